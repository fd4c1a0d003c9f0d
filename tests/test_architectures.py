"""Runs of tiny models of many architectures, killed and resumed, against a loop in plain transformers and PEFT."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

import run_exp
from eval import command
from flatlora import export
from flatlora.noise import host
from flatlora.train.trainer import FlatTrainer
from tests.conftest import Killed, adapter_bytes, die_at, metrics_rows, run_folder, write_split
from tests.saved_models import ARCHITECTURES, ENCODERS

NAMES = list(ARCHITECTURES)[:14]
QUICK = ("gpt2",)
_ATTENTION = "q_proj,k_proj,v_proj,o_proj"
# Models with the weights of all experts in one tensor, and the layers that have an adapter.
FUSED = {"MixtralForCausalLM": _ATTENTION, "Qwen2MoeForCausalLM": f"{_ATTENTION},up_proj,gate_proj,down_proj"}
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


def trained_by_hand(base, watched, losses_of, *, sigma, seed, **peft):
    """Losses and adapter of Flat-LoRA written out: W + ε is put into the weights, and W put back after the step.

    `losses_of(model, window)` yields the shares of a step's loss that its micro-batches have.
    """
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **peft))
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
        total = 0.0
        for loss in losses_of(model, window):
            loss.backward()
            total += float(loss.detach())
        for name, module in modules.items():
            module.get_base_layer().weight.data.copy_(before[name])
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(adapter.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


def token_losses(model, window):
    """The mean over all tokens of a step."""
    labeled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
    for batch in window:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        yield loss / labeled


def class_losses(model, window):
    """The mean over the rows of each micro-batch."""
    for batch in window:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        yield functional.cross_entropy(logits, batch["labels"]) / len(window)


@pytest.mark.parametrize("model_folder", parameters(NAMES), indirect=True)
def test_a_killed_and_resumed_run_is_the_loop_written_out(model_folder, tiny_settings, monkeypatch, capsys):
    common = [word for word in tiny_settings if not word.startswith(("model.hub_id", "optim.lr", "dataset.test_rows"))]
    common += [f"model.hub_id={model_folder}", f"trainer.max_steps={STEPS}", "trainer.save_steps=2", "seed=5"]
    common += [f"optim.lr={LR}", "optim.lr_schedule=constant", "optim.warmup_ratio=0", "peft.lora_alpha=8"]
    common += ["dataset.test_rows=3"]
    (architecture,) = json.loads((model_folder / "config.json").read_text())["architectures"]
    if layers := FUSED.get(architecture):
        assert run_exp.main(common) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert f"Invalid peft.target_modules=all with {architecture}: model.layers.0.mlp.experts.gate_up" in message
        assert "choose layers by name, such as peft.target_modules=attention" in message
        common.append(f"peft.target_modules=[{layers}]")
    is_the_loop_written_out(model_folder, common, monkeypatch, AutoModelForCausalLM, token_losses, "CAUSAL_LM")
    holds_the_answers_of_plain_peft(run_folder(of(common, "recompute")), model_folder)


def of(common, name):
    """The settings of a run with a folder of its own."""
    return [f"{word}-{name}" if word.startswith("results_root=") else word for word in common]


def is_the_loop_written_out(model_folder, common, monkeypatch, auto, losses_of, task):
    """Runs without noise and in both modes, killed and resumed, have the losses and adapters of `trained_by_hand`."""
    flat = ["rho=flat", f"rho.sigma={SIGMA}", "rho.ramp=constant"]
    adapters = {}
    for name, words in {
        "off": ["rho=off"],
        "copy": [*flat, "rho.mode=copy"],
        "recompute": [*flat, "rho.mode=recompute"],
    }.items():
        settings = of(common, name) + words
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
        saved = json.loads((folder / "adapter/adapter_config.json").read_text())
        peft = {key: saved[key] for key in ("target_modules", "modules_to_save")} | {"task_type": task}
        base = auto.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
        losses, model = trained_by_hand(base, watched, losses_of, sigma=0.0 if name == "off" else SIGMA, seed=5, **peft)
        assert [row["loss"] for row in metrics_rows(folder)] == pytest.approx(losses, rel=2e-5)
        saved = load_file(folder / "adapter/adapter_model.safetensors")
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                moved = (parameter - watched.start[key]).abs().max()
                difference = (parameter - saved[saved_name(key)]).abs().max()
                assert moved > LR / 10, key  # A's first gradient is 0, as B is
                assert difference < 0.05 * moved, key
    assert adapters["copy"] == adapters["recompute"] != adapters["off"]


def saved_name(name):
    """The name in an adapter's file of a parameter of a PEFT model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


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


def pair_tokenizer():
    """One token per byte, with the special tokens that BERT puts around a text and between two."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {text: i for i, text in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocabulary, [], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokens = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), names, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **tokens)


@pytest.fixture
def encoder_folder(tmp_path, request):
    """A folder of random weights of an encoder as it is pretrained, with the head of its masked language model."""
    tokenizer = pair_tokenizer()
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), 0.0)
    described = ENCODERS[request.param] | {"vocab_size": len(tokenizer)} | no_dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        auto = AutoModelForPreTraining if request.param == "bert" else AutoModelForMaskedLM  # BERT's has the pooler
        model = auto.from_config(AutoConfig.for_model(request.param, **described))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(1.0 if request.param == "bert" else 3.0)  # BERT's pooler would saturate
        model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def encoder_settings(tiny_settings, tmp_path):
    """Settings of a run on pairs of sentences, the longest of them longer than the model's 63 positions."""
    rows = [
        {"sentence1": f"row {n} said so", "sentence2": f"row {n % 3} said" + " more" * (n % 9), "label": n % 2}
        for n in range(32)
    ]
    for split, part in (("train", rows[:24]), ("validation", rows[24:])):
        write_split(tmp_path / "data", "nyu-mll/glue", "mrpc", split, part)
    words = [word for word in tiny_settings if not word.startswith(("model.", "dataset.", "optim.lr"))]
    words += ["model=encoder", "dataset=mrpc", "dataset.max_length=48", f"data_root={tmp_path / 'data'}"]
    words += [f"trainer.max_steps={STEPS}", "trainer.save_steps=2", "seed=5", "peft.lora_alpha=8", f"optim.lr={LR}"]
    return [*words, "optim.lr_schedule=constant", "optim.warmup_ratio=0"]


@pytest.mark.parametrize("encoder_folder", parameters(ENCODERS), indirect=True)
def test_a_killed_and_resumed_encoder_is_the_loop_written_out(encoder_folder, encoder_settings, monkeypatch):
    common = [*encoder_settings, f"model.hub_id={encoder_folder}"]
    auto = AutoModelForSequenceClassification
    is_the_loop_written_out(encoder_folder, common, monkeypatch, auto, class_losses, "SEQ_CLS")
    folder = run_folder(of(common, "recompute"))
    assert command.main("glue", [str(folder), "batch_size=3"]) == 0
    (path,) = folder.glob("eval/**/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    model = PeftModel.from_pretrained(auto.from_pretrained(encoder_folder, num_labels=2), folder / "adapter").eval()
    most = {"roberta": 63, "bert": 64}.get(model.config.model_type, 512)  # RoBERTa's first position is the padding's
    for row in rows:
        inputs = tokenizer(*row["prompt"].split("\t"), truncation=True, max_length=most, return_tensors="pt")
        if model.config.model_type != "bert":
            del inputs["token_type_ids"]
        scores = model(**inputs).logits[0].log_softmax(-1).tolist()
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert row["prediction"] == ("different", "equivalent")[scores[1] > scores[0]]
    assert len(rows) == 8
    assert len({row["scores"][0] for row in rows}) > 4
    exported_says_the_same(folder, encoder_folder.parent, path, monkeypatch)


def exported_says_the_same(folder, here, path, monkeypatch):
    """A copy is scored as its run, and the code on its card loads the classifier."""
    assert export.main([str(folder), "--copy", str(here / "copy")]) == 0
    words = [f"rows={folder / 'test.jsonl'}", f"out={here / 'out'}", "task=mrpc", "batch_size=3"]
    assert command.main("glue", [str(here / "copy"), *words]) == 0
    scores = [json.loads(line)["scores"] for line in (here / "out/predictions.jsonl").read_text().splitlines()]
    assert scores == [json.loads(line)["scores"] for line in path.read_text().splitlines()]
    monkeypatch.chdir(here)
    found = {}
    exec((here / "copy/README.md").read_text().partition("```python\n")[2].partition("```")[0], found)
    assert found["model"].config.id2label == {0: "different", 1: "equivalent"}
    assert "classifier" in found["model"].peft_config["default"].modules_to_save
