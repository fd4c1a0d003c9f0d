"""FlatLoraCallback in TRL's own trainers: noise in what is trained, none in what is generated."""

import contextlib
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flatlora import FlatLoraCallback, find_lora_layers
from flatlora.models.hashes import backbone_sha256

trl = pytest.importorskip("trl")

PLAIN = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 3,
}
PROMPTS = [f"What is {i} plus {i + 1}?" for i in range(8)]


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(folder: Path) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(base, LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_sft_trains_on_perturbed_weights(tiny_model_folder, tmp_path):
    """σ = 0 is plain SFT bit for bit, copy is what adding ε to the weights gives, and W is untouched."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)

    def adapter(**settings):
        model = adapted(tiny_model_folder)
        before = backbone_sha256(model)
        args = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, **PLAIN)
        rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": [" 1 and so on"] * len(PROMPTS)})
        callbacks = [FlatLoraCallback(ramp="constant", **settings)] if settings else []
        trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()
        assert settings.get("mode") == "inplace" or backbone_sha256(model) == before
        return trained(model)

    plain, zero, copy = adapter(), adapter(sigma=0.0), adapter(sigma=0.5, mode="copy")
    added = adapter(sigma=0.5, mode="inplace")
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert max((plain[name] - copy[name]).abs().max() for name in plain) > 1e-3
    for name in copy:
        torch.testing.assert_close(copy[name], added[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["GRPO", pytest.param("RLOO", marks=pytest.mark.extra)])
def test_online_methods_generate_without_noise_and_train_with_it(tiny_model_folder, tmp_path, method):
    """Each call of generate() inside a step, against plain PEFT with the same adapter and random state."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder, padding_side="left")
    model, calls = adapted(tiny_model_folder), []
    flat = FlatLoraCallback(sigma=1.0, ramp="constant")
    generate = model.generate

    def recorded(*args, **kwargs):
        before = torch.get_rng_state(), trained(model), model.training
        answer = generate(*args, **kwargs)
        calls.append((args, kwargs, *before, flat.perturbation.perturbed, answer))
        return answer

    model.generate = recorded
    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6}
    trainer = getattr(trl, f"{method}Trainer")(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=getattr(trl, f"{method}Config")(str(tmp_path), beta=0.1, **sizes, **PLAIN),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        callbacks=[flat],
    )
    before = backbone_sha256(model), trained(model)
    trainer.train()
    assert backbone_sha256(model) == before[0]
    assert any(not torch.equal(p, before[1][name]) for name, p in trained(model).items())
    assert len(calls) == 3
    oracle = adapted(tiny_model_folder)
    for args, kwargs, state, adapter, training, perturbed, answer in calls:
        assert perturbed
        oracle.load_state_dict(adapter, strict=False)
        oracle.train(training)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(state)
            assert torch.equal(oracle.generate(*args, **kwargs), answer)


class Passes:
    """Compares the passes of a trainer's model, those of generation excepted, with plain PEFT, bit for bit.

    A pass with gradients must read W + ε, and one without must read W. `seen` has each of them: whether it had
    gradients, and the name of its adapter (None: disabled).
    """

    def __init__(self, model: PeftModel, oracle: PeftModel, flat: FlatLoraCallback) -> None:
        self.model, self.oracle, self.flat = model, oracle, flat
        self.seen: list[tuple[bool, str | None]] = []
        model.get_base_model().model.register_forward_hook(self.compare, with_kwargs=True)

    @torch.no_grad()
    def compare(self, decoder, args, kwargs, output):
        if kwargs.get("past_key_values") is not None:
            return  # of generate()
        gradients, perturbation = output.last_hidden_state.requires_grad, self.flat.perturbation
        assert perturbation.perturbed
        adapter = self.model.active_adapter if perturbation.layers[0].enabled() else None
        self.seen.append((gradients, adapter))
        self.oracle.load_state_dict(self.model.state_dict())
        without_noise = self.hidden_states(adapter, kwargs)
        for index, layer in enumerate(find_lora_layers(self.oracle)):
            layer.weight.copy_(perturbation.perturbed_weight(index, perturbation.draw(index)))
        with_noise = self.hidden_states(adapter, kwargs)
        assert (without_noise - with_noise).abs().max() > 1e-3
        assert torch.equal(output.last_hidden_state, with_noise if gradients else without_noise)

    def hidden_states(self, adapter: str | None, kwargs: dict) -> torch.Tensor:
        self.oracle.set_adapter(adapter or "default")
        with contextlib.nullcontext() if adapter else self.oracle.disable_adapter():
            return self.oracle.get_base_model().model(**kwargs).last_hidden_state


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("method", "mode", "own_adapter", "changes"),
    [
        ("DPO", "copy", False, {}),
        ("DPO", "recompute", True, REENTRANT),
        ("GRPO", "copy", True, {}),
        ("GRPO", "recompute", False, {"num_iterations": 2}),  # old log-probabilities come from an earlier policy
    ],
)
def test_the_reference_reads_w_and_the_policy_w_plus_noise(
    tiny_model_folder, tmp_path, method, mode, own_adapter, changes
):
    """The reference is the model without adapter, or for a model that comes with an adapter a frozen copy of it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder, padding_side="left")
    flat = FlatLoraCallback(sigma=1.0, ramp="constant", mode=mode)
    model = adapted(tiny_model_folder)
    rows = {"prompt": PROMPTS}
    if method == "DPO":
        own = {"per_device_train_batch_size": 2}
        rows |= {"chosen": [" It is clear."] * len(PROMPTS), "rejected": [" No."] * len(PROMPTS)}
        rewards = {}
    else:
        own = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        rewards = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    trainer = getattr(trl, f"{method}Trainer")(
        model if own_adapter else model.unload(),
        args=getattr(trl, f"{method}Config")(str(tmp_path), **{**PLAIN, **own, **changes}),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=None if own_adapter else LORA,
        callbacks=[flat],
        **rewards,
    )
    oracle = adapted(tiny_model_folder).train()
    reference = "ref" if own_adapter else None
    if own_adapter:
        oracle.add_adapter("ref", LORA)
    passes = Passes(trainer.model, oracle, flat)
    before = backbone_sha256(trainer.model)
    trainer.train()
    assert backbone_sha256(trainer.model) == before
    policies, references = passes.seen.count((True, "default")), passes.seen.count((False, reference))
    assert policies == 3
    assert references >= 2  # GRPO's two iterations share one
    assert set(passes.seen) - {(False, "default")} == {(True, "default"), (False, reference)}
