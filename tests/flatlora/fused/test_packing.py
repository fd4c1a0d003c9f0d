"""Batches without padding and the chunked head, against transformers' padded forward and its own loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from flatlora.fused import acceleration, cross_entropy, packing
from flatlora.fused.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils.labels import IGNORED_LABEL
from tests.conftest import tiny_llama, tiny_lora
from tests.saved_models import ENCODERS

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def architecture(model_type: str, **changes) -> nn.Module:
    """A tiny random model with LoRA and large logits."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(model_type, **(SHAPE | {"sliding_window": None} | changes))
    config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation=changes.get("attn", "eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def batch(*, left: bool = False) -> dict[str, torch.Tensor]:
    """Seven rows of 3 to 19 tokens, the first tokens of each without loss."""
    lengths, width = [19, 3, 11, 4, 16, 8, 12], 24
    ids, mask = torch.zeros(7, width, dtype=torch.long), torch.zeros(7, width, dtype=torch.long)
    labels = torch.full((7, width), IGNORED_LABEL)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = torch.randint(3, 96, (length,)), 1
        labels[row, place] = torch.cat([torch.full((2,), IGNORED_LABEL), ids[row, place][2:]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs):
    model.zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(one, other, tolerance=2e-5):
    assert one[0] == pytest.approx(other[0].item(), rel=tolerance)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance * b.abs().max().clamp_min(1e-3).item())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo2", "granite"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_the_padded_batch(model_type, attn):
    model = architecture(model_type, attn=attn)
    inputs = batch()
    expected = loss_and_gradients(model, inputs)
    done = acceleration.accelerate(model, CPU)
    assert "batches without padding" in done
    assert_same(loss_and_gradients(model, inputs), expected)


def test_each_token_goes_through_the_linear_layers_once(monkeypatch):
    model, inputs, seen = architecture("llama"), batch(), []
    acceleration.accelerate(model, CPU)
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    model(**inputs)
    assert seen == [(1, int(inputs["attention_mask"].sum()))]


@pytest.mark.parametrize("items", [None, 40])
def test_padding_on_the_left_and_token_counts(items):
    model, inputs = architecture("llama"), batch(left=True)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    count = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    expected = loss_and_gradients(model, {**inputs, "position_ids": positions}, **count)
    acceleration.accelerate(model, CPU)
    assert_same(loss_and_gradients(model, inputs, **count), expected)


def test_gradient_checkpointing_changes_nothing():
    model, inputs = architecture("llama"), batch()
    acceleration.accelerate(model, CPU)
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, inputs), expected, tolerance=1e-6)


def test_evaluation_and_generation_run_as_before():
    model, inputs = architecture("llama").eval(), batch()
    asked = {key: batch(left=True)[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits, model.generate(**asked, max_new_tokens=5, do_sample=False)
    acceleration.accelerate(model, CPU)
    torch.testing.assert_close(model(**inputs).logits, expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**asked, max_new_tokens=5, do_sample=False), expected[1])


def test_a_batch_without_labels_gets_what_the_model_makes_of_it():
    model, inputs = architecture("llama"), batch()
    inputs["labels"][:] = IGNORED_LABEL
    expected = model(**inputs).loss
    acceleration.accelerate(model, CPU)
    torch.testing.assert_close(model(**inputs).loss, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 4}),  # rows would see other tokens than a window lets them
        ("gemma2", {"sliding_window": 4}),
        (
            "gpt2",
            {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        ),  # learned positions, another body
    ],
)
def test_what_cannot_be_packed_stays_padded(model_type, changes):
    model = architecture(model_type, **changes)
    attention = model.config._attn_implementation
    expected = loss_and_gradients(model, batch_ := batch())
    done = acceleration.accelerate(model, CPU)
    assert "batches without padding" not in done
    assert model.config._attn_implementation == attention
    assert_same(loss_and_gradients(model, batch_), expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 4}, "its attention has a window (sliding_window=4)"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "(layer_types: sliding_attention)"),
        ("llama", {}, None),
    ],
)
def test_why_batches_stay_padded_is_said_once(model_type, changes, reason, caplog):
    done = acceleration.accelerate(architecture(model_type, **changes), CPU)
    warnings = [record.getMessage() for record in caplog.records]
    assert ("chunked cross entropy" in done) == (reason is None)
    if reason is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert "stay padded, and its head computes all logits" in warnings[0]
        assert reason in warnings[0]


def test_a_model_that_computes_another_loss_is_found_by_the_trial(caplog):
    model = architecture("llama")
    base = model.get_base_model()
    plain = base.model.forward
    base.model.forward = lambda *args, row_groups=None, **kwargs: plain(*args, **kwargs)  # rows see each other
    expected = loss_and_gradients(model, inputs := batch())
    assert acceleration.remove_padding(base) == []
    assert "loss changes without padding" in caplog.text
    assert_same(loss_and_gradients(model, inputs), expected)


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logits_scaling"])
def test_a_head_with_more_than_a_product_keeps_its_own_code(setting):
    model = architecture("granite") if setting == "logits_scaling" else architecture("llama")
    setattr(model.get_base_model().config, setting, 4.0)
    assert "chunked cross entropy" not in acceleration.accelerate(model, CPU)


@pytest.mark.parametrize(
    ("model_type", "changes", "kept"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 30.0, "lru_width": 32, "attention_window_size": 8}, True),
        ("bamba", {"z_loss_coefficient": 1e-3, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}, True),
        ("cohere", {"logit_scale": 0.25}, True),
        ("bamba", {"z_loss_coefficient": 0.0, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}, False),
        ("cohere", {"logit_scale": 1.0}, False),
        ("llama", {}, False),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_head_whose_loss_has_more_keeps_its_own_code(model_type, changes, kept, by_name, monkeypatch):
    base = architecture(model_type, **changes).get_base_model()
    if not by_name:
        monkeypatch.setattr(cross_entropy, "_CHANGES_LOGITS", ())
    training = [module.training for module in base.modules()]
    assert cross_entropy.has_frozen_linear_head(base) is not kept
    assert [module.training for module in base.modules()] == training
    assert not base.lm_head._forward_pre_hooks


def test_layers_of_the_usual_names_may_read_other_inputs():
    model = architecture("rwkv", attention_hidden_size=32)  # feed_forward.value reads what feed_forward.key computes
    ids = torch.randint(3, 96, (2, 8))
    expected = loss_and_gradients(model, {"input_ids": ids, "labels": ids})
    assert "14 fused LoRA layers" in acceleration.accelerate(model, CPU)
    assert_same(loss_and_gradients(model, {"input_ids": ids, "labels": ids}), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 77])
def test_the_chunked_head_is_its_reference(dtype, items):
    hidden, weight = torch.randn(300, 24), torch.randn(500, 24).to(dtype)
    labels = torch.randint(0, 500, (300,))
    labels[::7] = IGNORED_LABEL
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        leaf = hidden.to(dtype).requires_grad_(True)
        loss = function(leaf, weight, labels, items)
        (2 * loss).backward()
        found.append((loss.detach(), leaf.grad.float()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=0)
    assert (found[0][1] - found[1][1]).norm() <= tolerance * found[1][1].norm()
    assert not found[0][1][::7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_are_bit_identical_on_packed_rows(dtype):
    results, inputs = [], batch()
    for mode in ("copy", "recompute"):
        model = tiny_lora(dtype).train()
        assert "batches without padding" in acceleration.accelerate(model, CPU)
        plain = loss_and_gradients(model, inputs)[0]
        perturbation = WeightPerturbation(find_lora_layers(model), sigma=0.3, total_steps=4, seed=3, mode=mode)
        perturbation.begin(2)
        results.append(loss_and_gradients(model, inputs))
        perturbation.close()
        assert results[-1][0] != plain
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_dropout_continues_working():
    model = tiny_lora(dropout=0.5).train()
    assert "batches without padding" in acceleration.accelerate(model, CPU)
    inputs = batch()
    assert model(**inputs).loss != model(**inputs).loss


def test_an_encoder_that_classifies_is_no_decoder():
    described = ENCODERS["modernbert"] | {"global_attn_every_n_layers": 1}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("modernbert", **described))
    assert isinstance(model.model, torch.nn.Module)
    assert not packing.is_decoder_only(model)
    assert packing.is_decoder_only(tiny_llama())
