"""InstructEval by lm-eval on local copies of the tasks' data in the hub's schema."""

import json
import shutil

import pytest

import run_exp
from eval import instruct_eval
from eval.command import main
from flatlora.inputs.rows import read_jsonl
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, write_split

pytest.importorskip("lm_eval")
TASKS = ["mmlu_anatomy", "drop", "bbh_navigate"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"Which is {i}?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for i in range(8)
    ]
    for split in ("test", "dev", "validation"):
        write_split(root, "cais/mmlu", "anatomy", split, questions)
    date = {"day": "", "month": "", "year": ""}
    passages = [
        {
            "section_id": f"s{i}",
            "query_id": f"q{i}",
            "passage": f"They scored {i} points.",
            "question": "How many?",
            "answer": {"number": str(i), "date": date, "spans": [], "worker_id": "w", "hit_id": "h"},
            "validated_answers": {
                "number": [str(i)],
                "date": [date],
                "spans": [[]],
                "worker_id": ["w"],
                "hit_id": ["h"],
            },
        }
        for i in range(6)
    ]
    for split in ("train", "validation"):
        write_split(root, "EleutherAI/drop", "default", split, passages)
    steps = [{"input": f"Take {i} steps. Do you return?", "target": ("Yes", "No")[i % 2]} for i in range(6)]
    write_split(root, "SaylorTwift/bbh", "navigate", "test", steps)
    return root


def test_a_run_is_scored_at_its_end_and_each_task_is_kept(tiny_settings, root, monkeypatch, tmp_path):
    words = [word for word in tiny_settings if word != "eval=[]"]
    words += ["eval=[instruct_eval]", f"data_root={root}", "trainer.max_steps=1", "eval.instruct_eval.max_rows=3"]
    words += [f"eval.instruct_eval.tasks=[{','.join(TASKS)}]"]
    assert run_exp.main(words) == 0
    folder = run_folder(words) / "eval/instruct_eval"
    score = json.loads((folder / "score.json").read_text())
    assert score["n"] == 9
    assert set(score["metrics"]) == {"n", "average", "mmlu", "drop", "bbh"}
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["mmlu_anatomy"] * 3 + ["drop"] * 3 + ["bbh_navigate"] * 3
    assert score["metrics"]["mmlu"] == sum(row["score"] for row in rows[:3]) / 3
    asked = []
    plain = instruct_eval._ask
    monkeypatch.setattr(instruct_eval, "_ask", lambda *a: asked.append(a[1]) or plain(*a))
    (folder / "tasks/drop.jsonl").unlink()  # as if it had been killed there
    before = (folder / "predictions.jsonl").read_bytes()
    assert main("instruct_eval", [str(run_folder(words)), "device=cpu", f"data_root={root}"]) == 0
    assert asked == ["drop"]
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert rows[0]["prompt"].count("Which is") == 6  # five shots and the question
    assert json.loads(rows[3]["answer"])[0] is not None
    other = tmp_path / "other"
    shutil.copytree(root, other)
    write_split(other, "EleutherAI/drop", "default", "validation", read_jsonl(root / DROP)[1:])
    asked.clear()
    assert main("instruct_eval", [str(run_folder(words)), "device=cpu", f"data_root={other}"]) == 0
    assert asked == ["drop"]  # other rows


DROP = "EleutherAI/drop/default/validation.jsonl"


def test_shots_and_metrics_are_instructevals(monkeypatch, root):
    import lm_eval

    seen = []
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **o: seen.append(o) or {"samples": {o["tasks"][0]: []}})
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", lambda **options: None)

    class Backend:
        tokenizer = precision = None

        class model:
            class config:
                is_encoder_decoder = False

    for task in ("drop", "mmlu_anatomy", "bbh_navigate"):
        instruct_eval._ask(Backend, task, instruct_eval.Config(), str(root))
    told = [(options["tasks"][0], options["num_fewshot"]) for options in seen]
    assert told == [("drop", 3), ("mmlu_anatomy", 5), ("bbh_fewshot_navigate", 3)]


def test_groups_are_asked_part_by_part():
    rows = instruct_eval.benchmark_rows(None, instruct_eval.Config(tasks=["mmlu", "drop", "bbh", "mmlu_anatomy"]))
    names = [row["task"] for row in rows]
    assert len(names) == len(set(names)) == 57 + 1 + 27
    assert [sum(name.startswith(group) for name in names) for group in ("mmlu_", "drop", "bbh_")] == [57, 1, 27]
    stem = instruct_eval.benchmark_rows("there", instruct_eval.Config(tasks=["mmlu_stem", "bbh_fewshot_navigate"]))
    assert len(stem) == 19 + 1
    assert stem[-1] == {"task": "bbh_navigate", "data_root": "there"}


def test_scores_are_means_of_groups():
    rows = [{"task": t, "score": s} for t, s in (("mmlu_a", 1.0), ("mmlu_b", 0.0), ("mmlu_b", 0.0), ("drop", 0.5))]
    metrics = instruct_eval.score(rows, {"n": 4, "metrics": {"pass@1": 0.25}})["metrics"]
    assert metrics["mmlu"] == pytest.approx(1 / 3)
    assert metrics["average"] == pytest.approx((1 / 3 + 0.5 + 0.25) / 3)
    assert metrics["n"] == 4 + 4
    assert instruct_eval.score([])["metrics"] == {"n": 0, "average": None}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tasks": ["gsm8k"]}, "gsm8k is none of mmlu, drop, bbh, humaneval"),
        ({"tasks": []}, "there is nothing to ask"),
        ({"tasks": ["mmlu_anatomi"]}, "did you mean mmlu_anatomy"),
        ({"tasks": ["humaneval"]}, "without eval.allow_code_execution=true"),
    ],
)
def test_tasks_that_are_none_are_faults(changes, fault):
    (told,) = [error.message for error in instruct_eval.Config(**changes).rule_errors()]
    assert fault in told


def test_missing_data_are_told_before_a_model_is_loaded(root, tmp_path):
    settings = instruct_eval.Config(tasks=["mmlu_anatomy", "mmlu_astronomy", "mmlu_virology", "drop", "bbh_snarks"])
    with pytest.raises(ConfigError) as told:
        instruct_eval.check_rows(instruct_eval.benchmark_rows(str(root), settings), "", settings)
    mmlu, bbh = told.value.faults
    assert "cais/mmlu/astronomy/test.jsonl (or .parquet) is not there" in mmlu
    assert mmlu.endswith("3 more files of cais/mmlu are missing.")
    assert "SaylorTwift/bbh/snarks/test.jsonl" in bbh


def test_parquet_is_read_as_well(root, tmp_path):
    import datasets

    usual = datasets.load_dataset
    other = tmp_path / "SaylorTwift/bbh/navigate"
    other.mkdir(parents=True)
    rows = read_jsonl(root / "SaylorTwift/bbh/navigate/test.jsonl")
    datasets.Dataset.from_list(rows).to_parquet(other / "test.parquet")
    with instruct_eval._data_of("bbh_navigate", str(tmp_path)):
        assert datasets.load_dataset("SaylorTwift/bbh", "navigate")["test"].to_list() == rows
    assert datasets.load_dataset is usual


def test_rows_that_lm_eval_cannot_ask_end_the_evaluation_and_keep_what_is_answered(
    tiny_settings, root, tmp_path, capsys
):
    words = [word for word in tiny_settings if word != "eval=[]"] + ["eval=[]", "trainer.max_steps=1"]
    assert run_exp.main(words) == 0
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    write_split(broken, "SaylorTwift/bbh", "navigate", "test", [{"input": "Take a step.", "aim": "No"}])
    command = [
        str(run_folder(words)),
        "device=cpu",
        "tasks=[mmlu_anatomy,bbh_navigate]",
        "max_rows=1",
        f"out={tmp_path / 'answers'}",
    ]
    assert main("instruct_eval", [*command, f"data_root={broken}"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "lm-eval cannot ask bbh_fewshot_navigate" in told
    assert "nothing was loaded" not in told
    kept = tmp_path / "answers/tasks"
    assert [path.name for path in sorted(kept.glob("*.jsonl"))] == ["mmlu_anatomy.jsonl"]
