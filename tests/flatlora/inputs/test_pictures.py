"""Pictures of folders that nobody vouches for: kind, place, format and size are asked before a pixel is decoded."""

import io
import json
import os
import resource
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from flatlora.inputs import images
from flatlora.inputs.images import ImageRows, LabeledImages, check_images, middle_of, png_of, read_images
from flatlora.inputs.rows import Source
from flatlora.inputs.text_to_image import TextToImageData, cover, read_folder, read_text_to_image, rows_of
from flatlora.utils.errors import ConfigError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n"


def png_head(width, height):
    """A PNG of one bit a pixel, all black: a thousandth of its pixels in bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(9), b"\0" * (1 + (width + 7) // 8)
    lines = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb():
    return png_head(13_000, 13_000)


def hostile(folder, bomb):
    """{name: why it is refused}, each of them in `folder` or led to from there."""
    good = png_of(np.full((64, 64, 3), 7, np.uint8))
    (folder / "good.png").write_bytes(good)
    (folder.parent / "private.png").write_bytes(good)
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "link.png").symlink_to("../private.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "eps.png").write_bytes(EPS)
    (folder / "bomb.png").write_bytes(bomb)
    (folder / "folder.png").mkdir()
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(1 << 35)
    return {
        "pipe.png": "it is a pipe, not a file",
        "endless.png": "it is outside",
        "link.png": "it is outside",
        "circle.png": "Too many levels of symbolic links",
        "eps.png": "it is not an image of a known format (PNG, JPEG,",
        "bomb.png": "it has 13000 × 13000 pixels, 169 million, and at most 160 are decoded",
        "folder.png": "it names a folder, not a file",
        "sparse.png": "it has 32,768 MiB, and at most 256 are read",
    }


NAMED = {
    "../private.png": "it is outside",
    "/dev/zero": "it is outside",
    "gone.png": "there is no such file",
    "a\0b.png": "null",
}


def error_of(function, *arguments, **more):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **more)
    return "\n".join(caught.value.errors)


@pytest.fixture
def given(tmp_path):
    folder = tmp_path / "root" / "me" / "set" / "default"
    folder.mkdir(parents=True)
    return folder


SOURCE = Source("me/set", "default", "train")


@pytest.mark.parametrize("kind", ["labeled", "listed", "folder", "parquet", "text-to-image parquet"])
def test_hostile_images_are_named_before_they_are_decoded(given, tmp_path, bomb, kind):
    wanted = hostile(given, bomb)
    if kind != "folder":
        wanted |= NAMED
    columns = {"image": "image", "data_root": str(tmp_path / "root")}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, reason in wanted.items():
        if kind == "labeled":
            (given / "train.jsonl").write_text(json.dumps({"image": name, "label": 0}))
            reported = error_of(check_images, read_images(SOURCE, label="label", **columns), [0])
        elif kind == "listed":
            (given / "metadata.jsonl").write_text(json.dumps({"file_name": name, "prompt": "p"}))
            reported = error_of(rows_of, read_folder(str(given), None), [0], resolution=32)
        elif kind == "folder":
            pictures = read_folder(str(given), "p")
            reported = error_of(rows_of, pictures, [pictures.names.index(name)], resolution=32)
        else:
            cell = pyarrow.array([{"bytes": None, "path": name}], pyarrow.struct({"bytes": "binary", "path": "string"}))
            pyarrow.parquet.write_table(pyarrow.table({"image": cell, "label": [0]}), given / "train.parquet")
            if kind == "parquet":
                reported = error_of(check_images, read_images(SOURCE, label="label", **columns), [0])
            else:
                pictures = read_text_to_image(
                    SOURCE, image="image", prompt=None, fixed="p", data_root=columns["data_root"]
                )
                reported = error_of(rows_of, pictures, [0], resolution=32)
        assert reason in reported, (name, reported)
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_images_that_the_hubs_rows_name_lie_in_its_caches(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/a.png").write_bytes(png_of(np.zeros((4, 4), np.uint8)))
    (tmp_path / "private.png").write_bytes(b"private")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("hub/a.png", "private.png")]
    read = images.bytes_of(datasets.Dataset.from_dict({"image": cells}), "image", None)
    assert read(0).startswith(b"\x89PNG")
    with pytest.raises(OSError, match="is outside"):
        read(1)


def test_large_images_are_tried_one_at_a_time(monkeypatch):
    at_once, most, plain = [], [], images._decode

    def decode(picture):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        try:
            return plain(picture)
        finally:
            at_once.pop()

    monkeypatch.setattr(images, "_decode", decode)
    files = [png_of(np.full((8, 8), shade, np.uint8)) for shade in range(16)]
    pictures = LabeledImages("here", np.zeros(16, np.int64), files.__getitem__)
    check_images(pictures, range(8))
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(images, "_LARGE_PIXELS", 63)
    check_images(pictures, range(8, 16))
    assert max(most) == 1


def strip(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def test_a_strip_is_cut_before_it_is_scaled(monkeypatch):
    monkeypatch.setattr("flatlora.inputs.text_to_image._MOST_SCALED", 10**9)
    pictures = [strip(3, 900), strip(700, 2), strip(40, 30)]
    sizes = [(16, 16), (24, 16), (32, 32)]
    whole = [cover(picture, size) for picture, size in zip(pictures, sizes, strict=True)]
    monkeypatch.undo()
    for (one, *place), picture, size in zip(whole, pictures, sizes, strict=True):
        other, *same = cover(picture, size)
        assert place == same
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int)).max()
        assert difference <= (1 if picture.size != (40, 30) else 0)
    cut, top, left = cover(strip(1, 60_000), (512, 512))
    assert (cut.size, top, left) == ((512, 512), 15_359_744, 0)


def test_the_longest_strips_are_rows_in_bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    buffer = io.BytesIO()
    strip(1, 60_000).save(buffer, "PNG")
    rows = rows_of(TextToImageData("here", ["p"], lambda index: buffer.getvalue()), [0], resolution=512)
    assert rows.view(0).pixels.shape == (3, 512, 512)
    assert rows.view(0, flipped=True).time_ids.tolist() == [60_000, 1, 15_359_744, 0, 512, 512]
    seen = []

    def processor(picture, return_tensors):
        seen.append(picture.size)
        return {"pixel_values": torch.zeros(1, 3, 2, 2)}

    pictures = LabeledImages("here", np.zeros(1, np.int64), lambda index: buffer.getvalue())
    ImageRows(pictures, np.array([0]), processor, [b""])[0]
    assert seen == [(1, 32)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_clip_sees_the_same_of_a_strips_middle():
    from transformers import CLIPImageProcessor

    cls = getattr(__import__("transformers"), "CLIPImageProcessorPil", CLIPImageProcessor)
    processor = cls(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    picture = strip(4, 400)
    whole, cut = (processor(one, return_tensors="pt")["pixel_values"] for one in (picture, middle_of(picture)))
    assert middle_of(picture).size == (4, 128)
    assert torch.allclose(whole, cut, atol=0.03)
    assert middle_of(strip(4, 128)).size == (4, 128)


def wide_grey(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return LabeledImages("here", np.zeros(1, np.int64), lambda index: buffer.getvalue())


@pytest.mark.parametrize("shape", [(256, 256), (65536, 1), (1, 65536)])
@pytest.mark.parametrize("pixels_at_once", [1, 100, 1000, 1 << 20])
def test_every_gray_of_16_bits_is_rounded_to_8(shape, pixels_at_once, monkeypatch):
    if pixels_at_once == 1:
        shape = (16, 16)
    monkeypatch.setattr(images, "_STRIP_PIXELS", pixels_at_once)
    greys = np.linspace(0, 65535, shape[0] * shape[1]).astype(np.uint16).reshape(shape)
    found = np.asarray(images.decoded(wide_grey(greys), 0))
    assert (found == (greys.astype(np.int64) / 257).round().astype(np.uint8)).all()


def test_a_large_gray_of_16_bits_takes_no_more_memory_than_its_pixels():
    pictures = wide_grey(np.zeros((3000, 4000), np.uint16))
    tracemalloc.start()  # which counts NumPy's arrays, and not PIL's own 2 + 1 bytes a pixel
    try:
        assert images.decoded(pictures, 0).size == (4000, 3000)
        assert tracemalloc.get_traced_memory()[1] < 2 * 3000 * 4000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (os.mkfifo, "it is a pipe, not a file"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_a_metadata_file_that_is_invalid_is_named(make, reason, tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(np.zeros((8, 8), np.uint8)))
    make(tmp_path / "metadata.jsonl")
    assert error_of(read_folder, str(tmp_path), "a prompt").startswith(
        f"Cannot read {tmp_path}/metadata.jsonl: {reason}; make it a readable file"
    )


def test_a_prompt_of_megabytes_is_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(np.zeros((8, 8), np.uint8)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": "dog " * 2_500_000}))
    reported = error_of(read_folder, str(tmp_path), None)
    assert "row 1: it has 10,000,000 letters, and a prompt has at most 10,000" in reported
    assert len(reported) < 500


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "AVIF"])
def test_flipped_bytes_break_an_image_and_nothing_else(kind):
    buffer, draw = io.BytesIO(), np.random.default_rng(1)
    if kind not in images._known_formats():
        pytest.skip(f"this PIL has no {kind}")
    strip(24, 20).save(buffer, kind)
    files = []
    for _ in range(200):
        damaged = bytearray(buffer.getvalue())
        for place in draw.integers(0, min(len(damaged), 400), 3):
            damaged[place] ^= 1 << int(draw.integers(8))
        files.append(bytes(damaged))
    pictures = LabeledImages("here", np.zeros(len(files), np.int64), files.__getitem__)
    assert "Broken image in here, row " in error_of(check_images, pictures, range(len(files)))
