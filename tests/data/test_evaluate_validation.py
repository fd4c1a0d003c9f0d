"""dataset.evaluate=validation: benchmarks score rows that are held out of the train split, and no test row is read."""

import json

import pytest

import data
import run_exp
from data import Splits, cache, images, meta_math
from flatlora.models.processors import load_image_processor
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, write_split

VALIDATION = "dataset.evaluate=validation"
WHOLE = "model.generated_test_rows=null"


def count_words(texts):
    return [len(text.split()) for text in texts]


@pytest.fixture(scope="module")
def train_only(tmp_path_factory):
    """The train splits of several data sets; there is no file with test rows."""
    root = tmp_path_factory.mktemp("train-only")
    pairs = [{"sentence": f"Sentence {n}.", "label": n % 2, "idx": n} for n in range(20)]
    for task in ("cola", "sst2"):
        write_split(root, "nyu-mll/glue", task, "train", pairs)
    scores = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "label": n / 4, "idx": n} for n in range(20)]
    write_split(root, "nyu-mll/glue", "stsb", "train", scores)
    math = [{"question": f"{n} + 1?", "answer": f"{n + 1}\n#### {n + 1}"} for n in range(20)]
    write_split(root, "openai/gsm8k", "main", "train", math)
    answers = {"text": ["high"], "answer_start": [0]}
    squad = [{"context": f"high {n}", "question": f"how {n}?", "answers": answers} for n in range(20)]
    write_split(root, "rajpurkar/squad", "plain_text", "train", squad)
    alpaca = [{"instruction": f"Add {n}.", "input": "", "output": str(n)} for n in range(20)]
    write_split(root, "tatsu-lab/alpaca", "default", "train", alpaca)
    rephrased = [
        {
            "type": "GSM_Rephrased",
            "query": f"{n} in form {form}?",
            "response": f"#### {n}",
            "original_question": f"q {n}",
        }
        for form in range(4)
        for n in range(40)
    ]
    write_split(root, "meta-math/MetaMathQA", "default", "train", rephrased)
    return root


def load(root, *settings):
    config = run_exp.experiment_of([*settings, WHOLE, f"data_root={root}"]).dataset
    return data.DATASETS[config.loader].load(config, str(root), count_words)


def keys(rows):
    return {(row["x"], row["y"]) for row in rows}


@pytest.mark.parametrize("subset", ["first", "shuffled"])
@pytest.mark.parametrize("name", ["cola", "sst2", "stsb", "gsm8k", "squad", "alpaca"])
def test_validation_rows_come_from_the_train_split_and_are_not_trained_on(train_only, name, subset):
    words = [f"dataset={name}", VALIDATION, "dataset.validation_rows=6", f"dataset.subset={subset}", "eval=[]"]
    splits = load(train_only, *words)
    assert (len(splits.train), len(splits.validation), splits.test) == (14, 6, [])
    assert not keys(splits.train) & keys(splits.validation)


def test_validation_rows_have_what_their_benchmark_scores(train_only):
    words = [VALIDATION, "dataset.validation_rows=6"]
    assert load(train_only, "dataset=cola", *words).validation[0]["choices"] == ["unacceptable", "acceptable"]
    assert load(train_only, "dataset=stsb", *words).validation[0]["value"] == 14 / 4
    assert load(train_only, "dataset=squad", *words).validation[0]["answers"] == ["high"]
    published = load(train_only, "dataset=squad", "dataset.template=published", *words)
    assert published.validation[0]["answers"] == ["high"]
    assert set(load(train_only, "dataset=cola", *words).train[0]) == {"x", "y", "choices", "texts"}


def test_word_math_scores_problems_of_its_validation_split():
    config = run_exp.experiment_of(["dataset=word_math", VALIDATION]).dataset
    splits = data.DATASETS["word_math"].load(config, None, count_words)
    usual = data.DATASETS["word_math"].load(config.model_copy(update={"evaluate": "test"}), None, count_words)
    assert splits.test == []
    assert splits[:2] == usual[:2]
    assert not keys(splits.validation) & (keys(usual.test) | keys(usual.train))


def test_meta_math_holds_out_whole_questions(train_only):
    sizes = ["dataset.train_rows=null", "dataset.validation_rows=4", "dataset.max_tokens=30"]
    splits = load(train_only, "dataset=meta_math", VALIDATION, *sizes)
    numbers = [{row["x"].split()[1] for row in rows} for rows in (splits.train, splits.validation)]
    held_out = {str(n) for n in range(40) if meta_math._is_held_out(f"q {n}")}
    assert numbers[0] == {str(n) for n in range(40)} - held_out
    assert numbers[1] <= held_out
    assert (len(splits.validation), splits.test) == (4, [])
    with pytest.raises(ConfigError, match=r"Invalid dataset\.validation_rows=40: only"):
        load(train_only, "dataset=meta_math", VALIDATION, "dataset.train_rows=8", "dataset.validation_rows=40")


@pytest.fixture
def digits_processor():
    return load_image_processor(run_exp.experiment_of(["model=clip_tiny", "dataset=digits"]).model)


def test_pictures_are_of_the_train_split(digits_processor):
    words = ["model=clip_tiny", "dataset=digits", "dataset.validation_rows=9", "dataset.train_rows=20"]
    config = run_exp.experiment_of([*words, VALIDATION]).dataset
    rows = images.prepared(config, None, digits_processor)
    usual = images.prepared(config.model_copy(update={"evaluate": "test"}), None, digits_processor)
    assert rows.test.digests == rows.validation.digests == usual.validation.digests
    assert len(rows.test) == 9
    assert rows.test.images.source.endswith("(train)")
    assert not set(rows.test.digests) & (set(usual.test.digests) | set(rows.train.digests))
    few = images.prepared(config.model_copy(update={"test_rows": 3}), None, digits_processor)
    assert few.test.digests == rows.validation.digests[:3]


def test_a_tuning_run_reads_and_scores_no_test_row(train_only, tiny_settings):
    """There is no file of test rows: a run that reads one fails."""
    words = [word for word in tiny_settings if not word.startswith(("eval=", "dataset."))]
    words += ["dataset=cola", f"data_root={train_only}", "trainer.max_steps=2", "dataset.subset=shuffled", "seed=3"]
    words += ["dataset.validation_rows=6", VALIDATION]
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    record = json.loads((folder / "run.json").read_bytes())
    scored = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    splits = load(train_only, *(word for word in words if word.startswith("dataset")))
    assert record["metrics"]["glue/n"] == 6
    assert record["metrics"]["eval_loss"] > 0
    assert keys(scored) == keys(splits.validation)
    assert not keys(scored) & keys(splits.train)
    asked = [json.loads(line) for line in (folder / "eval/glue/predictions.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in asked} == {f"{row['x']} " for row in splits.validation}


def test_test_rows_limits_the_scored_rows(train_only, smollm_tokenizer):
    words = ["dataset=gsm8k", VALIDATION, "dataset.validation_rows=6", "dataset.test_rows=4", f"data_root={train_only}"]
    rows = cache.prepared(run_exp.experiment_of(words).dataset, str(train_only), smollm_tokenizer)
    assert [row["x"] for row in rows.test] == [f"Q: {n} + 1?\nA: " for n in range(14, 18)]
    assert len(rows.validation) == 6


def test_it_holds_for_every_loader_and_rows_that_are_trained_on_are_an_error(smollm_tokenizer, monkeypatch):
    row, other, seen = ({"x": f"Q: {n}\nA: ", "y": "#### 1"} for n in range(3))
    config = run_exp.experiment_of(["dataset=word_math", VALIDATION]).dataset
    monkeypatch.setattr(cache, "_load", lambda *_: Splits([row], [other], [seen]))
    assert cache.prepared(config, None, smollm_tokenizer).test == [other]
    monkeypatch.setattr(cache, "_load", lambda *_: Splits([row], [other, row], [seen]))
    with pytest.raises(ConfigError, match="1 of 2 validation rows are train rows"):
        cache.prepared(config.model_copy(update={"train_rows": 1}), None, smollm_tokenizer)


def test_it_is_part_of_the_identity_and_the_default_is_not():
    plain, named, tuned = (
        run_exp.experiment_of(["dataset=word_math", *words]) for words in ([], ["dataset.evaluate=test"], [VALIDATION])
    )
    assert plain.sha256() == named.sha256() != tuned.sha256()
    assert plain.run_name() != tuned.run_name()
    assert "evaluate" not in plain.identity()["dataset"]


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (
            ["dataset=cola"],
            "Invalid dataset.evaluate=validation with dataset.validation_rows=0: no row of dataset=cola",
        ),
        (
            ["dataset=wizard_lm", "eval=[mt_bench]", "eval.mt_bench.judge=gpt-4", "eval.mt_bench.judge_url=https://x"],
            "Invalid eval=[mt_bench] with dataset.evaluate=validation: its rows",
        ),
        (
            ["dataset=codefeedback", "eval=[humaneval]", "eval.allow_code_execution=true"],
            "Invalid eval=[humaneval] with",
        ),
        (
            ["model=sdxl_tiny", "dataset=shapes"],
            "Invalid dataset.evaluate=validation with dataset=shapes: there are no",
        ),
        (["dataset=gsm8k", "dataset.evaluate=dev"], "Invalid dataset.evaluate='dev': it must be one of"),
    ],
)
def test_what_has_no_validation_split_is_an_error(words, reported):
    with pytest.raises(ConfigError) as caught:
        run_exp.experiment_of([VALIDATION, *words])
    assert [reported in message for message in caught.value.errors] == [True]


def test_corrupted_test_pictures_are_test_rows():
    assert run_exp.SUITE.benchmarks["corruptions"].test_only
