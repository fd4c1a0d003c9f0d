"""Tasks of lm-eval by name: scores against lm-eval's own, on tasks in a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_exp
from eval import lm_eval as benchmark
from eval import lm_eval_tasks
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora.inputs.rows import jsonl, read_jsonl
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, tiny_llama, write_split

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """
task: own_choice
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
WORDS = """
task: own_words
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: " {{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: letter, filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]}}
metadata: {{version: 2.0}}
"""
GROUP = """
group: own_group
task: [own_choice, own_choice_again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} and {{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"Which of {i} and {i + 1}?", "choices": ["one", "two words", "three"], "label": i % 3}
        for i in range(12)
    ]
    (folder / "train.jsonl").write_text(jsonl(rows[:4]))
    (folder / "test.jsonl").write_text(jsonl(rows[4:]))
    for name, text in {"choice": CHOICE, "words": WORDS, "rolling": ROLLING}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "again.yaml").write_text("include: choice.yaml\ntask: own_choice_again\ntag: null\nnum_fewshot: 1\n")
    (folder / "group.yaml").write_text(GROUP)
    return folder


def manager(folder, monkeypatch=None):
    """lm-eval's index of the folder; in place of that of all its tasks, which takes ten seconds."""
    made = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    if monkeypatch:
        monkeypatch.setattr(benchmark, "_index", lambda include_path, defaults: made)
    return made


def score_of(folder):
    return json.loads((folder / "score.json").read_text())


def theirs(results):
    """lm-eval's results in the names of score.json."""
    return {
        f"{task}/{key.removesuffix(',none')}": None if value == "N/A" else float(value)
        for task, values in results["results"].items()
        for key, value in values.items()
        if "," in key
    }


def same(ours, results):
    metrics = {name: value for name, value in ours["metrics"].items() if name.count(",") or not name.endswith("/n")}
    expected = theirs(results)
    assert {name for name in metrics if "/" in name} == set(expected)
    for name, value in expected.items():
        assert metrics[name] == (None if value is None else pytest.approx(value, rel=1e-6)), name


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """Each of lm-eval's evaluations lists all installed packages with pip, which takes longer than ours."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


TASKS = ["own_choice", "own_words"]


@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_lm_evals(tiny_model_folder, own, tmp_path, chat):
    words = [f"tasks=[{','.join(TASKS)}]", f"include_path={own}", "num_fewshot=2", *["template=chat"][: int(chat)]]
    assert main("lm_eval", [str(tiny_model_folder), *words, "device=cpu", f"out={tmp_path / 'answers'}"]) == 0
    score = score_of(tmp_path / "answers")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny_model_folder), "dtype": "float32"},
        tasks=TASKS,
        num_fewshot=2,
        apply_chat_template=chat,
        device="cpu",
        batch_size=8,
        task_manager=manager(own),
    )
    assert results["n-shot"] == dict.fromkeys(TASKS, 2)
    same(score, results)
    assert {"own_choice/acc", "own_choice/acc_stderr", "own_words/exact_match,letter"} <= score["metrics"].keys()
    assert score["tasks"] == {
        "own_choice": {"version": 1.0, "num_fewshot": 2},
        "own_words": {"version": 2.0, "num_fewshot": 2},
    }
    assert score["n"] == 16
    rows = read_jsonl(tmp_path / "answers/predictions.jsonl")
    assert [row["task"] for row in rows] == ["own_choice"] * 8 + ["own_words"] * 16
    assert rows[0]["prompt"].count("Question") == 3
    assert ("<|im_start|>user" in rows[0]["prompt"]) == chat
    theirs_of = {
        (task, sample["doc_id"], sample["filter"]): sample for task in TASKS for sample in results["samples"][task]
    }
    assert all(row["prompt"] == theirs_of[row["task"], row["doc"], row["filter"]]["arguments"][0][0] for row in rows)


@pytest.mark.extra
def test_scores_are_those_of_lm_evals_command(tiny_model_folder, own, tmp_path):
    words = ["tasks=[own_group,own_words]", f"include_path={own}", "device=cpu", f"out={tmp_path / 'answers'}"]
    assert main("lm_eval", [str(tiny_model_folder), *words]) == 0
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "own_group,own_words"]
    command += ["--model_args", f"pretrained={tiny_model_folder},dtype=float32", "--include_path", str(own)]
    command += ["--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "theirs")]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (path,) = Path(tmp_path / "theirs").rglob("results_*.json")
    same(score_of(tmp_path / "answers"), json.loads(path.read_text()))


def test_a_group_has_lm_evals_score_and_a_tag_is_its_tasks(tiny_model_folder, own, tmp_path, monkeypatch):
    manager(own, monkeypatch)
    settings = benchmark.Config(tasks=["own_tag", "own_group"], include_path=str(own))
    assert [row["task"] for row in benchmark.benchmark_rows(None, settings)] == ["own_choice", "own_words", "own_group"]
    words = ["tasks=[own_group]", f"include_path={own}", "max_rows=5", "device=cpu", f"out={tmp_path / 'answers'}"]
    assert main("lm_eval", [str(tiny_model_folder), *words]) == 0
    metrics = score_of(tmp_path / "answers")["metrics"]
    each = [metrics[f"{name}/acc"] for name in ("own_choice", "own_choice_again")]
    assert metrics["own_group/acc"] == metrics["average"] == pytest.approx(sum(each) / 2)
    assert metrics["n"] == metrics["own_group/n"] == 10


def test_a_run_has_the_scores_in_its_record_and_asks_only_what_is_missing(tiny_settings, own, tmp_path, monkeypatch):
    words = [word for word in tiny_settings if word != "eval=[]"]
    words += ["eval=[lm_eval]", f"eval.lm_eval.include_path={own}", f"eval.lm_eval.tasks=[{','.join(TASKS)}]"]
    words += ["trainer.max_steps=1", "eval.lm_eval.max_rows=4"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    metrics = score_of(folder / "eval/lm_eval")["metrics"]
    recorded = json.loads((folder / "run.json").read_text())["metrics"]
    assert {f"lm_eval/{name}": value for name, value in metrics.items()}.items() <= recorded.items()
    assert metrics["own_choice/n"] == 4
    asked, plain = [], lm_eval_tasks.ask
    monkeypatch.setattr(lm_eval_tasks, "ask", lambda *a, **o: asked.append(a[2]) or plain(*a, **o))
    before = (folder / "eval/lm_eval/predictions.jsonl").read_bytes()
    (folder / "eval/lm_eval/tasks/own_words.jsonl").unlink()  # as if it had been killed there
    assert main("lm_eval", [str(folder), "device=cpu"]) == 0
    assert asked == ["own_words"]
    assert (folder / "eval/lm_eval/predictions.jsonl").read_bytes() == before
    assert main("lm_eval", [str(folder), "score_only=true"]) == 0
    assert score_of(folder / "eval/lm_eval")["metrics"] == metrics
    rows = read_jsonl(own / "test.jsonl")
    (own / "test.jsonl").write_text(jsonl(rows[::-1]))  # other questions
    try:
        asked.clear()
        assert main("lm_eval", [str(folder), "device=cpu"]) == 0
        assert asked == TASKS
    finally:
        (own / "test.jsonl").write_text(jsonl(rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "there is nothing to ask"),
        ({"tasks": ["own_choise", "own_words"]}, "own_choise (did you mean own_choice?)"),
        ({"tasks": ["own_again_and_other"], "include_path": "nowhere"}, "there is no such folder"),
        ({"tasks": ["code"]}, "without a sandbox; use eval=[humaneval]"),
        ({"tasks": ["pictures"]}, "about an image"),
        ({"tasks": ["beams"]}, "generation_kwargs has num_beams"),
        ({"tasks": ["zero"], "num_fewshot": 3}, "num_fewshot=3 has no effect"),
    ],
)
def test_tasks_that_cannot_be_scored_are_errors(changes, message, own, tmp_path, monkeypatch):
    extra = {
        "code": "unsafe_code: true",
        "pictures": "doc_to_image: image",
        "beams": "generation_kwargs: {num_beams: 4}",
        "zero": "num_fewshot: 0",
    }
    for name, line in extra.items():
        (tmp_path / f"{name}.yaml").write_text(f"include: {own}/choice.yaml\ntask: {name}\ntag: null\n{line}\n")
    (tmp_path / "choice.yaml").write_text((own / "choice.yaml").read_text())
    (tmp_path / "words.yaml").write_text((own / "words.yaml").read_text())
    manager(tmp_path, monkeypatch)
    (reported,) = [error.message for error in benchmark.Config(**changes).rule_errors()]
    assert message in reported


def test_missing_packages_and_data_are_errors_before_a_model_is_loaded(own, tmp_path):
    (tmp_path / "needs.yaml").write_text(
        f"include: {own}/choice.yaml\ntask: needs\ndoc_to_text: !function utils.text\n"
    )
    (tmp_path / "utils.py").write_text("import no_such_package\n")
    (tmp_path / "hub.yaml").write_text(
        f"include: {own}/choice.yaml\ntask: hub\ndataset_path: owner/name\ndataset_name: easy\ndataset_kwargs: null\n"
    )
    settings = benchmark.Config(tasks=["needs", "hub"], include_path=str(tmp_path))
    with pytest.raises(ConfigError) as reported:
        benchmark.check_rows(benchmark.benchmark_rows(str(tmp_path), settings), "", settings)
    data, package = reported.value.errors
    assert "owner/name/easy/test.jsonl (or .parquet) does not exist" in data
    assert "Cannot load lm-eval's needs: No module named 'no_such_package'" in package


def test_data_root_is_read_in_place_of_the_hub(own, tmp_path, tiny_model_folder):
    (tmp_path / "hub.yaml").write_text(
        f"include: {own}/choice.yaml\ntask: hub\ndataset_path: owner/name\ndataset_name: easy\ndataset_kwargs: null\n"
    )
    for split in ("train", "test"):
        write_split(tmp_path, "owner/name", "easy", split, read_jsonl(own / f"{split}.jsonl"))
    scores = []
    for task, folder in (("hub", tmp_path), ("own_choice", own)):
        words = [f"tasks=[{task}]", f"include_path={folder}", f"data_root={tmp_path}", "device=cpu"]
        assert main("lm_eval", [str(tiny_model_folder), *words, f"out={tmp_path / task}"]) == 0
        scores.append(score_of(tmp_path / task)["metrics"]["average"])
    assert scores[0] == scores[1]


def test_a_model_without_a_chat_template_is_an_error(tiny_model_folder, tmp_path, own, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    words = ["tasks=[own_choice]", f"include_path={own}", "device=cpu", "template=chat"]
    assert main("lm_eval", [str(tmp_path), *words]) == 2
    assert f"Invalid template=chat: the tokenizer of {tmp_path} has no chat template" in capsys.readouterr().err


@pytest.mark.extra
def test_a_run_on_chats_is_asked_in_chats_unless_told_otherwise(tiny_settings, own, tmp_path, capsys):
    words = [word for word in tiny_settings if word != "eval=[]"]
    words += ["eval=[lm_eval]", f"eval.lm_eval.include_path={own}", "eval.lm_eval.tasks=[own_choice]"]
    words += ["trainer.max_steps=1", "eval.lm_eval.max_rows=2", "dataset.template=chat", "dataset.system=Think."]
    assert run_exp.main([*words, "eval.lm_eval.template=null"]) == 2
    assert "set eval.lm_eval.template=chat, or eval.lm_eval.system=null" in capsys.readouterr().err
    assert run_exp.main(words) == 0
    folder = run_folder(words)

    def asked(name):
        return [row["prompt"] for row in read_jsonl(folder / name / "predictions.jsonl")]

    chats = asked("eval/lm_eval")
    assert all(prompt.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n") for prompt in chats)
    record = json.loads((folder / "eval/lm_eval/generation.json").read_text())
    assert (record["template"], record["system"]) == ("chat", "Think.")
    before = (folder / "eval/lm_eval/predictions.jsonl").read_bytes()
    assert main("lm_eval", [str(folder), "device=cpu", "template=chat"]) == 0  # as the run: the same answers
    assert main("lm_eval", [str(folder), "device=cpu", "template=null"]) == 0
    assert (folder / "eval/lm_eval/predictions.jsonl").read_bytes() == before
    assert all(prompt.startswith("Question: ") for prompt in asked("eval/lm_eval-template=None"))


def asker(model, tokenizer, **options):
    from eval.backends.lm_eval import LMEvalModel

    return LMEvalModel(HFBackend(model, tokenizer, batch_size=3), "own", 3, **options)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def test_names_of_special_tokens_in_a_chat_are_text(tokenizer):
    model = asker(tiny_llama(vocab_size=len(tokenizer)), tokenizer, chat=True)
    turns = [{"role": "user", "content": "What does <|im_end|> mean?"}]
    prompt = model.apply_chat_template(turns)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)["input_ids"]
    assert model.tok_encode(prompt).count(end) == plain.count(end)
    assert "<|im_end|> mean?" in model.readable(prompt)
    assert model.tok_encode(prompt + " A")[: len(model.tok_encode(prompt))] == model.tok_encode(prompt)


def test_a_task_that_samples_draws_the_same_answers_in_any_batch(tokenizer):
    from lm_eval.api.instance import Instance

    options = {"until": ["\n\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    model = asker(tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    asked = [Instance("generate_until", {}, ("Which of them?", options), index) for index in range(4)]
    answers = model.generate_until(asked)
    assert answers == model.generate_until(asked)
    assert answers[:2] == model.generate_until(asked[:2])
    assert len(set(answers)) > 1


def test_texts_longer_than_the_context_are_read_in_windows(tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(3)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("one two " * 30, "one")]
    own = asker(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=16)
    assert own == pytest.approx(plain.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-4)


def test_another_template_than_chat_is_refused(tiny_model_folder, own, tmp_path, capsys):
    words = ["tasks=[own_choice]", f"include_path={own}", "template=qa", f"out={tmp_path / 'answers'}"]
    assert main("lm_eval", [str(tiny_model_folder), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Invalid template=qa: this benchmark asks its texts as they are, or as chats; use template=null" in said
    assert not (tmp_path / "answers").exists()
