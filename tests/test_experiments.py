"""Every file of conf/experiment: its launch command composes, and a tiny model of its family trains a step with it."""

import json
import math
from pathlib import Path

import pytest

import run_exp
from flatlora.experiment import commandline
from tests.conftest import run_folder, write_split

PROJECT = Path(__file__).parents[1]
FILES = sorted(path for path in (PROJECT / "conf/experiment").glob("*/*.yaml") if path.stem != "base")
LAUNCH = "# python run_exp.py "
SHORT = ["seed=0", "eval=[]", "wandb.mode=disabled", "wandb.name=run", "trainer=cpu", "trainer.max_steps=1"]
SHORT += ["optim.batch_size=2", "trainer.micro_batch_size=1", "dataset.train_rows=4", "dataset.validation_rows=0"]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def launch_words(path: Path) -> list[str]:
    """What its first comment, which is its launch command, says."""
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(LAUNCH)]
    return [word for word in line.removeprefix(LAUNCH).split() if word not in ("-m", "data_root=DIR")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_launch_command_composes(path):
    words = [word for word in launch_words(path) if not word.startswith("seed=")]  # alike for every seed
    assert words[0] == f"experiment={name_of(path)}"
    jobs = commandline.expand_sweep(words)
    values = [word.partition("=")[2].split(",") for word in words if "=[" not in word]
    assert len(jobs) == math.prod(map(len, values))
    ends = jobs[:1] + jobs[1:][-1:]  # what lies between differs by a data set, whose option is composed elsewhere
    assert len({experiment.sha256() for experiment in run_exp.experiments_of(ends)}) == len(ends)


@pytest.fixture(scope="session")
def cola(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        rows = [{"sentence": f"The {split} sentence {n} ends.", "label": n % 2, "idx": n} for n in range(6)]
        write_split(root, "nyu-mll/glue", "cola", split, rows)
    return root


@pytest.fixture
def tiny_words(request, tiny_model_folder, tiny_t5_folder, cola):
    """{model family: words that put a tiny model and a small data set in its place}."""
    local = ["model.embedded=null", "model.dtype=float32"]
    return {
        "seq2seq": [f"model.hub_id={tiny_t5_folder}", *local, "dataset=cola", f"data_root={cola}"],
        "clip": ["model=clip_tiny", "dataset=digits", "dataset.test_rows=4"],
        "sdxl": ["model=sdxl_tiny", "dataset=shapes"],
        "causal_lm": [f"model.hub_id={tiny_model_folder}", *local, "dataset=word_math", "dataset.test_rows=2"],
    }


def with_extras(paths: list[Path]) -> list:
    """Rows of tables 3 and 4 train as the pairs of tests/flatlora/methods do: most of them in `make test-all` alone."""
    quick = ("lora", "flat_lora", "full_ft", "bi_lora", "lora_sam")
    extra = {path for path in paths if path.parent.name in ("table3", "table4") and path.stem not in quick}
    return [pytest.param(path, marks=pytest.mark.extra if path in extra else (), id=name_of(path)) for path in paths]


@pytest.mark.parametrize("path", with_extras(FILES))
def test_a_tiny_model_of_the_family_trains_one_step(path, tiny_words, tmp_path):
    first = commandline.expand_sweep(launch_words(path))[0]
    asked = run_exp.experiment_of(first)
    kept = [word for word in first if word.partition("=")[0] not in ("dataset", "seed", "eval", "trainer")]
    settings = [*kept, *tiny_words[asked.model.family], *SHORT, f"results_root={tmp_path}"]
    assert run_exp.main(settings) == 0
    record = json.loads((run_folder(settings) / "run.json").read_bytes())
    done = record["experiment"]
    assert record["status"] == "finished"
    assert record["metrics"]["train_loss"] > 0
    assert done["peft"]["name"] == asked.peft.name
    assert done["rho"]["name"] == asked.rho.name
    hashes = record["backbone_sha256"]
    assert hashes["before"] == hashes["after"]
