"""Methods that compute their start, on an encoder-decoder and on GPT-2's transposed layers."""

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from flatlora import methods
from flatlora.perturb.layers import find_lora_layers
from flatlora.utils.errors import ConfigError
from tests.methods_toolbox import batches_of, config_of, nudge


def tiny_t5():
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    return T5ForConditionalGeneration(config).eval()


def tiny_gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def t5_batches(count):
    for batch in batches_of(count):
        yield {**batch, "labels": batch["labels"][:, :6].contiguous()}


MODELS = {"t5": (tiny_t5, t5_batches), "gpt2": (tiny_gpt2, batches_of)}


@torch.no_grad()
def loss_of(model, batches):
    return torch.stack([model.eval()(**batch).logits.flatten()[:500] for batch in batches(1)])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "name",
    [
        "pissa",
        pytest.param("corda", marks=pytest.mark.extra),
        "olora",
        "lora_ga",
        pytest.param("eva", marks=pytest.mark.extra),
    ],
)
def test_starts(name, kind, tmp_path):
    make, batches = MODELS[kind]
    start, config = methods.Start(1, tmp_path / "start", batches), config_of(name)
    if (name, kind) in (("eva", "t5"), ("olora", "gpt2")):
        with pytest.raises(ConfigError, match=f"Invalid peft={name} with .*; use peft="):
            methods.ADAPTERS[name].apply(make(), config, start)
        return
    before = loss_of(make(), batches)
    model = methods.ADAPTERS[name].apply(make().requires_grad_(False), config, start)
    assert (loss_of(model, batches) - before).norm() <= 1e-5 * before.norm()
    nudge(model)
    trained = loss_of(model, batches)
    methods.ADAPTERS[name].save(model, config, tmp_path / "adapter", start)
    reloaded = loss_of(PeftModel.from_pretrained(make(), tmp_path / "adapter"), batches)
    assert (reloaded - trained).norm() <= 1e-5 * trained.norm()
    assert len(find_lora_layers(model)) > 4


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_of_lora_ga_has_a_gradient(kind):
    from flatlora.methods.adapters.lora import find_targets
    from flatlora.methods.adapters.lora_ga import mean_gradients

    make, batches = MODELS[kind]
    model = make().requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in find_targets(model, "all")}
    gradients = mean_gradients(model, layers, batches(2))
    twin = make()
    for batch in batches(2):
        (twin(**batch).loss / 2).backward()
    for name, gradient in gradients.items():
        expected = twin.get_submodule(name).weight.grad
        expected = expected.t() if kind == "gpt2" else expected
        assert gradient.shape == expected.shape
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name
        assert gradient.norm() > 0
