"""Greedy decoding is the largest logit at every step, whatever the model's own generation config asks for."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from eval.backends import Sampling
from eval.backends.hf import HFBackend
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
