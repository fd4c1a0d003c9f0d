"""GLUE's scores: likelihoods against a plain reading of the logits, metrics against their formulas, what is refused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_exp
from data import glue as data_glue
from eval import glue
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, write_split

PROMPTS = ["classify: a\nresult: ", "classify the sentiment of the text: a much longer one.\nresult: "]
CHOICES = [["not_entailment", "entailment"], ["positive", "negative", "neither of the two"]]


@pytest.fixture(params=["llama", "t5"])
def backend(request, tiny_model_folder, tiny_t5_folder):
    folder, auto = {
        "llama": (tiny_model_folder, AutoModelForCausalLM),
        "t5": (tiny_t5_folder, AutoModelForSeq2SeqLM),
    }[request.param]
    model = auto.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():  # the random start is too flat for two answers to differ
            parameter.mul_(4.0)
    return HFBackend(model, AutoTokenizer.from_pretrained(folder), batch_size=3)


def log_likelihood_reference(backend, prompt, choice, first_token=False):
    """One pair at a time, one token after the other."""
    model, tokenizer = backend.model, backend.tokenizer
    asked = tokenizer(prompt)["input_ids"]
    answer = [*tokenizer(choice, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    total, said = 0.0, []
    for token in answer[:1] if first_token else answer:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.tensor([[model.config.decoder_start_token_id, *said]])
                logits = model(input_ids=torch.tensor([asked]), decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.tensor([asked + said])).logits
        total += logits[0, -1].double().log_softmax(-1)[token].item()
        said.append(token)
    return total


@pytest.mark.parametrize("first_token", [False, True])
def test_likelihoods_are_those_of_one_token_after_the_other(backend, first_token):
    found = backend.log_likelihoods(PROMPTS, CHOICES, first_token=first_token)
    assert [len(scores) for scores in found] == [2, 3]
    for prompt, choices, scores in zip(PROMPTS, CHOICES, found, strict=True):
        for choice, score in zip(choices, scores, strict=True):
            assert score == pytest.approx(log_likelihood_reference(backend, prompt, choice, first_token), rel=1e-4)


@pytest.mark.parametrize("positions", [21, 20])
def test_rows_that_do_not_fit_are_refused_before_the_first_batch(tiny_model_folder, tmp_path, positions):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = [
        {"x": " one" * 15, "y": " two", "choices": [" one", " two"]},  # the longest prompt comes first
        {"x": " one" * 10, "y": " one", "choices": [" one", " two" * 4]},
    ]
    asked = [len(tokenizer(f"{row['x']} ")["input_ids"]) for row in rows]
    assert asked == [16, 11]
    assert len(tokenizer(" two" * 4)["input_ids"]) == 4  # with an end: 5
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=8, n_layer=1, n_head=1))
    backend = HFBackend(model, tokenizer, batch_size=1)
    config = glue.Config(task="sst2")
    if positions == 16 + 5:
        assert glue.run(backend, rows, tmp_path / "out", config)["n"] == 2
        return
    with pytest.raises(ConfigError, match="Too long for the model: 1 of 2 prompts, the longest of 16 tokens"):
        glue.run(backend, rows, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def row(task, reference, prediction, choices=("a", "b"), **more):
    return {"task": task, "reference": reference, "prediction": prediction, "choices": list(choices), **more}


def metrics(rows):
    return glue.score(rows)["metrics"]


def test_matthews_and_f1_are_their_formulas():
    pairs = [("b", "b")] * 5 + [("b", "a")] * 2 + [("a", "b")] * 3 + [("a", "a")] * 4
    tp, fn, fp, tn = 5, 2, 3, 4
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics([row("cola", *pair) for pair in pairs])["matthews"] == pytest.approx(expected)
    found = metrics([row("mrpc", *pair) for pair in pairs])
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["accuracy"] == pytest.approx(9 / 14)
    assert found["majority"] == pytest.approx(7 / 14)
    assert "f1" not in metrics([row("sst2", *pair) for pair in pairs])


def test_pearson_reads_the_scores_behind_the_words():
    values, guesses = [0.1, 2.0, 3.3, 5.0], ["0.0", "1.8", "4.0", "4.6"]
    rows = [row("stsb", "0.0", guess, value=value) for value, guess in zip(values, guesses, strict=True)]
    expected = torch.corrcoef(torch.tensor([values, [float(g) for g in guesses]], dtype=torch.float64))[0, 1].item()
    assert metrics(rows)["pearson"] == pytest.approx(expected)
    assert metrics([row("stsb", "0.0", "1.0", value=v) for v in values])["pearson"] is None


def test_three_answers_and_no_rows():
    rows = [row("mnli", "x", guess, ("x", "y", "z")) for guess in "xyzx"]
    assert metrics(rows)["accuracy"] == 0.5
    assert glue.score([]) == {"scorer": "glue/1", "n": 0, "metrics": {"n": 0, "accuracy": None}}


def asked():
    return [
        {"x": f"classify: {i}\nresult: ", "y": ("positive", "negative")[i % 2], "choices": ["negative", "positive"]}
        for i in range(7)
    ]


def test_the_likeliest_answer_is_the_prediction_and_a_killed_run_goes_on(backend, tmp_path):
    config = glue.Config(task="sst2")
    whole = glue.run(backend, asked(), tmp_path / "whole", config)
    rows = [json.loads(line) for line in (tmp_path / "whole/predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(7))
    for one in rows:
        assert one["prediction"] == one["choices"][one["scores"].index(max(one["scores"]))]
    calls = []

    class Killed(BaseException):
        pass

    plain = backend.log_likelihoods

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return plain(*arguments, **options)

    backend.log_likelihoods = killed
    with pytest.raises(Killed):
        glue.run(backend, asked(), tmp_path / "killed", config)
    assert glue.run(backend, asked(), tmp_path / "killed", config) == whole
    assert len(calls) == 4  # three batches, the first of them not again
    assert (tmp_path / "killed/predictions.jsonl").read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()


def test_the_published_way_compares_first_tokens(backend, tmp_path):
    glue.run(backend, asked(), tmp_path, glue.Config(task="sst2", metric="published"))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for one in rows:
        expected = [log_likelihood_reference(backend, one["prompt"], choice, True) for choice in one["choices"]]
        assert one["scores"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("choices", [["positive one", "positive two"], ["a", "b", "c"]])
def test_the_published_way_is_refused_where_it_cannot_tell_answers_apart(backend, tmp_path, choices):
    rows = [{"x": "q", "y": choices[0], "choices": choices}]
    with pytest.raises(ConfigError, match=r"first tokens of two answers, which must differ"):
        glue.run(backend, rows, tmp_path, glue.Config(task="sst2", metric="published"))


@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_the_published_way_is_refused_before_anything_is_loaded(task):
    with pytest.raises(ConfigError, match=rf"metric=published with eval.glue.task={task}"):
        run_exp.experiment_of([f"dataset={task}", "eval.glue.metric=published"])


def test_metrics_of_another_task_are_refused():
    with pytest.raises(ConfigError, match=r"Invalid eval.glue.task=stsb with dataset=sst2"):
        run_exp.experiment_of(["dataset=sst2", "eval.glue.task=stsb"])


def test_glue_of_rows_without_choices_is_an_error_before_training(tiny_settings, capsys):
    assert run_exp.main([word if word != "eval=[]" else "eval=[glue]" for word in tiny_settings]) == 2
    reported = capsys.readouterr().err
    assert "1 error: nothing was loaded or written." in reported
    assert "it needs a list of at least two different answers; glue ranks given answers" in reported


def test_rows_of_no_task_of_glue_have_an_accuracy(backend, tmp_path):
    pairs = zip(PROMPTS, CHOICES, strict=True)
    rows = [{"x": prompt, "y": choices[0], "choices": choices} for prompt, choices in pairs]
    config = glue.Config(task=None)
    glue.check_rows(rows, "there", config)
    assert set(glue.run(backend, rows, tmp_path, config)["metrics"]) == {"n", "accuracy", "majority"}
    assert glue.score_file(tmp_path / "predictions.jsonl", config)["n"] == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"choices": None}, "at least two different answers"),
        ({"choices": ["a"]}, "at least two different answers"),
        ({"choices": ["a", "a"]}, "at least two different answers"),
        ({"choices": ["a", ""]}, "must be texts"),
        ({"choices": ["b", "c"]}, "'a' is not among them"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(changes, problem):
    good, config = {"x": "q", "y": "a", "choices": ["a", "b"]}, glue.Config(task="sst2")
    with pytest.raises(ConfigError, match=rf"there, row 2: .*{problem}"):
        glue.check_rows([good, good | changes], "there", config)
    glue.check_rows([good], "there", config)


@pytest.mark.parametrize(
    ("task", "changes", "problem"),
    [
        ("stsb", {}, 'row 1: its "value", the unrounded number of its answer, is missing'),
        ("stsb", {"value": 1.0}, "row 1: task=stsb needs answers that are numbers"),
        ("mrpc", {"choices": ["a", "b", "c"]}, r"row 1 \(and 1 more\): .* the same two answers in every row"),
    ],
)
def test_rows_of_another_task_are_named(task, changes, problem):
    row = {"x": "q", "y": "a", "choices": ["a", "b"]} | changes
    others = [row] if task == "stsb" else [row, row]
    with pytest.raises(ConfigError, match=problem):
        glue.check_rows(others, "there", glue.Config(task=task))


def test_answers_that_change_their_places_are_named():
    rows = [{"x": "q", "y": "a", "choices": choices} for choices in (["a", "b"], ["b", "a"])]
    with pytest.raises(ConfigError, match=r"row 2: task=cola needs the same two answers in every row"):
        glue.check_rows(rows, "there", glue.Config(task="cola"))


@pytest.fixture
def sst2(tiny_settings, tmp_path):
    rows = [{"sentence": f"s {i}", "label": i % 2, "idx": i} for i in range(4)]
    for split in ("train", "validation"):
        write_split(tmp_path, "nyu-mll/glue", "sst2", split, rows)
    kept = [word for word in tiny_settings if not word.startswith("dataset")]
    return [*kept, "dataset=sst2", f"data_root={tmp_path}", "trainer.max_steps=1"]


def test_first_tokens_are_compared_before_a_run_trains(sst2, monkeypatch, capsys):
    words = [word for word in sst2 if word != "eval=[]"] + ["eval.glue.metric=published"]
    task = data_glue.TASKS["sst2"]
    monkeypatch.setitem(data_glue.TASKS, "sst2", task._replace(labels=("accept it", "accept them")))
    assert run_exp.main(words) == 2
    assert "1 error: nothing was loaded or written." in (reported := capsys.readouterr().err)
    assert "for the answers accept it, accept them: it compares the first tokens of two answers" in reported
    monkeypatch.undo()
    assert run_exp.main(words) == 0


def test_a_finished_run_says_its_task(sst2, capsys):
    assert run_exp.main(sst2) == 0  # with eval=[]
    folder = run_folder(sst2)
    assert main("glue", [str(folder), "device=cpu"]) == 0
    assert json.loads((folder / "eval/glue/score.json").read_text())["n"] == 4
    capsys.readouterr()
    assert main("glue", [str(folder), "device=cpu", "task=mnli", "metric=published"]) == 2
    assert "Invalid eval.glue.metric=published with eval.glue.task=mnli" in capsys.readouterr().err
    assert main("glue", ["some/model", "rows=/nope.jsonl"]) == 2
    reported = capsys.readouterr().err
    assert (
        "Missing task: this key has no default; set task=VALUE; it determines the metrics, null is accuracy" in reported
    )
    assert "Invalid rows=/nope.jsonl" in reported
