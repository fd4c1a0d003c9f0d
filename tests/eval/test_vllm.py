"""vLLM's backend against transformers': the same tokens are the same answer. Its own package stands in for itself."""

import importlib.machinery
import json
import logging
import re
import shutil
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval.backends import Completion, Sampling
from eval.backends.hf import HFBackend
from eval.backends.vllm import VLLMBackend
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama
from tests.scripted import ScriptedLM, continuation, llama2_like_tokenizer

PROMPT, ANSWER = "def f(x):\n", "    return x\nQ: 3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = ["def f(x):", "    return [y for y in x]", "Q: 3 + 4?"] * 20
    return llama2_like_tokenizer(tmp_path_factory.mktemp("llama2-like"), lines, pieces=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """Folder of a whole model."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


class Engine:
    """Gives the tokens of a script, and a text that nobody should read."""

    def __init__(self, tokenizer, said, reason, ends):
        self.tokenizer, self.said, self.reason = tokenizer, said, reason
        config = types.SimpleNamespace(max_model_len=64, try_get_generation_config=lambda: {"eos_token_id": ends})
        self.loras = []
        self.llm_engine = types.SimpleNamespace(model_config=config, add_lora=self.loras.append)

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, asked, options, **_):
        self.asked, self.options = asked, options
        output = types.SimpleNamespace(token_ids=self.said, text="?", finish_reason=self.reason, stop_reason=None)
        return [types.SimpleNamespace(outputs=[output]) for _ in asked]


@pytest.fixture
def served(monkeypatch, tokenizer, base):
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

    def make(said, reason, ends, own=tokenizer, adapter=None, weights=base, **options):
        engine = Engine(own, said, reason, ends)

        def load(**loaded):
            engine.loaded = loaded
            return engine

        modules["vllm"].LLM = load
        return VLLMBackend(str(weights), adapter, batch_size=1, **options), engine

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


def test_vllm_is_sent_no_stops_of_a_body_alone(served, tokenizer):
    ids = [*continuation(tokenizer, PROMPT, ANSWER), tokenizer.eos_token_id]
    backend, engine = served(ids, "stop", None)
    (answer,) = backend.generate([PROMPT], Sampling(50, stop=("\nQ:",), stop_in_body=True))
    assert answer == Completion("    return x", len(ids) - 1, True)
    assert engine.options[0]["stop"] is None


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


def test_what_does_not_fit_is_refused_or_reported(served, caplog):
    backend, _ = served([], "stop", None)
    with pytest.raises(ConfigError, match="2 of 2 prompts, the longest of 64 tokens"):
        backend.check_lengths([60, 64], 20)
    with caplog.at_level(logging.WARNING):
        backend.check_lengths([3, 60], 20)
    assert "1 of 2 prompts and their answers of up to 20 tokens" in caplog.text
    assert "is cut there, and counts as unfinished" in caplog.text


@pytest.fixture
def adapter(tmp_path, base, tokenizer):
    """Changes of adapter_config.json → the folder of an adapter of rank 4 that PEFT saved."""

    def make(**changes):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(tiny_llama(vocab_size=len(tokenizer)), config).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)} | changes))
        return tmp_path

    return make


def test_an_adapter_is_served_with_its_own_tokenizer_on_the_run_s_revision(served, adapter, tokenizer, tmp_path):
    folder = adapter()
    tokenizer.save_pretrained(tmp_path / "run")
    _, engine = served([], "stop", None, adapter=folder, tokenizer=tmp_path / "run", revision="v2")
    assert engine.loaded["max_lora_rank"] == 8
    assert engine.loras == [("adapter", 1, str(folder))]  # read now, not with the first prompt
    assert engine.loaded["tokenizer"] == str(tmp_path / "run")
    assert (engine.loaded["revision"], engine.loaded["tokenizer_revision"]) == ("v2", None)
    _, engine = served([], "stop", None, adapter=folder, revision="v2")
    assert (engine.loaded["tokenizer"], engine.loaded["tokenizer_revision"]) == (None, "v2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"bias": "all"}, "it also has biases"),
        ({"alpha_pattern": {"q": 32}}, "scalings of their own"),
        ({"rank_pattern": {"q": 2}}, "ranks of their own"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "its kind is IA3"),
        ({"init_lora_weights": "pissa"}, r"moves a part of the base's weights into it \(init_lora_weights=pissa\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights=olora"),
        ({"init_lora_weights": "lora_ga"}, "by a gradient that it did not save"),
        ({"alora_invocation_tokens": [1]}, "only after certain tokens"),
        ({"r": 10**9}, "ranks are whole numbers"),
        ({"r": 600}, "the adapter's rank is 600, and vLLM supports 512 at most"),
    ],
)
def test_an_adapter_that_vllm_would_compute_otherwise_is_refused(served, adapter, changes, message):
    with pytest.raises(ConfigError, match=message):
        served([], "stop", None, adapter=adapter(**changes))


def test_a_damaged_adapter_is_refused(served, adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="Missing file"):
        served([], "stop", None, adapter=folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(B), "layers.0.self_attn.q_proj.lora_B.*missing"),
        (lambda tensors: [tensors.pop(name) for name in sorted(tensors)[1:]], "7 .* missing"),
        (
            lambda tensors: tensors.update({A.replace("layers.0", "layers.7"): tensors[A].clone()}),
            "layers.7.*left over",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "it also has other tensors",
        ),
        (lambda tensors: tensors.update({B: tensors[B][:5]}), "size mismatch for .*q_proj.lora_B"),
        (lambda tensors: tensors.update({B: tensors[B] * torch.nan}), "q_proj.lora_B.weight. with NaN or infinity"),
    ],
)
def test_an_adapter_whose_tensors_are_not_whole_is_refused(served, adapter, change, message):
    path = adapter() / "adapter_model.safetensors"
    tensors = load_file(path)
    assert len(tensors) == 8  # A and B of q and v in two layers
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        served([], "stop", None, adapter=path.parent)


def test_an_adapter_of_another_task_is_refused(served, adapter):
    with pytest.raises(ConfigError, match="Invalid task_type SEQ_CLS"):
        served([], "stop", None, adapter=adapter(task_type="SEQ_CLS"))


def test_tokens_without_an_embedding_are_refused(served, adapter, tokenizer, tmp_path):
    folder = adapter()
    larger = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    larger.add_special_tokens({"pad_token": "<padding>"})
    larger.save_pretrained(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"<padding> .* beyond the model's"):
        served([], "stop", None, adapter=folder, tokenizer=tmp_path / "run")


@pytest.mark.parametrize("message", ["missing", "left over", "of another shape"])
def test_a_model_whose_tensors_are_not_whole_is_refused(served, base, tmp_path, message):
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    name, path = "model.layers.1.mlp.up_proj.weight", folder / "model.safetensors"
    tensors = load_file(path)
    if message == "missing":
        del tensors[name]
    elif message == "left over":
        tensors[name.replace("layers.1", "layers.2")] = tensors[name].clone()
        name = name.replace("layers.1", "layers.2")
    else:
        tensors[name] = tensors[name][:3].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"1 .{re.escape(name)}.*{message}"):
        served([], "stop", None, weights=folder)
