"""Every text data set of the papers on a few rows with the hub's columns: formats, filters, splits, a training step."""

import json

import pytest

import data
import run_exp
from data import codefeedback, glue, wizard_lm
from eval import command
from flatlora.inputs.rows import prompt_text
from flatlora.utils.errors import ConfigError
from tests.conftest import metrics_rows, run_folder, write_split

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def count_words(texts):
    return [len(text.split()) for text in texts]


def written(root):
    """Small files with the hub's exact columns for every text data set; GLUE's tasks besides."""
    math = [
        {
            "type": ("GSM_Rephrased", "MATH_AnsAug")[i % 2],
            "query": f"What is {i} + 1?",
            "original_question": "q",
            "response": f"{i} + 1 = {i + 1}\n#### {i + 1}\nThe answer is: {i + 1}",
        }
        for i in range(20)
    ]
    code = [
        {
            "query": f"Print {i}.",
            "answer": f"So:\n```python\nprint({i})\n```\nIt prints {i}." if i % 4 else "No code.",
            "resource": "evol",
            "lang": "python",
        }
        for i in range(16)
    ]
    outputs = ("Of course: {}.", "I'm SORRY, {}.", "As an AI I have {}.", "It is {}.")
    wizard = [
        {"instruction": f"Say {i}.", "output": outputs[i % 4].format(i), "instruction_zh": "说", "output_zh": "好"}
        for i in range(20)
    ]
    alpaca = [
        {"instruction": f"Add {i}.", "input": "" if i % 2 else f"to {i}", "output": str(2 * i), "text": "t"}
        for i in range(20)
    ]
    flan = [
        {
            "inputs": f"Translate {i}:",
            "targets": f"eins {i}",
            "task_source": "s",
            "task_name": "n",
            "template_type": "t",
        }
        for i in range(12)
    ]
    squad = [
        {
            "id": str(i),
            "title": "T",
            "context": f"The tower is {i} m high.",
            "question": "How high is it?",
            "answers": {"text": [f"{i} m", f"{i}"], "answer_start": [13, 13]},
        }
        for i in range(12)
    ]
    gsm8k = [{"question": f"{i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(20)]
    for hub_id, config, split, rows in (
        ("meta-math/MetaMathQA", "default", "train", math),
        ("m-a-p/CodeFeedback-Filtered-Instruction", "default", "train", code),
        ("silk-road/Wizard-LM-Chinese-instruct-evol", "default", "train", wizard),
        ("tatsu-lab/alpaca", "default", "train", alpaca),
        ("vicgalle/alpaca-gpt4", "default", "train", alpaca),
        ("yahma/alpaca-cleaned", "default", "train", alpaca),
        ("SirNeural/flan_v2", "default", "train", flan),
        ("rajpurkar/squad", "plain_text", "train", squad),
        ("rajpurkar/squad", "plain_text", "validation", squad[:4]),
        ("openai/gsm8k", "main", "train", gsm8k),
        ("openai/gsm8k", "main", "test", gsm8k[:4]),
    ):
        write_split(root, hub_id, config, split, rows)
    for task in glue.TASKS:
        write_glue(root, task)
    return root


def glue_rows(task, count=8):
    columns, labels = glue.TASKS[task].columns, len(glue.TASKS[task].labels)
    values = [round(0.7 * i, 2) for i in range(count)] if task == "stsb" else [i % labels for i in range(count)]
    return [
        {**{column: f"{column} {i}." for column in columns}, "label": value, "idx": i} for i, value in enumerate(values)
    ]


def write_glue(root, task):
    write_split(root, glue.TASKS[task].hub_id, task, "train", glue_rows(task))
    for split in ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",):
        write_split(root, glue.TASKS[task].hub_id, task, split, glue_rows(task, 6))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data"))


def load(root, *settings):
    config = run_exp.experiment_of([*settings, "model.generated_test_rows=null"]).dataset
    return data.DATASETS[config.loader].load(config, str(root), count_words)


def small(train, validation=2):
    return [f"dataset.train_rows={train}", f"dataset.validation_rows={validation}"]


# --- what the rows are


def test_codefeedback_ends_at_the_first_block_and_leaves_rows_without_code(root):
    splits = load(root, "dataset=codefeedback", *small(8))
    assert splits.train[0] == {
        "x": f"{ALPACA}### Instruction:\nPrint 1.\n\n### Response:\n",
        "y": "So:\n```python\nprint(1)\n```",
    }
    assert len(splits.train) == 8
    assert not any("It prints" in row["y"] for row in splits.train + splits.validation)
    full = load(root, "dataset=codefeedback", "dataset.response=full", *small(8))
    assert full.train[0]["y"].endswith("It prints 1.")


@pytest.mark.parametrize(
    ("answer", "kept"),
    [("a ``` b ``` c ``` d ```", "a ``` b ```"), ("a ``` b", "a ``` b"), ("``` a ```", "``` a ```")],
)
def test_a_block_is_cut_where_it_ends(answer, kept):
    assert codefeedback.first_block(answer) == kept


def test_wizard_lm_leaves_out_refusals_in_any_case(root):
    splits = load(root, "dataset=wizard_lm", *small(6))
    assert [row["y"] for row in splits.train[:2]] == ["Of course: 0.", "It is 3."]
    assert len(splits.train) + len(splits.validation) == 8
    assert not any(word in row["y"].lower() for row in splits.train for word in wizard_lm._REFUSALS)


@pytest.mark.parametrize("name", ["alpaca", "alpaca_cleaned", "alpaca_gpt4"])
def test_alpaca_has_both_prompts_and_a_tenth_to_validate(root, name):
    splits = load(root, f"dataset={name}")
    assert [len(rows) for rows in splits] == [18, 2, 0]
    assert "### Input:\nto 0\n\n### Response:\n" in splits.train[0]["x"]
    assert splits.train[1]["x"] == f"{ALPACA}### Instruction:\nAdd 1.\n\n### Response:\n"
    assert not {row["x"] for row in splits.train} & {row["x"] for row in splits.validation}


def test_meta_math_has_two_families_of_templates(root):
    ours = load(root, "dataset=meta_math", *small(8))
    assert ours.train[0] == {"x": "Q: What is 0 + 1?\nA: ", "y": "0 + 1 = 1\n#### 1"}
    theirs = load(root, "dataset=meta_math", "dataset.template=alpaca", *small(8))
    assert theirs.train[0]["x"] == f"{ALPACA}### Instruction:\nWhat is 0 + 1?\n\n### Response:\n"
    assert theirs.train[0]["y"].endswith("The answer is: 1")
    assert theirs.test[0]["x"].startswith(ALPACA)  # asked as it was trained
    cut = load(root, "dataset=meta_math", "dataset.template=alpaca", "dataset.response=cut", *small(8))
    assert cut.train[0]["y"] == ours.train[0]["y"]


def test_meta_math_in_the_form_of_pefts_suite(tmp_path):
    root = tmp_path
    write_split(root, "openai/gsm8k", "main", "test", [{"question": "2?", "answer": "#### 2"}])
    rows = [
        {"type": kind, "query": query, "response": "It is 2.\nThe answer is: 2", "original_question": "q"}
        for kind, query in (("MATH_SV", "1 + 1?"), ("GSM_Rephrased", "long" * 400), ("GSM_SV", "3 - 1?"))
    ]
    write_split(root, "meta-math/MetaMathQA", "default", "train", rows)
    words = ["dataset=meta_math", "dataset.template=step_by_step", "dataset.types=all", "dataset.max_characters=1300"]
    splits = load(root, *words, "dataset.max_tokens=null", *small(2, 0))
    begins = [f"Question: {query} Think step by step.\nAnswer:" for query in ("1 + 1?", "3 - 1?")]
    assert splits.train == [{"x": x, "y": "It is 2.\nThe answer is: 2"} for x in begins]
    assert [prompt_text(row) for row in splits.train] == begins
    assert splits.test[0]["x"].endswith("? Think step by step.\nAnswer:")
    exactly = len("1 + 1? It is 2.\nThe answer is: 2")
    assert len(load(root, *words[:-1], f"dataset.max_characters={exactly}", *small(1, 0)).train) == 1
    with pytest.raises(ConfigError, match=r"only 0 rows are left|keeps no train rows"):
        load(root, *words[:-1], f"dataset.max_characters={exactly - 1}", *small(1, 0))


def test_flan_rows_are_prompts_as_they_are(root):
    assert load(root, "dataset=flan_v2", *small(8)).train[0] == {"x": "Translate 0:", "y": "eins 0"}
    as_questions = load(root, "dataset=flan_v2", "dataset.template=qa", *small(8))
    assert as_questions.train[0]["x"] == "Q: Translate 0:\nA: "


def test_squad_learns_the_first_answer_and_keeps_all_to_score(root):
    splits = load(root, "dataset=squad", *small(8))
    assert splits.train[3]["y"] == "3 m"
    assert "### Input:\nThe tower is 3 m high." in splits.train[3]["x"]
    assert splits.test[1]["answers"] == ["1 m", "1"]
    published = load(root, "dataset=squad", "dataset.template=published", *small(8))
    asked = "answer the question: How high is it?\ncontext: The tower is 3 m high.\nresult: "
    assert published.train[3] == {"x": asked, "y": "3 m, 3"}
    assert published.test[3]["x"] == asked


@pytest.mark.parametrize("answers", [{"text": []}, {"text": [""]}, {}, "1 m", None])
def test_squad_without_an_answer_is_an_error(tmp_path, answers):
    row = {"context": "c", "question": "q", "answers": answers}
    write_split(tmp_path, "rajpurkar/squad", "plain_text", "train", [row])
    write_split(tmp_path, "rajpurkar/squad", "plain_text", "validation", [row])
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "dataset=squad")
    assert len(caught.value.errors) == 2
    assert "row 1" in caught.value.errors[0]


def test_sentences_without_text_do_not_train_and_are_asked(tmp_path, caplog):
    rows = [{"sentence": text, "label": 0, "idx": 0} for text in ("a", " ", "b")]
    for split in ("train", "validation"):
        write_split(tmp_path, glue.HUB_ID, "sst2", split, rows)
    splits = load(tmp_path, "dataset=sst2")
    assert [len(part) for part in splits] == [2, 0, 3]
    assert "1 train rows have an empty sentence and are left out" in caplog.text
    assert "1 test rows have an empty sentence" in caplog.text
    assert set(splits.test[0]) == set(splits.train[0]) == {"x", "y", "choices", "texts"}


def test_a_sentence_that_trains_validates_under_no_other_label(tmp_path):
    rows = [{"sentence": text, "label": label, "idx": 0} for text, label in (("a", 0), ("b", 1), ("a", 1), ("c", 1))]
    for split in ("train", "validation"):
        write_split(tmp_path, glue.HUB_ID, "sst2", split, rows)
    splits = load(tmp_path, "dataset=sst2", *small(2, 1))
    assert [row["x"].split()[-2] for row in splits.validation] == ["c"]


def test_a_tokenizer_that_counts_for_no_limit_is_an_error():
    with pytest.raises(ConfigError, match=r"dataset.limit_tokenizer=some/model without dataset.max_tokens"):
        run_exp.experiment_of(["dataset=alpaca", "dataset.limit_tokenizer=some/model"])


def test_both_sources_of_meta_math_can_be_pinned():
    words = ["dataset=meta_math", "dataset.revision=one", "dataset.test_revision=two"]
    config = run_exp.experiment_of(words).dataset
    assert [source.revision for source in data.DATASETS["meta_math"].sources(config)] == ["one", "two"]


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"instruction": i, "input": "", "output": o} for i, o in (("a", "b"), (" ", "b"), ("a", "\n"), ("c", "d"))]
    write_split(tmp_path, "tatsu-lab/alpaca", "default", "train", rows)
    splits = load(tmp_path, "dataset=alpaca", "dataset.validation_rows=0")
    assert [row["y"] for row in splits.train] == ["b", "d"]
    assert "2 rows have no instruction or no response" in caplog.text


def test_a_row_that_trains_never_validates(tmp_path, caplog):
    rows = [{"instruction": f"{i % 5}", "input": "", "output": "o"} for i in range(8)] + [
        {"instruction": "new", "input": "", "output": "o"}
    ]
    write_split(tmp_path, "tatsu-lab/alpaca", "default", "train", rows)
    splits = load(tmp_path, "dataset=alpaca", *small(5, 1))
    assert "new" in splits.validation[0]["x"]
    assert "3 rows repeat train rows" in caplog.text


GLUE_ROWS = {
    "sst2": ("classify the sentiment of the text: sentence 1.\nresult: ", "positive"),
    "cola": ("classify the grammaticality of the text: sentence 1.\nresult: ", "acceptable"),
    "mrpc": ("classify the semantic similarity of the text: sentence1 1.\nsentence2 1.\nresult: ", "equivalent"),
    "qqp": ("classify the semantic similarity of the text: question1 1.\nquestion2 1.\nresult: ", "duplicate"),
    "mnli": ("classify the semantic similarity of the text: premise 1.\nhypothesis 1.\nresult: ", "neutral"),
    "qnli": (
        "classify the semantic similarity of the question and the sentence: question 1.\nsentence 1.\nresult: ",
        "not_entailment",
    ),
    "rte": ("classify the semantic similarity of the text: sentence1 1.\nsentence2 1.\nresult: ", "not_entailment"),
    "stsb": ("rate the semantic similarity of the text: sentence1 1.\nsentence2 1.\nresult: ", "0.8"),
    "boolq": ("answer the question about the passage: passage 1.\nquestion 1.\nresult: ", "true"),
    "cb": ("classify the semantic similarity of the text: premise 1.\nhypothesis 1.\nresult: ", "contradiction"),
    "copa": (
        "choose the cause or effect of the premise: premise 1.\nquestion 1.\nchoice1 1.\nchoice2 1.\nresult: ",
        "second",
    ),
    "wic": (
        "compare the meaning of the word in both sentences: word 1.\nsentence1 1.\nsentence2 1.\nresult: ",
        "same",
    ),
}


@pytest.mark.parametrize("task", glue.TASKS)
def test_glue_rows_are_in_the_published_words(root, task):
    splits = load(root, f"dataset={task}")
    assert (splits.train[1]["x"], splits.train[1]["y"]) == GLUE_ROWS[task]
    assert [len(rows) for rows in splits] == [8, 0, 6]
    assert all(row["y"] in row["choices"] for row in splits.test)
    if task == "stsb":
        assert splits.test[1]["value"] == 0.7


@pytest.mark.parametrize(("task", "label"), [("sst2", -1), ("mnli", 3), ("stsb", 5.1), ("stsb", -1.0)])
def test_a_label_outside_the_map_is_an_error_that_names_it(tmp_path, task, label):
    write_glue(tmp_path, task)
    rows = glue_rows(task)
    rows[3]["label"] = label
    write_split(tmp_path, glue.HUB_ID, task, "train", rows)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"dataset={task}")
    (message,) = caught.value.errors
    assert f"row 4 (and 0 more): {label} is none of" in message
    assert "test split has no labels" in message


@pytest.mark.parametrize("label", [None, "1", 1.0, True])
def test_a_label_that_is_no_whole_number_is_an_error(tmp_path, label):
    write_glue(tmp_path, "cola")
    write_split(tmp_path, glue.HUB_ID, "cola", "train", [{"sentence": "s", "label": label, "idx": 0}])
    with pytest.raises(ConfigError, match="row 1: it must be a whole number"):
        load(tmp_path, "dataset=cola")


# --- through a whole run

LLAMA = ("gsm8k", "meta_math", "codefeedback", "wizard_lm", "alpaca", "alpaca_gpt4", "flan_v2", "squad")


QUICK = ("gsm8k", "codefeedback", "squad", "cola", "mnli", "stsb")  # a form of rows or a metric of its own each


def quick_first(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.extra) for name in names]


@pytest.mark.parametrize("name", quick_first(LLAMA))
def test_a_training_step_on_a_tiny_llama(root, tiny_settings, name):
    kept = [w for w in tiny_settings if not w.startswith("dataset.")]
    sizes = [*small(6), *(["dataset.test_rows=2"] if name in ("gsm8k", "meta_math", "squad") else [])]
    words = [*kept, f"dataset={name}", f"data_root={root}", "trainer.max_steps=1", *sizes]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    assert [row["step"] for row in metrics_rows(folder) if "loss" in row] == [1]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_set_without_test_rows_is_asked_the_benchmarks_own_in_its_own_template(root, tiny_settings):
    kept = [w for w in tiny_settings if not w.startswith(("dataset.", "eval"))]
    words = [*kept, "dataset=alpaca", *small(6), "eval=[gsm8k]", "eval.gsm8k.max_new_tokens=2", "eval.gsm8k.max_rows=2"]
    words += [f"data_root={root}", "trainer.max_steps=1"]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    rows = [json.loads(line) for line in (folder / "eval/gsm8k/predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"].startswith(f"{ALPACA}### Instruction:\n{i} + 1?") for i, row in enumerate(rows)] == [True] * 2
    assert command.main("gsm8k", [str(folder), "device=cpu"]) == 0  # the same rows, from the run's own data_root
    assert (folder / "eval/gsm8k/predictions.jsonl").read_text().count("\n") == 2
    assert not (folder / "eval/gsm8k/predictions.stale.jsonl").is_file()


def test_a_benchmarks_template_is_rejected_where_the_runs_rows_are_asked(root, tiny_settings, capsys):
    kept = [w for w in tiny_settings if not w.startswith(("dataset.", "eval"))]
    words = [
        *kept,
        "dataset=gsm8k",
        *small(6),
        "dataset.test_rows=2",
        f"data_root={root}",
        "eval.gsm8k.template=alpaca",
    ]
    assert run_exp.main(words) == 2
    assert "Invalid eval.gsm8k.template=alpaca with dataset=gsm8k: its test rows are asked" in capsys.readouterr().err


@pytest.mark.parametrize("task", quick_first(glue.TASKS))
def test_a_training_step_and_a_score_on_a_tiny_t5(root, tiny_settings, tiny_t5_folder, task):
    kept = [w for w in tiny_settings if not w.startswith(("dataset.", "model.", "eval"))]
    model = ["model=t5base", f"model.hub_id={tiny_t5_folder}", "rho=flat"]
    words = [*kept, *model, f"dataset={task}", f"data_root={root}", "trainer.max_steps=1"]
    assert run_exp.main(words) == 0
    record = json.loads((run_folder(words) / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert record["metrics"]["glue/n"] == 6
    path = run_folder(words) / "eval" / "glue" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["metrics"]["glue/accuracy"] == sum(row["prediction"] == row["reference"] for row in rows) / 6
    assert all(row["prediction"] == row["choices"][row["scores"].index(max(row["scores"]))] for row in rows)
