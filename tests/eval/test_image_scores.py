"""Scores of pictures: accuracy over rows and over classes, corruption folders, and what in them is refused."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import run_exp
from eval import corruptions, images, kinds
from eval.backends.clip import CLIPBackend
from eval.command import main
from flatlora.inputs.images import LabeledImages
from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder


class Brightest:
    """A backend whose class is the index of a picture's brightest column."""

    batch_size = 3
    calls = 0

    def processor(self, picture, **options):
        pixels = torch.tensor(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        return {"pixel_values": pixels[None]}

    def describe(self):
        return {"backend": "brightest"}

    def logits(self, pixel_values):
        self.calls += 1
        return pixel_values.sum(dim=(1, 2))


class Rows:
    """Pictures whose brightest column is `shown`, said to be `labels`."""

    def __init__(self, shown, labels):
        self.shown, self.labels = shown, labels
        self.digests = [bytes(pair) for pair in zip(shown, labels, strict=True)]

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        rows = []
        for index in indices:
            pixels = torch.zeros(3, 4, 4)
            pixels[:, :, self.shown[index]] = 1
            rows.append({"pixel_values": pixels, "labels": self.labels[index]})
        return rows


def test_both_accuracies(tmp_path):
    rows = Rows([0, 0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 1, 1, 3])
    result = images.run(Brightest(), rows, tmp_path, images.Config())
    assert result["metrics"] == {"n": 7, "top1": 5 / 7, "mean_per_class": pytest.approx((3 / 4 + 1 / 2 + 1) / 3)}
    assert json.loads((tmp_path / "score.json").read_text()) == result
    assert images.score_file(tmp_path / "predictions.jsonl", images.Config()) == result


def test_max_rows_and_no_rows(tmp_path):
    rows = Rows([0, 1], [0, 0])
    assert images.run(Brightest(), rows, tmp_path, images.Config(max_rows=1))["metrics"]["top1"] == 1.0
    assert images.score([])["metrics"] == {"n": 0, "top1": None, "mean_per_class": None}


def test_a_second_call_asks_nothing_again(tmp_path):
    backend, rows = Brightest(), Rows([0, 1, 2, 3], [0, 1, 2, 0])
    first = images.run(backend, rows, tmp_path, images.Config())
    calls = backend.calls
    assert images.run(backend, rows, tmp_path, images.Config()) == first
    assert backend.calls == calls


def test_other_pictures_under_the_same_labels_are_asked_anew(tmp_path):
    images.run(Brightest(), Rows([0, 1], [0, 0]), tmp_path / "out", images.Config())
    assert images.run(Brightest(), Rows([0, 0], [0, 0]), tmp_path / "out", images.Config())["metrics"]["top1"] == 1.0
    folders = [
        write_folder(tmp_path / name, labels=[0] * 5, fog=pictures([column] * 5))
        for name, column in (("a", 0), ("b", 1))
    ]
    scores = [
        corruptions.run(Brightest(), None, tmp_path / "c", corruptions.Config(folder=str(folder)))["metrics"]["fog"]
        for folder in folders
    ]
    assert scores == [1.0, 0.0]


def write_folder(folder, *, labels=None, **arrays):
    folder.mkdir(exist_ok=True)
    if labels is not None:
        np.save(folder / "labels.npy", np.array(labels, np.uint8))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def pictures(columns):
    made = np.zeros((len(columns), 4, 4, 3), np.uint8)
    for place, column in enumerate(columns):
        made[place, :, column] = 200
    return made


def test_corruptions_are_the_mean_over_kinds_and_severities(tmp_path):
    labels = [0, 1] * 5
    fog = [0, 1, 0, 1, 0, 1, 0, 0, 1, 0]  # right in severities 1 to 3, half right in 4, wrong in 5
    folder = write_folder(tmp_path / "c", labels=labels, fog=pictures(fog), snow=pictures([0] * 10))
    result = corruptions.run(Brightest(), None, tmp_path / "out", corruptions.Config(folder=str(folder)))
    metrics = result["metrics"]
    assert metrics["fog"] == pytest.approx((1 + 1 + 1 + 0.5 + 0) / 5)
    assert metrics["snow"] == pytest.approx(0.5)
    assert metrics["mean_accuracy"] == pytest.approx((0.7 + 0.5) / 2)
    assert metrics["n"] == 20
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert {row["severity"] for row in rows} == {1, 2, 3, 4, 5}
    one = corruptions.run(Brightest(), None, tmp_path / "one", corruptions.Config(folder=str(folder), max_rows=1))
    assert one["metrics"]["n"] == 10


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "labels.npy and one .npy file per corruption are needed"),
        ({"labels": [0] * 5}, "labels.npy and one .npy file per corruption are needed"),
        ({"fog": pictures([0] * 5)}, "labels.npy and one .npy file per corruption are needed"),
        ({"labels": [0] * 5, "fog": pictures([0] * 10)}, "fog.npy: 5 UINT8 images"),
        ({"labels": [0] * 5, "fog": np.zeros((5, 4, 4, 3))}, "not float64"),
        ({"labels": [0] * 6, "fog": pictures([0] * 6)}, "6 rows are not five severities"),
    ],
)
def test_a_folder_that_does_not_do_is_an_error_of_the_config(tmp_path, contents, message):
    folder = write_folder(tmp_path / "c", **contents)
    words = ["model=clip_tiny", "dataset=digits", "eval=[images,corruptions]", f"eval.corruptions.folder={folder}"]
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of(words)
    assert any(message in reported for reported in caught.value.errors), caught.value.errors


def test_a_broken_file_and_a_missing_folder_are_named(tmp_path):
    folder = write_folder(tmp_path / "c", labels=[0] * 5)
    for write in (lambda path: path.write_bytes(b"no array"), lambda path: np.savez(path.open("wb"), a=[1])):
        write(folder / "fog.npy")
        with pytest.raises(ConfigError, match=r"Broken file .*fog.npy"):
            corruptions.read_folder(folder)
    (folder / "fog.npy").unlink()
    os.mkfifo(folder / "fog.npy")
    with pytest.raises(ConfigError, match=r"Broken file .*fog.npy: it is a pipe"):
        corruptions.read_folder(folder)
    with pytest.raises(ConfigError, match=r"Missing eval.corruptions.folder"):
        run_exp.experiment_of(["model=clip_tiny", "dataset=digits", "eval=[corruptions]"])


def test_corruptions_for_validation_have_figures_and_do_not_count(tmp_path):
    right, wrong = pictures([0] * 5), pictures([1] * 5)
    folder = write_folder(tmp_path / "c", labels=[0] * 5, fog=right, spatter=wrong, saturate=wrong)
    metrics = corruptions.run(Brightest(), None, tmp_path / "out", corruptions.Config(folder=str(folder)))["metrics"]
    assert (metrics["mean_accuracy"], metrics["fog"], metrics["spatter"], metrics["saturate"]) == (1.0, 1.0, 0.0, 0.0)
    assert [metrics[f"severity_{level}"] for level in range(1, 6)] == [1.0] * 5
    (folder / "fog.npy").unlink()
    with pytest.raises(ConfigError, match="saturate, spatter are for validation and not part of the score"):
        corruptions.read_folder(folder)


def test_each_severity_is_a_mean_over_corruptions(tmp_path):
    folder = write_folder(tmp_path / "c", labels=[0] * 5, fog=pictures([0, 0, 1, 1, 1]), snow=pictures([0, 1, 1, 1, 0]))
    metrics = corruptions.run(Brightest(), None, tmp_path / "out", corruptions.Config(folder=str(folder)))["metrics"]
    assert [metrics[f"severity_{level}"] for level in range(1, 6)] == [1.0, 0.5, 0.0, 0.0, 0.5]


@pytest.fixture
def words(tmp_path):
    words = ["model=clip_tiny", "dataset=digits", "dataset.train_rows=8", "dataset.test_rows=4", "trainer.max_steps=2"]
    words += ["optim.batch_size=4", "trainer.micro_batch_size=4", f"results_root={tmp_path / 'results'}"]
    return [*words, "wandb.mode=disabled", "wandb.name=run", "trainer.device=cpu", "trainer.save_steps=1"]


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    return write_folder(tmp_path / "c", labels=[0, 1] * 5, fog=draw.integers(0, 255, (10, 8, 8, 3), dtype=np.uint8))


def test_a_run_scores_corruptions_too(words, folder):
    words = [*words, "eval=[images,corruptions]", f"eval.corruptions.folder={folder}"]
    assert run_exp.main(words) == 0
    metrics = json.loads((run_folder(words) / "run.json").read_text())["metrics"]
    assert metrics["corruptions/n"] == 10
    assert metrics["images/n"] == 4
    assert metrics["corruptions/fog"] == metrics["corruptions/mean_accuracy"]


def test_corruptions_of_other_classes_are_an_error_before_training(words, folder, capsys):
    np.save(folder / "labels.npy", np.array([0, 10] * 5))
    assert run_exp.main([*words, "eval=[corruptions]", f"eval.corruptions.folder={folder}"]) == 2
    assert "labels.npy, row 2 (and 4 more): 10 is no class of the model, which has 10" in capsys.readouterr().err


# --- python -m eval.images


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("model.head=text", marks=pytest.mark.extra),
        pytest.param("model.head=linear", marks=pytest.mark.extra),
        pytest.param("peft=full_ft", marks=pytest.mark.extra),
        "peft=pissa",
        pytest.param("peft=lora_ga", marks=pytest.mark.extra),
    ],
)
def test_a_finished_run_is_scored_as_it_scored_itself(words, folder, setting, monkeypatch):
    words, seen = [*words, setting], []
    plain = CLIPBackend.logits
    monkeypatch.setattr(CLIPBackend, "logits", lambda self, pixels: seen.append(plain(self, pixels)) or seen[-1])
    assert run_exp.main(words) == 0
    run = run_folder(words)
    own = (run / "eval/images/predictions.jsonl").read_bytes()
    assert main("images", [str(run), "device=cpu", f"out={run / 'again'}"]) == 0
    assert (run / "again/predictions.jsonl").read_bytes() == own
    assert main("images", [str(run / "checkpoint-2"), "device=cpu"]) == 0
    assert (run / "eval/images-checkpoint-2/predictions.jsonl").read_bytes() == own
    assert main("images", [str(run / "checkpoint-1"), "device=cpu"]) == 0
    whole, again, checkpoint, earlier = seen  # every class is the same after two steps: the scores behind it are not
    made = [json.loads((run / name / "generation.json").read_text()) for name in ("eval/images", "again")]
    assert made[0] == made[1]
    assert {"weights", "base", "classes"} <= made[0].keys()
    assert torch.allclose(again, whole, atol=1e-5)
    assert torch.allclose(checkpoint, whole, atol=1e-5)
    assert (earlier - whole).abs().max() > 1e-3
    assert main("corruptions", [str(run), "device=cpu", f"folder={folder}"]) == 0
    (scored,) = run.glob("eval/corruptions-folder=c-*/score.json")
    assert json.loads(scored.read_text())["n"] == 10


def test_pictures_of_a_list_are_scored(words, tmp_path):
    assert run_exp.main(words) == 0
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "label": 3}\n')
    run = str(run_folder(words))
    assert main("images", [run, "device=cpu", f"rows={tmp_path / 'rows.jsonl'}"]) == 0
    (scored,) = run_folder(words).glob("eval/images-rows=rows-*/score.json")
    assert json.loads(scored.read_text())["n"] == 1


def test_what_cannot_be_scored_is_reported(words, folder, tmp_path, capsys, monkeypatch):
    def reported(benchmark, *words):
        capsys.readouterr()
        assert main(benchmark, list(map(str, words))) == 2
        return capsys.readouterr().err

    assert "python -m eval.images PATH [key=value ...]" in reported("images")
    assert "only a run defines the classes of images; name a run that classifies images" in reported(
        "images", "some/model"
    )
    assert run_exp.main([*words, "eval=[]"]) == 0
    run = run_folder(words)
    assert "Missing folder: this key has no default; set folder=VALUE; name the folder of CIFAR-10-C" in reported(
        "corruptions", run
    )
    assert "Invalid eval.corruptions.folder=/nope" in reported("corruptions", run, "folder=/nope")
    assert "Invalid rows: it has no effect on which images" in reported(
        "corruptions", run, f"folder={folder}", "rows=/x.jsonl"
    )
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "label": 30}\n')
    assert "Broken image" in reported("images", run, f"rows={tmp_path / 'rows.jsonl'}")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    assert "30 is no class of the model" in reported("images", run, f"rows={tmp_path / 'rows.jsonl'}")
    assert "classifies images and generates no text" in reported("squad", run, "rows=benchmark")
    served = ["backend=openai", "base_url=http://127.0.0.1:9/v1"]
    assert "it generates text, and this benchmark needs images" in reported("images", run, *served)
    named = [f"digit {name}" for name in json.loads((run / "classes.json").read_text())["names"]]
    other = LabeledImages("parquet", np.zeros(1, np.int64), lambda _: b"", named[::-1])
    monkeypatch.setattr(kinds, "read_images", lambda *_, **options: other)
    record = json.loads((run / "run.json").read_text())
    del record[records.FILES], record[records.SIGNATURE]  # as a version wrote it that kept no hashes
    (run / "run.json").write_text(json.dumps(record))
    (run / "classes.json").write_text(json.dumps({"names": named, "prompts": [[name] for name in named]}))
    assert "label 0 is digit 9 in parquet, and digit 0 in the run's classes.json" in reported("images", run)
    (run / "classes.json").write_text('{"names": ["a"], "prompts": []}')
    assert "Broken file" in reported("images", run)
