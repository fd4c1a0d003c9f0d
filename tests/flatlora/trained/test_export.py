"""Exported models: what plain transformers and PEFT read computes what was trained; cards; what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import run_exp
from flatlora import export, inspect
from flatlora.models.loading import load_for_inference
from flatlora.trained import merge
from flatlora.trained.description import _interval
from flatlora.trained.place import resolve_model
from flatlora.utils.precision import widen
from tests.conftest import run_folder
from tests.saved_models import CPU, model_config

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
AUTO = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}


HEAD_AND_BIASES = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "lora_only"}


def make_adapter(base, folder, task="CAUSAL_LM", **settings):
    """An adapter of plain PEFT with random factors, and the base's tokenizer."""
    model = AUTO[task].from_pretrained(base)
    settings = {"target_modules": "all-linear"} | settings
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type=task, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def outputs(model):
    """Logits, and the tokens of greedy decoding."""
    model.eval()
    return model(input_ids=IDS, labels=IDS).logits, model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)


def check_same(left, right):
    (logits, tokens), (own_logits, own_tokens) = outputs(left), outputs(right)
    torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-5)  # one FP32 addition a weight
    assert torch.equal(tokens, own_tokens)


def errors(arguments, capsys):
    """The messages of a refused export."""
    capsys.readouterr()
    assert export.main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("CAUSAL_LM", {}),
        pytest.param("CAUSAL_LM", {"use_rslora": True}, marks=pytest.mark.extra),
        pytest.param("CAUSAL_LM", {"use_dora": True}, marks=pytest.mark.extra),
        pytest.param("CAUSAL_LM", HEAD_AND_BIASES, marks=pytest.mark.extra),
        ("SEQ_2_SEQ_LM", {}),
    ],
    ids=["lora", "rslora", "dora", "saved head", "t5"],
)
def test_a_merged_folder_computes_what_the_adapter_does(
    task, settings, tiny_model_folder, tiny_t5_folder, tmp_path, capsys
):
    base = tiny_t5_folder if task == "SEQ_2_SEQ_LM" else tiny_model_folder
    adapter = make_adapter(base, tmp_path / "adapter", task, **settings)
    assert export.main([str(adapter), "--merge", str(tmp_path / "merged")]) == 0
    written = capsys.readouterr().err
    assert "merged: rounding to float32 changes logits by up to" in written
    check_same(
        PeftModel.from_pretrained(AUTO[task].from_pretrained(base), adapter),
        AUTO[task].from_pretrained(tmp_path / "merged"),
    )
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= files
    assert not any(name.startswith("adapter") for name in files)
    assert str(base) not in (tmp_path / "merged/config.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}  # no temporary folder is left


@pytest.mark.parametrize("peft", ["pissa", pytest.param("lora_ga", marks=pytest.mark.extra)])
def test_a_run_whose_method_moves_the_base_is_merged(peft, tiny_settings, tiny_model_folder, tmp_path, capsys):
    settings = [*tiny_settings, f"peft={peft}", "trainer.max_steps=2", "trainer.save_steps=1"]
    assert run_exp.main(settings) == 0
    run = run_folder(settings)
    assert export.main([str(run / "checkpoint-2"), "--merge", str(tmp_path / "merged")]) == 0  # less its start/
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    check_same(PeftModel.from_pretrained(base, run / "adapter"), merged)
    assert "export the finished run, or use --merge" in errors([run / "checkpoint-2", "--copy", tmp_path / "x"], capsys)


@pytest.mark.extra
def test_a_fully_trained_model_is_copied_whole(tiny_settings, tmp_path, capsys):
    settings = [word for word in tiny_settings if not word.startswith("peft.")]
    settings += ["peft=full_ft", "trainer.max_steps=1"]
    assert run_exp.main(settings) == 0
    run = run_folder(settings)
    assert export.main([str(run), "--copy", str(tmp_path / "copy")]) == 0
    check_same(*(AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "adapter", tmp_path / "copy")))
    assert "library_name: transformers" in (tmp_path / "copy/README.md").read_text()
    assert "holds a whole model and no adapter" in errors([run, "--merge", tmp_path / "merged"], capsys)


def test_bf16_weights_are_those_of_one_rounding(tiny_model_folder, tmp_path):
    adapter = make_adapter(tiny_model_folder, tmp_path / "adapter")
    assert export.main([str(adapter), "--merge", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    base, factors = load_file(tiny_model_folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(merged[f"{name}.weight"], (base[f"{name}.weight"] + 2.0 * (b @ a)).bfloat16())
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    card = (tmp_path / "merged/README.md").read_text()
    assert "rounding to bfloat16 changes logits by up to 0.0" in card


@pytest.mark.extra
def test_a_head_that_shares_the_embedding_is_merged_alone(tiny_model_folder, tmp_path):
    base = tmp_path / "tied"
    shutil.copytree(tiny_model_folder, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    assert export.main([str(adapter), "--merge", str(tmp_path / "merged")]) == 0
    check_same(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    )


def test_a_merge_that_is_not_the_adapter_is_refused(tiny_model_folder, tmp_path, monkeypatch, capsys):
    adapter = make_adapter(tiny_model_folder, tmp_path / "adapter")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    assert "so it is not the adapted one" in errors([adapter, "--merge", tmp_path / "merged"], capsys)
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder):
    """A finished and scored run with Flat-LoRA."""
    root = tmp_path_factory.mktemp("exported")
    settings = [
        f"model.hub_id={tiny_model_folder}",
        "model.embedded=null",
        "model.dtype=float32",
        "wandb.mode=disabled",
    ]
    settings += [
        f"results_root={root}",
        "eval=[gsm8k]",
        "eval.gsm8k.max_new_tokens=4",
        "trainer.device=cpu",
        "rho=flat",
    ]
    settings += ["dataset.train_rows=8", "dataset.validation_rows=0", "dataset.test_rows=4", "optim.batch_size=4"]
    settings += ["trainer.micro_batch_size=4", "trainer.save_steps=1"]
    assert run_exp.main(settings) == 0
    return run_folder(settings)


def test_a_copied_adapter_loads_and_its_card_says_what_it_is(run, tiny_model_folder, tmp_path):
    assert export.main([str(run), "--copy", str(tmp_path / "copy")]) == 0
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), run / "adapter")
    copied = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path / "copy")
    check_same(original, copied)
    card = ModelCard.load(tmp_path / "copy/README.md")
    record = json.loads((run / "run.json").read_text())
    (score,) = [result for result in card.data.eval_results if result.metric_type == "exact_match"]
    assert score.metric_value == record["metrics"]["gsm8k/exact_match"]
    assert card.data.library_name == "peft"
    assert "flat-lora" in card.data.tags
    for text in (
        "| gsm8k | exact_match |",
        "| 4 |",
        "sigma=0.05",
        record["backbone_sha256"]["before"],
        "| seed | 42 |",
    ):
        assert text in card.text
    assert str(tiny_model_folder) not in card.content
    assert str(run.parents[2]) not in card.content


def test_a_checkpoint_is_copied_without_its_optimizer(run, tmp_path):
    checkpoint = max(run.glob("checkpoint-*"))
    assert export.main([str(checkpoint), "--copy", str(tmp_path / "copy")]) == 0
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if name.endswith((".pt", ".pth", ".bin"))}


def test_a_push_uploads_the_folder_with_its_card(run, tmp_path, monkeypatch, capsys):
    uploads, created = [], []

    def upload(self, repo_id, folder_path, **_):
        uploads.append((repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()}))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(export, "get_token", lambda: "hf_token")
    monkeypatch.setattr(export.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(export.HfApi, "whoami", lambda self, token: {})
    monkeypatch.setattr(
        export.HfApi, "create_repo", lambda self, repo_id, **options: created.append((repo_id, options))
    )
    monkeypatch.setattr(export.HfApi, "upload_folder", upload)
    monkeypatch.setattr(export, "is_local", lambda name: False)
    assert export.main([str(run), "--push", "someone/flat", "--private"]) == 0
    ((name, files),) = uploads
    assert name == "someone/flat"
    assert created == [("someone/flat", {"private": True, "exist_ok": True})]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert b'PeftModel.from_pretrained(model, "someone/flat")' in files["README.md"]
    failed = OSError("connection reset")
    monkeypatch.setattr(export.HfApi, "upload_folder", lambda self, **_: (_ for _ in ()).throw(failed))
    assert export.main([str(run), "--merge", str(tmp_path / "merged"), "--push", "someone/flat"]) == 1
    assert "connection reset" in capsys.readouterr().err
    assert (tmp_path / "merged/README.md").is_file()


def test_all_errors_are_reported_before_weights_are_read(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "load_for_inference", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(export, "get_token", lambda: None)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (tmp_path / "there").mkdir()
    reported = errors([run, "--merge", tmp_path / "there", "--push", "a//b"], capsys)
    assert f"Invalid folder {tmp_path}/there: it exists" in reported
    assert "GB are needed there and 0.00 GB are free" in reported
    assert "Missing token for --push=a//b" in reported
    assert "run `hf auth login`, or set HF_TOKEN" in reported
    assert "it is written USER/NAME" in reported
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file" in errors([run, "--copy", tmp_path / "file/x"], capsys)
    assert "which nobody else can load" in errors([run, "--push", "a/b"], capsys)
    assert "no such folder" in errors([tmp_path / "none", "--copy", tmp_path / "x"], capsys)


def test_quantized_bases_and_whole_models_are_refused_by_name(tiny_model_folder, tmp_path, capsys):
    adapter = make_adapter(tiny_model_folder, tmp_path / "adapter")
    resolved = resolve_model(str(adapter))
    (reported,) = merge.merge_errors(resolved, model_config(tiny_model_folder, quantize="nf4"))
    assert f"the weights of {tiny_model_folder} are quantized (nf4)" in reported
    packed = tmp_path / "packed"
    shutil.copytree(tiny_model_folder, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (packed / "config.json").write_text(json.dumps(config))
    assert "quantized (gptq)" in errors([adapter, f"base={packed}", "--merge", tmp_path / "x"], capsys)
    reported = errors([tiny_model_folder, "--merge", tmp_path / "x"], capsys)
    assert "it holds a whole model and no adapter; --copy shares" in reported


def test_an_adapter_whose_base_moved_or_changed_is_refused(run, tiny_model_folder, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    adapter = make_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    reported = errors([adapter, "--merge", tmp_path / "x"], capsys)
    assert (
        f"Invalid base model {base} of {adapter}: there is no such folder; name its new place with base=PATH"
        in reported
    )
    assert export.main([str(adapter), f"base={tmp_path / 'elsewhere'}", "--merge", str(tmp_path / "x")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    model.lm_head.weight.data.mul_(-1.0)
    model.save_pretrained(tmp_path / "elsewhere")
    reported = errors([run, f"base={tmp_path / 'elsewhere'}", "--merge", tmp_path / "y"], capsys)
    assert "which differ in weights" in reported
    assert not (tmp_path / "y").exists()


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    assert export.main([str(run), "--copy", str(tmp_path / "copy")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["--dtype", "float32", "--copy", "x"], ["--private", "--copy", "x"], ["x=y"]]
)
def test_options_without_effect_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main(["run", *arguments])
    assert stopped.value.code == 2
    capsys.readouterr()


def test_inspect_prints_what_a_run_and_an_adapter_are(run, tiny_model_folder, tmp_path, capsys):
    adapter = make_adapter(tiny_model_folder, tmp_path / "adapter", use_dora=True)
    assert inspect.main([str(run), str(adapter)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "peft=lora",
        "rho=flat",
        "sigma=0.05",
        "gsm8k exact_match",
        "n = 4",
        "transformers",
        "PEFT adapter LORA dora",
    ):
        assert text in shown
    assert inspect.main([str(tmp_path / "none"), str(tmp_path / "nothing")]) == 2
    assert "2 errors" in capsys.readouterr().err


def test_intervals_are_those_of_shares():
    low, high = _interval("accuracy", 0.75, 100)
    assert (round(low, 4), round(high, 4)) == (0.657, 0.8245)  # Wilson's, by hand
    assert _interval("f1", 0.75, 100) is None
    assert _interval("pass@1", 0.123, 10) is None  # several samples a row
    assert _interval("accuracy", 0.75, None) is None


@pytest.mark.extra
def test_smollm_merged_gives_the_same_answers(tmp_path):
    """The real model: LoRA on the embedded weights against the merged folder read by plain transformers."""
    base, tokenizer, _ = load_for_inference("HuggingFaceTB/SmolLM2-135M-Instruct", None, CPU)
    adapted = get_peft_model(widen(base), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.002 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("Q: What is the capital of France?\nA: ", return_tensors="pt")["input_ids"]
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 1.0)):
        assert export.main([str(tmp_path / "adapter"), "--merge", str(tmp_path / dtype), "--dtype", dtype]) == 0
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = (merged(ids).logits - adapted.eval()(ids).logits).abs().max()
        assert difference < tolerance
        if dtype == "float32":
            answers = [model.generate(ids, max_new_tokens=24, do_sample=False) for model in (merged, adapted)]
            assert torch.equal(*answers)
