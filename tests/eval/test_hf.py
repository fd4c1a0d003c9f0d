"""Greedy decoding is the largest logit at every step, whatever the model's own generation config asks for."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from eval import predictions
from eval.backends import Sampling, cut_at
from eval.backends.hf import HFBackend, SeededDraw
from tests.conftest import tiny_llama, tiny_lora

OWN = {
    "repetition penalty": {"repetition_penalty": 1e-3},  # below 1 it rewards, which a model that repeats nothing shows
    "suppressed tokens": {"suppress_tokens": list(range(0, 40_000, 2))},
    "sampling": {"do_sample": True, "temperature": 50.0},
    "beams": {"num_beams": 3, "length_penalty": 5.0},
    "a forced end": {"forced_eos_token_id": 7},
    "at least": {"min_new_tokens": 6, "exponential_decay_length_penalty": (1, 3.0)},
}


def largest_logits(model, ids, count):
    """The slow and obvious way: no cache, one row, no `generate`."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_greedy_is_the_largest_logit(tokenizer, name, adapted):
    model = (tiny_lora if adapted else tiny_llama)(vocab_size=len(tokenizer)).eval()
    own = GenerationConfig(**OWN[name])
    for module in model.modules():
        if "generation_config" in vars(module):
            module.generation_config = own
    ids = tokenizer("Q: 3 + 4?\nA: ")["input_ids"]
    expected = largest_logits(model, ids, 8)
    assert tokenizer.eos_token_id not in expected
    (answer,) = HFBackend(model, tokenizer, batch_size=1).generate(["Q: 3 + 4?\nA: "], Sampling(8))
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.tokens, answer.finished) == (8, False)
    assert model.generation_config is own  # as it was


def test_a_failed_call_leaves_the_models_own_config(tokenizer, monkeypatch):
    model = tiny_llama(vocab_size=len(tokenizer))
    own, before = model.generation_config, json.dumps(model.generation_config.to_dict(), default=str)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        HFBackend(model, tokenizer, batch_size=1).generate(["Q"], Sampling(2))
    assert model.generation_config is own
    assert json.dumps(own.to_dict(), default=str) == before


DRAWN = Sampling(6, temperature=1.5, top_p=0.9)


def test_a_row_draws_the_same_whatever_stands_beside_it(tokenizer):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=4)
    prompts, seeds = ["Q: 1?", "Q: a longer one, padded?", "Q: 1?", "Q: 1?"], [5, 6, 7, 5]
    together = [one.text for one in backend.generate(prompts, DRAWN, seeds)]
    alone = [backend.generate([p], DRAWN, [s])[0].text for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together[0] == together[3] != together[2]


def test_draws_follow_the_nucleus_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -4.0])
    draws = 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        probabilities = (logits / temperature).softmax(0)
        if top_p < 1:
            before = probabilities.cumsum(0) - probabilities  # they are in order already
            probabilities = probabilities * (before < top_p)
            probabilities /= probabilities.sum()
        processor = SeededDraw(Sampling(1, temperature, top_p), range(draws))
        drawn = processor(None, logits.expand(draws, -1)).argmax(1).bincount(minlength=4) / draws
        assert torch.allclose(drawn, probabilities, atol=0.03)
        assert ((probabilities == 0) <= (drawn == 0)).all()


def test_global_generators_are_left_alone(tokenizer):
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=1)
    before = torch.get_rng_state()
    backend.generate(["Q"], DRAWN, [3])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("text", "kept"), [("ab\nQ: c", "ab"), ("Q: x", ""), ("none", "none")])
def test_answers_end_before_the_first_stop(text, kept):
    assert cut_at(text, ["\nQ:", "Q:"])[0] == kept


def test_generation_stops_at_a_stop(tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer))
    backend = HFBackend(model, tokenizer, batch_size=2)
    (whole, other) = backend.generate(["Q: 3 + 4?\nA: ", "Q"], Sampling(8))
    stop = whole.text[3:5]
    assert stop.strip()
    (found, _) = backend.generate(["Q: 3 + 4?\nA: ", "Q"], Sampling(8, stop=(stop,)))
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finished
    assert found.tokens < whole.tokens or whole.text.endswith(stop)
    assert other.tokens == 8


def test_tokens_move_the_count_of_rows(tokenizer, tmp_path):
    told = []
    backend = HFBackend(tiny_llama(vocab_size=len(tokenizer)), tokenizer, batch_size=2)
    predictions.generate(
        backend,
        ["Q: 1", "Q: 2", "Q: 3"],
        ["1", "2", "3"],
        tmp_path,
        sampling=Sampling(4),
        on_progress=lambda done, total, _: told.append((done, total)),
    )
    done = [count for count, _ in told]
    assert done == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3]  # before; ⅖ … 8⁄5 of two rows, then two; ⅕ … ⅘ of one, then three
    assert {total for _, total in told} == {3}
    assert backend.on_token is None


def test_the_head_s_weight_is_not_copied_for_each_row(tokenizer):
    """torch would expand it to rows × d × V for a last place that is a view."""
    model = tiny_llama(vocab_size=len(tokenizer))
    backend = HFBackend(model, tokenizer, batch_size=8)
    ids = torch.arange(40).view(8, 5)
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
        logits = backend.model(input_ids=ids, logits_to_keep=1).logits
    products = [
        event.input_shapes
        for event in profile.events()
        if event.name in ("aten::mm", "aten::bmm") and any(len(tokenizer) in shape for shape in event.input_shapes)
    ]
    assert [sorted(map(len, shapes)) for shapes in products] == [[2, 2]]
    with torch.inference_mode():
        torch.testing.assert_close(logits[:, 0], model(input_ids=ids).logits[:, -1])
