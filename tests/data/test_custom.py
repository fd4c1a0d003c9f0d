"""Own rows: every format gives the same rows; the same rows as a built-in data set give the same ids and adapter."""

import csv
import gzip
import json
import logging
from pathlib import Path

import datasets
import pytest
import trl

import data
from data import cache, custom, gsm8k
from flatlora.inputs.rows import Source, jsonl, read_rows
from flatlora.trained import card, description
from flatlora.utils.errors import ConfigError
from run_exp import main
from tests.conftest import adapter_bytes, run_folder, write_split

ROWS = [{"question": f'Is {i}, "x"\nreally 007?', "answer": f"{i} + 1\n#### {i + 1}"} for i in range(40)]
GSM8K = {"prompt": "Q: {question}\nA:  ", "answer": "{answer}"}


def config(path, **keys):
    return custom.Config(**{"name": "custom", "loader": "custom", "path": str(path), "max_length": 128} | keys)


def load(path, **keys):
    return custom.load(config(path, **keys), None, lambda texts: [1] * len(texts))


def write(path: Path, rows) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write(json.dumps(rows) if name.endswith(".json") else jsonl(rows))
    return path


FORMATS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    train, _, test = load(write(tmp_path / f"rows.{suffix}", ROWS), test_share=0.25, **GSM8K)
    assert [row["y"] for row in (*train, *test)] == [row["answer"] for row in ROWS]
    assert train[3]["x"] == f"Q: {ROWS[3]['question']}\nA:  "
    assert len(test) == 10


def shards(folder: Path, split: str, rows) -> None:
    for k in range(3):
        write(folder / f"{split}-0000{k}-of-00003.parquet", rows[k::3])


def test_shards_of_a_download_are_one_split_in_a_folder_and_under_data_root(tmp_path):
    shards(tmp_path / "data", "train", ROWS)
    shards(tmp_path / "openai/gsm8k/main", "train", ROWS)
    (train, _, _) = load(tmp_path, **GSM8K)
    of_root = read_rows(Source("openai/gsm8k", "main", "train"), columns=("answer",), data_root=str(tmp_path))
    assert [row["y"] for row in train] == [row["answer"] for k in range(3) for row in ROWS[k::3]]
    assert [row["answer"] for row in of_root] == [row["y"] for row in train]
    (tmp_path / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(ConfigError, match="2 of 3 files train-… are there; download the others"):
        load(tmp_path, **GSM8K)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_same_rows_as_gsm8k_give_the_same_ids(suffix, tmp_path, smollm_tokenizer):
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / f"own/{split}.{suffix}", rows)
        write_split(tmp_path, "openai/gsm8k", "main", split, rows)
    built_in = gsm8k.Config(name="gsm8k", loader="gsm8k", validation_rows=0, max_length=128)
    expected = cache.prepared(built_in, str(tmp_path), smollm_tokenizer)
    own = cache.prepared(config(tmp_path / "own", **GSM8K), None, smollm_tokenizer)
    assert own.sha256 == expected.sha256
    assert [row["y"] for row in own.test] == [row["y"] for row in expected.test]


def test_the_same_rows_as_gsm8k_give_the_same_adapter_and_are_scored(tmp_path, tiny_settings):
    for split, rows in (("train", ROWS[:30]), ("test", ROWS[30:])):
        write(tmp_path / f"own/{split}.csv", rows)
        write_split(tmp_path, "openai/gsm8k", "main", split, rows)
    own = [f"dataset.path={tmp_path / 'own'}", "dataset.max_length=512", 'dataset.answer="{answer}"']
    own += [r'dataset.prompt="Q: {question}\nA:  "', "eval=[custom]", r'eval.custom.pattern="#### (.*)"']
    own += ["eval.custom.max_new_tokens=2"]
    settings = [word for word in tiny_settings if "validation_rows" not in word and word != "eval=[]"]
    runs = []
    for name, words in (
        ("gsm8k", [*tiny_settings, "dataset=gsm8k", f"data_root={tmp_path}"]),
        ("custom", [*settings, "dataset=custom", *own]),
    ):
        words = [*words, f"results_root={tmp_path / name}", "trainer.max_steps=2"]
        words = [word for word in words if word != f"results_root={tmp_path / 'results'}"]
        assert main(words) == 0
        runs.append(run_folder(words))
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])
    score = json.loads((runs[1] / "eval/custom/score.json").read_text())
    assert score["n"] == 4
    assert score["metrics"]["exact_match"] == 0


def test_prompt_and_completion_have_the_ids_and_the_loss_of_trl(tmp_path, smollm_tokenizer, tiny_model_folder):
    rows = [{"prompt": f"Translate {i}:", "completion": f" it is {i}."} for i in range(6)]
    own = cache.prepared(config(write(tmp_path / "a.jsonl", rows)), None, smollm_tokenizer).train
    arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(
        str(tiny_model_folder),
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=smollm_tokenizer,
    )
    for row, theirs in zip(own, trainer.train_dataset, strict=True):
        assert row["prompt"] + row["answer"] == theirs["input_ids"]
        mask = theirs.get("completion_mask") or [int(label != -100) for label in theirs["labels"]]
        assert mask == [0] * len(row["prompt"]) + [1] * len(row["answer"])


def test_text_is_learned_whole(tmp_path, smollm_tokenizer):
    own = cache.prepared(config(write(tmp_path / "a.csv", [{"text": "one two"}])), None, smollm_tokenizer)
    assert own.train[0] == {
        "prompt": [],
        "answer": [*smollm_tokenizer("one two")["input_ids"], smollm_tokenizer.eos_token_id],
    }


def test_splits_are_disjoint_and_drawn_by_their_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    shares = {"validation_share": 0.1, "test_share": 0.2, **GSM8K}
    last, drawn, again = load(path, **shares), load(path, split_seed=1, **shares), load(path, split_seed=1, **shares)
    assert [row["y"] for part in last for row in part] == [row["answer"] for row in ROWS]
    assert [len(part) for part in drawn] == [28, 4, 8]
    assert drawn == again != last
    assert sorted(row["y"] for part in drawn for row in part) == sorted(row["answer"] for row in ROWS)
    assert load(path, evaluate="validation", **shares).validation == last.validation


def test_an_empty_column_is_empty_and_counted(tmp_path, caplog):
    rows = [{"q": "a", "hint": None, "a": 7}, {"q": "b", "a": 8}, {"q": "c", "hint": "h", "a": None}]
    rows.append({"q": "d", "hint": "", "a": 0})
    with caplog.at_level(logging.WARNING):
        train, _, _ = load(write(tmp_path / "a.jsonl", rows), prompt="{q} {hint}:", answer="{a}")
    assert [(row["x"], row["y"]) for row in train] == [("a :", "7"), ("b :", "8"), ("d :", "0")]
    assert "3 of 4 rows have no hint; it is empty there" in caplog.text
    assert "1 of 4 rows have no answer and are left out" in caplog.text
    assert "have no a;" not in caplog.text  # a row that is left out is counted once


def test_a_dry_run_and_a_card_name_the_file(tmp_path, capsys):
    path = write(tmp_path / "tickets.csv", ROWS)
    words = [
        "dataset=custom",
        f"dataset.path={path}",
        'dataset.prompt="Q: {question}\\nA:"',
        'dataset.answer="{answer}"',
    ]
    assert main([*words, "dry_run=true"]) == 0
    described = "".join(capsys.readouterr().out.split())
    assert f"custom:{path}(train)" in described
    assert "fromhub" not in described
    settings = config(path, prompt="Q: {question}\\nA:", answer="{answer}").model_dump()
    assert description.data_name(settings) == "tickets.csv"
    assert card._datasets(settings) is None
    assert card._datasets(settings | {"path": "owner/name"}) == ["owner/name"]
    assert card._form(settings) == "Q: {question}\nA:"
    assert "'content': 'Q: {question}\\nA:'" in card._form(settings | {"template": "chat"})


def test_classes_are_words_or_numbers_of_given_words(tmp_path):
    rows = [{"s": f"text {i}", "label": str(i % 2)} for i in range(6)]
    path = write(tmp_path / "a.csv", rows)
    words = load(path, prompt="{s} is ", label="label", labels=["bad", "good"]).train
    assert [row["y"] for row in words] == ["bad", "good"] * 3
    assert words[0]["choices"] == ["bad", "good"]
    assert load(path, prompt="{s} is ", label="label").train[0]["choices"] == ["0", "1"]
    with pytest.raises(ConfigError, match="row 1: 'z' is none of the classes x, y"):
        load(write(tmp_path / "b.csv", [{"s": "", "label": "z"}] * 2), prompt="{s}", label="label", labels=["x", "y"])


def test_a_tab_of_the_prompt_alone_separates_an_encoders_texts(tmp_path):
    rows = [{"a": f"one\ttext {i}", "b": f"b{i}", "label": ("no", "yes")[i % 2]} for i in range(4)]
    path = write(tmp_path / "a.csv", rows)
    for prompt, x, read in (
        ("{a}\\t{b}", "one\ttext 0\tb0", "one text 0\tb0"),
        ("{a}\\n{b}", "one\ttext 0\nb0", "one text 0\nb0"),
    ):
        keys = {"prompt": prompt, "label": "label"}
        splits = load(path, **keys)
        assert splits.train[0]["x"] == x
        splits, classes = cache._as_classes(splits, config(path, **keys))
        assert splits.train[0] == {"x": read, "y": "no", "choices": classes, "joined": True}


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "Missing columns in .*: it has a, b, and needs prompt and completion, or text"),
        ([{"messages": []}], {}, "set dataset.template=chat"),
        ([{"question": "x", "b": "y"}], {"prompt": "{questoin}", "answer": "{b}"}, "did you mean question?"),
        ([{"prompt": "x", "completion": "y"}, {"prompt": "x"}], {}, "Missing column completion in .*, row 2"),
        ([{"prompt": "x", "completion": 3}], {}, "row 1: it must be text, not 3"),
        ([{"a": ["x"], "b": "y"}], {"prompt": "{a}", "answer": "{b}"}, "Invalid a in .*, row 1: it must be text or a"),
    ],
)
def test_wrong_columns_are_named(rows, keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "a.jsonl", rows), **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"test_rows": 41, "test_share": 0.5}, "Invalid dataset.test_rows=41: only 20 rows are left"),
        ({"train_rows": 41}, "Invalid dataset.train_rows=41: only 40 rows are left"),
        ({"validation_share": 0.01}, "Invalid dataset.validation_share=0.01: of 40 rows it is none; raise it"),
        ({"prompt": "question"}, r"""put a column into braces, as in 'dataset.prompt="{question}"'"""),
        ({"answer": "5"}, "Invalid dataset.answer=5: it names no column"),
        ({"test_split": "held"}, "it is a file, whose rows are its split train; leave dataset.test_split out"),
        ({"answer": None, "label": "nothing"}, "dataset.label names it"),
    ],
)
def test_keys_that_do_not_fit_the_rows_are_named(keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "a.jsonl", ROWS), **GSM8K | keys)


def test_a_share_beside_a_file_of_its_own_is_an_error(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", ROWS)
    with pytest.raises(ConfigError, match="has test rows of its own; leave the key out"):
        load(tmp_path, test_share=0.1, **GSM8K)
    shards(tmp_path / "data", "test", ROWS)
    with pytest.raises(ConfigError, match=r"test.csv and data/test-0.* are both its split test"):
        load(tmp_path, **GSM8K)


def test_empty_columns_are_reported_from_the_cache_too(tmp_path, smollm_tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "hint": None, "a": 7}, {"q": "b", "a": 8}])
    for _ in range(2):
        caplog.clear()
        cache.prepared(config(path, prompt="{q}{hint}:", answer="{a}"), None, smollm_tokenizer)
        assert "2 of 2 rows have no hint" in caplog.text


def test_a_text_has_no_prompt_for_an_encoder(tmp_path, smollm_tokenizer):
    path = write(tmp_path / "a.csv", [{"text": "one two"}])
    with pytest.raises(ConfigError, match="Invalid dataset=custom with an encoder-decoder model: no row has a prompt"):
        cache.prepared(config(path), None, smollm_tokenizer, encoder_decoder=True)


def test_classes_without_a_label_are_left_out_and_free_text_is_none(tmp_path):
    rows = [{"s": "x", "label": label} for label in ("bad", None, "good")]
    (train, _, _) = load(write(tmp_path / "a.jsonl", rows), prompt="{s} ", label="label")
    assert [row["choices"] for row in train] == [["bad", "good"]] * 2
    rows = [{"s": "x", "label": f"text {i}"} for i in range(1001)]
    with pytest.raises(ConfigError, match="has 1001 different values, and classes are 2 to 1000"):
        load(write(tmp_path / "b.jsonl", rows), prompt="{s} ", label="label")


@pytest.mark.extra
def test_the_same_rows_as_sst2_give_the_same_adapter_and_score(tmp_path, tiny_settings):
    rows = [{"sentence": f"a film {i}", "label": i % 2} for i in range(30)]
    write(tmp_path / "own/train.csv", rows[:24])
    shards(tmp_path / "own", "test", rows[24:])
    for split, part in (("train", rows[:24]), ("validation", rows[24:])):
        write_split(tmp_path, "nyu-mll/glue", "sst2", split, part)
    own = [f"dataset.path={tmp_path / 'own'}", "dataset.label=label", "dataset.labels=[negative,positive]"]
    own += [r'dataset.prompt="classify the sentiment of the text: {sentence}\nresult:  "', "dataset.max_length=128"]
    own += ["eval.glue.metrics=[f1,macro_f1,matthews]"]
    settings = [word for word in tiny_settings if not word.startswith(("eval=", "dataset.validation", "results_root"))]
    runs = []
    for name, words in (
        ("sst2", ["dataset=sst2", f"data_root={tmp_path}", "eval=[glue]"]),
        ("custom", ["dataset=custom", *own, "eval=[glue]"]),
    ):
        words = [*settings, *words, f"results_root={tmp_path / name}", "trainer.max_steps=2"]
        assert main(words) == 0
        runs.append(run_folder(words))
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])
    built_in, scored = (json.loads((run / "eval/glue/score.json").read_text())["metrics"] for run in runs)
    assert scored | built_in == scored
    assert scored.keys() - built_in.keys() == {"f1", "macro_f1", "matthews"}


def test_wrong_files_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.csv").write_text("a,b\n1,2,3\n")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("prompt,completion\n")
    (tmp_path / "twice.csv").write_text("text,a,text\n1,2,3\n")
    (tmp_path / "other.csv").write_text("prompt;completion\na;b\n")
    (tmp_path / "latin.csv").write_bytes("text\nGrüße\n".encode("latin-1"))
    (tmp_path / "whole.json").write_text('{"data": [\n{"text": "a"}\n]}')
    for name, message in (
        ("notes.txt", "its format is not read; convert it to one of .jsonl"),
        ("missing.csv", "no such path"),
        ("a.csv", "row 1: it has 3 values for 2 columns"),
        ("a.jsonl.gz", "Cannot read .*a.jsonl.gz"),
        ("empty.csv", "Empty data set: .*empty.csv has no rows"),
        ("head.csv", "Empty data set: .*head.csv has no rows"),
        ("twice.csv", "it has several columns text; rename or remove them"),
        ("other.csv", "its columns are separated by ';'; save it with commas"),
        ("latin.csv", "not UTF-8 at byte 7; save it as UTF-8"),
        ("whole.json", "it is one JSON object .data., not a row; write a list of rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / name)
    with pytest.raises(ConfigError, match="it has no split train"):
        load(tmp_path)
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000)  # longer than Python's csv reads by itself
    assert len(load(tmp_path / "long.csv").train[0]["y"]) == 200_000


def test_a_name_that_may_be_a_mistyped_path_is_told_as_both(tmp_path):
    for data_root in (None, str(tmp_path)):
        with pytest.raises(ConfigError, match=r"data_root.*correct dataset.path=revews/data: no such path is here"):
            custom.load(config("revews/data"), data_root, lambda texts: [])


def test_a_repeated_key_is_an_error(tmp_path):
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
        with pytest.raises(ConfigError, match=r"line 2: not JSON \(the key 'text' is there twice; keep one\)"):
            load(tmp_path / name)
    (tmp_path / "list.json").write_text('[{"text": "b", "text": "c"}]')
    with pytest.raises(ConfigError, match="the key 'text' is there twice"):
        load(tmp_path / "list.json")


def test_contradicting_keys_are_all_reported(tmp_path):
    errors = config(tmp_path, answer="{a}", label="b", labels=["x"], validation_share=0.6, test_share=0.6).rule_errors()
    assert [error.keys for error in errors] == [
        ("prompt",),
        ("answer", "label"),
        ("labels",),
        ("validation_share", "test_share"),
    ]
    assert data.DATASETS["custom"].Config is custom.Config
