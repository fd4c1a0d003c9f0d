"""Image sets on a few pictures with the hub's columns: reading, classes, broken files, a run of a tiny random CLIP."""

import io
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

import run_exp
from data import images
from eval import command
from flatlora.inputs.images import ImageRows, LabeledImages, check_images
from flatlora.inputs.text_to_image import TextToImageData, picture_of
from flatlora.models import loading, sources
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder, write_split

# name: (hub id, config, splits, image column, label column, classes)
SETS = {
    "cifar10": ("uoft-cs/cifar10", "plain_text", "img", "label", 10),
    "cifar100": ("uoft-cs/cifar100", "cifar100", "img", "fine_label", 100),
    "cars": ("tanganke/stanford_cars", "default", "image", "label", 5),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "image", "label", 10),
    "dtd": ("tanganke/dtd", "default", "image", "label", 5),
    "eurosat": ("tanganke/eurosat", "default", "image", "label", 10),
    "gtsrb": ("tanganke/gtsrb", "default", "image", "label", 43),
    "resisc45": ("tanganke/resisc45", "default", "image", "label", 5),
    "sun397": ("tanganke/sun397", "default", "image", "label", 5),
    "mnist": ("ylecun/mnist", "mnist", "image", "label", 10),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 10),
}
UNNAMED = ("cars", "dtd", "resisc45", "sun397")  # their classes are the data set's own
OWN_NAMES = {  # as the hub's ClassLabel has them, for sets whose names in class_names.yaml read otherwise or alike
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "svhn": [str(i) for i in range(10)],
    "mnist": [str(i) for i in range(10)],
    "fashion_mnist": [
        "T - shirt / top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
}


def png(number, size=(8, 6)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(root, hub_id, config, split, columns, names=None):
    """As the hub's converter writes it: with the features of `datasets` in the file's metadata."""
    import datasets

    path = root / hub_id / config / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = list(columns)[:2]
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    chosen = {key: columns[key] for key in (image, label)}
    datasets.Dataset.from_dict(chosen, features=features).to_parquet(str(path))
    return path


def write_set(root, name, counts=(12, 6)):
    hub_id, config, image, label, classes = SETS[name]
    names = [f"class_{i}" for i in range(classes)] if name in UNNAMED else OWN_NAMES.get(name)
    for split, count in zip(("train", "test"), counts, strict=True):
        pictures = [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]
        columns = {image: pictures, label: [i % classes for i in range(count)]}
        write_parquet(root, hub_id, config, split, columns, names)


@pytest.fixture(scope="module")
def processor():
    return loading.load_processor(clip_config())


def clip_config(**changes):
    return loading.ModelConfig(
        **{"name": "clip", "hub_id": "flatlora/random-clip", "family": "clip", "embedded": "random-clip"} | changes
    )


def dataset(name, *settings):
    return run_exp.experiment_of([f"dataset={name}", "model=clip_tiny", *settings]).dataset


def prepared(root, name, processor, *settings):
    return images.prepared(dataset(name, *settings), str(root), processor)


def errors(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return caught.value.errors


# --- reading


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_read_with_its_columns_and_classes(tmp_path, processor, name):
    write_set(tmp_path, name)
    rows = prepared(tmp_path, name, processor, "dataset.validation_rows=2")
    assert [len(part) for part in rows[:3]] == [10, 2, 6]
    assert len(rows.classes.names) == SETS[name][-1]
    if name in UNNAMED:
        assert rows.classes.names[1] == "class 1"
    assert all(prompt.count(rows.classes.names[0]) == 1 for prompt in rows.classes.prompts[0])
    row = rows.train[3]
    assert row["pixel_values"].shape == (3, 32, 32)
    assert row["labels"] == 3 % SETS[name][-1]


def test_pixels_are_those_of_the_processor(tmp_path, processor):
    write_set(tmp_path, "mnist")
    rows = prepared(tmp_path, "mnist", processor)
    picture = Image.open(io.BytesIO(png(4))).convert("RGB")
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(rows.train[4]["pixel_values"], expected)


def test_gray_and_transparent_images_are_read_as_rgb(tmp_path, processor):
    buffers = []
    for mode in ("L", "RGBA", "P"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(48, dtype=np.uint8).reshape(8, 6)).convert(mode).save(buffer, "PNG")
        buffers.append({"bytes": buffer.getvalue(), "path": None})
    for split in ("train", "test"):
        write_parquet(tmp_path, "ylecun/mnist", "mnist", split, {"image": buffers, "label": [0, 1, 2]})
    rows = prepared(tmp_path, "mnist", processor)
    assert all(rows.train[i]["pixel_values"].shape == (3, 32, 32) for i in range(3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_turned_image_is_read_upright_as_transformers_reads_it(tmp_path, processor, kind):
    """All eight ways that a camera may be held, against CLIP's own preprocessing of the file."""
    pictures, files = [], []
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind.lower()}"
        Image.open(io.BytesIO(png(7, (40, 64)))).save(path, kind, exif=tags)
        files.append(path)
        pictures.append({"bytes": path.read_bytes(), "path": path.name})
    for split in ("train", "test"):
        write_parquet(tmp_path, "ylecun/mnist", "mnist", split, {"image": pictures, "label": list(range(8))})
    rows = prepared(tmp_path, "mnist", processor).train
    prompted = TextToImageData("the same", ["p"] * 8, lambda index: files[index].read_bytes())
    pixels = [rows[place]["pixel_values"] for place in range(8)]
    for place, path in enumerate(files):
        own = load_image(str(path))
        assert torch.equal(pixels[place], processor(own, return_tensors="pt")["pixel_values"][0])
        assert picture_of(prompted, place).tobytes() == own.tobytes()
    assert not any(torch.equal(pixels[0], other) for other in pixels[1:])


def test_a_list_of_files_is_read_as_parquet_is(tmp_path, processor):
    for split, count in (("train", 4), ("test", 2)):
        path = write_split(
            tmp_path, "ylecun/mnist", "mnist", split, [{"image": f"{split}/{i}.png", "label": i} for i in range(count)]
        )
        (path.parent / split).mkdir()
        for i in range(count):
            (path.parent / split / f"{i}.png").write_bytes(png(i))
    listed = prepared(tmp_path, "mnist", processor)
    other = tmp_path / "other"
    write_set(other, "mnist", (4, 2))
    columns = prepared(other, "mnist", processor)
    assert listed.sha256 == columns.sha256
    assert torch.equal(listed.train[2]["pixel_values"], columns.train[2]["pixel_values"])


def test_digits_need_no_file_and_are_split_in_their_order(processor):
    rows = images.prepared(dataset("digits"), None, processor)
    assert [len(part) for part in rows[:3]] == [1437, 0, 360]
    assert rows.train.labels[:10] == list(range(10))
    assert not set(rows.train.digests) & set(rows.test.digests)


@pytest.mark.parametrize("subset", ["first", "shuffled"])
def test_sizes_and_order(tmp_path, processor, subset):
    write_set(tmp_path, "mnist")
    rows = prepared(
        tmp_path, "mnist", processor, "dataset.train_rows=6", "dataset.validation_rows=3", f"dataset.subset={subset}"
    )
    assert [len(part) for part in rows[:3]] == [6, 3, 6]
    assert not set(rows.train.digests) & set(rows.validation.digests)
    assert (rows.train.labels == list(range(6))) == (subset == "first")


def test_images_that_train_do_not_validate(tmp_path, processor, caplog):
    hub_id, config, image, label, _ = SETS["mnist"]
    for split in ("train", "test"):
        pictures = [{"bytes": png(i % 3), "path": None} for i in range(7)] + [{"bytes": png(9), "path": None}]
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [i % 3 for i in range(7)] + [0]})
    rows = prepared(tmp_path, "mnist", processor, "dataset.validation_rows=4")
    assert [len(part) for part in rows[:3]] == [4, 1, 8]
    assert "3 rows repeat train rows" in caplog.text
    assert "7 of 8 test rows are also train rows" in caplog.text


def test_one_image_under_two_classes_does_not_validate(tmp_path, processor, caplog):
    hub_id, config, image, label, _ = SETS["mnist"]
    pictures = [{"bytes": png(i), "path": None} for i in (0, 1, 0, 2)]
    for split in ("train", "test"):
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [0, 1, 5, 2]})
    rows = prepared(tmp_path, "mnist", processor, "dataset.train_rows=2", "dataset.validation_rows=2")
    assert rows.validation.labels == [2]
    assert "1 rows repeat train rows" in caplog.text
    assert len(set(rows.test.digests)) == 4


def test_no_image_left_to_validate_is_an_error_of_early_stopping(tmp_path, settings, capsys):
    hub_id, config, image, label, _ = SETS["mnist"]
    for split in ("train", "test"):
        pictures = [{"bytes": png(i % 2), "path": None} for i in range(6)]
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [i % 2 for i in range(6)]})
    words = [*settings, "dataset=mnist", "dataset.validation_rows=2", "trainer.max_steps=1"]
    assert run_exp.main([*words, "optim.early_stopping_patience=2"]) == 2
    assert "Invalid optim.early_stopping_patience=2: no validation row is left of mnist" in capsys.readouterr().err
    assert run_exp.main(words) == 0


def test_the_hash_sees_files_classes_and_order(tmp_path, processor):
    write_set(tmp_path, "mnist")
    first = prepared(tmp_path, "mnist", processor).sha256
    assert prepared(tmp_path, "mnist", processor).sha256 == first
    assert prepared(tmp_path, "mnist", processor, "dataset.subset=shuffled").sha256 != first
    assert prepared(tmp_path, "mnist", processor, "dataset.train_rows=11").sha256 != first


# --- bad input


def test_broken_images_are_counted_and_named(tmp_path, processor):
    hub_id, config, image, label, _ = SETS["mnist"]
    whole = [{"bytes": png(i), "path": None} for i in range(5)]
    whole[2], whole[4] = {"bytes": png(2)[:40], "path": None}, {"bytes": b"no picture", "path": None}
    write_parquet(tmp_path, hub_id, config, "train", {image: whole, label: [0] * 5})
    write_parquet(tmp_path, hub_id, config, "test", {image: whole[:3], label: [0] * 3})
    reported = errors(prepared, tmp_path, "mnist", processor)
    assert "train.parquet, row 3 (and 1 more)" in reported[0]
    assert "test.parquet, row 3:" in reported[1]
    write_parquet(tmp_path, hub_id, config, "train", {image: whole[4:], label: [0]})
    assert "row 1: it is not an image of a known format (PNG, JPEG" in errors(prepared, tmp_path, "mnist", processor)[0]


def test_a_label_outside_the_classes_is_named(tmp_path, processor):
    hub_id, config, image, label, _ = SETS["mnist"]
    pictures = [{"bytes": png(i), "path": None} for i in range(3)]
    for split in ("train", "test"):
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [0, 10, 11]})
    reported = errors(prepared, tmp_path, "mnist", processor)
    assert len(reported) == 2
    assert "row 2 (and 1 more): 10 is none of 10 classes (0 to 9)" in reported[0]


def test_a_label_of_many_digits_is_named(tmp_path, processor):
    for split in ("train", "test"):
        write_split(tmp_path, "ylecun/mnist", "mnist", split, [{"image": "0.png", "label": 10**25}])
    assert "row 1: it must be a whole number ≥ 0, not 1000" in errors(prepared, tmp_path, "mnist", processor)[0]


def test_a_negative_label_is_named(tmp_path, processor):
    hub_id, config, image, label, _ = SETS["mnist"]
    pictures = [{"bytes": png(i), "path": None} for i in range(3)]
    for split in ("train", "test"):
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [0, 1, -1]})
    assert "row 3: it must be a whole number ≥ 0, not -1" in errors(prepared, tmp_path, "mnist", processor)[0]


def test_missing_columns_and_files_are_reported_at_once(tmp_path, processor):
    hub_id, config, *_ = SETS["mnist"]
    path = tmp_path / hub_id / config / "train.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"picture": [1], "digit": [2]}), path)
    reported = errors(prepared, tmp_path, "mnist", processor)
    assert [message.split(" in ")[0] for message in reported[:2]] == ["Missing column image", "Missing column label"]
    assert "test.jsonl (or .parquet) does not exist" in reported[2]


def test_classes_without_names_are_an_error(tmp_path, processor):
    hub_id, config, image, label, _ = SETS["cars"]
    pictures = [{"bytes": png(i), "path": None} for i in range(3)]
    for split in ("train", "test"):
        write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: [0, 1, 2]})
    assert "entry cars nor the data set has class names" in errors(prepared, tmp_path, "cars", processor)[0]


def named(*names, source="train"):
    return LabeledImages(source, np.arange(len(names)), lambda index: png(index), list(names))


def test_another_number_of_names_is_an_error():
    reported = errors(images.classes_of, "mnist", named("a", "b", "c"))[0]
    assert "entry mnist has 10 names, and train has 3 classes" in reported


def test_classes_in_another_order_are_an_error_however_they_are_spelled():
    names = ["AnnualCrop", "Forest", *"abcdefgh"]
    assert images.classes_of("eurosat", named(*names)).names[0] == "annual crop land"
    names = OWN_NAMES["cifar10"]
    assert images.classes_of("cifar10", named(*map(str.title, names))).names == names
    swapped = [*names[:3], "Dog", "deer", "cat", *names[6:]]
    reported = errors(images.classes_of, "cifar10", named(*swapped))[0]
    assert "label 3 is Dog in train, and cat in data/class_names.yaml, entry cifar10, where Dog has label 5" in reported


def test_classes_in_other_words_are_a_warning_where_another_label_reads_more_alike(caplog):
    own = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
    own += ["Residential", "River", "SeaLake"]
    images.classes_of("eurosat", named(*own))
    assert not caplog.messages
    own[0], own[6] = own[6], own[0]
    images.classes_of("eurosat", named(*own))
    assert [message.partition(" in ")[0] for message in caplog.messages] == ["Label 0 is PermanentCrop"]
    assert "where label 6 is more similar" in caplog.text


def test_splits_that_name_other_classes_are_an_error():
    names = OWN_NAMES["cifar10"]
    reported = errors(images.classes_of, "cifar10", named(*names), named(*names[1:], names[0], source="test"))[0]
    assert "label 0 is automobile in test, and airplane in data/class_names.yaml, entry cifar10" in reported
    reported = errors(images.classes_of, "cars", named("a", "b"), named("a", "c", source="test"))[0]
    assert "label 1 is b in train and c in test" in reported


def test_a_folder_has_one_state():
    reported = errors(dataset, "mnist", "dataset.revision=main", "data_root=/d")[0]
    assert reported.startswith("Invalid dataset.revision=main with data_root=/d: ")


def test_digits_have_one_state():
    assert "dataset.revision=main with dataset=digits" in errors(dataset, "digits", "dataset.revision=main")[0]


def test_an_entry_that_is_not_there_is_an_error():
    assert "data/class_names.yaml has cifar10, cifar100" in errors(dataset, "mnist", "dataset.classes=cifar11")[0]


def test_text_benchmarks_do_not_score_images():
    assert "it scores text data sets" in errors(dataset, "mnist", "eval=[gsm8k]")[0]


def test_an_image_is_tried_in_every_thread(processor):
    rows = images.prepared(dataset("digits"), None, processor)
    assert check_images(rows.train.images, range(1437)) == rows.train.digests
    rows.train.images.read = lambda index: b""
    assert "row 1 (and 1436 more)" in errors(check_images, rows.train.images, range(1437))[0]


def test_images_that_were_decoded_once_are_read_and_not_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("flatlora.inputs.images.cache_folder", lambda: tmp_path)
    opened, files = [], {0: png(0), 1: png(1)}
    plain = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **more: opened.append(file) or plain(file, **more))
    pictures = LabeledImages("here", np.array([0, 1]), lambda index: files[index])
    first = check_images(pictures, [0, 1])
    assert len(opened) == 2
    assert check_images(pictures, [1, 0]) == first[::-1]
    assert len(opened) == 2
    files[1] = png(2)
    assert check_images(pictures, [0, 1])[1] != first[1]
    assert len(opened) == 4
    files[1] = png(2)[:50]
    assert "row 2" in errors(check_images, pictures, [0, 1])[0]


def test_another_file_of_the_same_time_and_size_is_seen(tmp_path, processor):
    hub_id, config, image, label, _ = SETS["mnist"]
    for labels in ([0, 1, 2], [2, 1, 0]):
        for split in ("train", "test"):
            pictures = [{"bytes": png(i), "path": None} for i in range(3)]
            path = write_parquet(tmp_path, hub_id, config, split, {image: pictures, label: labels})
            os.utime(path, (1_700_000_000, 1_700_000_000))
        assert prepared(tmp_path, "mnist", processor).train.labels == labels


def test_wide_grays_are_scaled_and_floats_rejected(tmp_path, processor):
    wide = np.linspace(0, 65535, 48).reshape(8, 6).astype(np.uint16)
    narrow = (wide / 257).round().astype(np.uint8)
    buffers = []
    unknown = narrow.astype(np.float32), narrow.astype(np.int32)
    for pixels in (wide, narrow, *unknown):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "TIFF" if pixels.dtype.itemsize == 4 else "PNG")
        buffers.append({"bytes": buffer.getvalue(), "path": None})
    for count in (2, 3):
        for split in ("train", "test"):
            columns = {"image": buffers[:count], "label": list(range(count))}
            write_parquet(tmp_path, "ylecun/mnist", "mnist", split, columns)
        if count == 2:
            rows = prepared(tmp_path, "mnist", processor)
            assert torch.equal(rows.train[0]["pixel_values"], rows.train[1]["pixel_values"])
            assert rows.train[0]["pixel_values"].std() > 0.5
        if count == 3:
            assert "row 3: its pixels are floating-point numbers" in errors(prepared, tmp_path, "mnist", processor)[0]
    for split in ("train", "test"):
        columns = {"image": [*buffers[:2], buffers[3]], "label": [0, 1, 2]}
        write_parquet(tmp_path, "ylecun/mnist", "mnist", split, columns)
    assert "row 3: its pixels are 32-bit integers" in errors(prepared, tmp_path, "mnist", processor)[0]


# --- runs


@pytest.fixture
def settings(tmp_path):
    return [
        "model=clip_tiny",
        f"data_root={tmp_path}",
        f"results_root={tmp_path / 'results'}",
        "wandb.mode=disabled",
        "wandb.name=run",
        "trainer.device=cpu",
        "optim.batch_size=4",
        "trainer.micro_batch_size=2",
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.extra if place > 3 else ()) for place, name in enumerate(SETS)]
)
def test_a_training_step_and_a_score_of_every_set(tmp_path, settings, name):
    write_set(tmp_path, name, (4, 3))
    words = [*settings, f"dataset={name}", "trainer.max_steps=1", "rho=flat"]
    assert run_exp.main(words) == 0
    record = json.loads((run_folder(words) / "run.json").read_text())
    assert record["metrics"]["images/n"] == 3
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]


@pytest.mark.parametrize(
    ("head", "rho"),
    [("text", "flat"), *(pytest.param("linear", rho, marks=pytest.mark.extra) for rho in ("flat", "sam"))],
)
def test_both_heads_train_resume_and_load(tmp_path, settings, head, rho, monkeypatch):
    settings = [*settings, "dataset=digits", "dataset.train_rows=24", "dataset.validation_rows=4", f"model.head={head}"]
    settings += ["dataset.test_rows=5", f"rho={rho}", "trainer.save_steps=2", "optim.epochs=1"]
    assert run_exp.main(settings) == 0
    whole = run_folder(settings)
    assert [row["step"] for row in metrics_rows(whole) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    die_at(3, monkeypatch)
    again = [word.replace("/results", "/again") for word in settings]
    with pytest.raises(Killed):
        run_exp.main(again)
    monkeypatch.undo()
    assert run_exp.main([*again, "resume=true"]) == 0
    assert adapter_bytes(run_folder(again)) == adapter_bytes(whole)
    assert metrics_rows(run_folder(again)) == metrics_rows(whole)


def test_a_run_is_scored_on_its_own_images_and_on_others_beside_them(tmp_path, settings):
    write_set(tmp_path, "mnist", (4, 3))
    words = [*settings, "dataset=mnist", "trainer.max_steps=1"]
    assert run_exp.main(words) == 0
    run = run_folder(words)
    own = (run / "eval/images/predictions.jsonl").read_bytes()
    assert command.main("images", [str(run), "device=cpu"]) == 0
    other = tmp_path / "other"
    write_set(other, "mnist", (4, 5))
    assert command.main("images", [str(run), "device=cpu", f"data_root={other}"]) == 0
    assert (run / "eval/images/predictions.jsonl").read_bytes() == own
    assert not list(run.glob("eval/images/*stale*"))
    (scored,) = run.glob("eval/images-data_root=other-*/score.json")
    assert json.loads(scored.read_text())["n"] == 5


@pytest.mark.extra
def test_neither_workers_nor_the_cache_change_anything(tmp_path, settings):
    settings = [
        *settings,
        "dataset=digits",
        "dataset.train_rows=16",
        "dataset.test_rows=2",
        "optim.epochs=1",
        "eval=[]",
    ]
    assert run_exp.main(settings) == 0
    for place, words in enumerate((["trainer.num_workers=2"], ["trainer.cache_images=off"])):
        other = [word.replace("/results", f"/other_{place}") for word in settings]
        assert run_exp.main([*other, *words]) == 0
        assert adapter_bytes(run_folder(other)) == adapter_bytes(run_folder(settings))
        assert metrics_rows(run_folder(other)) == metrics_rows(run_folder(settings))


def test_an_adapter_loads_on_transformers_own_vision_model(tmp_path, settings):
    from peft import PeftModel
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    words = [*settings, "dataset=digits", "dataset.train_rows=8", "dataset.test_rows=4", "model.head=text", "eval=[]"]
    words += ["trainer.max_steps=2"]
    assert run_exp.main(words) == 0
    source = sources.backbone_source(clip_config())
    whole = CLIPModel.from_pretrained(source)
    plain = CLIPVisionModelWithProjection(whole.config.vision_config)
    plain.vision_model, plain.visual_projection = whole.vision_model, whole.visual_projection
    loaded = PeftModel.from_pretrained(plain, str(run_folder(words) / "adapter"))
    config = clip_config(dtype="float32")
    rows = images.prepared(dataset("digits", "dataset.test_rows=4"), None, loading.load_processor(config))
    pixels = torch.stack([rows.test[i]["pixel_values"] for i in range(4)])
    ours = loading.load_backbone(config, torch.device("cpu"), rows.classes)
    ours = PeftModel.from_pretrained(ours, str(run_folder(words) / "adapter"))
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(loaded(pixel_values=pixels).image_embeds, dim=-1)
        logits = ours(pixel_values=pixels).logits
        base = ours.get_base_model()
    expected = base.temperature * embeddings @ base.class_embeddings.t()
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("peft", "reason"), [("eva", "only supports decoder-only language models"), ("corda", "one row")]
)
def test_methods_that_only_support_text_are_rejected(settings, peft, reason, capsys):
    assert run_exp.main([*settings, "dataset=digits", f"peft={peft}"]) == 2
    assert reason in capsys.readouterr().err


METHODS = ["dora", "pissa", "lora_ga", "lora_pro", "adalora", "full_ft", "lora_fa"]
WITH_A_HEAD = ("lora_pro", "full_ft")  # which treat a trained head otherwise


@pytest.mark.parametrize(
    ("peft", "head"),
    [
        *((peft, "text") for peft in METHODS),
        *(pytest.param(p, "linear", marks=() if p in WITH_A_HEAD else pytest.mark.extra) for p in METHODS),
    ],
)
def test_other_methods_take_a_step_on_images(settings, peft, head):
    words = [*settings, "dataset=digits", "dataset.train_rows=8", "eval=[]", f"peft={peft}", f"model.head={head}"]
    assert run_exp.main([*words, "trainer.max_steps=1"]) == 0


def test_rows_have_what_a_sampler_needs(processor):
    rows = images.prepared(dataset("digits"), None, processor).train
    assert isinstance(rows, ImageRows)
    assert rows.lengths == [1] * 1437
