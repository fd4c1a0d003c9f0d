"""Runs of tiny models of many architectures, killed and resumed, against a loop in plain transformers and PEFT."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import run_exp
from eval import command
from flatlora.noise import host
from flatlora.train.trainer import FlatTrainer
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder
from tests.saved_models import ARCHITECTURES

NAMES = list(ARCHITECTURES)[:14]
QUICK = ("gemma2", "gpt2")
SIGMA, LR, STEPS = 0.3, 5e-3, 4


@pytest.fixture
def model_folder(tmp_path, tiny_model_folder, request):
    """A folder of random weights with the tiny Llama's tokenizer."""
    name, tokenizer = request.param, AutoTokenizer.from_pretrained(tiny_model_folder)
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    lengths = {"n_positions": 512} | no_dropout if name == "gpt2" else {"max_position_embeddings": 512}
    described = ARCHITECTURES[name] | {"vocab_size": len(tokenizer)} | ids | lengths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **described))
        for parameter in model.parameters():
            if parameter.ndim == 2:  # what is said depends on what was asked, more than with the usual start
                parameter.data.mul_(3.0)
        model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def parameters(names):
    """Test cases: the quick ones always, the others in `make test-all`."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.extra, id=name) for name in names]


class Watched:
    """The adapter that a training starts from and the micro-batches that it takes, as its model is given them."""

    def __init__(self, monkeypatch) -> None:
        self.start, self.micro_batches = {}, []
        plain = FlatTrainer.training_step

        def watched(trainer, model, inputs, *args):
            if not self.start:
                self.start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self.micro_batches.append(copy.deepcopy(dict(inputs)))
            return plain(trainer, model, inputs, *args)

        monkeypatch.setattr(FlatTrainer, "training_step", watched)


def trained_by_hand(folder, watched, targets, *, sigma, seed):
    """Losses and adapter of Flat-LoRA written out: W + ε is put into the weights, and W put back after the step."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapter.keys() == watched.start.keys()
    for name, parameter in adapter.items():
        parameter.data.copy_(watched.start[name])
    optimizer = torch.optim.AdamW(adapter.values(), lr=LR, weight_decay=0.0)
    scaling, losses = 8 / 4, []
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for step in range(STEPS):
        window = watched.micro_batches[2 * step : 2 * step + 2]
        before = {}
        for name, module in modules.items():
            weight = module.get_base_layer().weight.data
            before[name] = weight.clone()
            rows = weight.T if isinstance(module.get_base_layer(), Conv1D) else weight  # a view
            merged = rows + scaling * module.lora_B["default"].weight.data @ module.lora_A["default"].weight.data
            c = sigma / math.sqrt(rows.shape[1]) * merged.norm(dim=1, keepdim=True)
            rows += c * host.normal(seed, step, 0, name.removeprefix("base_model.model."), tuple(rows.shape))
        labeled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        total = 0.0
        for batch in window:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
            (loss / labeled).backward()
            total += float(loss.detach()) / labeled
        for name, module in modules.items():
            module.get_base_layer().weight.data.copy_(before[name])
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(adapter.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("model_folder", parameters(NAMES), indirect=True)
def test_a_killed_and_resumed_run_is_the_loop_written_out(model_folder, tiny_settings, monkeypatch, capsys):
    common = [word for word in tiny_settings if not word.startswith(("model.hub_id", "optim.lr", "dataset.test_rows"))]
    common += [f"model.hub_id={model_folder}", f"trainer.max_steps={STEPS}", "trainer.save_steps=2", "seed=5"]
    common += [f"optim.lr={LR}", "optim.lr_schedule=constant", "optim.warmup_ratio=0", "peft.lora_alpha=8"]
    common += ["dataset.test_rows=3"]
    if "Qwen2Moe" in (model_folder / "config.json").read_text():  # among all of its layers is one of a single output
        assert run_exp.main(common) == 2
        assert "Invalid peft.lora_r=4: it needs 4 directions of a layer" in " ".join(capsys.readouterr().err.split())
        common.append("peft.target_modules=[q_proj,k_proj,v_proj,o_proj,up_proj,gate_proj,down_proj]")
    flat = ["rho=flat", f"rho.sigma={SIGMA}", "rho.ramp=constant"]
    adapters = {}
    for name, words in {
        "off": ["rho=off"],
        "copy": [*flat, "rho.mode=copy"],
        "recompute": [*flat, "rho.mode=recompute"],
    }.items():
        settings = [f"{word}-{name}" if word.startswith("results_root=") else word for word in common] + words
        with monkeypatch.context() as patch:
            watched = Watched(patch)
            with patch.context() as death:
                die_at(3, death)
                with pytest.raises(Killed):
                    run_exp.main(settings)
            del watched.micro_batches[2 * 2 :]  # the third step, which is not in the checkpoint
            assert run_exp.main([*settings, "resume=true"]) == 0
        folder = run_folder(settings)
        record = json.loads((folder / "run.json").read_text())
        assert record["resumed_from"] == 2
        assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
        adapters[name] = adapter_bytes(folder)
        if name == "recompute":
            continue
        targets = json.loads((folder / "adapter/adapter_config.json").read_text())["target_modules"]
        sigma = 0.0 if name == "off" else SIGMA
        losses, model = trained_by_hand(model_folder, watched, targets, sigma=sigma, seed=5)
        assert [row["loss"] for row in metrics_rows(folder)] == pytest.approx(losses, rel=2e-5)
        saved = load_file(folder / "adapter/adapter_model.safetensors")
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                moved = (parameter - watched.start[key]).abs().max()
                difference = (parameter - saved[key.replace(".default", "")]).abs().max()
                assert moved > LR / 2, key
                assert difference < 0.05 * moved, key
    assert adapters["copy"] == adapters["recompute"] != adapters["off"]
    holds_the_answers_of_plain_peft(folder, model_folder)


def holds_the_answers_of_plain_peft(folder, model_folder):
    """`python -m eval.gsm8k RUN` writes what transformers' greedy generate() says, row by row without padding."""
    assert command.main("gsm8k", [str(folder), "max_new_tokens=12", "batch_size=3"]) == 0
    (path,) = folder.glob("eval/**/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        made = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
        assert row["completion"] == tokenizer.decode(made, skip_special_tokens=True)
