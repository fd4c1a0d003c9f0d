"""vLLM's own package against transformers, on a CPU or a GPU: `make test-vllm`. Elsewhere these tests are skipped."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from eval.backends import Sampling
from eval.backends.hf import HFBackend
from eval.backends.vllm import VLLMBackend
from tests.scripted import llama2_like_tokenizer

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

PROMPTS = ["def f(x):\n", "Q: 3 + 4?\nA:", "    return [y for", "x"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = ["def f(x):", "    return [y for y in x]", "Q: 3 + 4?", "A: 7"] * 20
    return llama2_like_tokenizer(tmp_path_factory.mktemp("llama2-like"), lines, pieces=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """Folder of a model with heads of a size that vLLM's kernels have, and large logits, which no rounding reorders."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("adapter")
    model = LlamaForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers_of(base, adapter, tokenizer):
    """(sampling) → answers of the adapted model by transformers and by vLLM."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    ours = HFBackend(model, tokenizer, batch_size=4)
    theirs = VLLMBackend(str(base), adapter, batch_size=4, dtype="float32")
    return lambda sampling: (ours.generate(PROMPTS, sampling), theirs.generate(PROMPTS, sampling))


def test_an_adapter_answers_as_by_transformers(answers_of):
    ours, theirs = answers_of(Sampling(24))
    assert theirs == ours
    assert len({answer.text for answer in ours}) == len(PROMPTS)


def test_the_adapter_is_not_left_out(base, tokenizer, answers_of):
    plain = HFBackend(LlamaForCausalLM.from_pretrained(base), tokenizer, batch_size=4).generate(PROMPTS, Sampling(24))
    _, theirs = answers_of(Sampling(24))
    assert [answer.text for answer in theirs] != [answer.text for answer in plain]


def test_an_answer_ends_at_its_stop(answers_of):
    whole, _ = answers_of(Sampling(24))
    stop = (re.search(r"[a-z]{2,}", whole[0].text[3:]).group(),)  # half a character is another text in each library
    ours, theirs = answers_of(Sampling(24, stop=stop))
    assert theirs == ours
    assert ours[0].finished
    assert stop[0] not in ours[0].text


def test_every_end_of_the_generation_config_ends_an_answer(base, tokenizer, tmp_path):
    model = LlamaForCausalLM.from_pretrained(base)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    end = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, -1].item()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [tokenizer.eos_token_id, end]}))
    ours = HFBackend(LlamaForCausalLM.from_pretrained(tmp_path), tokenizer, batch_size=4)
    theirs = VLLMBackend(str(tmp_path), batch_size=4, dtype="float32")
    assert theirs.describe()["ends"] == ours.describe()["ends"]
    expected = ours.generate(PROMPTS, Sampling(12))
    assert theirs.generate(PROMPTS, Sampling(12)) == expected
    assert expected[0].finished
