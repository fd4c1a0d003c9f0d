"""Ids, cuts and masks; and that a collated batch gives the loss that a plain reading of the logits gives."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from data import Splits, tokens
from data.tokens import CausalCollator, Seq2SeqCollator, prepare, tokenize
from flatlora.utils.errors import ConfigError
from flatlora.utils.labels import IGNORED_LABEL

PAD, BOS, EOS, UNKNOWN = range(4)
WORDS = [f"w{i}" for i in range(92)]


def make_tokenizer(*, bos: bool, eos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        single, known = "<s> $A </s>" if eos else "<s> $A", [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request):
    return make_tokenizer(bos=request.param)


def text(*numbers):
    return " ".join(WORDS[i] for i in numbers)


def ids(*numbers):
    return [i + 4 for i in numbers]


def test_prompt_and_answer_are_tokenized_apart_and_only_the_prompt_begins(tokenizer):
    found = tokenize([{"x": text(0, 1), "y": text(2, 3, 4)}], tokenizer, 20)
    start = tokenizer("")["input_ids"]
    assert found[0] == {"prompt": [*start, *ids(0, 1)], "answer": [*ids(2, 3, 4), EOS]}
    assert found[0]["prompt"] == tokenizer(text(0, 1) + " ")["input_ids"]  # what an evaluator asks
    assert found.lengths == [len(start) + 6]
    assert (found.cut, found.dropped) == (0, 0)


def test_a_row_that_is_learned_whole_is_one_text(tokenizer):
    row = {"x": text(0, 1), "y": text(2, 3, 4)}
    start = tokenizer("")["input_ids"]
    found = tokenize([row], tokenizer, 20, whole=True)
    assert found[0] == {"prompt": [], "answer": [*start, *ids(0, 1, 2, 3, 4), EOS]}
    assert found[0]["answer"][:-1] == tokenizer(f"{row['x']} {row['y']}")["input_ids"]
    batch = CausalCollator(PAD)([found[0]])
    labeled = batch["labels"][0] != IGNORED_LABEL
    assert labeled.sum() == found.lengths[0] - 1  # nothing predicts the first token
    assert batch["shift_labels"][0, : found.lengths[0] - 1].tolist() == found[0]["answer"][1:]
    cut = tokenize([row], tokenizer, 4, whole=True)
    assert (cut[0]["answer"], cut.cut, cut.dropped) == ([*start, *ids(0, 1, 2, 3)][:4], 1, 0)


def test_a_word_that_spans_prompt_and_answer_is_tokenized_as_in_the_text(smollm_tokenizer):
    row = {"x": "Question: n? Think step by step.\nAnswer:", "y": "James has 2."}
    (found,) = [tokenize([row], smollm_tokenizer, 99, whole=True)[0]]
    assert found["answer"] == [*smollm_tokenizer(row["x"] + row["y"])["input_ids"], smollm_tokenizer.eos_token_id]


def test_the_end_that_a_tokenizer_puts_behind_every_text_is_an_encoders_alone():
    rows, plain, ending = (
        [{"x": text(0, 1), "y": text(2)}],
        make_tokenizer(bos=True),
        make_tokenizer(bos=True, eos=True),
    )
    asked = plain(text(0, 1))["input_ids"]
    assert ending(text(0, 1))["input_ids"] == [*asked, EOS]
    for rows_of in (tokenize, tokens.tokenize_reference):
        assert rows_of(rows, ending, 20)[0] == {"prompt": asked, "answer": [*ids(2), EOS]}
    assert tokenize(rows, ending, 20, encoder_decoder=True)[0]["prompt"] == [*asked, EOS]
    (row,) = prepare(Splits(rows, [], []), ending, 20).train
    assert row["prompt"] == asked


def test_names_of_special_tokens_in_rows_are_text_and_reported(smollm_tokenizer, caplog):
    x, y = "What does <|im_end|> do?", "It ends <|im_start|> and <|im_end|> again."
    rows = [{"x": x, "y": y}, {"x": "plain", "y": "text"}, {"x": "plain", "y": "<|im_end|>"}]
    assert smollm_tokenizer(y)["input_ids"].count(smollm_tokenizer.eos_token_id) == 1  # as control tokens
    with caplog.at_level(logging.WARNING):
        found = tokenize(rows, smollm_tokenizer, 200)
    assert smollm_tokenizer.decode(found[0]["prompt"]) == x + " "
    assert found[0]["answer"].count(smollm_tokenizer.eos_token_id) == 1  # its end
    assert smollm_tokenizer.decode(found[0]["answer"][:-1]) == y
    (record,) = caplog.records
    assert "(<|im_end|> in 2 rows, <|im_start|> in 1 rows): they are tokenized as text" in record.message
    reference = tokens.tokenize_reference(rows, smollm_tokenizer, 200)
    assert [found[i] for i in range(3)] == [reference[i] for i in range(3)]


def test_names_that_a_tokenizer_cannot_read_as_text_are_reported(caplog):
    with caplog.at_level(logging.WARNING):  # a vocabulary of whole words has them as words
        tokenize([{"x": text(0), "y": f"{text(1)} </s> {text(2)}"}], make_tokenizer(bos=True), 20)
    assert "(</s> in 1 rows): this tokenizer always reads them as special tokens; remove them" in caplog.text


@pytest.mark.parametrize(
    ("max_length", "answers", "cut", "dropped"),
    [
        (9, [3, 5, 2], 0, 0),
        (8, [3, 4, 2], 1, 0),
        (5, [3, 1, 2], 1, 0),
        (4, [2, 2], 2, 1),
        (3, [1, 1], 3, 1),
        (2, [], 3, 3),
    ],
)
def test_rows_are_cut_dropped_counted_and_warned_of_once(max_length, answers, cut, dropped, caplog):
    rows = [
        {"x": text(0, 1), "y": text(2, 3)},
        {"x": text(0, 1, 2, 3), "y": text(2, 3, 4, 5)},
        {"x": text(7, 8), "y": text(9)},
    ]
    with caplog.at_level(logging.WARNING):
        found = tokenize(rows, make_tokenizer(bos=False), max_length)
    assert found.answer_lengths.tolist() == answers
    assert (found.cut, found.dropped) == (cut, dropped)
    assert all(length <= max_length for length in found.lengths)
    assert len(found.lengths) == len(found)
    assert len(caplog.records) == (1 if cut else 0)
    if cut:
        reported = f"{cut} rows are longer than dataset.max_length={max_length} tokens: {cut - dropped} lose the end"
        assert reported in caplog.text
        assert f"{dropped} are left out" in caplog.text


def test_only_a_whole_answer_ends_with_end_of_sequence():
    rows = [{"x": text(0), "y": text(*range(10))}]
    answers = [tokenize(rows, make_tokenizer(bos=False), length)[0]["answer"] for length in (11, 12)]
    assert answers == [ids(*range(10)), [*ids(*range(10)), EOS]]


def test_many_rows_keep_their_order(monkeypatch):
    monkeypatch.setattr(tokens, "_ROWS_AT_ONCE", 7)
    rows = [{"x": text(i % 50), "y": text(i % 31)} for i in range(60)]
    found = tokenize(rows, make_tokenizer(bos=False), 20)
    assert [row["answer"][0] for row in map(found.__getitem__, range(60))] == [i % 31 + 4 for i in range(60)]


def test_a_set_that_no_row_is_left_of_is_an_error():
    splits = Splits([{"x": text(0, 1), "y": text(2)}], [], [])
    with pytest.raises(ConfigError, match=r"none of 1 train rows is left at dataset\.max_length=2; raise it"):
        prepare(splits, make_tokenizer(bos=False), 2)
    prepared = prepare(splits, make_tokenizer(bos=False), 3)
    assert (len(prepared.train), len(prepared.validation)) == (1, 0)
    longer = Splits(splits.train, [{"x": text(0, 1, 2), "y": text(3)}], [])
    with pytest.raises(ConfigError, match=r"none of 1 validation rows is left at dataset\.max_length=3; raise it"):
        prepare(longer, make_tokenizer(bos=False), 3)
    with pytest.raises(ConfigError) as caught:
        prepare(longer, make_tokenizer(bos=False), 1)
    assert len(caught.value.errors) == 2


def test_a_tokenizer_that_cannot_end_an_answer_is_an_error():
    tokenizer = make_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        prepare(Splits([{"x": text(0), "y": text(1)}], [], []), tokenizer, 8)


ROWS = [
    {"prompt": [BOS, *ids(1, 2, 3)], "answer": [*ids(4, 5), EOS]},
    {"prompt": [BOS, *ids(6)], "answer": [*ids(7, 8, 9, 10, 11), EOS]},
    {"prompt": [BOS, *ids(*range(20, 32))], "answer": [EOS]},
]


def test_causal_masks():
    batch = CausalCollator(PAD, pad_to_multiple=8)(ROWS)
    assert batch["input_ids"].shape == (3, 16)
    for row, line, mask, labels in zip(ROWS, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        whole = row["prompt"] + row["answer"]
        padding = 16 - len(whole)
        assert line.tolist() == whole + [PAD] * padding
        assert mask.tolist() == [1] * len(whole) + [0] * padding
        assert labels.tolist() == [IGNORED_LABEL] * len(row["prompt"]) + row["answer"] + [IGNORED_LABEL] * padding


def test_end_of_sequence_has_a_loss_also_where_it_is_the_padding_token():
    batch = CausalCollator(EOS)(ROWS[:1])
    assert batch["labels"][0].tolist() == [IGNORED_LABEL] * 4 + [*ids(4, 5), EOS] + [IGNORED_LABEL]


def test_only_positions_with_a_loss_reach_the_head():
    batch = CausalCollator(PAD)(ROWS)
    shifted = batch["labels"].roll(-1, dims=1)
    shifted[:, -1] = IGNORED_LABEL
    wanted = [i for i in range(16) if (shifted[:, i] != IGNORED_LABEL).any()]
    assert batch["logits_to_keep"].tolist() == wanted
    assert torch.equal(batch["shift_labels"], shifted[:, wanted])
    assert len(wanted) < 16


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        initializer_range=0.5,  # far from uniform, so that a wrong position shows in the loss
    )
    return LlamaForCausalLM(config)


def plain_causal_loss(model, rows):
    """Mean over all answer tokens, one row at a time, without padding, batch, mask or collator."""
    losses = []
    for row in rows:
        whole = torch.tensor(row["prompt"] + row["answer"])
        logits = model(input_ids=whole[None]).logits[0].float()
        log_probs = logits.log_softmax(-1)
        start = max(1, len(row["prompt"]))
        losses += [-log_probs[i - 1, whole[i]] for i in range(start, len(whole))]
    return torch.stack(losses).mean()


WHOLE = [{"prompt": [], "answer": row["prompt"] + row["answer"]} for row in ROWS[:2]]


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], ROWS[1:], [ROWS[2]] * 2, WHOLE], ids=["all", "one", "two", "eos-only", "whole"]
)
@pytest.mark.parametrize("pad_to", [1, 8, 64])
def test_causal_loss_is_that_of_the_full_logits(llama, rows, pad_to):
    batch = CausalCollator(PAD, pad_to)(rows)
    loss = llama(**batch).loss
    assert loss.item() == pytest.approx(plain_causal_loss(llama, rows).item(), abs=1e-6, rel=1e-6)
    logits = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    full = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(full.item(), abs=1e-6, rel=1e-6)


def test_causal_gradients_are_those_of_the_full_logits(llama):
    gradients = []
    for loss in (llama(**CausalCollator(PAD, 64)(ROWS)).loss, plain_causal_loss(llama, ROWS)):
        llama.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_the_padding_token_and_the_batchs_order_do_not_matter(llama):
    losses = [llama(**CausalCollator(pad)(rows)).loss.item() for pad in (PAD, EOS, 50) for rows in (ROWS, ROWS[::-1])]
    assert max(losses) - min(losses) < 1e-5


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


def test_seq2seq_masks():
    batch = Seq2SeqCollator(PAD)(ROWS)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 13)
    assert batch["labels"].shape == (3, 6)
    for i, row in enumerate(ROWS):
        prompt, answer = row["prompt"], row["answer"]
        assert batch["input_ids"][i].tolist() == prompt + [PAD] * (13 - len(prompt))
        assert batch["attention_mask"][i].tolist() == [1] * len(prompt) + [0] * (13 - len(prompt))
        assert batch["labels"][i].tolist() == answer + [IGNORED_LABEL] * (6 - len(answer))


def test_a_prompt_may_hold_the_padding_token(t5):
    row = {"prompt": [BOS, PAD, *ids(3)], "answer": [EOS]}
    assert Seq2SeqCollator(PAD)([row, ROWS[0]])["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_seq2seq_loss_is_that_of_single_rows(t5):
    losses = []
    for row in ROWS:
        inputs = torch.tensor([[PAD, *row["answer"][:-1]]])  # T5 starts its answer with the padding token
        logits = t5(input_ids=torch.tensor([row["prompt"]]), decoder_input_ids=inputs).logits[0]
        losses += [-logits[i].log_softmax(-1)[token] for i, token in enumerate(row["answer"])]
    expected = torch.stack(losses).mean().item()
    assert t5(**Seq2SeqCollator(PAD)(ROWS)).loss.item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_each_family_has_its_collator():
    assert isinstance(tokens.collator(PAD, encoder_decoder=False), CausalCollator)
    assert isinstance(tokens.collator(PAD, encoder_decoder=True), Seq2SeqCollator)
    assert tokens.collator(EOS, encoder_decoder=False).pad_token_id == EOS
