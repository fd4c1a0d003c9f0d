"""Loaders on small files with the hub's columns: format, selection, disjoint splits, and what a broken file says."""

import errno
import json
import urllib.error

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import data
from data import gsm8k, instructions, meta_math, selection
from flatlora.config.sections import DatasetConfig
from flatlora.inputs.rows import Source, hub_is_reachable, jsonl, prompt_text, read_jsonl, read_rows
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split as write


def count_words(texts):
    return [len(text.split()) for text in texts]


def errors(function, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    return caught.value.errors


@pytest.fixture
def root(tmp_path):
    """GSM8K of 20 + 5 rows and MetaMathQA of 30 rows, every third made from MATH and row 4 too long."""
    for split, count in (("train", 20), ("test", 5)):
        rows = [{"question": f"{split} {i}?", "answer": f"{i} + 1\n#### {i + 1}", "id": i} for i in range(count)]
        write(tmp_path, "openai/gsm8k", "main", split, rows)
    types = ("GSM_Rephrased", "MATH_AnsAug", "GSM_SV")
    rows = [
        {
            "type": types[i % 3],
            "query": f"query {i}" + " long" * (40 if i == 3 else 0),
            "response": f"step {i}\n#### {i}\nThe answer is: {i}",
            "original_question": "q",
        }
        for i in range(30)
    ]
    write(tmp_path, "meta-math/MetaMathQA", "default", "train", rows)
    return tmp_path


def gsm8k_config(**changes):
    return gsm8k.Config(**{"name": "gsm8k", "loader": "gsm8k", "validation_rows": 4} | changes)


def meta_math_config(**changes):
    sizes = {"train_rows": 8, "validation_rows": 4, "max_tokens": 30}
    return meta_math.Config(**{"name": "meta_math", "loader": "meta_math"} | sizes | changes)


def keys(rows):
    return {(row["x"], row["y"]) for row in rows}


def assert_disjoint(splits):
    assert not keys(splits.train) & keys(splits.validation)
    assert not (keys(splits.train) | keys(splits.validation)) & keys(splits.test)
    assert len(keys(splits.train)) == len(splits.train)


def test_gsm8k_rows_are_in_the_published_prompt(root):
    splits = gsm8k.load(gsm8k_config(), str(root), count_words)
    assert splits.train[0] == {"x": "Q: train 0?\nA: ", "y": "0 + 1\n#### 1"}
    assert splits.test[4] == {"x": "Q: test 4?\nA: ", "y": "4 + 1\n#### 5"}
    assert prompt_text(splits.test[0]) == "Q: test 0?\nA:  "


@pytest.mark.parametrize("subset", ["first", "shuffled"])
@pytest.mark.parametrize("train_rows", [None, 1, 16])
@pytest.mark.parametrize("validation_rows", [0, 4])
def test_gsm8k_splits_have_their_sizes_and_are_disjoint(root, subset, train_rows, validation_rows):
    config = gsm8k_config(subset=subset, train_rows=train_rows, validation_rows=validation_rows, test_rows=3)
    splits = gsm8k.load(config, str(root), count_words)
    assert [len(rows) for rows in splits] == [train_rows or 20 - validation_rows, validation_rows, 3]
    assert_disjoint(splits)


def test_gsm8k_validates_on_the_rows_that_follow_the_train_rows(root):
    splits = gsm8k.load(gsm8k_config(train_rows=6, validation_rows=2), str(root), count_words)
    assert [row["x"] for row in splits.validation] == ["Q: train 6?\nA: ", "Q: train 7?\nA: "]


def test_first_keeps_the_files_order_and_shuffled_really_shuffles(root):
    first = gsm8k.load(gsm8k_config(), str(root), count_words).train
    shuffled = gsm8k.load(gsm8k_config(subset="shuffled"), str(root), count_words).train
    assert [row["x"] for row in first] == [f"Q: train {i}?\nA: " for i in range(16)]
    assert shuffled != first
    assert shuffled == gsm8k.load(gsm8k_config(subset="shuffled"), str(root), count_words).train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_rows": 21}, "Invalid dataset.train_rows=21: only 20 rows are left"),
        ({"train_rows": 18, "validation_rows": 3}, "Invalid dataset.validation_rows=3: only 2 rows are left"),
        ({"validation_rows": 20}, "Invalid dataset.validation_rows=20: only 19 rows are left; lower it."),
        ({"test_rows": 6}, "Invalid dataset.test_rows=6: only 5 rows are left"),
    ],
)
def test_more_rows_than_there_are_is_an_error(root, changes, message):
    (reported,) = errors(gsm8k.load, gsm8k_config(**changes), str(root), count_words)
    assert reported.startswith(message)


def test_meta_math_keeps_gsm_rows_that_are_short_and_cuts_the_last_line(root):
    splits = meta_math.load(meta_math_config(), str(root), count_words)
    kept = [i for i in range(30) if i % 3 != 1 and i != 3]
    assert [row["x"] for row in splits.train + splits.validation] == [f"Q: query {i}\nA: " for i in kept[:12]]
    assert splits.train[1] == {"x": "Q: query 2\nA: ", "y": "step 2\n#### 2"}
    assert [row["x"] for row in splits.test] == [f"Q: test {i}?\nA: " for i in range(5)]
    assert_disjoint(splits)


def test_meta_math_without_a_size_takes_all_but_the_validation_rows(root):
    splits = meta_math.load(meta_math_config(train_rows=None, max_tokens=1000), str(root), count_words)
    assert [len(rows) for rows in splits] == [20 - 4, 4, 5]
    assert_disjoint(splits)


def test_meta_math_counts_prompt_and_answer_together_below_the_limit(root):
    rows = [{"x": "a b", "y": "c"}, {"x": "a", "y": "b c d"}, {"x": "a", "y": ""}]
    assert list(instructions.shorter_than(4, rows, count_words)) == [rows[0], rows[2]]
    assert list(instructions.shorter_than(5, rows, count_words)) == rows


def test_meta_math_tokenizes_no_more_than_it_needs():
    asked = []

    def count(texts):
        asked.append(len(texts))
        return count_words(texts)

    rows = instructions.shorter_than(10, ({"x": str(i), "y": ""} for i in range(10_000)), count)
    assert [next(rows)["x"] for _ in range(1001)][-1] == "1000"
    assert asked == [1000, 1000]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("a\n#### 5\nThe answer is: 5", "a\n#### 5"),
        ("a\nThe answer is: 5\nb\nThe answer is: 6", "a"),
        ("a. The answer is: 5", "a. The answer is: 5"),  # only on a line of its own
        ("a", "a"),
    ],
)
def test_meta_math_cut(response, answer):
    (example,) = meta_math.examples([{"type": "GSM_SV", "query": "q", "response": response}], meta_math_config())
    assert example == ("q", answer, "")


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_loader_has_the_contract(name):
    loader = data.DATASETS[name]
    assert issubclass(loader.Config, DatasetConfig)
    assert callable(loader.sources)
    assert callable(loader.load) == (loader.Config.kind == "text")
    assert isinstance(loader.version, int)


def test_an_unknown_loader_lists_the_known():
    with pytest.raises(KeyError, match=r"Unknown loader tokens: known are .*gsm8k"):
        data.DATASETS["tokens"]  # a module of the package, and no loader


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_batched_loses_nothing(size):
    batches = list(selection.batched(iter(range(7)), size))
    assert [item for batch in batches for item in batch] == list(range(7))
    assert all(len(batch) == size for batch in batches[:-1])
    assert list(selection.batched([], size)) == []


def test_take_and_order_leave_their_rows_alone():
    rows = list(range(50))
    assert selection.take(rows, None, name="n") == rows
    assert selection.take(rows, 0, name="n") == []
    shuffled = selection.ordered(rows, "shuffled")
    assert sorted(shuffled) == rows == list(range(50))
    assert shuffled != rows
    assert selection.ordered(rows, "shuffled", seed=1) != shuffled


# --- files


TRICKY = [
    {"x": "line\u2028and\u2029para\x85graph", "y": 'quo"te\n\ttab \\ ünï 日本 \u0000'},
    {"x": "", "y": "\r\n"},
]


def read(root, columns=("x", "y"), split="train"):
    return read_rows(Source("owner/name", "default", split), columns=columns, data_root=str(root))


def test_jsonl_is_read_back_whatever_the_text(tmp_path):
    path = write(tmp_path, "owner/name", "default", "train", TRICKY)
    assert read(tmp_path) == read_jsonl(path) == TRICKY


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    path = write(tmp_path, "owner/name", "default", "train", [])
    path.write_bytes(b'\n{"x": "1"}\r\n  \r\n{"x": "2"}')
    assert read(tmp_path, ["x"]) == [{"x": "1"}, {"x": "2"}]


def test_the_mark_of_windows_editors_is_no_text(tmp_path):
    path = write(tmp_path, "owner/name", "default", "train", [])
    path.write_text('{"x": "1"}\n', encoding="utf-8-sig")
    assert read(tmp_path, ["x"]) == [{"x": "1"}]


def test_parquet_is_read_as_jsonl_is(tmp_path):
    folder = tmp_path / "owner" / "name" / "default"
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([row | {"extra": 1} for row in TRICKY])
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    assert read(tmp_path) == TRICKY


def test_columns_are_cut_to_those_asked(tmp_path):
    write(tmp_path, "owner/name", "default", "train", [{"x": "1", "y": 2, "z": "3"}])
    assert read(tmp_path, ["z", "x"]) == [{"z": "3", "x": "1"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["Empty data set", "has no rows"]),
        (b"\n\n", ["Empty data set"]),
        (b'{"x": 1}\n{"x": ', ["train.jsonl, line 2: not JSON"]),
        (b'\n{"x": 1}\n[1, 2]\n', ["train.jsonl, line 3: it must be a JSON object, not '[1, 2]'"]),
        (b'{"z": 1}\n', ["Missing column x", "row 1", "it has z"]),
        (b'{"x": "1", "y": 2}\n{"y": 2}\n', ["Missing column x", "row 2", "it has y"]),
        (b'{"x": "1"}\n{}', ["Missing column x", "row 2", "it has none"]),
        (b'{"x": "1"}\n{"x": null}\n{"x": 5}', ["Invalid x in", "row 2: it must be text, not null; fix the row"]),
        (b'{"x": 5}\n{}', ["row 1: it must be text, not 5;"]),
        (b'{"x": true}', ["row 1: it must be text, not true;"]),
        (b'{"x": {"a": ["b"]}}', ['it must be text, not {"a": ["b"]};']),
        (b'{"x": [' + b"1, " * 100 + b"1]}", ["it must be text, not [1, 1, ", "…; fix"]),
        (b'{"x": "a\\ud83d"}', [r"row 1: its character 2, \ud83d, is half of a pair", "fix the row"]),
        (b'{"\\ud83d": "a"}', [r"Missing column x", r"it has \ud83d;"]),
        pytest.param(b'{"x": ' + b"9" * 5000 + b"}", ["line 1: not JSON", "fix it"], id="5,000 digits"),
        pytest.param(b'{"x": ' + b"[" * 100_000, ["line 1: not JSON", "fix it"], id="too deep"),
        ('{"x": "1"}'.encode("utf-16"), ["not UTF-8 at byte 0"]),
        (b'{"x": "\xff"}\n', ["not UTF-8 at byte 7"]),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path, content, words):
    write(tmp_path, "owner/name", "default", "train", []).write_bytes(content)
    (message,) = errors(read, tmp_path, ["x"])
    assert all(word in message for word in words), message


def test_every_missing_column_is_named(tmp_path):
    write(tmp_path, "owner/name", "default", "train", [{"z": 1}])
    assert [message.split(" in ")[0] for message in errors(read, tmp_path)] == ["Missing column x", "Missing column y"]


def test_every_column_without_text_is_named_once(tmp_path):
    rows = [{"x": "1", "y": "2"}, {"x": "1", "y": None}, {"x": 3, "y": 4}, {}]
    write(tmp_path, "owner/name", "default", "train", rows)
    of_x, of_y = errors(read, tmp_path)
    assert "Invalid x" in of_x
    assert "row 3: it must be text, not 3" in of_x
    assert "Invalid y" in of_y
    assert "row 2: it must be text, not null" in of_y


def write_parquet(root, rows):
    folder = root / "owner" / "name" / "default"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return folder / "train.parquet"


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"PAR1 and no more",
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],  # no footer
        lambda raw: raw[:8] + b"\xff" * 16 + raw[24:],  # a page that the footer describes otherwise
        lambda raw: raw.replace(b"owl", b"\xff\xff\xff"),  # text that is not UTF-8
    ],
)
def test_a_broken_parquet_file_is_an_error(tmp_path, damage):
    path = write_parquet(tmp_path, [{"x": "owl", "y": "owl"}])
    path.write_bytes(damage(path.read_bytes()))
    (message,) = errors(read, tmp_path)
    assert "train.parquet: not Parquet" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"x": "1", "z": "2"}, ["Missing column y", "it has x, z"]),
        ({"x": "1", "y": 2}, ["Invalid y", "row 1: it must be text, not 2"]),
        ({"x": "1", "y": None}, ["Invalid y", "not null"]),
        ({"x": "1", "y": {"a": [1]}}, ["Invalid y", 'not {"a": [1]}']),
        ({"x": "1", "y": b"2"}, ["Invalid y", "b'2'"]),
    ],
)
def test_parquet_of_another_schema_is_an_error(tmp_path, row, words):
    write_parquet(tmp_path, [row])
    (message,) = errors(read, tmp_path)
    assert all(word in message for word in words), message


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    (message,) = errors(read_jsonl, tmp_path)
    assert message == f"Cannot read {tmp_path}: Is a directory; make it a readable file, or name another."


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere", "it does not exist"), ("file", "it is a file, not a folder")]
)
def test_a_data_root_that_is_no_folder_is_an_error(tmp_path, name, problem):
    (tmp_path / "file").write_text("")
    (message,) = errors(read, tmp_path / name)
    assert message.startswith(
        f"Invalid data_root={tmp_path / name}: {problem}; name the folder that contains owner/name/default/"
    )


@pytest.mark.parametrize(("module", "config"), [(gsm8k, gsm8k_config), (meta_math, meta_math_config)])
def test_errors_of_train_and_test_rows_are_reported_together(root, module, config):
    write(root, "openai/gsm8k", "main", "test", [{"question": None, "answer": 5}])
    reported = errors(module.load, config(train_rows=99, test_rows=1), str(root), count_words)
    assert [message.split()[1] for message in reported] == ["dataset.train_rows=99:", "question", "answer"]


def test_no_train_row_below_the_limit_is_an_error_of_the_limit(root):
    config = meta_math_config(max_tokens=8, train_rows=None)
    (message,) = errors(meta_math.load, config, str(root), lambda texts: [9] * len(texts))
    assert "keeps no train rows; raise its limits, such as dataset.max_tokens" in message


def test_a_missing_file_names_the_path_and_the_way_out(tmp_path):
    write(tmp_path, "owner/name", "default", "train", TRICKY)
    (message,) = errors(read, tmp_path, split="test")
    assert f"{tmp_path}/owner/name/default/test.jsonl (or .parquet) does not exist" in message
    assert "leave data_root out to read the hub" in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("reset\n by someone"), ": reset by someone. "),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), ": the hub cannot be reached"),
        (ValueError(), ": ValueError. "),  # an error without a message
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer"),
        (datasets.exceptions.DatasetGenerationError("a broken file"), "a broken file"),
        (
            ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"),
            ": the hub cannot be reached",
        ),
    ],
)
def test_a_hub_out_of_reach_is_an_error_with_the_local_way(monkeypatch, error, reason):
    def unreachable(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (message,) = errors(read_rows, Source("owner/name", "default", "train"), columns=["x"])
    assert reason in message
    assert "set data_root=DIR with DIR/owner/name/default/train.jsonl" in message


def test_jsonl_writes_one_line_a_row():
    lines = jsonl(TRICKY).split("\n")
    assert [json.loads(line) for line in lines[:-1]] == TRICKY
    assert lines[-1] == ""


def test_an_endpoint_that_is_no_address_is_an_error(monkeypatch):
    import huggingface_hub

    hub_is_reachable.cache_clear()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "hub.example")
    (message,) = errors(hub_is_reachable)
    assert message.startswith("Invalid HF_ENDPOINT=hub.example: ")


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_no_route_is_no_network(monkeypatch, number):
    import huggingface_hub

    def fail(*_, **options):
        raise urllib.error.URLError(OSError(number, "no way"))

    hub_is_reachable.cache_clear()
    for module, name in ((huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert hub_is_reachable() is False
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    hub_is_reachable.cache_clear()
