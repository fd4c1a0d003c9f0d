"""Prepared rows from the cache: the same as made anew, never another's, and made anew where the file is broken."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import data
import run_exp
from data import cache, tokens
from flatlora.utils.errors import ConfigError
from tests.conftest import write_split


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 30), ("test", 4)):
        rows = [{"question": f"{split} {i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(count)]
        write_split(tmp_path, "openai/gsm8k", "main", split, rows)
    return tmp_path


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")


def config(*settings):
    sizes = ["dataset.validation_rows=4", "dataset.test_rows=null"]
    return run_exp.experiment_of(["dataset=gsm8k", *sizes, *settings]).dataset


def prepared(root, tokenizer, *settings, **options):
    return cache.prepared(config(*settings), str(root), tokenizer, **options)


def files(root):
    return sorted((root / "cache" / "data").iterdir())


def no_loading(monkeypatch):
    def load(*arguments):
        raise AssertionError("loaded anew")

    monkeypatch.setitem(data.DATASETS._items, "gsm8k", replace(data.DATASETS["gsm8k"], load=load))


def same(one, other):
    for left, right in zip(one[:2], other[:2], strict=True):
        assert [left[i] for i in range(len(left))] == [right[i] for i in range(len(right))]
        assert (left.cut, left.dropped) == (right.cut, right.dropped)
    assert one.test == other.test
    return one.sha256 == other.sha256


def test_a_second_start_reads_the_same_rows_and_loads_nothing(root, tokenizer, monkeypatch):
    first = prepared(root, tokenizer)
    no_loading(monkeypatch)
    assert same(prepared(root, tokenizer), first)
    assert len(files(root)) == 1


def test_warnings_come_with_the_cached_rows_too(root, tokenizer, caplog, monkeypatch):
    rows = [{"question": f"train {i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(3)]
    write_split(root, "openai/gsm8k", "main", "test", [*rows, {"question": " ", "answer": "#### 1"}])
    reported = []
    for _ in range(2):
        prepared(root, tokenizer, "dataset.max_length=16")
        reported.append([record.getMessage() for record in caplog.records])
        caplog.clear()
        no_loading(monkeypatch)
    assert reported[0] == reported[1]
    assert any("3 of 4 test rows are also train rows" in text for text in reported[1])
    assert any("rows are longer than dataset.max_length=16 tokens" in text for text in reported[1])


def test_counting_tokens_shows_how_far_it_is(root, tokenizer, capsys):
    prepared(root, tokenizer, "dataset.max_tokens=100")
    assert "count tokens of gsm8k: 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    ["dataset.template=alpaca", "dataset.max_length=64", "dataset.train_rows=20", "dataset.subset=shuffled"],
)
def test_another_template_limit_size_or_order_is_another_cache(root, tokenizer, setting):
    first, other = prepared(root, tokenizer), prepared(root, tokenizer, setting)
    assert len(files(root)) == 2
    assert (first.sha256 == other.sha256) == (setting == "dataset.max_length=64")  # no row here is as long as that


def test_another_tokenizer_is_another_cache(root, tokenizer, tiny_model_folder):
    prepared(root, tokenizer)
    other = AutoTokenizer.from_pretrained(tiny_model_folder)
    other.add_tokens(["train"])
    assert cache.tokenizer_sha256(other) != cache.tokenizer_sha256(tokenizer)
    prepared(root, other)
    prepared(root, tokenizer, "dataset.max_tokens=100", limit_tokenizer=other)
    prepared(root, tokenizer, "dataset.max_tokens=100")
    assert len(files(root)) == 4


def test_what_a_tokenizer_did_before_does_not_matter(tokenizer):
    before = cache.tokenizer_sha256(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert cache.tokenizer_sha256(tokenizer) == before


def test_other_rows_in_the_file_are_another_cache(root, tokenizer):
    first = prepared(root, tokenizer)
    path = root / "openai/gsm8k/main/train.jsonl"
    path.write_text(path.read_text().replace("train 3 + 1", "train 3 + 2"))
    assert prepared(root, tokenizer).sha256 != first.sha256


def torn(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def of_other_rows(path):
    arrays = load_file(path)
    arrays["train.ids"] = arrays["train.ids"][::-1].copy()
    rewrite(path, arrays)


def of_other_test_rows(path):
    arrays = load_file(path)
    arrays["test"] = arrays["test"].copy()
    arrays["test"][20] += 1
    rewrite(path, arrays)


def without_an_array(path):
    arrays = load_file(path)
    del arrays["validation.ids"]
    rewrite(path, arrays)


def rewrite(path, arrays):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize("damage", [torn, emptied, of_other_rows, of_other_test_rows, without_an_array])
def test_a_broken_file_is_made_again_with_a_warning(root, tokenizer, damage, caplog):
    first = prepared(root, tokenizer)
    (path,) = files(root)
    damage(path)
    assert same(prepared(root, tokenizer), first)
    assert f"The cache file {path} is broken" in caplog.text
    assert "will be rebuilt" in caplog.text
    caplog.clear()
    assert same(prepared(root, tokenizer), first)
    assert caplog.text == ""


def test_a_file_under_anothers_name_is_not_taken(root, tokenizer, caplog):
    first = prepared(root, tokenizer)
    prepared(root, tokenizer, "dataset.template=alpaca")
    one, other = files(root)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert same(prepared(root, tokenizer), first)
    assert "does not match the hash in its name" in caplog.text


def test_a_second_maker_of_the_same_file_does_no_harm(root, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "find", lambda config, key: None)  # neither sees that the other has made it
    assert same(prepared(root, tokenizer), prepared(root, tokenizer))
    assert len(files(root)) == 1  # no staging file is left


def test_a_cache_that_cannot_be_written_is_a_warning(root, tokenizer, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "file")
    assert len(prepared(root, tokenizer).train) == 26
    assert "cannot be written" in caplog.text


def test_missing_files_are_reported_at_once(tmp_path, tokenizer):
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, tokenizer)
    assert len(caught.value.errors) == 2


def test_test_rows_that_train_are_counted(root, tokenizer, caplog):
    path = root / "openai/gsm8k/main/test.jsonl"
    path.write_text(json.dumps({"question": "train 2 + 1?", "answer": "3\n#### 3"}) + "\n" + path.read_text())
    prepared(root, tokenizer)
    assert "1 of 5 test rows are also train rows" in caplog.text


def test_tokenize_is_its_slow_twin(tokenizer):
    rows = [{"x": f"Q: {'long ' * (7 * i % 40)}{i}?\nA: ", "y": f"ünï 日本 {i}\n" * (i % 5 + 1)} for i in range(300)]
    for limit in (12, 30, 500):
        fast, slow = tokens.tokenize(rows, tokenizer, limit), tokens.tokenize_reference(rows, tokenizer, limit)
        assert [fast[i] for i in range(len(fast))] == [slow[i] for i in range(len(slow))]
        assert (fast.cut, fast.dropped) == (slow.cut, slow.dropped)
    assert fast.cut == 0


def test_rows_are_seen_as_lists_and_end(tokenizer):
    rows = tokens.TokenRows.of([[1, 2], [3]], [[4], [5, 6, 7]])
    assert list(rows) == [{"prompt": [1, 2], "answer": [4]}, {"prompt": [3], "answer": [5, 6, 7]}]
    assert rows[-1] == rows[1]
    assert rows.lengths == [3, 4]
    with pytest.raises(IndexError):
        rows[2]


def test_a_hash_knows_where_rows_begin():
    def sha256(prompts, answers):
        rows = tokens.TokenRows.of(prompts, answers)
        return tokens.Prepared(rows, tokens.TokenRows.of([], []), []).sha256

    found = {
        sha256([[1, 2]], [[3]]),
        sha256([[1]], [[2, 3]]),
        sha256([[1], [2]], [[3], []]),
        sha256([[1, 2]], [[4]]),
    }
    assert len(found) == 4


def test_collating_costs_no_row(tokenizer):
    collate = tokens.collator(tokenizer.pad_token_id, encoder_decoder=False)
    batch = collate([tokens.TokenRows.of([[5, 6]], [[7, 8]])[0]])
    assert torch.equal(batch["input_ids"][0, :4], torch.tensor([5, 6, 7, 8]))
