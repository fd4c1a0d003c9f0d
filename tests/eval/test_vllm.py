"""vLLM's backend against transformers': the same tokens are the same answer. Its own package stands in for itself."""

import importlib.machinery
import logging
import sys
import types

import pytest
from transformers import AutoTokenizer

from eval.backends import Completion, Sampling
from eval.backends.hf import HFBackend
from eval.backends.vllm import VLLMBackend
from flatlora.config import ConfigError
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
    modules["vllm.lora.request"].LoRARequest = None
    modules["vllm.platforms"].current_platform = types.SimpleNamespace(is_cpu=lambda: False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def make(said, reason, ends, own=tokenizer):
        engine = Engine(own, said, reason, ends)
        modules["vllm"].LLM = lambda **_: engine
        return VLLMBackend("weights", batch_size=1), engine

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
