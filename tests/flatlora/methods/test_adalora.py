"""AdaLoRA: the schedule runs to its budget, the saved adapter loads, and Flat-LoRA reads its merged weight."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import run_exp
from flatlora import methods
from flatlora.methods.adapters.adalora import micro_batches_of
from flatlora.perturb.epsilon import merged_row_norms
from flatlora.perturb.layers import find_lora_layers
from flatlora.utils.errors import ConfigError
from tests.conftest import metrics_rows, run_folder, tiny_llama
from tests.methods_toolbox import logits, nudge

SCHEDULE = [
    "peft=adalora",
    "peft.lora_r=2",
    "peft.init_r=4",
    "peft.delta_t=2",
    "trainer.max_steps=12",
]


def ranks(folder):
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return [sum(kept) for kept in config["rank_pattern"].values()]


def test_ranks_end_at_the_budget_and_the_adapter_loads(tiny_settings, tiny_model_folder):
    words = [word for word in tiny_settings if "lora_r" not in word] + SCHEDULE
    assert run_exp.main(words) == 0
    folder = run_folder(words)
    assert sum(ranks(folder)) == 2 * 14
    assert max(ranks(folder)) > min(ranks(folder))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert not torch.allclose(logits(model), logits(plain))
    assert len({row["step"] for row in metrics_rows(folder)}) == 12


def test_saved_logits_are_those_of_the_trained_model(adapt, tmp_path):
    model, config, start = adapt("adalora", lora_r=2, init_r=4)
    nudge(model, std=0.3)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_E" in name:
                parameter[index % 4] = 0.0  # pruned
    trained = logits(model)
    methods.ADAPTERS["adalora"].save(model, config, tmp_path / "adapter", start)
    assert torch.equal(logits(model), trained)
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.extra
@pytest.mark.parametrize("rows", [24, 21])
def test_penalty_does_not_grow_with_accumulation(rows, tiny_settings):
    """Steps of four micro-batches, the last of an epoch with one of 21 rows alone, as steps of one micro-batch."""
    losses = []
    for size in (1, 4):
        words = [f"{word}-{size}" if word.startswith("results_root=") else word for word in tiny_settings]
        words = [word for word in words if "lora_r" not in word and word != "dataset.train_rows=24"] + SCHEDULE
        words += [f"dataset.train_rows={rows}", f"trainer.micro_batch_size={size}", "peft.orth_reg_weight=5.0"]
        assert run_exp.main(words) == 0
        folder = run_folder(words)
        losses.append([row["loss"] for row in metrics_rows(folder)])
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["orth_reg_weight"] == 5.0
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(("batches", "accumulation"), [(12, 4), (11, 4), (3, 4), (5, 1), (9, 4)])
def test_micro_batches_of_a_step_are_those_that_the_trainer_takes(batches, accumulation):
    taken = [len(range(batches)[i : i + accumulation]) for i in range(0, batches, accumulation)]
    assert [micro_batches_of(step, batches, accumulation) for step in range(2 * len(taken))] == 2 * taken


@pytest.mark.extra
def test_an_evaluation_has_no_penalty(tiny_settings):
    """The same model with and without: only the training loss tells them apart."""
    losses = []
    for weight in ("0.0", "5.0"):
        words = [f"{word}-{weight}" if word.startswith("results_root=") else word for word in tiny_settings]
        words = [word for word in words if "lora_r" not in word and not word.startswith("dataset.validation_rows")]
        words += [*SCHEDULE, f"peft.orth_reg_weight={weight}", "dataset.validation_rows=4", "optim.lr=1e-9"]
        assert run_exp.main(words) == 0
        rows = metrics_rows(run_folder(words))
        losses.append((next(row["loss"] for row in rows if "loss" in row), rows[-1]["eval_loss"]))
    assert losses[1][0] > losses[0][0] + 1
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-4)


def test_row_norms_are_those_of_the_merged_weight(adapt):
    model, _, _ = adapt("adalora", lora_r=2, init_r=4)
    nudge(model, std=0.5)
    for layer in find_lora_layers(model):
        svd = model.base_model.model.get_submodule(layer.name)
        merged = layer.weight.detach() + svd.get_delta_weight("default").detach()
        norms = merged_row_norms(layer.weight.detach(), layer.adapters())
        torch.testing.assert_close(norms, merged.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_schedules_that_shrink_nothing_are_rejected():
    with pytest.raises(ConfigError, match=r"peft.init_r=8 with peft.lora_r=8: .*must be larger"):
        run_exp.experiment_of(["peft=adalora", "peft.init_r=8"])
    words = ["peft=adalora", "peft.lora_r=null", "peft.lora_relative_r=0.25", "peft.init_r=4"]
    with pytest.raises(ConfigError, match=r"peft\.init_r=4 with a final rank of 8"):
        methods.ADAPTERS["adalora"].check(tiny_llama(), run_exp.experiment_of(words).peft)
    with pytest.raises(ConfigError, match="leave no step in which ranks are reduced"):
        run_exp.experiment_of(["peft=adalora", "peft.tinit_ratio=0.5", "peft.tfinal_ratio=0.5"])
