"""bench.py families on tiny models and the CPU: each contender does its work, and results survive interrupted runs."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from flatlora.runs import environment
from scripts import bench, bench_answers, bench_families, bench_training
from scripts.bench_training import Contender, Timing
from tests.conftest import write_split

TINY_LLAMA = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
PROJECT = Path(__file__).parents[2]
SMALL_BATCHES = ("optim.batch_size=4", "trainer.micro_batch_size=4")
TINY_T5 = dataclasses.replace(
    bench_training.T5,
    write=partial(bench_training.write_t5, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2),
    settings=(*bench_training.T5.settings, *SMALL_BATCHES),
    timing=Timing(1, 2, 2),
)
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_CLIP = dataclasses.replace(
    bench_training.CLIP,
    write=partial(bench_training.write_clip, images=8, side=32, text=TOWER, vision=TOWER | {"patch_size": 16}),
    settings=(*bench_training.CLIP.settings, *SMALL_BATCHES),
    timing=Timing(0, 2, 2),
    contenders={
        "stock": Contender(stock={}),
        "stock 12 workers": Contender(stock={"dataloader_num_workers": 2}),
        "LoRA": Contender(("rho=off",)),
        "LoRA BF16": Contender(("rho=off", "trainer.autocast=bfloat16")),
    },
)
TINY_TEXT = dataclasses.replace(
    bench_training.TEXT,
    write=partial(bench_training.write_llama, layers=1, **TINY_LLAMA),
    settings=(*bench_training.TEXT.settings, *SMALL_BATCHES, "model.dtype=float32", "trainer.micro_batch_size=2"),
    timing=Timing(1, 1, 2),
    contenders={
        "stock": Contender(stock={}, timing=Timing(0, 1, 2)),
        "Flat-LoRA copy": Contender(("rho=flat", "rho.mode=copy")),
        "LoRA full rows": Contender(("rho=off", "data_root={folder}/full", "dataset.max_length=64")),
    },
)
TINY_ANSWERS = bench_answers.AnswersFamily(prompts=6, batch=4, new_tokens=5, rounds=2, layers=1, shape=TINY_LLAMA)
TINY = {"t5": TINY_T5, "clip": TINY_CLIP, "text": TINY_TEXT, "answers": TINY_ANSWERS}
ROW = {"step_s": [0.5, 0.25, 0.25], "tokens_per_s": [4.0, 4.0], "start_s": 3.0, "peak_gib": 4.0}


@pytest.fixture
def data_root(tmp_path):
    sentences = [{"sentence": f"Row {i} sings.", "label": i % 2, "idx": i} for i in range(64)]
    problems = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}. #### {i + 1}"} for i in range(64)]
    for split in ("train", "validation"):
        write_split(tmp_path / "data", "nyu-mll/glue", "cola", split, sentences)
    for split in ("train", "test"):
        write_split(tmp_path / "data", "openai/gsm8k", "main", split, problems)
    return str(tmp_path / "data")


@pytest.fixture
def measure(tmp_path, data_root):
    """`run` of tiny families into a folder: exit code and families.json."""

    def run(only, families=TINY, root=data_root):
        settings = {"out": tmp_path / "out", "command": "the command", "data_root": root, "device": "cpu"}
        code = bench_families.run(only, families=families, **settings)
        path = tmp_path / "out/families.json"
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


def rows_of(report, family):
    return report["families"][family]["contenders"]


@pytest.mark.extra
def test_t5_both_sides_train_and_are_timed(measure):
    code, report = measure("t5/stock,t5/Flat-LoRA copy")
    assert code == 0
    assert list(rows_of(report, "t5")) == ["stock", "Flat-LoRA copy"]
    assert all(len(row["step_s"]) == 2 and min(row["step_s"]) > 0 for row in rows_of(report, "t5").values())


@pytest.mark.extra
def test_clip_trains_on_epochs_of_pngs(measure):
    code, report = measure("clip/stock,clip/LoRA BF16")
    assert code == 0
    assert [len(row["step_s"]) for row in rows_of(report, "clip").values()] == [2, 2]
    assert rows_of(report, "clip")["LoRA BF16"]["cache_s"] > 0
    assert "cache_s" not in rows_of(report, "clip")["stock"]


@pytest.mark.extra
def test_clip_with_workers_and_in_fp32(measure):
    code, report = measure("clip/stock 12 workers,clip/LoRA")
    assert (code, list(rows_of(report, "clip"))) == (0, ["stock 12 workers", "LoRA"])


@pytest.mark.extra
def test_text_counts_tokens_without_padding(measure, capsys):
    code, report = measure("text")
    assert code == 0
    rows = rows_of(report, "text")
    tokens = {
        name: [r * s for r, s in zip(row["tokens_per_s"], row["step_s"], strict=True)] for name, row in rows.items()
    }
    assert tokens["LoRA full rows"] == pytest.approx([4 * 64] * 2)
    assert tokens["stock"][1] == pytest.approx(tokens["Flat-LoRA copy"][0])  # the second step has the same rows
    assert all(0 < count < 4 * 64 for count in tokens["stock"])


def test_answers_of_both_sides_are_counted(measure):
    code, report = measure("answers")
    assert code == 0
    assert [len(row["tokens_per_s"]) for row in rows_of(report, "answers").values()] == [1, 2]  # stock takes long


def test_tokens_of_a_window_follow_the_order_of_the_rows():
    lengths = [1, 10, 100, 1000]
    counts = bench_training.window_tokens(lengths, 2, Timing(0, 2, 2))
    assert counts == [1111 / 2] * 2  # a window is an epoch
    one, other = bench_training.window_tokens(lengths, 2, Timing(0, 1, 2))
    assert one + other == 1111


def test_errors_are_named_together_before_anything_is_written(measure, tmp_path, capsys):
    code, report = measure("t5,answers,clipp/LoRA", root=str(tmp_path / "none"))
    said = " ".join(capsys.readouterr().err.split())
    assert (code, report) == (2, None)
    assert "Invalid --only=clipp/LoRA: did you mean clip/LoRA?" in said
    assert "nyu-mll/glue/cola" in said
    assert "openai/gsm8k/main" in said


def test_a_benchmark_refuses_options_of_others(capsys):
    with pytest.raises(SystemExit):
        bench.main(["families", "--steps", "3"])
    assert "unrecognized arguments: --steps 3" in capsys.readouterr().err


class Scripted:
    """A family that measures nothing; it fails for one contender."""

    title, model, rows = "A family", "a model", "rows"
    contenders, compared, other_rows = ("stock", "LoRA", "Flat-LoRA"), ("stock", "LoRA"), ()
    speed = staticmethod(lambda row: 1 / row["s"])
    shown = staticmethod(lambda row: {"step": str(row["s"])})

    def check(self, place):
        """Does nothing."""

    def write(self, place):
        assert place.folder.is_dir()

    def measure(self, name, place):
        if name == self.failing:
            raise RuntimeError("no memory")
        return {"s": {"stock": 4.0, "LoRA": 2.0, "Flat-LoRA": 1.0}[name]}

    failing = None


def test_later_runs_keep_what_was_measured_on_the_same_machine(measure, tmp_path, monkeypatch, capsys):
    one, other = Scripted(), Scripted()
    families = {"one": one, "other": other}
    one.failing = "LoRA"
    code, report = measure("one", families)
    assert code == 1  # the others are measured
    assert list(rows_of(report, "one")) == ["stock", "Flat-LoRA"]
    one.failing = None
    measure("other/stock", families)
    code, report = measure("one/LoRA", families)
    assert code == 0
    assert list(rows_of(report, "one")) == ["stock", "LoRA", "Flat-LoRA"]
    assert rows_of(report, "other")["stock"] == {"s": 4.0, "command": "the command", "git_sha": environment.git_sha()}
    other.rows = "other rows"
    assert list(measure("one/LoRA", families)[1]["families"]) == ["one"]
    env = environment.environment()
    env["hardware"]["gpus"] = ["another GPU"]
    monkeypatch.setattr(environment, "environment", lambda: env)
    assert list(rows_of(measure("one/LoRA", families)[1], "one")) == ["LoRA"]
    assert "left out: one, which were measured on" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "out/families.json").write_text('{"contenders": {}}')
    assert measure("one", families)[0] == 2  # its results are not overwritten
    assert "move it away" in capsys.readouterr().err


def test_the_tables_and_the_chart_name_every_contender(tmp_path, capsys, monkeypatch):
    for family in bench_families.FAMILIES.values():
        table = bench_families.table_of(family, dict.fromkeys(family.contenders, ROW))
        assert list(table.columns[0].cells) == list(family.contenders)
        ratios = [column for column in table.columns if column.header == "to stock"]
        assert set(ratios[0].cells) == {"1.000"}
    report = {"env": environment.environment(), "families": {}}
    for key, name in (
        ("t5", "LoRA"),
        ("clip", "stock"),
        ("clip", "LoRA"),
        ("text", "stock"),
        ("text", "LoRA full rows"),
    ):
        bench_families.add_row(report, key, name, ROW, bench_families.FAMILIES)
    assert bench_families.speedups_of(report, bench_families.FAMILIES) == {
        bench_training.CLIP.title: {"stock": 1.0, "LoRA": 1.0},
        bench_training.TEXT.title: {"stock": 1.0},
    }  # T5's stock was not measured, and full rows are others
    assert bench_families.draw(tmp_path) == 2
    (tmp_path / "families.json").write_text(json.dumps(report))
    assert bench_families.draw(tmp_path) == 0
    first = (tmp_path / "families.png").read_bytes()
    bench_families.draw(tmp_path)
    assert (tmp_path / "families.png").read_bytes() == first


def test_the_committed_results_are_those_of_the_contenders_of_today():
    report = bench_families.read_report(PROJECT / "results/bench/families.json")
    for key, part in report["families"].items():
        family = bench_families.FAMILIES[key]
        assert (part["model"], part["rows"]) == (family.model, family.rows)
        assert set(part["contenders"]) <= set(family.contenders)
        assert bench_families.table_of(family, part["contenders"]).row_count == len(part["contenders"])
