"""vLLM's backend against transformers': the same tokens are the same answer. Its own package stands in for itself."""

import importlib.machinery
import json
import logging
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from eval.backends import Completion, Sampling
from eval.backends.hf import HFBackend
from eval.backends.vllm import VLLMBackend
from flatlora.utils.errors import ConfigError
from tests.scripted import ScriptedLM, continuation, llama2_like_tokenizer

PROMPT, ANSWER = "def f(x):\n", "    return x\nQ: 3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = ["def f(x):", "    return [y for y in x]", "Q: 3 + 4?"] * 20
    return llama2_like_tokenizer(tmp_path_factory.mktemp("llama2-like"), lines, pieces=300)


class Engine:
    """Gives the tokens of a script, and a text that nobody should read."""

    def __init__(self, tokenizer, said, reason, ends):
        self.tokenizer, self.said, self.reason = tokenizer, said, reason
        config = types.SimpleNamespace(max_model_len=64, try_get_generation_config=lambda: {"eos_token_id": ends})
        self.llm_engine = types.SimpleNamespace(model_config=config)

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, asked, options, **_):
        self.asked, self.options = asked, options
        output = types.SimpleNamespace(token_ids=self.said, text="?", finish_reason=self.reason, stop_reason=None)
        return [types.SimpleNamespace(outputs=[output]) for _ in asked]


@pytest.fixture
def served(monkeypatch, tokenizer):
    """(tokens, finish_reason, ends of the generation config) → (backend, engine)."""
    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.platforms")
    modules = {name: types.ModuleType(name) for name in names}
    modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    modules["vllm"].__version__ = "0"
    modules["vllm"].SamplingParams = lambda **options: options
    modules["vllm.lora.request"].LoRARequest = lambda *given: given
    modules["vllm.platforms"].current_platform = types.SimpleNamespace(is_cpu=lambda: False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def make(said, reason, ends, own=tokenizer, adapter=None, **options):
        engine = Engine(own, said, reason, ends)

        def load(**loaded):
            engine.loaded = loaded
            return engine

        modules["vllm"].LLM = load
        return VLLMBackend("weights", adapter, batch_size=1, **options), engine

    return make


@pytest.mark.parametrize("stop", [(), ("\nQ:",)])
def test_the_same_tokens_are_the_same_answer_as_by_transformers(served, tokenizer, stop):
    ids = [*continuation(tokenizer, PROMPT, ANSWER), tokenizer.eos_token_id]
    model = ScriptedLM({tuple(tokenizer(PROMPT)["input_ids"]): ids}, len(tokenizer), tokenizer.eos_token_id)
    (expected,) = HFBackend(model, tokenizer, batch_size=1).generate([PROMPT], Sampling(64, stop=stop))
    assert expected.text == ("    return x" if stop else ANSWER)
    given = ids[: expected.tokens] if stop else ids  # vLLM ends at the token that completes a stop
    backend, _ = served(given, "stop", None)
    assert backend.generate([PROMPT], Sampling(50, stop=stop)) == [expected]


def test_every_end_that_is_declared_ends_an_answer(served, tokenizer):
    other = tokenizer("x", add_special_tokens=False)["input_ids"][-1]
    ids = [*continuation(tokenizer, PROMPT, "    3"), other]
    backend, engine = served(ids, "stop", [other, tokenizer.eos_token_id])
    (answer,) = backend.generate([PROMPT], Sampling(9))
    assert answer == Completion("    3", len(ids) - 1, True)
    ends = sorted({other, tokenizer.eos_token_id})
    assert engine.options[0]["stop_token_ids"] == ends == backend.describe()["ends"]
    cut, _ = served(ids[:-1], "length", other)
    assert cut.generate([PROMPT], Sampling(9)) == [Completion("    3", len(ids) - 1, False)]


def test_prompts_are_those_of_training(served, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    ending = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)
    backend, engine = served([], "stop", None, ending)
    backend.generate(["Q: 3"], Sampling(2))
    assert engine.asked == [{"prompt_token_ids": tokenizer("Q: 3")["input_ids"]}]


def test_what_does_not_fit_is_refused_or_told(served, caplog):
    backend, _ = served([], "stop", None)
    with pytest.raises(ConfigError, match="2 of 2 prompts, the longest of 64 tokens"):
        backend.check_lengths([60, 64], 20)
    with caplog.at_level(logging.WARNING):
        backend.check_lengths([3, 60], 20)
    assert "1 of 2 prompts and their answers of up to 20 tokens" in caplog.text
    assert "is cut there, and counts as unfinished" in caplog.text


@pytest.fixture
def adapter(tmp_path):
    """Changes of adapter_config.json → the folder of an adapter of rank 4."""

    def make(**changes):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "rank_pattern": {}, "use_dora": False}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file({"base_model.model.q.lora_A.weight": torch.ones(4, 8)}, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def test_an_adapter_is_served_with_its_own_tokenizer_on_the_run_s_revision(served, adapter, tmp_path):
    folder = adapter()
    _, engine = served([], "stop", None, adapter=folder, tokenizer=tmp_path / "run", revision="v2")
    assert engine.loaded["max_lora_rank"] == 8
    assert engine.loaded["tokenizer"] == str(tmp_path / "run")
    assert (engine.loaded["revision"], engine.loaded["tokenizer_revision"]) == ("v2", None)
    _, engine = served([], "stop", None, adapter=folder, revision="v2")
    assert (engine.loaded["tokenizer"], engine.loaded["tokenizer_revision"]) == (None, "v2")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"bias": "all"}, "it has biases"),
        ({"alpha_pattern": {"q": 32}}, "scalings of their own"),
        ({"rank_pattern": {"q": 2}}, "ranks of their own"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "its kind is IA3"),
        ({"r": 10**9}, "ranks are whole numbers"),
        ({"r": 600}, "the adapter's rank is 600, and vLLM serves 512 at most"),
    ],
)
def test_an_adapter_that_vllm_would_compute_otherwise_is_refused(served, adapter, changes, fault):
    with pytest.raises(ConfigError, match=fault):
        served([], "stop", None, adapter=adapter(**changes))


def test_a_damaged_adapter_is_refused(served, adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="Missing file"):
        served([], "stop", None, adapter=folder)
