"""Models are loaded as they were saved."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from flatlora import models, precision
from flatlora.config import ConfigError, ModelConfig
from tests.conftest import tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize(("saved", "of_run"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_whole_model_keeps_the_dtype_that_it_was_saved_in(tiny_model_folder, tmp_path, saved, of_run, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(True, True, False, True))
    tokenizer = models.load_tokenizer(ModelConfig(name="tiny", hub_id=str(tiny_model_folder), family="causal_lm"))
    tiny_llama(vocab_size=len(tokenizer)).to(getattr(torch, saved)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = ModelConfig(name="tiny", hub_id="nowhere", family="causal_lm", dtype=of_run)
    for config in (run, None):
        model, _, _ = models.load_for_inference(str(tmp_path), config, CPU)
        weights = load_file(tmp_path / "model.safetensors")
        found = dict(model.named_parameters())
        assert len(weights) > 10
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype == getattr(torch, saved)
            assert torch.equal(found[name], tensor), name


def test_an_adapter_without_weights_is_no_hub_id(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ConfigError, match=r"Missing file .*adapter_model\.safetensors: copy the adapter's folder whole"
    ):
        models.load_for_inference(str(tmp_path), None, CPU)


def test_an_adapter_of_a_kind_that_peft_does_not_know_is_told_with_the_weights_that_are_missing(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORAX"}')
    with pytest.raises(ConfigError) as told:
        models.load_for_inference(str(tmp_path), None, CPU)
    missing, unknown = told.value.faults
    assert missing.startswith("Missing file ")
    assert f"Invalid peft_type LORAX in {tmp_path}/adapter_config.json: PEFT {peft.__version__} does not" in unknown
