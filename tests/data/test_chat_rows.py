"""Chats as rows: own conversations and built-in data sets give the same ids, the same adapter, and ask one template."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl
from transformers import AutoTokenizer

from data import cache, custom, gsm8k, tokens
from data.__main__ import main as show
from eval import BENCHMARKS, command
from flatlora.inputs.conversations import row_of, turns
from flatlora.inputs.rows import jsonl, read_jsonl
from flatlora.trained.place import resolve_model
from flatlora.utils.errors import ConfigError
from run_exp import main
from tests.conftest import adapter_bytes, run_folder, write_split
from tests.flatlora.inputs.test_chats import MARKED, PLAIN, learned_reference

REAL = Path(__file__).parents[2].parent / "shared/data"
CHAT = ["dataset.template=chat", "dataset.system=Think."]
needs_real_rows = pytest.mark.skipif(not (REAL / "openai").is_dir(), reason="the real GSM8K is not here")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    """SmolLM2's own, with its chat template, and fewer tokens."""
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def config(path, **keys):
    return custom.Config(**{"name": "custom", "loader": "custom", "path": str(path), "template": "chat"} | keys)


def load(path, **keys):
    return custom.load(config(path, **keys), None, lambda texts: [1] * len(texts))


def write(path: Path, rows) -> Path:
    path.write_text(jsonl(rows), encoding="utf-8")
    return path


def real_rows(split: str, count: int) -> list[dict]:
    lines = (REAL / f"openai/gsm8k/main/{split}.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def conversation(row) -> dict:
    return {"messages": turns("Think.", row["question"], row["answer"])}


def as_pair(row, completion_turns: int) -> dict:
    """The conversation in TRL's columns `prompt` and `completion`."""
    messages = row["messages"]
    return {"prompt": messages[:-completion_turns], "completion": messages[-completion_turns:]}


@needs_real_rows
def test_the_same_rows_as_gsm8k_give_the_same_ids(tmp_path, tokenizer):
    rows = real_rows("train", 24)
    built_in = gsm8k.Config(
        name="gsm8k", loader="gsm8k", template="chat", system="Think.", train_rows=24, validation_rows=0, test_rows=4
    )
    expected = cache.prepared(built_in, str(REAL), tokenizer)
    as_messages = write(tmp_path / "messages.jsonl", [conversation(row) for row in rows])
    datasets.Dataset.from_list([conversation(row) for row in rows]).to_parquet(str(tmp_path / "messages.parquet"))
    write(tmp_path / "columns.jsonl", rows)
    pairs = [{"prompt": row["question"], "completion": row["answer"], "system": "Think."} for row in rows]
    forms = [
        config(as_messages),
        config(tmp_path / "messages.parquet"),
        config(tmp_path / "columns.jsonl", prompt="{question}", answer="{answer}", system="Think."),
        config(write(tmp_path / "pairs.jsonl", pairs), system="unread"),
        config(write(tmp_path / "turns.jsonl", [as_pair(conversation(row), 1) for row in rows])),
    ]
    assert {cache.prepared(form, None, tokenizer).sha256 for form in forms} == {expected.sha256}
    for row, one in zip(rows, expected.train, strict=True):
        by_hand = learned_reference(tokenizer, conversation(row)["messages"])
        assert one["prompt"] + one["answer"] == by_hand.ids
        assert len(one["prompt"]) == by_hand.has_loss.index(True)
    assert expected.test[0]["messages"][:-1] == turns("Think.", expected.test[0]["x"].removeprefix("Think.\n\n"))


def trained_on_chats(tmp_path, settings, train, test):
    """The runs of the built-in GSM8K and of the same rows as conversations."""
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder / "train.jsonl", [conversation(row) for row in train])
    write(folder / "test.jsonl", [conversation(row) for row in test])
    own = ["dataset=custom", f"dataset.path={folder}", "dataset.template=chat", "dataset.max_length=512"]
    own += ["eval=[custom]", "eval.custom.max_new_tokens=2"]
    built_in = ["dataset=gsm8k", f"data_root={REAL}", *CHAT, f"dataset.train_rows={len(train)}"]
    built_in += ["dataset.validation_rows=0", f"dataset.test_rows={len(test)}", "eval=[gsm8k]"]
    built_in += ["eval.gsm8k.max_new_tokens=2"]
    runs = []
    for name, words in (("gsm8k", built_in), ("custom", own)):
        words = [*settings, *words, f"results_root={tmp_path / name}"]
        assert main(words) == 0
        runs.append(run_folder(words))
    return runs


@needs_real_rows
def test_the_same_rows_as_gsm8k_give_the_same_adapter_and_are_asked_alike(tmp_path, tiny_settings):
    left_out = ("dataset.", "eval=", "results_root=")
    settings = [*(word for word in tiny_settings if not word.startswith(left_out)), "trainer.max_steps=2"]
    built_in, own = trained_on_chats(tmp_path, settings, real_rows("train", 12), real_rows("test", 3))
    assert adapter_bytes(built_in) == adapter_bytes(own)
    records = [json.loads((run / "run.json").read_text()) for run in (built_in, own)]
    assert len({record["chat_template_sha256"] for record in records} - {None}) == 1
    assert len({record["data_sha256"] for record in records}) == 1
    answers = []
    for run, benchmark in ((built_in, "gsm8k"), (own, "custom")):
        lines = (run / f"eval/{benchmark}/predictions.jsonl").read_text().splitlines()
        answers.append([(row["messages"], row["completion"]) for row in map(json.loads, lines)])
        saved = AutoTokenizer.from_pretrained(run / "adapter")
        assert saved.chat_template == (run / "adapter/chat_template.jinja").read_text()
    assert answers[0] == answers[1]
    assert answers[0][0][0] == turns("Think.", real_rows("test", 1)[0]["question"])


@needs_real_rows
@pytest.mark.slow
@pytest.mark.extra  # the tiny model's run is the same one
def test_smollm_learns_chats_of_gsm8k(tmp_path):
    settings = ["model.dtype=float32", "wandb.mode=disabled", "wandb.name=run", "optim.batch_size=2"]
    settings += ["trainer.micro_batch_size=2", "trainer.device=cpu", "trainer.max_steps=2"]
    built_in, own = trained_on_chats(tmp_path, settings, real_rows("train", 4), real_rows("test", 2))
    assert adapter_bytes(built_in) == adapter_bytes(own)


def test_turns_between_answers_have_no_loss(tmp_path, tokenizer):
    messages = turns("Be brief.", "2 + 3?", "5", "4 + 4?", "8")
    rows = [{"messages": messages}, {"messages": turns(None, "a", "b")}]
    prepared = cache.prepared(config(write(tmp_path / "a.jsonl", rows)), None, tokenizer).train
    again = cache.prepared(config(tmp_path / "a.jsonl"), None, tokenizer).train
    by_hand = learned_reference(tokenizer, messages)
    for kept in (prepared, again):
        batch = tokens.CausalCollator(0)([kept[0], kept[1]])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        count = len(by_hand.ids)
        assert ids[:count] == by_hand.ids
        assert labels[:count] == [i if new else -100 for i, new in zip(by_hand.ids, by_hand.has_loss, strict=True)]
        assert "gaps" not in kept[1]
    supervised = torch.tensor(by_hand.has_loss).nonzero().squeeze(1) - 1
    assert set(supervised.tolist()) <= set(batch["logits_to_keep"].tolist())
    whole = cache.prepared(config(tmp_path / "a.jsonl", loss_on="text"), None, tokenizer).train
    assert whole[0]["answer"][:count] == by_hand.ids
    assert not len(whole.gaps)


def test_gaps_end_where_a_row_is_cut(tokenizer):
    rows = [row_of(turns(None, "a", "b", "a question of several words", "c"))]
    whole = tokens.tokenize(rows, tokenizer, 512)
    ((_, start, stop),) = whole.gaps.tolist()
    most = int(whole.prompt_lengths[0]) + start + 2
    cut = tokens.tokenize(rows, tokenizer, most)
    assert cut.gaps.tolist() == [[0, start, start + 2]]
    assert (cut.cut, cut.dropped) == (1, 0)
    assert tokens.tokenize(rows, tokenizer, most - 3).gaps.tolist() == []
    assert stop > start + 2
    assert np.array_equal(tokens.TokenRows.from_arrays(whole.arrays()).gaps, whole.gaps)


def test_conversations_have_the_ids_and_the_loss_of_trl(tmp_path, tiny_model_folder):
    """`assistant_only_loss`, which needs a template with marks. What TRL keeps after the last answer has no loss."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = MARKED
    rows = [{"messages": turns("Add.", f"{i} + 1?", f"{i + 1}", "And 1 more?", f"{i + 2}")} for i in range(4)]
    own = cache.prepared(config(write(tmp_path / "a.jsonl", rows)), None, tokenizer).train
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, assistant_only_loss=True
    )
    trainer = trl.SFTTrainer(
        str(tiny_model_folder),
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for row, theirs in zip(own, trainer.train_dataset, strict=True):
        ids = row["prompt"] + row["answer"]
        labels = tokens.CausalCollator(0)([row])["labels"][0, : len(ids)].tolist()
        mask = theirs.get("assistant_masks") or [int(label != -100) for label in theirs["labels"]]
        assert ids == theirs["input_ids"][: len(ids)]
        assert [int(label != -100) for label in labels] == mask[: len(ids)]
        assert not any(mask[len(ids) :])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_completion_has_the_ids_and_the_loss_of_trl(tmp_path, tiny_model_folder, template):
    """Answers in the prompt have no loss; the line break after the completion, which TRL learns, has none either."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = template
    whole = [turns("Add.", f"{i} + 1?", f"{i + 1}", "And 1 more?", f"{i + 2}") for i in range(4)]
    rows = [as_pair({"messages": messages}, 1) for messages in whole]
    own = cache.prepared(config(write(tmp_path / "a.jsonl", rows)), None, tokenizer).train
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert list(cache.prepared(config(tmp_path / "a.parquet"), None, tokenizer).train) == list(own)
    arguments = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(
        str(tiny_model_folder), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for row, theirs in zip(own, trainer.train_dataset, strict=True):
        ids = row["prompt"] + row["answer"]
        assert "gaps" not in row
        assert [*ids, *end] == theirs["input_ids"]
        learned = [i for i, label in zip(theirs["input_ids"], theirs["labels"], strict=True) if label != -100]
        assert [*row["answer"], *end] == learned
    as_messages = [{"messages": messages} for messages in whole]
    assert cache.prepared(config(write(tmp_path / "b.jsonl", as_messages)), None, tokenizer).train[0]["gaps"]
    several = write(tmp_path / "c.jsonl", [as_pair(row, 3) for row in as_messages])
    assert cache.prepared(config(several, system="unread"), None, tokenizer).train[0]["gaps"]


@pytest.mark.parametrize(
    ("rows", "keys", "messages"),
    [
        ([{"messages": turns(None, "a", "b")}], {"template": None}, ["set dataset.template=chat"]),
        (
            [as_pair({"messages": turns(None, "a", "b")}, 1)],
            {"template": None},
            ["Invalid dataset.template=null with the columns prompt and completion in .*set dataset.template=chat"],
        ),
        (
            [
                as_pair({"messages": turns(None, "a", "b")}, 1),
                {"prompt": turns(None, "a"), "completion": "b"},
                {"prompt": turns(None, "a", "b"), "completion": turns(None, "c")},
                {"prompt": turns(None, "a"), "completion": []},
            ],
            {},
            [
                r"prompt and completion in .*, row 2 \(and 1 more\): completion must be a list of turns",
                "row 3: it ends with a turn of user",
            ],
        ),
        (
            [{"messages": turns(None, "a", "b"), "text": "c"}, {"text": "d"}, {"messages": turns(None, "a")}],
            {},
            ["Mixed columns in .*: it has messages, and text too", "row 2: messages must be a", "row 3: it ends with"],
        ),
        ([{"text": "a"}], {}, ["it has text, and needs messages, or prompt and completion"]),
        (
            [{"prompt": "a", "completion": "b", "system": 3}],
            {},
            ["Invalid system in .*, row 1: it must be text, not 3"],
        ),
        ([{"messages": turns(None, "a", "b"), "tools": "f"}], {}, ["row 1: tools must be a list"]),
    ],
)
def test_rows_that_are_no_chats_are_named_all_at_once(rows, keys, messages, tmp_path):
    with pytest.raises(ConfigError) as raised:
        load(write(tmp_path / "a.jsonl", rows), **keys)
    for message in messages:
        assert raised.match(message)


def test_a_row_that_the_template_does_not_take_is_named(tmp_path, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + MARKED
    )
    rows = [{"messages": turns(None, "a", "b")}, *({"messages": turns("s", f"q{i}", "b")} for i in range(3))]
    with pytest.raises(ConfigError, match=r"chat that begins with 's\\n\\nq0' \(and 2 more\): .* \(no system\)"):
        cache.prepared(config(write(tmp_path / "a.jsonl", rows)), None, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"Invalid dataset.template=chat: the tokenizer of .* has no chat template"):
        cache.prepared(config(tmp_path / "a.jsonl"), None, tokenizer)


def test_another_template_is_another_cache_and_another_hash(tmp_path, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    path = write(tmp_path / "a.jsonl", [{"messages": turns(None, "a", "b")}])
    first = cache.prepared(config(path), None, tokenizer)
    tokenizer.chat_template += "{# the same ids #}"
    second = cache.prepared(config(path), None, tokenizer)
    assert first.train[0] == second.train[0]
    assert first.sha256 != second.sha256
    assert cache.prepared(config(path), None, tokenizer).chat_template_sha256 == second.chat_template_sha256


def test_names_of_special_tokens_in_chats_are_counted_as_text(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [{"messages": turns(None, "What is <|im_end|>?", "An end.")}])
    with caplog.at_level(logging.WARNING):
        (row,) = cache.prepared(config(path), None, tokenizer).train
    assert "(<|im_end|> in 1 rows): they are tokenized as text" in caplog.text
    assert (row["prompt"] + row["answer"]).count(tokenizer.eos_token_id) == 3  # the template's own system turn


@pytest.mark.extra
def test_rows_are_shown_with_what_has_no_loss(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"messages": turns("s", "2 + 3?", "5", "4 + 4?", "8")}])
    assert show(["custom", f"dataset.path={path}", "dataset.template=chat"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("⟦") == 3  # two, and the legend's
    assert "sha256" in shown


def test_a_run_on_chats_is_scored_as_chats_by_every_command(tmp_path, tiny_settings, capsys):
    """At the run's end, by a command, and in a benchmark's own rows; other templates are refused for the run's rows."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    for split in ("train", "test"):
        write_split(tmp_path, "openai/gsm8k", "main", split, rows)
    settings = [word for word in tiny_settings if not word.startswith(("dataset.", "eval="))]
    words = [*settings, "dataset=gsm8k", f"data_root={tmp_path}", *CHAT, "trainer.max_steps=1"]
    words += ["dataset.validation_rows=0", "dataset.test_rows=2", "eval=[gsm8k]", "eval.gsm8k.max_new_tokens=2"]
    assert main([*words, "eval.gsm8k.template=qa", "eval.gsm8k.system=null"]) == 2
    assert "its test rows are asked, in dataset.template=chat; leave the key out" in capsys.readouterr().err
    assert main(words) == 0
    run = run_folder(words)
    asked = read_jsonl(run / "eval/gsm8k/predictions.jsonl")
    assert [row["messages"] for row in asked] == [turns("Think.", row["question"]) for row in rows[:2]]
    assert command.main("gsm8k", [str(run), "device=cpu"]) == 0
    assert read_jsonl(run / "eval/gsm8k/predictions.jsonl") == asked
    own = [str(run), "device=cpu", "rows=benchmark", "max_rows=2", f"out={tmp_path / 'own'}"]
    assert command.main("gsm8k", own) == 0
    assert read_jsonl(tmp_path / "own/predictions.jsonl") == asked
    for name in ("humaneval", "mt_bench", "custom", "math500", "lm_eval"):
        config = BENCHMARKS[name].Config
        known = resolve_model(str(run), benchmark=(name, config)).scored_with
        assert (known["template"], known["system"]) == ("chat", "Think.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.system=a"], "Invalid dataset.system='a' with template=qa: only chats have a system prompt"),
        (["dataset.template=chat", "model=t5base"], "Invalid dataset.template=chat with model=t5base"),
        (
            ["eval=[custom]", "eval.custom.path={own}", "eval.custom.template=chat"],
            "Invalid eval.custom.template=chat: the",
        ),
        (["dataset.template=chat"], "Invalid dataset.template=chat: the tokenizer of"),
    ],
)
def test_settings_that_are_no_chats_are_refused_before_weights(words, message, tmp_path, tiny_settings, capsys):
    for split in ("train", "test"):
        write_split(tmp_path, "openai/gsm8k", "main", split, [{"question": "a", "answer": "#### 1"}] * 3)
    own = write(tmp_path / "own.jsonl", [{"messages": turns(None, "a", "b")}])
    settings = [word for word in tiny_settings if not word.startswith(("dataset.", "model.hub_id", "eval="))]
    model = Path(shutil.copytree(tiny_settings[0].partition("=")[2], tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    words = [
        *settings,
        f"model.hub_id={model}",
        "dataset=gsm8k",
        f"data_root={tmp_path}",
        *(word.format(own=own) for word in words),
    ]
    assert main([*words, "dataset.validation_rows=0", "dataset.test_rows=3"]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "results").glob("*/*/*/config.yaml"))
