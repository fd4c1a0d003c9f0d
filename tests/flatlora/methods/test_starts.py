"""Adapters that start from W or from data: nothing changes at step 0, and what is saved fits the untouched backbone."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from flatlora import methods
from flatlora.models import loading, starts
from flatlora.perturb.layers import find_lora_layers
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama
from tests.methods_toolbox import batches_of, config_of, logits, nudge

MOVING = ["pissa", "olora", "corda", "lora_ga"]
ALL = [*MOVING, "eva"]


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_what_it_was(adapt, name):
    before = logits(tiny_llama())
    model, _, _ = adapt(name)
    assert (logits(model) - before).norm() <= 1e-5 * before.norm()
    moved = [
        not torch.equal(layer.weight, tiny_llama().get_submodule(layer.name).weight)
        for layer in find_lora_layers(model)
    ]
    assert all(moved) if name in MOVING else not any(moved)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", ALL)
def test_saved_adapters_fit_the_untouched_backbone(adapt, name, tmp_path):
    model, config, start = adapt(name)
    nudge(model)
    trained = logits(model)
    methods.ADAPTERS[name].save(model, config, tmp_path / "adapter", start)
    assert (logits(model) - trained).norm() == 0  # saving changes nothing
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert (logits(reloaded) - trained).norm() <= 1e-5 * trained.norm()
    assert (logits(tiny_llama()) - trained).norm() > 1e-3 * trained.norm()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_starts_from_the_same_bytes(adapt, name, dtype, monkeypatch):
    first = adapt(name, dtype=dtype)[0].state_dict()

    def must_not_begin(*args, **kwargs):
        raise AssertionError("the start was there")

    monkeypatch.setattr(type(methods.ADAPTERS[name]), "begin", must_not_begin)
    again = adapt(name, dtype=dtype, resumed=True)[0].state_dict()
    assert first.keys() == again.keys()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
    with pytest.raises(ConfigError, match="elsewhere is missing: it has the initial adapter"):
        adapt(name, dtype=dtype, resumed=True, folder="elsewhere")


@pytest.mark.parametrize("name", ALL)
def test_a_start_without_a_checkpoint_is_computed_again(adapt, name, monkeypatch):
    """It may be of a run that was killed at once and whose data have changed since."""
    adapt(name)
    begun = []
    begin = type(methods.ADAPTERS[name]).begin
    monkeypatch.setattr(type(methods.ADAPTERS[name]), "begin", lambda *args: begun.append(1) or begin(*args))
    adapt(name)
    assert begun == [1]


@pytest.mark.parametrize("name", MOVING)
def test_a_bf16_backbone_gives_the_converted_adapter_back_up_to_rounding(adapt, name, tmp_path):
    model, config, start = adapt(name, dtype=torch.bfloat16)
    nudge(model)
    trained = logits(model).float()
    methods.ADAPTERS[name].save(model, config, tmp_path / "adapter", start)
    reloaded = logits(PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "adapter")).float()
    assert (reloaded - trained).norm() < 0.05 * trained.norm()


@pytest.mark.parametrize("name", MOVING)
def test_a_checkpoint_is_evaluated_on_the_backbone_that_it_was_trained_on(adapt, name, tmp_path, monkeypatch):
    model, _, _ = adapt(name)
    nudge(model)
    trained = logits(model)
    checkpoint = tmp_path / "checkpoint-5"
    model.save_pretrained(checkpoint)  # as Trainer does
    starts.mark_checkpoint(checkpoint, tmp_path / "start")
    monkeypatch.chdir(checkpoint)
    assert starts.start_of_checkpoint(Path()).resolve() == tmp_path / "start"
    assert starts.start_of_checkpoint(checkpoint) == tmp_path / "start"
    backbone = tiny_llama()
    starts.subtract_initial_adapter(backbone, tmp_path / "start")
    assert not [n for n, _ in backbone.named_parameters() if "lora_" in n]
    assert torch.equal(logits(PeftModel.from_pretrained(backbone, checkpoint)), trained)
    assert starts.start_of_checkpoint(tmp_path / "adapter") is None
    shutil.copytree(checkpoint, tmp_path / "copies" / "mine")
    with pytest.raises(ConfigError, match="fits the backbone less the start of its run"):
        starts.start_of_checkpoint(tmp_path / "copies" / "mine")


def test_load_for_inference_moves_the_backbone_of_a_checkpoint(adapt, tmp_path, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    config = loading.ModelConfig(name="tiny", hub_id=str(tiny_model_folder), family="causal_lm", dtype="float32")
    backbone = AutoModelForCausalLM.from_pretrained(tiny_model_folder).requires_grad_(False)
    start = methods.Start(3, tmp_path / "start")
    model = methods.ADAPTERS["pissa"].apply(backbone, config_of("pissa"), start)
    nudge(model)
    model.save_pretrained(tmp_path / "checkpoint-2")
    starts.mark_checkpoint(tmp_path / "checkpoint-2", tmp_path / "start")
    loaded, _, _ = loading.load_for_inference(str(tmp_path / "checkpoint-2"), config, torch.device("cpu"))
    torch.testing.assert_close(logits(loaded), logits(model))


def test_without_a_kept_start_saving_is_rejected(adapt, tmp_path):
    model, config, start = adapt("pissa", folder=None)
    with pytest.raises(ValueError, match="Start\\(folder"):
        methods.ADAPTERS["pissa"].save(model, config, tmp_path / "adapter", start)


@pytest.mark.parametrize("name", [*ALL, "hira", "delora"])
def test_quantized_backbones_are_rejected(name):
    backbone = tiny_llama().requires_grad_(False)
    layer = backbone.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=f"peft={name} on a quantized backbone .*up_proj is torch.uint8.*unquantized"):
        methods.ADAPTERS[name].apply(backbone, config_of(name), methods.Start(0, batches=batches_of))
    skeleton = tiny_llama()
    skeleton.config.quantization_config = {"load_in_4bit": True}  # as a hub model that was saved quantized says
    with pytest.raises(ConfigError, match=f"peft={name} on a quantized backbone .*config.json"):
        methods.ADAPTERS[name].check(skeleton, config_of(name))


def test_pissa_takes_the_best_rank_r_part(adapt):
    model, _, _ = adapt("pissa", lora_alpha=6.0)
    for name, layer in starts.lora_layers(model):
        weight = tiny_llama().get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-6)


def test_pissa_s_fast_svd_is_near_the_exact_one_and_repeats(adapt):
    exact, fast, again = (
        adapt("pissa", folder=folder, **settings)[0]
        for folder, settings in (("a", {}), ("b", {"niter": 16}), ("c", {"niter": 16}))
    )
    for (_, one), (_, two), (_, three) in zip(*map(starts.lora_layers, (exact, fast, again)), strict=True):
        product, near, same = (x.lora_B["default"].weight @ x.lora_A["default"].weight for x in (one, two, three))
        assert near.norm().item() == pytest.approx(product.norm().item(), rel=0.02)  # a random W's spectrum is flat
        assert torch.equal(near, same)


def test_eva_s_a_spans_the_principal_inputs(adapt):
    """A of the first layer is the leading right singular vectors of what enters it."""
    model, _, _ = adapt("eva", eva_batches=6)
    layer = next(module for name, module in starts.lora_layers(model) if name.endswith("layers.0.self_attn.q_proj"))
    entered = []
    base = tiny_llama()
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, o: entered.append(i[0].detach()))
    for batch in batches_of(6):
        base(**batch)
    masks = [batch["labels"] != -100 for batch in batches_of(6)]
    rows = torch.cat([x[mask] for x, mask in zip(entered, masks, strict=True)])
    _, _, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    A = layer.lora_A["default"].weight.detach()
    directions = torch.nn.functional.normalize(A, dim=1)
    assert (directions @ Vh[:4].t()).norm() ** 2 > 0.7 * 4
    assert not layer.lora_B["default"].weight.any()


def test_corda_s_directions_depend_on_the_rows(adapt):
    kpm, ipm = adapt("corda", folder="a")[0], adapt("corda", folder="b", corda_method="ipm")[0]
    for (_, one), (_, two) in zip(starts.lora_layers(kpm), starts.lora_layers(ipm), strict=True):
        sizes = [(x.lora_B["default"].weight @ x.lora_A["default"].weight).norm() for x in (one, two)]
        assert sizes[0] < sizes[1]  # what matters least to the rows, against what matters most


def test_eva_refuses_batches_that_it_would_wait_for_for_ever(tmp_path):
    def short(count):
        for batch in batches_of(count):
            yield {**batch, "labels": torch.where(torch.arange(10) == 9, batch["labels"], -100)}

    with pytest.raises(ConfigError, match=r"peft\.lora_r=4: none of 2 micro-batches has so many tokens with a label"):
        methods.ADAPTERS["eva"].apply(tiny_llama(), config_of("eva", eva_batches=2), methods.Start(0, batches=short))


@pytest.mark.parametrize("name", MOVING)
def test_layers_with_forwards_of_their_own_are_rejected_where_w_moves(name, tmp_path):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x)

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Scaled(32, 56, bias=False)
    with pytest.raises(ConfigError, match=rf"Invalid peft={name} with model.layers.1.mlp.up_proj=Scaled \(1 in all\)"):
        methods.ADAPTERS[name].check(model, config_of(name))
    methods.ADAPTERS["eva"].check(model, config_of("eva"))
