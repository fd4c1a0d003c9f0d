"""Every cache under every damage: made anew with a warning, refused by name, or unharmed; never something else."""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import CLIPImageProcessorPil

import run_exp
from data import cache
from flatlora.config.sections import DiffusionModelConfig, ModelConfig
from flatlora.inputs import images, pixel_cache
from flatlora.inputs.images import ImageRows, LabeledImages, check_images, parquet_table, png_of
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.text_to_image import TextToImageData, TextToImageRows
from flatlora.models import diffusion, latents, sources
from flatlora.models.random_weights import byte_tokenizer
from flatlora.utils import caches, files, staging
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split
from tests.processes import die, in_a_child, umask

SDXL = DiffusionModelConfig(name="sdxl", hub_id="flatlora/random-sdxl", family="text_to_image", embedded="random-sdxl")
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
CLIP = ModelConfig(name="clip", hub_id="flatlora/random-clip", family="clip", embedded="random-clip")


# --- what is kept, and how it is read: each gives all that a run would use of it


def rows(root):
    if not (root / "openai").exists():
        for split, count in (("train", 6), ("test", 2)):
            asked = [{"question": f"{split} {i}?", "answer": f"#### {i}"} for i in range(count)]
            write_split(root, "openai/gsm8k", "main", split, asked)
    words = ["dataset=gsm8k", "dataset.validation_rows=1", "dataset.test_rows=null"]
    found = cache.prepared(run_exp.experiment_of(words).dataset, str(root), byte_tokenizer())
    return found.sha256, found.test, found.train.cut, found.train.dropped


def latents_of(root):
    pictures = TextToImageData("here", ["p"], lambda index: b"")
    found = latents.encoded(
        TextToImageRows(pictures, [0], [b"0"], [(8, 8)]), SDXL, "source", torch.device("cpu"), state="", seed=0
    )
    return found[0]["latents"].tolist(), found[0]["prompt_embeds"].tolist()


def class_pictures(root):
    found = latents.class_pictures("a dog", 2, 1, 8, SDXL, "source", torch.device("cpu"), state="")
    return [found.read(index) for index in range(2)]


def decoded(root):
    made = [png_of(np.full((4, 4), shade, np.uint8)) for shade in range(3)]
    return check_images(LabeledImages("here", np.arange(3), made.__getitem__), range(3))


def pixels(root):
    made = [png_of(np.full((4, 4), shade, np.uint8)) for shade in range(3)]
    pictures, kept = LabeledImages("here", np.arange(3), made.__getitem__), PixelCache(PROCESSOR)
    digests = check_images(pictures, range(3), kept)
    assert kept.filled
    found = ImageRows(pictures, np.arange(3), PROCESSOR, digests, kept).__getitems__(range(3))
    return [row["pixel_values"].tolist() for row in found]


def parquet(root):
    path = root / "rows.parquet"
    if not path.exists():
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"one", b"two"], "label": [0, 1]}), path)
    return parquet_table(path, "a" * 64).to_list()


def weights(root):
    folder = Path(sources.backbone_source(CLIP))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


CACHES = {
    "data": rows,
    "latents": latents_of,
    "class_images": class_pictures,
    "decoded": decoded,
    "pixels": pixels,
    "images": parquet,
    "random-clip-1": weights,
}


def write_weights(folder):
    (folder / "part").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "part" / "model.safetensors").write_bytes(bytes(range(256)))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    for module in (cache, images, latents, pixel_cache):
        monkeypatch.setattr(module, "cache_folder", files.cache_folder)
    monkeypatch.setitem(sources.RANDOM, "random-clip", write_weights)
    monkeypatch.setattr(latents, "_key", lambda *args, **more: "k" * 40)
    names = ("mean", "std", "time_ids", "prompt_embeds", "pooled")
    encoded = {f"{name}.0": torch.arange(256.0).reshape(1, 4, 8, 8) for name in names}
    monkeypatch.setattr(latents, "_encode", lambda *args: encoded | {"timesteps": torch.tensor(1000)})
    for name in ("load_model", "pipeline_of"):
        monkeypatch.setattr(diffusion, name, lambda *args: None)
    monkeypatch.setattr(diffusion, "sample", lambda p, prompts, seeds, **more: [torch.full((3, 8, 8), seeds[0] / 2)])


# --- damages


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(bytes(content))


def nest(path):
    """The file in a folder of its own name."""
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / path.name).write_bytes(content)


def folder(path):
    path.unlink()
    path.mkdir()


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def link_in_a_circle(path):
    path.unlink()
    path.symlink_to(path.name)


def link_to_a_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def lose(path):
    path.unlink()


def mode(path):
    path.chmod(0)


DAMAGES = [truncate, empty, flip, nest, folder, link_to_nothing, link_in_a_circle, link_to_a_device, pipe, lose]
DAMAGES += [mode] if os.geteuid() == 0 else []  # others are refused by name: see below


def anew(caplog):
    return sum("it will be rebuilt" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", CACHES)
def test_every_damage_of_every_file_is_reported_and_repaired(name, tmp_path, caplog):
    read = CACHES[name]
    whole, counts = read(tmp_path), Counter()
    kept = sorted(path.relative_to(tmp_path) for path in (tmp_path / "cache" / name).rglob("*") if path.is_file())
    assert kept
    for path in kept:
        for damage in DAMAGES:
            damage(tmp_path / path)
            caplog.clear()
            assert read(tmp_path) == whole, (path, damage.__name__)
            counts["anew" if anew(caplog) else "unharmed"] += 1
            gone = damage is lose and name not in ("random-clip-1", "images", "pixels")  # as if it had never been made
            assert (anew(caplog) > 0) != (damage is mode or gone), (path, damage.__name__)
            caplog.clear()
            assert read(tmp_path) == whole
            assert not anew(caplog), "rebuilt twice"
    assert not list((tmp_path / "cache").rglob(".*")), "left half-written"
    assert counts.total() == len(kept) * len(DAMAGES)
    assert counts["anew"] >= len(kept) * (len(DAMAGES) - 2)


def nest_folder(path):
    path.rename(path.with_name("x"))
    path.mkdir()
    path.with_name("x").rename(path / path.name)


def file_instead(path):
    shutil.rmtree(path)
    path.write_text("")


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def one_more_file(path):
    (path / "adapter_config.json").write_text("{}")  # from_pretrained would put that adapter on the model


def of_another_name(path):
    shutil.copytree(path, path.with_name("other"))
    shutil.rmtree(path)
    other = caches.kept_folder(path.with_name("other-1"), lambda fresh: (fresh / "config.json").write_text("[]"))
    other.rename(path)


def of_an_earlier_version(path):
    (path / caches.MANIFEST).unlink()


def of_200_gb(path):
    os.truncate(path / caches.MANIFEST, 200 << 30)


FOLDER_DAMAGES = (of_200_gb, nest_folder, file_instead, emptied, one_more_file, of_another_name, of_an_earlier_version)


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_every_damage_of_a_folder_is_reported_and_repaired(damage, tmp_path, caplog):
    whole = weights(tmp_path)
    damage(tmp_path / "cache/random-clip-1")
    assert weights(tmp_path) == whole
    assert anew(caplog) == 1


def test_a_file_under_anothers_name_is_not_taken(tmp_path, caplog):
    one, other = (caches.keep(tmp_path, name, ".json", b"{}") for name in ("one", "other"))
    taken = other.with_name(other.name.replace("other", "one"))
    one.unlink()
    other.rename(taken)
    assert caches.find(tmp_path, "one", ".json") is None
    assert anew(caplog) == 1


def test_a_folder_is_read_once_a_process(tmp_path, monkeypatch):
    weights(tmp_path)
    monkeypatch.setattr(caches, "file_sha256", lambda path: pytest.fail("read again"))
    weights(tmp_path)


def test_a_maker_that_comes_second_takes_what_the_first_one_made(tmp_path):
    path = tmp_path / "kept"

    def make(fresh):
        if not path.exists():
            caches.kept_folder(path, lambda inner: (inner / "a").write_text("first"))
        (fresh / "a").write_text("second")

    assert (caches.kept_folder(path, make) / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["kept"]


# --- leftovers


def test_what_dead_makers_left_is_swept_and_what_living_ones_make_is_not(tmp_path):
    path = tmp_path / "kept"
    assert os.WTERMSIG(in_a_child(lambda: caches.kept_folder(path, die))) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with staging.staging(tmp_path / "other", folder=True) as living:
        caches.kept_folder(path, lambda fresh: (fresh / "a").write_text("a"))
        assert not left.exists()
        assert living.is_dir()
    assert os.listdir(tmp_path) == ["kept"]


# --- modes and other users


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    with umask(mask):
        for read in CACHES.values():
            read(tmp_path)
    found = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "cache").rglob("*")}
    assert found == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}


@pytest.fixture
def shared(monkeypatch):
    """A folder that other users may enter: those of pytest are closed to them."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        monkeypatch.setenv("FLATLORA_CACHE", f"{root}/cache")
        yield Path(root)


@contextlib.contextmanager
def nobody():
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_another_users_closed_cache_is_named_as_that(shared, caplog):
    with umask(0o022):
        whole, kept = weights(shared), rows(shared)
    with nobody():
        caches._verified.clear()
        assert weights(shared) == whole
        assert rows(shared) == kept
    assert caplog.text == ""
    target = shared / "cache/random-clip-1"
    for closed in (target, target / "part/model.safetensors"):
        before = closed.stat().st_mode & 0o777
        closed.chmod(0o700)
        with nobody(), pytest.raises(ConfigError) as caught:
            weights(shared)
        (message,) = caught.value.errors
        assert message.startswith(
            f"Cannot read the converted weights of random-clip in the cache folder {shared}/cache"
        )
        assert f"{closed} belongs to user 0" in message
        assert f"chmod -R a+rX {shared}/cache" in message
        closed.chmod(before)
    (file,) = (shared / "cache/data").iterdir()
    file.chmod(0o600)
    with nobody():
        assert rows(shared) == kept
    assert "Permission denied" in caplog.text
    assert "cannot be written" in caplog.text


def test_a_cache_that_takes_no_files_is_a_warning_for_what_fits_in_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("")
    for read in (rows, latents_of, class_pictures, decoded):
        caplog.clear()
        read(tmp_path)
        assert "cannot be written" in caplog.text
    for read in (weights, parquet):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path)
        assert "set FLATLORA_CACHE=DIR" in str(caught.value)


def leave(folder, name):
    """What a maker that was killed leaves, and what one that lives is at, which it locks."""
    (folder / f".{name}-0123abcd").mkdir()
    (folder / f".{name}-0123abcd" / "model.safetensors").write_bytes(b"half")
    (folder / f".{name}-4567cdef").touch()
    living = os.open(folder / f".{name}-4567cdef", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    return living


def test_what_dead_makers_left_is_swept_when_a_cache_is_opened(tmp_path):
    path = caches.kept_folder(tmp_path / "weights-1", lambda fresh: (fresh / "config.json").write_text("{}"))
    living = leave(tmp_path, "weights-2")
    caches._verified.clear()  # as in a process of its own
    assert caches.kept_folder(path, lambda fresh: pytest.fail("it is there, and whole")) == path
    assert sorted(one.name for one in tmp_path.iterdir()) == [".weights-2-4567cdef", "weights-1"]
    os.close(living)
    caches.keep(tmp_path, "rows", ".json", b"{}")
    os.close(leave(tmp_path, "rows"))
    assert caches.find(tmp_path, "rows", ".json") is not None
    assert not list(tmp_path.glob(".*"))
