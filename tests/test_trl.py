"""FlatLoraCallback in TRL's own trainers: noise in what is trained, none in what is generated."""

from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flatlora import FlatLoraCallback
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


def adapted(folder: Path) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
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
