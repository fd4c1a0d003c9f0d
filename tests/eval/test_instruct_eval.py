"""InstructEval by lm-eval on local copies of the tasks' data in the hub's schema."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import run_exp
from eval import instruct_eval, lm_eval_tasks
from eval.backends.hf import HFBackend
from eval.command import main
from flatlora.inputs.rows import read_jsonl
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, tiny_llama, write_split
from tests.scripted import llama2_like_tokenizer

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


@pytest.mark.extra
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
    monkeypatch.setattr("eval.backends.lm_eval.LMEvalModel", lambda *options: None)
    for task in ("drop", "mmlu_anatomy", "bbh_navigate"):
        instruct_eval._ask(None, task, instruct_eval.Config(), str(root))
    reported = [(options["tasks"][0], options["num_fewshot"]) for options in seen]
    assert reported == [("drop", 3), ("mmlu_anatomy", 5), ("bbh_fewshot_navigate", 3)]


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
    ("changes", "message"),
    [
        ({"tasks": ["gsm8k"]}, "gsm8k is none of mmlu, drop, bbh, humaneval"),
        ({"tasks": []}, "there is nothing to ask"),
        ({"tasks": ["mmlu_anatomi"]}, "did you mean mmlu_anatomy"),
        ({"tasks": ["humaneval"]}, "without eval.allow_code_execution=true"),
    ],
)
def test_tasks_that_are_none_are_errors(changes, message):
    (reported,) = [error.message for error in instruct_eval.Config(**changes).rule_errors()]
    assert message in reported


def test_missing_data_are_reported_before_a_model_is_loaded(root, tmp_path):
    settings = instruct_eval.Config(tasks=["mmlu_anatomy", "mmlu_astronomy", "mmlu_virology", "drop", "bbh_snarks"])
    with pytest.raises(ConfigError) as reported:
        instruct_eval.check_rows(instruct_eval.benchmark_rows(str(root), settings), "", settings)
    mmlu, bbh = reported.value.errors
    assert "cais/mmlu/astronomy/test.jsonl (or .parquet) does not exist" in mmlu
    assert mmlu.endswith("3 more files of cais/mmlu are missing.")
    assert "SaylorTwift/bbh/snarks/test.jsonl" in bbh


def test_parquet_is_read_as_well(root, tmp_path):
    import datasets

    usual = datasets.load_dataset
    other = tmp_path / "SaylorTwift/bbh/navigate"
    other.mkdir(parents=True)
    rows = read_jsonl(root / "SaylorTwift/bbh/navigate/test.jsonl")
    datasets.Dataset.from_list(rows).to_parquet(other / "test.parquet")
    with lm_eval_tasks.data_of(instruct_eval._sources("bbh_navigate"), str(tmp_path)):
        assert datasets.load_dataset("SaylorTwift/bbh", "navigate")["test"].to_list() == rows
    assert datasets.load_dataset is usual


@pytest.mark.extra
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
    reported = " ".join(capsys.readouterr().err.split())
    assert "lm-eval cannot run bbh_fewshot_navigate" in reported
    assert "nothing was loaded" not in reported
    kept = tmp_path / "answers/tasks"
    assert [path.name for path in sorted(kept.glob("*.jsonl"))] == ["mmlu_anatomy.jsonl"]


CONTEXT = "Which <s> ends </s> the list?\nA. one\nB. two\nAnswer:"
ENDS = {"until": ["</s>", "\n\n"], "do_sample": False, "max_gen_toks": 6}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of Llama-2's kind: one, and the same with an end behind every text."""
    lines = ["Which ends the list?", "A. one", "B. two", "Answer: A B C D"] * 20
    plain = llama2_like_tokenizer(tmp_path_factory.mktemp("plain"), lines, pieces=320)
    folder = tmp_path_factory.mktemp("ending")
    plain.save_pretrained(folder)
    return plain, AutoTokenizer.from_pretrained(folder, add_bos_token=True, add_eos_token=True)


def asker(model, tokenizer, batch_size=3):
    from eval.backends.lm_eval import LMEvalModel

    return LMEvalModel(HFBackend(model, tokenizer, batch_size=batch_size), "mmlu_anatomy", batch_size)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0) for one in arguments]


def by_hand(model, tokenizer, context, answer):
    """log p of the answer's tokens, of ids that the tokenizer gives to the text as text."""
    before, whole = (tokenizer(text, split_special_tokens=True)["input_ids"] for text in (context, context + answer))
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([whole])).logits[0, :-1].double().log_softmax(-1)
    return sum(scores[place - 1, whole[place]].item() for place in range(len(before), len(whole)))


@pytest.mark.parametrize("ending", [False, True])
def test_choices_are_weighed_by_the_tokens_of_their_text(tokenizers, ending):
    model = tiny_llama(vocab_size=len(tokenizers[0])).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    assert tokenizers[0].bos_token_id not in tokenizers[0](CONTEXT, split_special_tokens=True)["input_ids"][1:]
    asked = [(CONTEXT, " A"), (CONTEXT, " B"), (CONTEXT[5:], " two, </s> or one")]
    scores = asker(model, tokenizers[ending]).loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    expected = [by_hand(model, tokenizers[0], *pair) for pair in asked]
    assert [score for score, _ in scores] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("ending", [False, True])
def test_answers_are_the_largest_logits_whatever_the_model_s_own_generation_config(tokenizers, ending):
    tokenizer = tokenizers[0]
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    ids = tokenizer(CONTEXT, split_special_tokens=True)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n\n")[0]
    model.generation_config.repetition_penalty = 1e-3
    asked = requests("generate_until", (CONTEXT, ENDS), ("Which?", ENDS))
    assert asker(model, tokenizers[ending]).generate_until(asked)[0] == expected


def test_the_blank_before_an_answer_is_none_of_it(tokenizers, monkeypatch):
    from eval.backends import Completion

    model = asker(tiny_llama(vocab_size=len(tokenizers[0])), tokenizers[0])
    monkeypatch.setattr(model._answering, "generate_ids", lambda *asked: [Completion(" Yes", 1, True)])
    assert model.generate_until(requests("generate_until", ("Q: 3\nA:", ENDS))) == ["Yes"]


def test_prompts_longer_than_the_context_are_refused_or_counted_never_cut(tokenizers, caplog):
    tokenizer, long = tokenizers[0], "one two " * 60 + "one"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1))
    pairs = requests("loglikelihood", *[(long, " A"), (long, " B"), ("one", " A")])
    too_long = "Too long for the model: 1 of 2 prompts of mmlu_anatomy"
    with pytest.raises(ConfigError, match=too_long):
        asker(gpt2, tokenizer).loglikelihood(pairs, disable_tqdm=True)
    texts = requests("generate_until", (long, ENDS), ("one", ENDS))
    with pytest.raises(ConfigError, match=too_long):
        asker(gpt2, tokenizer).generate_until(texts)
    llama = tiny_llama(vocab_size=len(tokenizer)).eval()
    llama.config.max_position_embeddings = 32
    rotary = asker(llama, tokenizer)
    with caplog.at_level(logging.WARNING):
        scores = rotary.loglikelihood(pairs, disable_tqdm=True)
        rotary.generate_until(texts)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "eval.backends.tokenized"]
    assert message.startswith("1 of 2 prompts of mmlu_anatomy and their answers")
    assert scores[0][0] == pytest.approx(by_hand(llama, tokenizer, long, " A"), rel=1e-4)
