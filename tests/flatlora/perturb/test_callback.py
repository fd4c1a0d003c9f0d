"""FlatLoraCallback in a plain transformers Trainer: someone else's script, one more line."""

import json
import random
import re
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from flatlora import FlatLoraCallback
from flatlora.models.hashes import backbone_sha256
from flatlora.perturb import callback
from flatlora.perturb.layers import find_lora_layers
from flatlora.perturb.perturbation import WeightPerturbation
from flatlora.utils import precision
from scripts.train_step import backward_of, train_step
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


@pytest.mark.extra
def test_a_resume_reads_the_draw_of_its_own_checkpoint_alone(tmp_path):
    """Earlier trainings have used both folders: the one that is resumed from, and the one that is written to then."""

    def flat(sigma=0.3):
        return FlatLoraCallback(sigma=sigma, every=5, ramp="constant")

    saving = {"save_strategy": "steps", "save_steps": 2}
    for folder in ("a", "b"):
        train(tmp_path / folder, [flat(0.1)], **saving)
    whole = train(tmp_path / "a", [flat()], **saving)[1]
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    for folder in ("b", "a"):
        assert same(whole, train(tmp_path / folder, [flat()], resume=checkpoint)[1])
    train(tmp_path / "c", [flat()], resume=checkpoint, **saving)  # saves in the same window again
    assert same(whole, train(tmp_path / "d", [flat()], resume=str(tmp_path / "c" / "checkpoint-8"))[1])


@pytest.mark.extra
def test_a_draw_that_is_not_of_the_window_is_rejected(tmp_path):
    train(tmp_path, [FlatLoraCallback(sigma=0.3, every=4)], save_strategy="steps", save_steps=6)
    folder = tmp_path / "checkpoint-6"

    def refused(reported, **changes):
        settings = {"sigma": 0.3, "every": 4} | changes
        with pytest.raises(ValueError, match=reported):
            train(tmp_path / "b", [FlatLoraCallback(**settings)], resume=str(folder))

    refused("sigma was 0.3 and is 0.2", sigma=0.2)
    refused("every was 4 and is 5", every=5)
    refused("seed was 5 and is 6", seed=6)
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    kept = state["stateful_callbacks"]["flatlora_draw"]
    kept["tensors"] = kept["tensors"][:-8] + "AAAAAAA="
    path.write_text(json.dumps(state))
    refused("the draw in the checkpoint is broken")
    del state["stateful_callbacks"]["flatlora_draw"]
    path.write_text(json.dumps(state))
    refused("does not contain it.*whose step is a multiple of 4")
    train(tmp_path / "b", [FlatLoraCallback(sigma=0.2, every=3)], resume=str(folder))  # no window is open at step 6


class Generating(Trainer):
    """As TRL's online trainers: a training step generates and reads log-probabilities, the model in train mode."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        with torch.no_grad():
            tokens = model.generate(input_ids=IDS[:2, :4], max_new_tokens=6, do_sample=False, pad_token_id=2)
            logits = model(IDS[:2]).logits
        adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append((tokens, logits, adapter))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append((loss * self.current_gradient_accumulation_steps, inputs))
        return loss


def quiet_arguments(folder, **changes):
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(folder), learning_rate=1e-2, **quiet, **changes)


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_what_a_step_generates_is_the_models_without_noise(tmp_path, mode):
    flat = FlatLoraCallback(sigma=1.0, ramp="constant", mode=mode)
    args = quiet_arguments(tmp_path, max_steps=3)
    trainer = Generating(tiny_lora(), args, train_dataset=ROWS, callbacks=[flat])
    trainer.seen, trainer.losses = [], []
    trainer.train()
    oracle = tiny_lora().train()  # plain PEFT, nothing of ours around it
    for (tokens, logits, adapter), (loss, inputs) in zip(trainer.seen, trainer.losses, strict=True):
        oracle.load_state_dict(adapter, strict=False)
        with torch.no_grad():
            assert torch.equal(logits, oracle(IDS[:2]).logits)
            expected = oracle.generate(input_ids=IDS[:2, :4], max_new_tokens=6, do_sample=False, pad_token_id=2)
            assert torch.equal(tokens, expected)
            assert abs(oracle(**inputs).loss - loss) > 1e-3  # the step itself was taken on W + ε


@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_reentrant_checkpoints_read_the_noise_of_their_pass(tmp_path, mode):
    """torch runs their first forward without gradients; adapters are those of a training without checkpoints."""

    class Toggling(TrainerCallback):
        """As TRL's DPO, which disables checkpoints for its reference and enables them anew within a step."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if args.gradient_checkpointing:
                model.gradient_checkpointing_disable()
                model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    def adapter(**changes):
        model = tiny_lora()
        model.enable_input_require_grads()
        flat = FlatLoraCallback(sigma=0.5, ramp="constant", mode=mode)
        return train(tmp_path, [flat, Toggling()], model=model, num_train_epochs=1, **changes)

    _, plain = adapter()
    trainer, checkpointed = adapter(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert same(plain, checkpointed)
    hooks = [
        hook for m in trainer.model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]
    assert not [hook for hook in hooks if hook.__module__ == "flatlora.perturb.callback"]  # ours are gone again


class Streamed(IterableDataset):
    """Rows whose number nobody knows: 11 micro-batches of 2 an epoch."""

    def __iter__(self):
        return iter(ROWS)


STREAMING = {"max_steps": 8, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}


def stream(folder, callbacks):
    args = quiet_arguments(folder, per_device_train_batch_size=2, gradient_accumulation_steps=3, **STREAMING)
    model = tiny_lora()
    Trainer(model, args, train_dataset=Streamed(), callbacks=callbacks).train()
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.extra
@pytest.mark.parametrize("resample", ["step", pytest.param("micro_batch", marks=pytest.mark.extra)])
def test_a_streamed_epoch_may_end_inside_a_window(tmp_path, resample):
    """Its last micro-batches belong to the step that the next epoch ends: against a loop written by hand."""
    settings = {"ramp": "constant", "resample": resample}
    assert same(stream(tmp_path, []), stream(tmp_path, [FlatLoraCallback(sigma=0.0, **settings)]))
    trained = stream(tmp_path, [FlatLoraCallback(sigma=0.5, **settings)])

    model = tiny_lora().train()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    perturbation = WeightPerturbation(
        find_lora_layers(model), sigma=0.5, total_steps=8, seed=42, training_only=True, **settings
    )
    epoch = [IDS[i : i + 2] for i in range(0, 22, 2)]
    counted = [epoch[:3], epoch[3:6], epoch[6:9], epoch[9:]]  # each has one mean over its tokens
    windows = [[counted[0]], [counted[1]], [counted[2]], [counted[3], counted[0]], [counted[1]], [counted[2]]]
    windows += [[counted[3], counted[0]], [counted[1]]]

    def loss_of(micro_batch):
        number, (ids, tokens) = micro_batch
        perturbation.next_micro_batch(number)
        return model(input_ids=ids, labels=ids, num_items_in_batch=tokens).loss

    for step, parts in enumerate(windows):
        micro_batches = [(ids, sum(one[:, 1:].numel() for one in part)) for part in parts for ids in part]
        train_step(backward_of(loss_of), enumerate(micro_batches), optimizer, step=step, perturbation=perturbation)
    for name, parameter in parameters.items():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"every": 20}, "the cosine ramp begins at 0, and with every=20 all 12 steps use its first value"),
        ({"every": 20, "ramp": "constant"}, None),
        ({"every": 6}, None),
    ],
)
def test_a_noise_that_stays_zero_is_named(tmp_path, caplog, settings, reported):
    noisy = train(tmp_path, [FlatLoraCallback(sigma=0.3, **settings)])[1]
    assert same(noisy, train(tmp_path, [])[1]) == bool(reported)
    assert bool(reported) == ("has no effect" in caplog.text)
    assert (reported or "") in caplog.text


@pytest.mark.parametrize(("dtype", "named"), [(torch.float16, True), (torch.bfloat16, False)])
def test_fp16_without_loss_scaling_is_named(tmp_path, caplog, dtype, named):
    train(tmp_path, [FlatLoraCallback(sigma=0.05)], model=tiny_lora(dtype), num_train_epochs=1)
    assert ("load the backbone with dtype=flatlora.fast_dtype(device), or set fp16=True" in caplog.text) == named


def test_offloaded_weights_are_rejected_before_the_first_step(tmp_path):
    model = accelerate.cpu_offload(tiny_lora(), execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"weights of 14 of them are not on this device.*offloaded.*without device_map"
    ):
        WeightPerturbation(find_lora_layers(model), sigma=0.1, total_steps=3, seed=0)


def test_a_model_without_lora_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layer in LlamaForCausalLM"):
        train(tmp_path, [FlatLoraCallback(sigma=0.1)], model=tiny_llama())


def test_the_readme_example_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
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
    ("dtype", "fast", "autocast", "warned"),
    [
        ("bf16", False, False, "dtype=bfloat16: "),
        ("bf16", True, False, None),
        ("fp32", False, False, None),
        ("fp32", False, True, "bf16=True: "),
    ],
)
def test_slow_products_are_named_once(tmp_path, monkeypatch, caplog, dtype, fast, autocast, warned):
    features = precision.CPUFeatures(*[fast] * 4)
    for module in (precision, callback):
        monkeypatch.setattr(module, "cpu_features", lambda: features)
    model = tiny_lora(torch.bfloat16 if dtype == "bf16" else torch.float32)
    train(tmp_path, [FlatLoraCallback(sigma=0.05)], model=model, num_train_epochs=1, bf16=autocast)
    reported = [record.getMessage() for record in caplog.records if "BF16 product takes" in record.getMessage()]
    assert len(reported) == bool(warned)
    if warned:
        assert reported[0].startswith(warned)
        assert (
            "flatlora.fast_dtype() and set bf16=False" in reported[0]
        )  # which TRL's configs do not have by themselves


@pytest.mark.extra
@pytest.mark.parametrize("mode", ["copy", "recompute"])
def test_torch_compile_trains_on_the_same_noise(tmp_path, mode):
    """The eager backend: Dynamo traces and guards as for any backend, without a compiler's minutes."""
    settings = {"num_train_epochs": 1, "max_steps": 3, "learning_rate": 1e-3}
    compiled = settings | {"torch_compile": True, "torch_compile_backend": "eager"}

    def adapter(changes, **noise):
        torch._dynamo.reset()
        frames.clear()
        model = tiny_lora(num_hidden_layers=1)
        before = backbone_sha256(model)
        found = train(tmp_path, [FlatLoraCallback(ramp="constant", **noise)], model=model, **changes)[1]
        assert backbone_sha256(model) == before
        return found

    frames = torch._dynamo.utils.counters["frames"]
    plain, without = adapter(settings, sigma=0.5, mode=mode), adapter(settings, sigma=0.0)
    assert not frames
    flat = adapter(compiled, sigma=0.5, mode=mode)
    assert frames["ok"] > 0  # it was compiled indeed
    torch._dynamo.reset()
    assert plain.keys() == flat.keys()
    for name in plain:
        torch.testing.assert_close(flat[name], plain[name], rtol=1e-4, atol=1e-6)
    assert max(float((flat[name] - without[name]).abs().max()) for name in flat) > 1e-3
