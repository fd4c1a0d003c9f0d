"""FlatLoraCallback in a plain transformers Trainer: someone else's script, one more line."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from flatlora import FlatLoraCallback, callback, precision
from flatlora.checkpoint import backbone_sha256
from tests.conftest import tiny_llama, tiny_lora

IDS = torch.randint(3, 96, (22, 10), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


class Spy(TrainerCallback):
    """Runs after the flat callback: what the layers hold at each event."""

    def __init__(self, flat):
        self.flat, self.steps, self.outside = flat, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        perturbation = self.flat.perturbation
        self.steps.append((state.global_step, perturbation._drawn_step, perturbation._sigma_drawn))

    def on_step_end(self, args, state, control, **kwargs):
        self.outside.append(self.flat.perturbation.active)


def train(folder, callbacks, *, model=None, resume=None, **changes):
    model = model or tiny_lora(dropout=0.1)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "seed": 5,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    args = TrainingArguments(output_dir=str(folder), **(settings | changes))
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_trains_on_perturbed_weights_and_leaves_the_backbone(tmp_path, mode):
    model = tiny_lora()
    before = backbone_sha256(model)
    flat = FlatLoraCallback(sigma=0.3, mode=mode)
    spy = Spy(flat)
    _, adapter = train(tmp_path, [flat, spy], model=model)
    assert backbone_sha256(model) == before
    assert not any(spy.outside)
    assert not same(adapter, train(tmp_path, [])[1])


def test_sigma_zero_is_plain_lora_bit_for_bit(tmp_path):
    plain = train(tmp_path, [])[1]
    assert same(plain, train(tmp_path, [FlatLoraCallback(sigma=0.0)])[1])


def test_ramp_and_noise_count_optimizer_steps_over_short_windows(tmp_path):
    """11 micro-batches an epoch, 3 a step: the last window of an epoch is short; invariant 8."""
    flat = FlatLoraCallback(sigma=0.3)
    spy = Spy(flat)
    trainer, _ = train(tmp_path, [flat, spy])
    total = trainer.state.max_steps
    assert total == 12
    assert [step for step, _, _ in spy.steps] == list(range(total))
    assert all(step == drawn for step, drawn, _ in spy.steps)
    assert [sigma for *_, sigma in spy.steps] == [
        pytest.approx(0.3 * 0.5 * (1 - np.cos(np.pi * step / total))) for step in range(total)
    ]


def test_generators_move_as_in_plain_training(tmp_path):
    states = []
    for callbacks in ([], [FlatLoraCallback(sigma=0.3, resample="micro_batch")]):
        train(tmp_path, callbacks)
        states.append((random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


def test_resume_inside_an_every_window(tmp_path):
    def flat():
        return FlatLoraCallback(sigma=0.3, every=4)

    whole = train(tmp_path / "a", [flat()], save_strategy="steps", save_steps=6)[1]
    resumed = train(tmp_path / "a", [flat()], save_strategy="steps", resume=str(tmp_path / "a" / "checkpoint-6"))[1]
    assert same(whole, resumed)
    (tmp_path / "a" / "checkpoint-6" / "flatlora.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"flatlora\.safetensors"):
        train(tmp_path / "a", [flat()], resume=str(tmp_path / "a" / "checkpoint-6"))


def test_a_model_without_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layer in LlamaForCausalLM"):
        train(tmp_path, [FlatLoraCallback(sigma=0.1)], model=tiny_llama())


def test_the_readme_example_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "FlatLoraCallback" in code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names = {"base_model": tiny_llama(), "train_dataset": ROWS}
    exec(compile(example, "README.md", "exec"), names)
    assert names["trainer"].state.global_step > 0


class Interrupting(TrainerCallback):
    """Ctrl-C in the middle of an accumulation window."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["copy", "recompute", "inplace"])
def test_an_interrupted_training_can_be_evaluated_and_run_again(tmp_path, mode):
    model = tiny_lora(dropout=0.1)
    before, plain = backbone_sha256(model), model.eval()(IDS[:2]).logits
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    flat = FlatLoraCallback(sigma=0.3, ramp="constant", mode=mode)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [flat, Interrupting()], model=model)
    if mode == "inplace":  # FP32 here; the bytes move by a rounding all the same
        flat.close()
        torch.testing.assert_close(model.eval()(IDS[:2]).logits, plain)
        return
    assert torch.equal(model.eval()(IDS[:2]).logits, plain)
    assert backbone_sha256(model) == before
    assert all(torch.equal(p, adapter[name]) for name, p in model.named_parameters() if p.requires_grad)
    again = train(tmp_path, [FlatLoraCallback(sigma=0.3, mode=mode)], model=model)[1]  # the cell, run again
    assert same(again, train(tmp_path, [FlatLoraCallback(sigma=0.3, mode=mode)])[1])


@pytest.mark.parametrize(
    ("dtype", "fast", "warned"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, 0)]
)
def test_slow_products_are_named_once(tmp_path, monkeypatch, caplog, dtype, fast, warned):
    features = precision.CPUFeatures(*[fast] * 4)
    for module in (precision, callback):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
    model = tiny_lora(torch.bfloat16 if dtype == "bf16" else torch.float32)
    train(tmp_path, [FlatLoraCallback(sigma=0.05)], model=model, num_train_epochs=1)
    told = [record.getMessage() for record in caplog.records if "BF16 product takes" in record.getMessage()]
    assert len(told) == warned
    if warned:
        assert told[0].startswith("dtype=bfloat16: ")
        assert "flatlora.fast_dtype()" in told[0]
