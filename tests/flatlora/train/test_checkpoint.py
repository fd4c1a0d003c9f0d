"""Checkpoints count whole or not at all; hashes see every bit of the backbone and nothing of the adapter's wrapping."""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora.models import hashes
from flatlora.models.hashes import TENSOR_HASH, backbone_sha256, trainable_sha256, weights_sha256
from flatlora.runs.record import RunRecord
from flatlora.train.checkpoint import MANIFEST, checkpoints, error_of, latest_good, remove_newer, rotate, write_manifest
from flatlora.utils import staging
from flatlora.utils.errors import ConfigError

CONFIG, DATA = "0" * 64, "d" * 64  # hashes of the experiment and the rows that make the checkpoints


def make(run, step, *, whole=True):
    folder = run / f"checkpoint-{step}"
    (folder / "nested").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "nested" / "state.json").write_text(f'{{"step": {step}}}')
    (folder / "empty").touch()
    if whole:
        write_manifest(folder, step=step, config_sha256=CONFIG, data_sha256=DATA)
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def as_link(path, target):
    staging.remove(path)
    path.symlink_to(target)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


BREAKAGES = {
    "a flipped bit": (lambda folder: flip_a_bit(folder / "adapter.bin"), "adapter.bin is not what was written"),
    "a cut file": (lambda folder: os.truncate(folder / "adapter.bin", 99), "adapter.bin is not what was written"),
    "an emptied file": (lambda folder: os.truncate(folder / "nested/state.json", 0), "nested/state.json is not what"),
    "a missing file": (lambda folder: (folder / "nested/state.json").unlink(), "nested/state.json is missing"),
    "a missing folder": (lambda folder: shutil.rmtree(folder / "nested"), "nested/state.json is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "a torn manifest": (lambda folder: os.truncate(folder / MANIFEST, 50), f"{MANIFEST} is broken"),
    "an empty manifest": (lambda folder: os.truncate(folder / MANIFEST, 0), f"{MANIFEST} is broken"),
    "a binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), f"{MANIFEST} is broken"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_text('{"files": []}'), f"{MANIFEST} is broken"),
    "a nested manifest": (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), f"{MANIFEST} is broken"),
    "another step": (lambda folder: replace(folder / MANIFEST, '"step": 10', '"step": 11'), f"{MANIFEST} is broken"),
    "other data": (lambda folder: replace(folder / MANIFEST, DATA, "e" * 64), f"{MANIFEST} is broken"),
    "a folder": (lambda folder: as_folder(folder / "adapter.bin"), "adapter.bin cannot be read (Is a directory)"),
    "a manifest that is a folder": (lambda folder: as_folder(folder / MANIFEST), f"{MANIFEST} is broken"),
    "a loop": (lambda folder: as_loop(folder / "adapter.bin"), "adapter.bin cannot be read (Too many levels"),
    "a pipe": (lambda folder: as_pipe(folder / "adapter.bin"), "adapter.bin cannot be read (it is a pipe, not a file)"),
    "a file that cannot be read": (  # it opens, and read(2) fails, with an error that names no file
        lambda folder: as_link(folder / "adapter.bin", "/proc/self/mem"),
        "adapter.bin cannot be read (Input/output error)",
    ),
    "a folder in a circle": (lambda folder: as_link(folder, folder.name), "it cannot be read (Too many levels"),
    "a link to nothing": (lambda folder: as_link(folder, "gone"), "it cannot be read (No such file"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[1]"), f"{MANIFEST} is broken"),
}


def test_a_sealed_checkpoint_is_good_wherever_it_is_moved(tmp_path):
    folder = make(tmp_path, 3)
    assert error_of(folder) is None
    (folder / "later.txt").write_text("a file more breaks nothing")
    folder.rename(tmp_path / "moved")
    assert error_of(tmp_path / "moved") is None


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_checkpoint_is_named_removed_and_passed_over(tmp_path, caplog, name):
    breakage, message = BREAKAGES[name]
    good, broken = make(tmp_path, 2), make(tmp_path, 10)
    breakage(broken)
    assert error_of(broken).startswith(message)
    with caplog.at_level(logging.WARNING):
        assert latest_good(tmp_path, CONFIG, DATA) == good
    assert f"Ignoring {broken}: {message}" in caplog.text
    assert os.path.lexists(broken)  # looking changes nothing
    remove_newer(tmp_path, good)
    assert checkpoints(tmp_path) == [good]


@pytest.mark.skipif(os.getuid() != 0, reason="root alone becomes another user")
def test_a_link_into_a_folder_that_is_closed_to_the_user_is_named_and_passed_over(caplog):
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    try:
        make(folder / "closed", 4)
        (folder / "run").mkdir()
        (folder / "run" / "checkpoint-4").symlink_to(folder / "closed" / "checkpoint-4")
        folder.chmod(0o755)
        (folder / "closed").chmod(0o700)
        (folder / "run").chmod(0o777)
        os.seteuid(65534)
        try:
            assert latest_good(folder / "run", CONFIG, DATA) is None
            remove_newer(folder / "run", None)
        finally:
            os.seteuid(0)
        assert f"Ignoring {folder}/run/checkpoint-4: it cannot be read (Permission denied)." in caplog.text
        assert list((folder / "run").iterdir()) == []
        assert error_of(folder / "closed" / "checkpoint-4") is None
    finally:
        shutil.rmtree(folder)


def test_steps_are_ordered_as_numbers_and_other_names_left_alone(tmp_path):
    for step in (10, 9, 100):
        make(tmp_path, step)
    for name in ("checkpoint-100-mine", "checkpoint-best", "checkpoint-²", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert latest_good(tmp_path, CONFIG, DATA).name == "checkpoint-100"
    assert (tmp_path / "checkpoint-100-mine").is_dir()


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert latest_good(tmp_path, CONFIG, DATA) is None
    make(tmp_path, 1, whole=False)
    make(tmp_path, 2, whole=False)
    assert latest_good(tmp_path, CONFIG, DATA) is None
    remove_newer(tmp_path, None)
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("config", "data", "what"), [("1" * 64, DATA, "another experiment"), (CONFIG, "1" * 64, "other training data")]
)
def test_a_checkpoint_of_another_origin_is_refused_and_kept(tmp_path, config, data, what):
    folder = make(tmp_path, 3)
    with pytest.raises(ConfigError, match=re.escape(f"{folder} is a checkpoint of {what}")):
        latest_good(tmp_path, config, data)
    assert error_of(folder) is None


def test_a_checkpoint_of_more_processes_is_refused_if_the_run_is_tied_to_their_number(tmp_path):
    folder = make(tmp_path, 3)
    assert latest_good(tmp_path, CONFIG, DATA, world_size=2) == folder
    refused = re.escape(
        f"{folder} was written by 1 processes and there are 2 now, but it rains; start as many as before"
    )
    with pytest.raises(ConfigError, match=refused):
        latest_good(tmp_path, CONFIG, DATA, world_size=2, tied="it rains")
    assert latest_good(tmp_path, CONFIG, DATA, tied="it rains") == folder


@pytest.mark.parametrize(("before", "now"), [(2, 2), (2, 0), (0, 2)])
def test_a_checkpoint_of_zero_is_refused_on_another_number_of_processes(tmp_path, before, now):
    folder = make(tmp_path, 3)
    write_manifest(folder, step=3, config_sha256=CONFIG, data_sha256=DATA, world_size=2, zero=before)
    with pytest.raises(ConfigError) as caught:
        latest_good(tmp_path, CONFIG, DATA, world_size=4, zero=now)
    assert "was written by 2 processes and there are 4 now, but each process of ZeRO keeps" in caught.value.errors[0]
    assert len(caught.value.errors) == 1 + (before != now)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, caplog):
    folder = make(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        assert latest_good(tmp_path, CONFIG, DATA, base="sha256:b") == folder  # of a version that did not write it
    assert f"{folder} does not say which backbone it was trained on" in caplog.text
    write_manifest(folder, step=3, config_sha256=CONFIG, data_sha256=DATA, base="sha256:a")
    assert latest_good(tmp_path, CONFIG, DATA, base="sha256:a") == folder
    with pytest.raises(ConfigError, match=r"was trained on other weights of the backbone \(sha256:a, here sha256:b\)"):
        latest_good(tmp_path, CONFIG, DATA, base="sha256:b")
    assert error_of(folder) is None
    assert latest_good(tmp_path, CONFIG, DATA, base="sha256:a/config:c") == folder  # of a version without settings
    write_manifest(folder, step=3, config_sha256=CONFIG, data_sha256=DATA, base="sha256:a/config:c")
    assert latest_good(tmp_path, CONFIG, DATA, base="sha256:a/config:c") == folder
    with pytest.raises(ConfigError, match=r"other settings of the backbone \(.*c, here .*d\): put the config.json of"):
        latest_good(tmp_path, CONFIG, DATA, base="sha256:a/config:d")


def test_of_a_checkpoint_that_is_a_link_the_link_alone_is_removed(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make(elsewhere, 2).rename(elsewhere / "kept")
    make(run, 4)
    (run / "checkpoint-2").symlink_to(elsewhere / "kept")
    rotate(run, 1)
    assert [path.name for path in run.iterdir()] == ["checkpoint-4"]
    assert error_of(elsewhere / "kept") is None


def test_rotate_keeps_the_newest(tmp_path):
    for step in (5, 50, 9, 100):
        make(tmp_path, step)
    (tmp_path / "checkpoint-5-mine").mkdir()
    rotate(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-50", "checkpoint-100"]
    rotate(tmp_path, 9)
    assert len(checkpoints(tmp_path)) == 2
    assert (tmp_path / "checkpoint-5-mine").is_dir()


def test_a_rotation_that_dies_half_way_leaves_nothing_that_counts(tmp_path, monkeypatch):
    folders = [make(tmp_path, step) for step in (1, 2)]

    def die(folder, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert error_of(folders[0]) == f"{MANIFEST} is missing"
    assert error_of(folders[1]) is None


def test_sealing_again_takes_new_content(tmp_path):
    folder = make(tmp_path, 3)
    flip_a_bit(folder / "adapter.bin")
    write_manifest(folder, step=3, config_sha256=CONFIG, data_sha256=DATA)
    assert error_of(folder) is None


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.proj = nn.Linear(6, 4, dtype=dtype)
        self.out = nn.Linear(4, 3, bias=False, dtype=dtype)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        self.requires_grad_(False)

    def forward(self, x):
        return self.out(self.proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bit", [0, 7, 15])
def test_one_flipped_bit_changes_the_hash(dtype, bit):
    model = Net(dtype)
    before = backbone_sha256(model)
    bits = model.out.weight.data.view(torch.int16)
    bits[1, 2] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
    changed = backbone_sha256(model)
    bits[1, 2] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
    assert changed != before
    assert backbone_sha256(model) == before


@pytest.mark.parametrize("threads", [1, 3])
def test_the_hash_is_that_of_its_definition_and_of_earlier_versions(monkeypatch, threads):
    monkeypatch.setattr(hashes, "_threads", lambda: threads)
    monkeypatch.setattr(hashes, "_PIECE", 16)  # bytes: tensors are read in several pieces
    model = Net(torch.bfloat16)
    tensors = {name: p.view(torch.uint8).numpy().tobytes() for name, p in sorted(model.named_parameters())}
    heads = {name: f"{name}|torch.bfloat16|{tuple(p.shape)}|".encode() for name, p in model.named_parameters()}
    lines = [heads[name] + hashlib.sha256(data).hexdigest().encode() + b"|" for name, data in tensors.items()]
    assert TENSOR_HASH == "tensors"
    assert backbone_sha256(model) == hashlib.sha256(b"".join(lines)).hexdigest()
    stream = b"".join(heads[name] + data for name, data in tensors.items())
    assert backbone_sha256(model, "stream") == hashlib.sha256(stream).hexdigest()
    assert RunRecord(status="finished").tensor_hash == "stream"  # of a record that does not say


def test_the_hash_of_files_is_that_of_their_hashes(tmp_path):
    for name in ("b.safetensors", "a.bin", "c.safetensors"):
        (tmp_path / name).write_bytes(name.encode() * 999)
    each = [f"{path.name}|{hashlib.sha256(path.read_bytes()).hexdigest()}|" for path in sorted(tmp_path.iterdir())]
    assert weights_sha256(tmp_path) == hashlib.sha256("".join(each).encode()).hexdigest()


def test_equal_values_of_other_bytes_dtype_shape_or_name_hash_apart():
    def linear(weight, name="a"):
        model = nn.ParameterDict({name: nn.Parameter(weight, requires_grad=False)})
        return backbone_sha256(model)

    zeros = torch.zeros(2, 6)
    variants = [
        linear(zeros),
        linear(-zeros),
        linear(zeros.bfloat16()),
        linear(zeros.half()),  # the same bytes as bfloat16 zeros
        linear(zeros.view(3, 4)),
        linear(zeros, "b"),
        linear(zeros[:, :5]),
    ]
    assert len(set(variants)) == len(variants)


def test_layout_and_order_of_definition_do_not_matter():
    weight = torch.randn(5, 3)
    one = nn.ParameterDict({"a": nn.Parameter(weight), "b": nn.Parameter(torch.tensor(2.0))})
    other = nn.ParameterDict({"b": nn.Parameter(torch.tensor(2.0)), "a": nn.Parameter(weight.t().contiguous().t())})
    assert not other["a"].is_contiguous()
    for model in (one, other):
        model.requires_grad_(False)
    assert backbone_sha256(one) == backbone_sha256(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapping_by_peft_and_ddp_leaves_the_backbones_hash(dtype):
    plain = backbone_sha256(Net(dtype))
    empty = trainable_sha256(Net(dtype))
    assert backbone_sha256(Net(dtype).requires_grad_(True)) is None  # nothing is frozen
    wrapped = get_peft_model(Net(dtype), LoraConfig(r=2, target_modules=["proj"]))
    outer = nn.Module()
    outer.module = wrapped
    assert backbone_sha256(wrapped) == plain
    assert backbone_sha256(outer) == plain
    assert trainable_sha256(outer) == trainable_sha256(wrapped) != empty
    before = trainable_sha256(wrapped)
    with torch.no_grad():
        wrapped.base_model.model.proj.lora_B["default"].weight[0, 0] = 1e-30
    assert trainable_sha256(wrapped) != before
    assert backbone_sha256(wrapped) == plain
    with torch.no_grad():
        wrapped.base_model.model.proj.base_layer.weight[0, 0] += 1
    assert backbone_sha256(wrapped) != plain
