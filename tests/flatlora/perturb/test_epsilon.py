"""ε on a device is ε on the host: row norms, copies and the scratch buffer, of dense and of packed weights.

Needs a GPU, or Triton's interpreter (test_kernels_interpreted.py runs it there).
"""

import importlib.util
import os

import pytest
import torch
from peft import DeloraConfig, HiraConfig, LoraConfig, get_peft_model

from flatlora.config.sections import ModelConfig
from flatlora.models import loading
from flatlora.noise import philox
from flatlora.perturb.epsilon import DeviceEpsilon, Draw, HostEpsilon
from flatlora.perturb.layers import find_lora_layers
from tests.conftest import tiny_llama, tiny_lora
from tests.methods_toolbox import nudge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a CUDA device or the interpreter"
)


def dense_layers(folder):
    return find_lora_layers(tiny_lora().to(DEVICE))


def packed_layers(folder):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    config = ModelConfig(name="t", hub_id=str(folder), family="causal_lm", dtype="float32", quantize="nf4")
    model = get_peft_model(loading.load_backbone(config, DEVICE), LoraConfig(r=4, target_modules="all-linear"))
    return find_lora_layers(model.to(DEVICE))


def multiplied_layers(folder):
    return adapted_layers(HiraConfig(r=4, target_modules="all-linear"))


def normalized_layers(folder):
    return adapted_layers(DeloraConfig(r=4, target_modules="all-linear"))


def adapted_layers(config):
    model = get_peft_model(tiny_llama(), config)
    nudge(model, std=0.2)
    return find_lora_layers(model.to(DEVICE))


@pytest.mark.parametrize("make", [dense_layers, packed_layers, multiplied_layers, normalized_layers])
@pytest.mark.parametrize("scale", ["filter", "iid"])
def test_a_device_makes_what_the_host_makes(make, scale, tiny_model_folder):
    layers = make(tiny_model_folder)[: 6 if DEVICE.type == "cuda" else 3]
    keys = [philox.layer_key(1, layer.name) for layer in layers]
    device, host = DeviceEpsilon(layers, keys), HostEpsilon(layers)
    found = device.coefficients(0.3, scale=scale, fan_in=True)
    expected = host.coefficients(0.3, scale=scale, fan_in=True)
    assert all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-4) for a, b in zip(found, expected, strict=True))
    draws = [Draw(key, 2, 0, c) for key, c in zip(keys, found, strict=True)]
    copies = [torch.empty(layer.stored_shape, dtype=layer.dtype, device=DEVICE) for layer in layers]
    device.write(draws, copies)
    for index, layer in enumerate(layers):
        made = device.materialize(index, draws[index]).clone()
        assert torch.equal(made, copies[index])
        assert torch.allclose(made, host.materialize(index, draws[index]), atol=1e-4)
        assert not torch.equal(made, layer.dense())
