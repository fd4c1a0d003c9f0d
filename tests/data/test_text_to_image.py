"""Pictures with prompts: where they are read from, how they are cut, and what is refused before a model is loaded."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import run_exp
from data import text_to_image
from data.__main__ import main as show
from flatlora.inputs.rows import Source
from flatlora.inputs.text_to_image import (
    TextToImageData,
    bucket_sizes,
    cover,
    identities,
    picture_of,
    read_text_to_image,
    rows_of,
    rows_of_run,
    shape_of,
)
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split

SOURCE = Source("linoyts/3d_icon", "default", "train")


def picture(number, size=(80, 60)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder_of(root, sizes=((80, 60), (60, 80), (64, 64)), metadata=None):
    root.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        picture(number, size).save(root / f"{number}.png")
    if metadata is not None:
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metadata))
    return root


def dataset(*words):
    return run_exp.experiment_of(["model=sdxl_tiny", "dataset=pictures", "dataset.min_side=16", *words]).dataset


def prepared(root, *words):
    return text_to_image.prepared(dataset(f"dataset.folder={root}", "dataset.resolution=32", *words), None)


def errors(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return caught.value.errors


def test_a_folder_gives_its_images_in_order(tmp_path):
    rows = prepared(folder_of(tmp_path / "own"), "dataset.prompt=a sks dog")
    assert len(rows.train) == len(rows.test) == 3
    assert {rows.train.prompt(row) for row in range(3)} == {"a sks dog"}
    view = rows.train.view(0)
    assert view.pixels.shape == (3, 32, 32)
    assert -1 <= view.pixels.min() < view.pixels.max() <= 1
    height, width, top, left, *target = view.time_ids.tolist()
    assert (height, width, top, target) == (60, 80, 0, [32, 32])
    assert left == (round(80 * 32 / 60) - 32) // 2


def test_each_image_may_have_a_prompt_of_its_own(tmp_path):
    rows = [{"file_name": f"{n}.png", "prompt": f"number {n}"} for n in (2, 0)]
    found = prepared(folder_of(tmp_path / "own", metadata=rows))
    assert [found.train.prompt(row) for row in range(2)] == ["number 2", "number 0"]
    named = [{"file_name": "1.png", "text": "as datasets has it"}, {"file_name": "0.png", "prompt": "p", "text": "t"}]
    found = prepared(folder_of(tmp_path / "text", metadata=named))
    assert [found.train.prompt(row) for row in range(2)] == ["as datasets has it", "p"]
    lost = folder_of(tmp_path / "lost", metadata=[{"file_name": "9.png", "prompt": "p"}])
    assert "row 1 (9.png): there is no such file" in errors(lambda: prepared(lost))[0]
    lost = folder_of(tmp_path / "none", metadata=[{"file_name": "", "prompt": "p"}])
    assert "it names a folder, not a file" in errors(lambda: prepared(lost))[0]


def test_the_hubs_columns_from_a_data_root(tmp_path):
    folder_of(tmp_path / SOURCE.hub_id / "default")
    write_split(tmp_path, *SOURCE[:3], [{"image": f"{n}.png", "prompt": f"an icon {n}"} for n in range(3)])
    found = read_text_to_image(SOURCE, image="image", prompt="prompt", fixed=None, data_root=str(tmp_path))
    assert found.prompts == ["an icon 0", "an icon 1", "an icon 2"]
    assert picture_of(found, 1).size == (60, 80)
    fixed = read_text_to_image(SOURCE, image="image", prompt="prompt", fixed="one for all", data_root=str(tmp_path))
    assert set(fixed.prompts) == {"one for all"}


def test_parquet_from_a_data_root(tmp_path):
    import datasets

    folder_of(tmp_path / "pictures")
    images = [{"bytes": (tmp_path / "pictures" / f"{n}.png").read_bytes(), "path": f"{n}.png"} for n in range(3)]
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    path = tmp_path / SOURCE.hub_id / "default" / "train.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": images, "prompt": ["a", "b", "c"]}, features=features).to_parquet(str(path))
    found = read_text_to_image(SOURCE, image="image", prompt="prompt", fixed=None, data_root=str(tmp_path))
    assert found.prompts == ["a", "b", "c"]
    assert picture_of(found, 0).size == (80, 60)
    reported = errors(
        lambda: read_text_to_image(SOURCE, image="image", prompt="caption", fixed=None, data_root=str(tmp_path))
    )
    assert "Missing column caption" in reported[0]


def test_an_image_stands_upright_as_its_camera_says(tmp_path):
    root = folder_of(tmp_path / "own", sizes=())
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture(0, (80, 60)).save(root / "0.jpg", exif=turned)
    assert prepared(root, "dataset.prompt=p").train.view(0).time_ids[:2].tolist() == [80, 60]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "I;16", "RGBA"])
def test_size_and_turn_of_a_file_are_those_of_its_image(kind, mode):
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    try:
        Image.new(mode, (120, 80)).save(buffer, kind, exif=turned)
    except (OSError, ValueError):
        pytest.skip(f"{kind} holds no {mode}")
    images = TextToImageData("one", ["p"], lambda index: buffer.getvalue())
    upright = picture_of(images, 0)
    assert shape_of(images, 0) == upright.size == (80, 120)
    assert upright.getpixel((40, 60)) == ((255, 255, 255) if mode == "RGBA" else (0, 0, 0))  # transparent is white


@pytest.mark.parametrize(
    "exif",
    [
        b"junkjunkjunk",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0",  # a turn in letters, cut off
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x3b\x01\x05\0\x01\0\0\0\x26\0\0\0"
        b"\0\0\0\0\x01\0\0\0\x02\0\0\0",  # turned, by an artist who is a fraction
    ],
    ids=["no tags", "letters", "a fraction"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_tags_of_a_camera_break_no_image(exif, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (120, 80)).save(buffer, kind, exif=exif)
    images = TextToImageData("one", ["p"] * 2, lambda index: buffer.getvalue())
    rows = rows_of(images, [0, 1], resolution=32)
    assert len(rows.sizes) == len(rows) == 2
    assert shape_of(images, 0) == picture_of(images, 0).size
    assert rows.view(0).pixels.shape == (3, 32, 32)


def test_images_that_no_row_names_are_reported(tmp_path, caplog):
    root = folder_of(tmp_path / "own", metadata=[{"file_name": "0.png", "prompt": "a"}])
    assert len(prepared(root).train) == 1
    assert "2 images are not named in" in caplog.text


def test_what_a_folder_holds_besides_images_is_reported(tmp_path, caplog):
    root = folder_of(tmp_path / "own")
    (root / "other.heic").write_bytes(b"")
    assert len(prepared(root, "dataset.prompt=p").train) == 3
    assert "1 entries of" in caplog.text
    assert "other.heic" in caplog.text
    (tmp_path / "deep" / "inner").mkdir(parents=True)
    assert "only inner; put some into it" in errors(prepared, tmp_path / "deep", "dataset.prompt=p")[0]
    assert "it is a file, not a folder" in errors(prepared, root / "0.png", "dataset.prompt=p")[0]


def test_a_metadata_file_has_a_prompt_a_row_and_may_name_an_image_twice(tmp_path, caplog):
    rows = [{"file_name": "0.png", "prompt": "a"}, {"file_name": "0.png", "prompt": "b"}]
    assert len(prepared(folder_of(tmp_path / "twice", metadata=rows)).train) == 2
    assert "names 1 images more than once" in caplog.text
    rows[1]["prompt"] = "  "
    (message,) = errors(prepared, folder_of(tmp_path / "blank", metadata=rows))
    assert message.endswith("row 2: it is blank; write one, or set dataset.prompt for all images.")


def test_cover_cuts_the_middle():
    wide = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(4, 0) * 30)
    cut, top, left = cover(wide, (4, 4))
    assert (top, left, cut.size) == (0, 2, (4, 4))
    assert np.asarray(cut)[0].tolist() == [60, 90, 120, 150]


def test_flips_mirror_the_pixels(tmp_path):
    rows = prepared(folder_of(tmp_path / "own", sizes=((32, 32),)), "dataset.prompt=p").train
    assert torch.equal(rows.view(0, flipped=True).pixels, rows.view(0).pixels.flip(-1))


def test_buckets_have_about_as_many_pixels_and_fit_the_shape(tmp_path):
    sizes = bucket_sizes(1024, 64)
    assert (1024, 1024) in sizes
    assert (832, 1216) in sizes  # one of SDXL's own
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.85 < height * width / 1024**2 <= 1
    images = folder_of(tmp_path / "own", sizes=((120, 60), (60, 120), (90, 90)))
    rows = prepared(images, "dataset.prompt=p", "dataset.buckets=true", "dataset.bucket_step=8").train
    (tall, wide), (other_tall, other_wide), square = rows.sizes[:3]
    assert wide > tall
    assert (other_wide, other_tall) == (tall, wide)
    assert square == (32, 32)
    assert rows.view(0).pixels.shape == (3, tall, wide)


def test_splits_repeats_and_hash(tmp_path):
    root = folder_of(tmp_path / "own", sizes=[(40, 40)] * 5)
    rows = prepared(root, "dataset.prompt=p", "dataset.validation_rows=2", "dataset.repeats=3")
    assert (len(rows.train), len(rows.validation), len(rows.test)) == (9, 2, 3)
    assert set(rows.train.indices) == {0, 1, 2}
    assert list(rows.validation.indices) == [3, 4]
    again = prepared(root, "dataset.prompt=p", "dataset.validation_rows=2", "dataset.repeats=3")
    other = prepared(root, "dataset.prompt=q", "dataset.validation_rows=2", "dataset.repeats=3")
    assert rows.sha256 == again.sha256 != other.sha256
    shuffled = prepared(root, "dataset.prompt=p", "dataset.subset=shuffled").train.indices
    assert sorted(shuffled) == [0, 1, 2, 3, 4]
    assert shuffled != [0, 1, 2, 3, 4]


def test_a_copy_of_an_image_does_not_validate(tmp_path, caplog):
    root = folder_of(tmp_path / "own")
    (root / "1b.png").write_bytes((root / "0.png").read_bytes())
    rows = prepared(root, "dataset.prompt=x", "dataset.validation_rows=2")
    assert [list(part.indices) for part in (rows.train, rows.validation)] == [[0, 1], [3]]
    assert "1 rows repeat train rows and are not used for validation." in caplog.text


def test_a_class_folder_gives_the_prior(tmp_path):
    own, others = folder_of(tmp_path / "own"), folder_of(tmp_path / "class", sizes=((50, 50), (70, 50)))
    rows = prepared(own, "dataset.prompt=sks", "dataset.class_prompt=a dog", f"dataset.class_folder={others}")
    assert [rows.prior.prompt(row) for row in range(2)] == ["a dog", "a dog"]
    assert set(rows.prior.sizes) == {(32, 32)}
    without = prepared(own, "dataset.prompt=sks")
    assert rows.sha256 != without.sha256


def test_the_images_of_a_run_are_found_again(tmp_path):
    own = folder_of(tmp_path / "own")
    words = (f"dataset.folder={own}", "dataset.prompt=p", "dataset.resolution=32")
    section = dataset(*words).model_dump()
    trained = prepared(own, "dataset.prompt=p").train.only([2, 0])
    (tmp_path / "pictures.json").write_text(json.dumps(identities(trained)))
    rows = rows_of_run(tmp_path, section, None)
    assert list(rows.indices) == [2, 0]
    whole = (own / "2.png").read_bytes()
    picture(77).save(own / "2.png")
    (message,) = errors(rows_of_run, tmp_path, section, None)
    assert "row 3 (2.png) of" in message
    assert "has changed since the run was trained (1 of 2 have)" in message
    (own / "2.png").write_bytes(whole)
    kept = (tmp_path / "pictures.json").read_text()
    for broken in (
        '{"indices": [2, 0], "digests": ["a"]}',
        '{"indices": [2.0], "digests": ["a"]}',
        "[]",
        "null",
        "[" * 100_000,
    ):
        (tmp_path / "pictures.json").write_text(broken)
        assert "is not what a run writes" in errors(rows_of_run, tmp_path, section, None)[0]
    (tmp_path / "pictures.json").write_text(kept)
    picture(78).save(own / "0a.png")  # the places of all others move
    assert "(1 of 2 have)" in errors(rows_of_run, tmp_path, section, None)[0]
    (own / "0a.png").unlink()
    (own / "2.png").unlink()
    assert "has 2, and the run was trained on number 3" in errors(rows_of_run, tmp_path, section, None)[0]
    (tmp_path / "pictures.json").unlink()
    assert "Broken run" in errors(rows_of_run, tmp_path, section, None)[0]


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        ([], ["Missing dataset.prompt:"]),
        (["dataset.folder=nowhere"], ["Invalid dataset.folder=nowhere: there is no such folder"]),
        (["dataset.prompt=p", "dataset.min_side=70"], ["Invalid image in"]),
        (["dataset.prompt=p", "dataset.train_rows=9"], ["Invalid dataset.train_rows=9: only 3 rows"]),
        (
            ["dataset.prompt=p", "dataset.train_rows=9", "dataset.class_prompt=c", "dataset.class_folder=nowhere"],
            ["Invalid dataset.train_rows=9:", "Invalid dataset.class_folder=nowhere: there is no such folder"],
        ),
    ],
)
def test_bad_images_are_reported(tmp_path, words, heads):
    root = folder_of(tmp_path / "own")
    reported = errors(prepared, root, *words)
    assert len(reported) == len(heads)
    for message, head in zip(reported, heads, strict=True):
        assert message.startswith(head)


def test_small_and_broken_images_are_named(tmp_path):
    root = folder_of(tmp_path / "own", sizes=((80, 60), (12, 90), (9, 9)))
    (message,) = errors(prepared, root, "dataset.prompt=p")
    assert "row 2 (1.png) (and 1 more): it is 12 × 90 pixels" in message
    (root / "0.png").write_bytes(b"no picture")
    broken, small = errors(prepared, root, "dataset.prompt=p")
    assert "row 1 (0.png): it is not an image of a known format" in broken
    assert "row 2 (1.png) (and 1 more)" in small
    (tmp_path / "empty").mkdir()
    assert "it has no images" in errors(prepared, tmp_path / "empty", "dataset.prompt=p")[0]


@pytest.mark.parametrize(
    ("words", "head"),
    [
        (["dataset=pictures"], "Invalid dataset.hub_id=None with dataset.folder=None"),
        (["dataset=icons3d", "dataset.folder=DIR"], "Invalid dataset.hub_id=linoyts/3d_icon with dataset.folder=DIR"),
        (["dataset=icons3d", "dataset.prompt_column=null"], "Missing dataset.prompt"),
        (["dataset=shapes", "dataset.revision=main"], "Invalid dataset.revision=main"),
        (["dataset=shapes", "dataset.class_images=5"], "Invalid dataset.class_images=5 without dataset.class_prompt"),
        (["dataset=shapes", "dataset.class_prompt=c"], "Invalid dataset.class_images=None with dataset.class_folder"),
        (
            ["dataset=shapes", "dataset.class_prompt=c", "dataset.class_images=2", "dataset.buckets=true"],
            "Invalid dataset.buckets=true with dataset.class_prompt=c",
        ),
        (
            ["dataset=shapes", "dataset.buckets=true", "dataset.bucket_step=128"],
            "Invalid dataset.bucket_step=128 with dataset.resolution=64",
        ),
        (["dataset=shapes", "dataset.resolution=8", "eval=[]"], "Invalid dataset.resolution=8: it must be ≥ 16"),
    ],
)
def test_settings_that_do_not_go_together(words, head):
    (message,) = errors(run_exp.experiment_of, ["model=sdxl_tiny", *words])
    assert message.startswith(head)


def test_the_eight_shapes_need_nothing():
    rows = text_to_image.prepared(run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes"]).dataset, None)
    assert len(rows.train) == 8
    views = [rows.train.view(row).pixels for row in range(8)]
    assert rows.train.prompt(0) == "a red circle"
    middle = views[0][:, 32, 32]
    assert middle.tolist() == pytest.approx([1, -1, -1])
    assert all(view[:, 0, 0].tolist() == pytest.approx([1, 1, 1]) for view in views)
    assert len({view.numpy().tobytes() for view in views}) == 8


def test_rows_are_shown(tmp_path, capsys):
    folder_of(tmp_path / "own")
    assert (
        show(
            [
                "pictures",
                "--show",
                "2",
                f"dataset.folder={tmp_path / 'own'}",
                "dataset.prompt=p",
                "dataset.min_side=9",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "80 × 60" in printed
    assert "1024 × 1024" in printed


def test_rows_of_says_which_row_of_the_set(tmp_path):
    folder_of(tmp_path / SOURCE.hub_id / "default", sizes=((80, 60), (5, 5)))
    write_split(tmp_path, *SOURCE[:3], [{"image": f"{n}.png", "prompt": "p"} for n in range(2)])
    images = read_text_to_image(SOURCE, image="image", prompt="prompt", fixed=None, data_root=str(tmp_path))
    assert len(rows_of(images, [0], resolution=32, min_side=16)) == 1
    assert "row 2 (1.png): it is 5 × 5" in errors(lambda: rows_of(images, [1], resolution=32, min_side=16))[0]
