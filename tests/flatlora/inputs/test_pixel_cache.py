"""Cached pixels have the processor's bits, whatever happens to the cache, its folder and the images."""

import io
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

import run_exp
from data import images
from eval import command
from flatlora.config.sections import TrainerConfig
from flatlora.inputs import pixel_cache
from flatlora.inputs.images import ImageRows, LabeledImages, check_images
from flatlora.inputs.pixel_cache import PixelCache
from flatlora.inputs.pixels import normalized
from flatlora.train.training import loader_workers
from flatlora.utils import caches
from tests.conftest import run_folder, write_split
from tests.processes import in_a_child

SMALL = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


class OneStep(CLIPImageProcessorPil):
    """Rescales and normalizes in one step, as transformers' processors do with torchvision: other bits."""

    def rescale(self, image, scale, **more):
        return image

    def normalize(self, image, mean, std, **more):
        mean, std = (torch.tensor(value)[:, None, None] * 255 for value in (mean, std))
        return ((torch.from_numpy(image).float() - mean) / std).numpy()


PROCESSORS = {"papers": CLIPImageProcessorPil(), "small": CLIPImageProcessorPil(**SMALL), "one_step": OneStep(**SMALL)}


def file_of(mode, size, seed=0, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


KINDS = [file_of(mode, (20, 24)) for mode in ("RGB", "L", "P", "RGBA", "1", "LA")]
KINDS += [file_of("RGB", size) for size in ((3, 60), (60, 3), (1, 90), (300, 224), (16, 16))]
KINDS += [file_of("RGB", (31, 40), kind="JPEG"), file_of("CMYK", (31, 40), kind="JPEG")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "cache_folder", lambda: tmp_path)
    return tmp_path / "pixels"


def cached(files, processor=PROCESSORS["small"], **options):
    pictures, cache = LabeledImages("here", np.arange(len(files)), files.__getitem__), PixelCache(processor, **options)
    digests = check_images(pictures, range(len(files)), cache)
    return ImageRows(pictures, np.arange(len(files)), processor, digests, cache)


def pixels_of(rows):
    return [row["pixel_values"] for row in rows.__getitems__(range(len(rows)))]


# --- exactness


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors_to_the_bit(name):
    processor = PROCESSORS[name]
    rows = cached(KINDS, processor)
    plain = ImageRows(rows.images, rows.indices, processor, rows.digests)
    assert rows.cache.filled
    both = (each.__getitems__(range(len(KINDS))) for each in (rows, plain))
    for own, uncached, row, file in zip(*both, rows, KINDS, strict=True):
        expected = processor(Image.open(io.BytesIO(file)).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        if file is KINDS[8]:  # a strip, of which only the middle is read
            expected = plain[8]["pixel_values"]
        assert torch.equal(own["pixel_values"], uncached["pixel_values"])
        assert own["pixel_values"].dtype == torch.uint8
        assert torch.equal(normalized(own["pixel_values"], own["pixel_table"]), expected)
        assert torch.equal(row["pixel_values"], expected)


def test_threads_read_what_one_does(monkeypatch):
    rows = cached([file_of("RGB", (16, 16), seed) for seed in range(40)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    order += [7, 7, 3]  # also twice, and no whole part
    digests = [rows.digests[i] for i in order] + [bytes(40)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone, missing = rows.cache.read(digests)
    assert missing == [43]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(pixel_cache, "_PART", 5)
    shared, missing = rows.cache.read(digests)
    assert missing == [43]
    assert torch.equal(shared[:43], alone[:43])
    assert rows.cache.read([])[0].shape == (0, 3, 16, 16)


def test_the_order_of_operations_has_other_bits():
    picture = Image.open(io.BytesIO(KINDS[0]))
    one, other = (PROCESSORS[name](picture, return_tensors="pt")["pixel_values"] for name in ("small", "one_step"))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.equal(one, other)


def test_processes_write_the_same(folder, monkeypatch):
    whole = pixels_of(cached(KINDS))
    (kept,) = folder.iterdir()
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    shutil.rmtree(kept)
    monkeypatch.setattr(pixel_cache, "_FORK_FROM", 1)
    monkeypatch.setattr(pixel_cache, "_CHUNK", 4)
    state = torch.get_rng_state()
    again = pixels_of(cached(KINDS))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, again, whole))
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


# --- what a cache is of


def test_a_cache_is_of_its_images_in_any_order_and_of_the_processors_settings(folder):
    cached(KINDS[:3])
    cached([KINDS[2], *KINDS[:3]])
    assert len(list(folder.iterdir())) == 1
    cached(KINDS[:3], CLIPImageProcessorPil(**SMALL, resample=0))
    assert len(list(folder.iterdir())) == 2
    assert not cached(KINDS[:4], write=False).cache.filled
    assert len(list(folder.iterdir())) == 2


def test_other_decoders_have_another_cache(folder, monkeypatch):
    cached(KINDS[:2])
    monkeypatch.setattr(pixel_cache.features, "version", lambda name: "99")
    cached(KINDS[:2])
    assert len(list(folder.iterdir())) == 2


def test_an_image_that_changed_under_the_cache_is_noticed(tmp_path):
    """Also one of the same size and time."""
    listed = tmp_path / "ylecun/mnist/mnist"
    for split in ("train", "test"):
        write_split(tmp_path, "ylecun/mnist", "mnist", split, [{"image": f"{i}.png", "label": i} for i in range(2)])
    config = run_exp.experiment_of(["dataset=mnist", "model=clip_tiny"]).dataset
    hashes = set()
    for shade in (3, 4):
        for name in ("0.png", "1.png"):
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(listed / name)
            os.utime(listed / name, (1_700_000_000, 1_700_000_000))
        rows = images.prepared(config, str(tmp_path), PROCESSORS["small"], cache=True)
        assert rows.train.cache.filled
        assert pixels_of(rows.train)[1].unique().tolist() == [shade]
        hashes.add(rows.sha256)
    assert len(hashes) == 2


def test_a_broken_image_is_reported_as_without_the_cache(folder):
    files = [*KINDS, KINDS[0][:60]]
    with pytest.raises(images.ConfigError) as caught:
        cached(files)
    with pytest.raises(images.ConfigError) as plain:
        check_images(LabeledImages("here", np.arange(len(files)), files.__getitem__), range(len(files)))
    assert str(caught.value) == str(plain.value)
    assert list(folder.iterdir()) == []


# --- disks and processes


def test_a_disk_that_is_too_small_is_named_and_images_are_decoded(folder, monkeypatch, caplog, capsys):
    whole = pixels_of(cached(KINDS))
    assert "caching 13 images of here: 0 MiB in" in capsys.readouterr().err
    (kept,) = folder.iterdir()
    shutil.rmtree(kept)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda path: usage._replace(free=9000))
    rows = cached(KINDS)
    assert all(map(torch.equal, pixels_of(rows), whole))
    assert not rows.cache.filled
    (message,) = [record.message for record in caplog.records if record.name.startswith("flatlora")]
    assert message.startswith("Not caching the images of here: they need 0 MiB, and")
    assert message.endswith(
        "they are decoded in every epoch. Set FLATLORA_CACHE=DIR to a folder with enough space, or "
        "trainer.cache_images=off."
    )
    assert list(folder.iterdir()) == []


def test_what_a_killed_writer_left_is_not_used(folder, monkeypatch):
    plain, read = pixel_cache.decode_in_turn, []

    def die_at_the_third(*arguments):
        read.append(1)
        if len(read) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    monkeypatch.setattr(pixel_cache, "decode_in_turn", die_at_the_third)
    assert os.WTERMSIG(in_a_child(lambda: cached(KINDS))) == signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name.startswith(".")
    monkeypatch.setattr(pixel_cache, "decode_in_turn", plain)
    rows = cached(KINDS)
    assert all(map(torch.equal, pixels_of(rows), pixels_of(ImageRows(rows.images, rows.indices, rows.processor, []))))
    (kept,) = folder.iterdir()
    assert (kept / caches.MANIFEST).is_file()


@pytest.mark.parametrize("part", [16, 5])  # images that a thread reads
def test_damage_while_it_is_read_costs_one_warning_and_no_image(folder, caplog, monkeypatch, part):
    monkeypatch.setattr(pixel_cache, "_PART", part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rows = cached(KINDS)
    whole = pixels_of(rows)
    (kept,) = folder.iterdir()
    with open(kept / pixel_cache.PIXELS, "r+b") as file:
        for place in range(0, 13, 2):
            file.seek(place * 3 * 16 * 16 + 5)
            old = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([old[0] ^ 1]))
    for _ in range(2):
        assert all(map(torch.equal, pixels_of(rows), whole))
    (message,) = [record.message for record in caplog.records if record.name.startswith("flatlora")]
    assert "is not what was written" in message
    assert not kept.exists()
    assert cached(KINDS).cache.filled


# --- runs


def test_a_score_reads_the_cache_of_its_run_and_writes_none(tmp_path, folder, monkeypatch):
    words = ["model=clip_tiny", "dataset=digits", "dataset.train_rows=8", "dataset.test_rows=6", "trainer.device=cpu"]
    words += ["optim.batch_size=8", "trainer.micro_batch_size=8", "trainer.max_steps=1", "wandb.mode=disabled"]
    words += [f"results_root={tmp_path / 'results'}", "wandb.name=run"]
    assert run_exp.main(words) == 0
    run = run_folder(words)
    kept = sorted(folder.iterdir())
    assert len(kept) == 2
    monkeypatch.setattr("flatlora.inputs.images._decode", lambda picture: pytest.fail("decoded again"))
    assert command.main("images", [str(run), "device=cpu", f"out={run / 'again'}"]) == 0
    own = Path(run, "eval/images/predictions.jsonl").read_bytes()
    assert (run / "again/predictions.jsonl").read_bytes() == own
    assert sorted(folder.iterdir()) == kept


def test_workers_are_for_images_that_are_decoded(monkeypatch):
    machine, rows = TrainerConfig(name="auto"), cached(KINDS)
    plain = ImageRows(rows.images, rows.indices, rows.processor, rows.digests)
    assert plain.bytes_to_decode == 3 * 16 * 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    assert loader_workers(machine, rows) == 0
    assert loader_workers(machine, plain) == 12
    assert loader_workers(machine.model_copy(update={"num_workers": 3}), rows) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert loader_workers(machine, plain) == 4
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 8 * 3 * 16 * 16 * 2))
    assert loader_workers(machine, plain) == 2
