"""`peft.init_from`: a run goes on with a saved adapter's factors, or refuses it with everything that differs."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_exp
from flatlora import methods
from flatlora.methods.regularizers.bi_lora import ASCENT
from flatlora.models import loading
from flatlora.models.loading import load_for_inference
from flatlora.train import training
from flatlora.trained import card
from flatlora.utils.errors import ConfigError
from tests.conftest import Killed, die_at, metrics_rows, tiny_llama
from tests.methods_toolbox import config_of, logits, nudge
from tests.saved_models import CPU, model_config

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def adapter(tiny_model_folder, tmp_path):
    """(folder, settings) → an adapter of plain PEFT as a run with `tiny_settings` has it, with its base's tokenizer."""

    def make(name="source", base=tiny_model_folder, **settings):
        model = AutoModelForCausalLM.from_pretrained(base)
        settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
        model = get_peft_model(model, LoraConfig(**settings))
        nudge(model)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def refused(tiny_settings, capsys, monkeypatch):
    """(settings) → the errors of a run that is refused before any weight is loaded."""
    monkeypatch.setattr(loading, "load_backbone", lambda *args: pytest.fail("weights were loaded"))

    def run(*settings):
        capsys.readouterr()
        assert run_exp.main([*tiny_settings, "trainer.max_steps=1", *settings]) == 2
        return " ".join(capsys.readouterr().err.split())

    return run


def named(settings, name, *more):
    return [*(word for word in settings if not word.startswith("wandb.name=")), f"wandb.name={name}", *more]


def folder_of(tmp_path, name):
    return next((tmp_path / "results").glob(f"*/{name}/42"))


def double(path):
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_the_first_loss_is_that_of_the_adapter(tiny_settings, tiny_model_folder, tmp_path, monkeypatch):
    settings = [*tiny_settings, "dataset.train_rows=4", "trainer.max_steps=3", "optim.warmup_ratio=0"]
    assert run_exp.main(named(settings, "first", "trainer.save_steps=2")) == 0
    checkpoint = folder_of(tmp_path, "first") / "checkpoint-2"
    given = {}

    def train(experiment, model, processor, rows, validation, collate, *args, original=training.train, **kwargs):
        given.update(batch=collate(list(rows)))
        return original(experiment, model, processor, rows, validation, collate, *args, **kwargs)

    monkeypatch.setattr(training, "train", train)
    assert run_exp.main(named(settings, "second", f"peft.init_from={checkpoint}")) == 0
    model, _, _ = load_for_inference(str(checkpoint), model_config(tiny_model_folder), CPU)
    with torch.no_grad():
        expected = model(**{key: value for key, value in given["batch"].items() if key != "rows"}).loss.item()
    second = folder_of(tmp_path, "second")
    first_loss = metrics_rows(second)[0]["loss"]
    assert first_loss == pytest.approx(expected, rel=1e-5)
    assert first_loss != pytest.approx(metrics_rows(folder_of(tmp_path, "first"))[0]["loss"], rel=1e-3)
    record = json.loads((second / "run.json").read_text())
    assert record["init_from"]["source"] == str(checkpoint)
    assert len(record["init_from"]["sha256"]) == 64
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    record["experiment"]["dataset"]["path"] = f"{tmp_path}/rows.jsonl"  # of dataset=custom
    assert str(tmp_path) not in card._settings(record["experiment"])


METHODS = ["lora", "rslora", "dora", "lora_plus", "lora_fa", "lora_pro", "hira", "delora"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_with_the_saved_factors(name, tmp_path):
    method, config = methods.ADAPTERS[name], config_of(name, init_from="here")
    backbones = [tiny_llama().requires_grad_(False) for _ in range(2)]
    for backbone in backbones:
        backbone.name_or_path = "tiny"
    saved = method.apply(backbones[0], config, methods.Start(3))
    with torch.no_grad():
        for parameter in saved.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1).add_(0.01)
    method.save(saved, config, tmp_path, methods.Start(3))
    again = method.apply(backbones[1], config, methods.Start(4, init_from=tmp_path))
    assert torch.equal(logits(again), logits(saved))
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    if methods.refusal(name, "bi_lora") is None:
        methods.REGULARIZERS["bi_lora"].prepare(again, methods.REGULARIZERS["bi_lora"].Config(name="bi_lora"), 3)
        torch.testing.assert_close(logits(again), logits(saved))
        ascent = [p for n, p in again.named_parameters() if f"lora_B.{ASCENT}" in n]
        assert ascent
        assert not any(p.any() for p in ascent)
    other, start = "hira" if name != "hira" else "lora", methods.Start(3, init_from=tmp_path)
    with pytest.raises(ConfigError, match="it is an adapter of"):
        methods.ADAPTERS[other].apply(tiny_llama().requires_grad_(False), config_of(other), start)


@pytest.mark.extra
def test_noise_acts_from_the_first_step(tiny_settings, adapter, tmp_path):
    """The ramp starts at 0, so a constant strength is used."""
    source = adapter()
    settings = [*tiny_settings, "trainer.max_steps=2", f"peft.init_from={source}", "rho=flat_constant"]
    losses = []
    for name, sigma in (("off", "rho.sigma=0"), ("flat", "rho.sigma=0.05")):
        assert run_exp.main(named(settings, name, sigma)) == 0
        folder = folder_of(tmp_path, name)
        losses.append(metrics_rows(folder)[0]["loss"])
        record = json.loads((folder / "run.json").read_text())
        assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_all_differences_are_named_before_weights_are_loaded(refused, adapter, tiny_model_folder):
    source = adapter(r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], alpha_pattern={"q_proj": 3})
    errors = refused(f"peft.init_from={source}")
    assert f"Invalid peft.lora_r=4 with peft.init_from={source}: that adapter has r=2; set peft.lora_r=2" in errors
    assert "that adapter has lora_alpha=32; set peft.lora_alpha=32" in errors
    assert "is on 4 layers (q_proj, v_proj), and peft.target_modules selects 14" in errors
    assert "set peft.target_modules=[q_proj,v_proj]" in errors
    assert "alpha_pattern={'q_proj': 3} in its adapter_config.json changes what it computes" in errors


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ({"use_dora": True}, [], "it is an adapter of dora, and this run trains one of lora; set peft=dora"),
        pytest.param(
            {"init_lora_weights": "pissa"}, [], "init_lora_weights=pissa in its adapter_config", marks=pytest.mark.extra
        ),
        pytest.param({"rank_pattern": {"q_proj": 3}}, [], "have ranks of their own", marks=pytest.mark.extra),
        ({}, ["peft=pissa"], "with peft=pissa: this method computes an initial adapter of its own"),
        ({}, ["peft=adalora"], "with peft=adalora: its ranks begin equal"),
    ],
)
def test_adapters_of_another_kind_are_refused(made, settings, message, refused, adapter):
    assert message in refused(f"peft.init_from={adapter(**made)}", *settings)


def test_a_whole_layer_that_the_config_does_not_name_is_refused(refused, adapter):
    source = adapter(modules_to_save=["norm"])
    path = source / "adapter_config.json"
    path.write_text(path.read_text().replace('"norm"', '"other"'))
    assert "it holds whole trained layers, such as resized embeddings or modules_to_save" in refused(
        f"peft.init_from={source}"
    )


def whole_layers(base, folder, added=0, **settings):
    """An adapter of plain PEFT with trained layers, or embeddings of `added` more tokens, in its file."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(added)])
    if added:
        model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", **settings)
    )
    nudge(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("added", "trained"),
    [
        pytest.param(0, ["lm_head", "norm"], marks=pytest.mark.extra, id="trained"),
        pytest.param(3, None, marks=pytest.mark.extra, id="added"),
        pytest.param(3, ["embed_tokens", "lm_head"], marks=pytest.mark.extra, id="both"),
    ],
)
def test_whole_layers_and_added_tokens_go_on(added, trained, tiny_settings, tiny_model_folder, tmp_path, monkeypatch):
    source = whole_layers(tiny_model_folder, tmp_path / "source", added, modules_to_save=trained)
    before = load_file(source / "adapter_model.safetensors")
    settings = [*tiny_settings, "trainer.max_steps=3", "trainer.save_steps=2", "optim.warmup_ratio=0"]
    settings += [f"peft.init_from={source}", "rho=flat_constant", "rho.sigma=0.05"]
    with monkeypatch.context() as patch:
        die_at(2, patch)
        with pytest.raises(Killed):
            run_exp.main(named(settings, "killed"))
    assert run_exp.main(named(settings, "killed", "resume=true")) == 0
    given = {}

    def train(experiment, model, processor, rows, validation, collate, *args, original=training.train, **kwargs):
        given.update(batch=collate(list(rows)), processor=processor, model=model)
        given["loss"] = loss_of(model.eval(), given["batch"])
        return original(experiment, model.train(), processor, rows, validation, collate, *args, **kwargs)

    monkeypatch.setattr(training, "train", train)
    assert run_exp.main(named(settings, "whole")) == 0
    whole = folder_of(tmp_path, "whole")
    assert (whole / "adapter/adapter_model.safetensors").read_bytes() == (
        folder_of(tmp_path, "killed") / "adapter/adapter_model.safetensors"
    ).read_bytes()
    config = model_config(tiny_model_folder)
    loaded, tokenizer, _ = load_for_inference(str(source), config, CPU)
    assert given["loss"] == pytest.approx(loss_of(loaded, given["batch"]), rel=1e-5)
    assert given["processor"].get_vocab() == tokenizer.get_vocab()
    record = json.loads((whole / "run.json").read_text())
    assert record["backbone_sha256"]["before"] == record["backbone_sha256"]["after"]
    after = load_file(whole / "adapter/adapter_model.safetensors")
    wrappers = ("modules_to_save", "original_module")  # whose tensors PEFT writes too, if embeddings were resized
    assert after.keys() == {name for name in before if not any(part in name for part in wrappers)}
    for name in after:  # of whole layers: those of added tokens are frozen
        if "lora_" not in name:
            assert torch.equal(before[name], after[name]) == (trained is None)
    scored, tokenizer, _ = load_for_inference(str(whole / "adapter"), config, CPU)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tiny_model_folder)) + added
    assert loss_of(scored, given["batch"]) == pytest.approx(loss_of(given["model"].eval(), given["batch"]), rel=1e-5)


def loss_of(model, batch) -> float:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "rows"}).loss.item()


def test_another_base_or_tokenizer_is_refused(refused, adapter, tiny_model_folder, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(tiny_model_folder, wide)
    tiny_llama(4096, intermediate_size=64).save_pretrained(wide)
    source = adapter(base=wide)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    errors = refused(f"peft.init_from={source}")
    assert f"with model.hub_id={tiny_model_folder}: the adapter was trained on {wide}; name that model" in errors
    assert "tensors of another shape than this model's: 6 (" in errors
    assert "another tokenizer: 1 tokens differ, such as '<new>', which is 4096 there and None here" in errors


def test_no_adapter_is_named(refused, tiny_model_folder, tmp_path):
    assert f"Invalid peft.init_from={tmp_path}/none: no such folder" in refused(f"peft.init_from={tmp_path}/none")
    assert "it holds no adapter; name a run" in refused(f"peft.init_from={tiny_model_folder}")
    assert "there is no such folder, and reading it from the hub failed" in refused("peft.init_from=someone/nothing")
    assert "Invalid peft.init_from=x with peft=full_ft: it is a key of peft=lora" in refused(
        "peft=full_ft", "peft.init_from=x"
    )


@pytest.mark.extra
def test_the_recorded_base_is_compared(tiny_settings, tiny_model_folder, tmp_path, capsys):
    """A run records its base's bytes: the folder's name may change, and they may not."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(tiny_model_folder, base)
    settings = [*tiny_settings, "trainer.max_steps=1"]
    assert run_exp.main(named(settings, "first", f"model.hub_id={base}")) == 0
    source = folder_of(tmp_path, "first")
    base.rename(moved)
    assert run_exp.main(named(settings, "second", f"model.hub_id={moved}", f"peft.init_from={source}")) == 0
    double(moved / "model.safetensors")
    assert run_exp.main(named(settings, "third", f"model.hub_id={moved}", f"peft.init_from={source}")) == 2
    assert "which differ in weights; put those weights back" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "results").glob("*/third/42/config.yaml"))


def test_a_resumed_run_refuses_another_start(tiny_settings, adapter, tmp_path, monkeypatch, capsys):
    source = adapter()
    settings = [*tiny_settings, "trainer.max_steps=3", "trainer.save_steps=1", f"peft.init_from={source}"]
    with monkeypatch.context() as patch:
        die_at(2, patch)
        with pytest.raises(Killed):
            run_exp.main(settings)
    path = source / "adapter_model.safetensors"
    content = path.read_bytes()
    double(path)
    assert run_exp.main([*settings, "resume=true"]) == 2
    assert "began with an adapter of SHA-256" in " ".join(capsys.readouterr().err.split())
    path.write_bytes(content)
    assert run_exp.main([*settings, "resume=true"]) == 0
    assert run_exp.main([*(word for word in settings if "init_from" not in word), "resume=true"]) == 2
    assert "peft.init_from is" in " ".join(capsys.readouterr().err.split())


def test_a_hub_id_is_read_from_the_hub(tiny_settings, adapter, tmp_path, monkeypatch):
    """Here from its cache, where a download leaves it."""
    commit = "c" * 40
    repository = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(adapter(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run_exp.main([*tiny_settings, "trainer.max_steps=1", "peft.init_from=someone/adapter"]) == 0
    record = json.loads((folder_of(tmp_path, "run") / "run.json").read_text())
    assert record["init_from"]["commit"] == commit


@pytest.mark.extra
def test_a_checkpoint_less_its_start_is_refused(tiny_settings, tmp_path, capsys):
    assert run_exp.main(named([*tiny_settings, "trainer.max_steps=1"], "first", "peft=pissa")) == 0
    first = folder_of(tmp_path, "first")
    settings = named([*tiny_settings, "trainer.max_steps=1"], "second")
    assert run_exp.main([*settings, f"peft.init_from={first / 'checkpoint-1'}"]) == 2
    assert "fits the backbone less the initial adapter" in " ".join(capsys.readouterr().err.split())
    whole = [word for word in settings if not word.startswith("peft.lora_r")]
    assert run_exp.main([*whole, f"peft.init_from={first}", "peft.lora_r=8", "peft.lora_alpha=32"]) == 0
