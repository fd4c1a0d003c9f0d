"""What does not fit a model is reported by its config and its skeleton; attention computes each model's own formula."""

import copy
import json
import re
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LEDConfig,
    LEDForConditionalGeneration,
    SiglipVisionConfig,
)

import run_exp
from flatlora.config.sections import ModelConfig
from flatlora.models import fit
from flatlora.utils.errors import ConfigError
from tests.saved_models import ARCHITECTURES, CPU, GPT, model_config


def loss_with_large_logits(described, attn):
    """Loss of a random model whose attention's scores are tens of units wide, on padded rows; the same at each call."""
    torch.manual_seed(11)
    auto = AutoModelForSeq2SeqLM if described.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(described), attn_implementation=attn).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and re.search(r"q_proj|k_proj|qkv|query|c_attn|Wqkv|\.q\.|\.k\.", name):
                parameter.normal_(std=1.5)
        ids = torch.randint(3, 90, (2, 24))
        mask = torch.ones_like(ids)
        mask[1, 17:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_chosen_attention_computes_the_models_own_formula(name, device):
    described = AutoConfig.for_model(name.split()[0], **ARCHITECTURES[name])
    family = "seq2seq" if described.is_encoder_decoder else "causal_lm"
    chosen = fit.attention_implementation(model_config("x", family=family), described, torch.device(device))
    right = loss_with_large_logits(described, "eager")
    assert loss_with_large_logits(described, chosen) == pytest.approx(float(right), rel=1e-5)


def test_sdpa_drops_the_cap_that_gemma_2_has():
    """Which the choice above is for: where this fails, transformers' SDPA has learned it."""
    described = AutoConfig.for_model("gemma2", **ARCHITECTURES["gemma2"] | {"attn_logit_softcapping": 5.0})
    eager, sdpa = (loss_with_large_logits(described, attn) for attn in ("eager", "sdpa"))
    assert abs(eager - sdpa) > 1e-3 * eager


@pytest.mark.parametrize(
    ("name", "attn", "reason"),
    [
        ("gemma2", "sdpa", "SDPA leaves out the cap on attention's logits that Gemma2ForCausalLM has"),
        ("gpt_oss", "sdpa", "transformers' GptOssForCausalLM has no SDPA"),
        ("bloom", "sdpa", "transformers' BloomForCausalLM has no SDPA"),
        ("bloom", "flash_attention_2", "transformers' BloomForCausalLM has no FlashAttention"),
        ("llama", "sdpa", None),
        ("gemma2", "eager", None),
    ],
)
def test_kernels_that_would_compute_something_else_are_refused(name, attn, reason):
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name]))
    reported = fit.attention_errors(model_config("folder", attn=attn), skeleton)
    wanted = [f"Invalid model.attn={attn} with folder: {reason}; use model.attn=auto or eager."] if reason else []
    assert reported == wanted


# --- what config and skeleton tell before weights are loaded


def saved(folder, model_type, tokenizer_folder, **described):
    """A folder with a config, a tokenizer and an empty file of weights: nothing is to read those."""
    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model(model_type, **described).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


LARGE = {"vocab_size": 4200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
MAMBA = LARGE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
UNFIT = {
    "rows longer than its positions": (
        ("gpt2", GPT | {"vocab_size": 4200}),
        ["dataset.max_length=65"],
        "Invalid dataset.max_length=65 with model.hub_id={}: its table of positions (transformer.wpe) ends at "
        "64; set dataset.max_length=64 or less.",
    ),
    "an encoder-decoder as causal model": (
        ("t5", {"vocab_size": 4200, "d_model": 32, "num_layers": 1, "num_heads": 4}),
        [],
        "Invalid model.hub_id={} (t5): it is an encoder-decoder; use model.family=seq2seq",
    ),
    "a decoder as encoder-decoder": (
        ("llama", LARGE),
        ["model.family=seq2seq"],
        "Invalid model.hub_id={} (llama): it has no encoder and decoder; use model.family=causal_lm",
    ),
    "an encoder": (("bert", LARGE), [], "Invalid model.hub_id={} (bert): it is an encoder, whose tokens see those"),
    "a permuting model": (
        ("xlnet", {"vocab_size": 4200, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}),
        [],
        "Invalid model.hub_id={} (xlnet): it predicts tokens in permuted order",
    ),
    "a decoder of an encoder-decoder": (
        ("bart", {"vocab_size": 4200, "d_model": 32, "is_encoder_decoder": False, "is_decoder": True}),
        [],
        "Invalid model.hub_id={} (bart): its loss in transformers does not shift labels: it would learn to repeat",
    ),
    "layers that PEFT refuses": (
        ("mamba2", MAMBA),
        [],
        "Invalid peft.target_modules=all with {}: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible with Mamba",
    ),
    "packed weights under noise": (
        ("llama", LARGE | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ["rho=flat", "rho.sigma=0.1"],
        "Invalid rho=flat with model.hub_id={}: its weights are packed (bitsandbytes 8-bit)",
    ),
    "packed weights that are to be trained": (
        ("llama", LARGE | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ["peft=full_ft"],
        "Invalid peft=full_ft with model.hub_id={}: its weights are packed (bitsandbytes 8-bit)",
    ),
    "a vocabulary larger than its embeddings": (
        ("llama", LARGE | {"vocab_size": 300}),
        [],
        "Invalid tokenizer of {}: rows of word_math contain ",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_reported_before_weights_are_loaded(name, tiny_model_folder, tiny_settings, tmp_path):
    (model_type, described), words, reported = UNFIT[name]
    folder = saved(tmp_path / "model", model_type, tiny_model_folder, **described)
    kept = [word for word in tiny_settings if not word.startswith("peft.") or "peft=full_ft" not in words]
    experiment = run_exp.experiment_of([*kept, f"model.hub_id={folder}", *words])
    with pytest.raises(ConfigError) as caught:
        run_exp.prepare(experiment, CPU)
    assert any(message.startswith(reported.format(folder)) for message in caught.value.errors), caught.value.errors


def test_positions_of_pictures_do_not_bound_rows_nor_a_decoders_an_encoders():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=16, patch_size=4, **sizes)
    text = Gemma3TextConfig(vocab_size=64, head_dim=8, num_key_value_heads=2, **sizes)
    with torch.device("meta"):
        pictured = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    assert any("position_embedding" in name for name, _ in pictured.named_parameters())
    assert fit.position_tables(pictured) == {}
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads", "ffn_dim")}
    positions = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 16}
    led = LEDForConditionalGeneration(LEDConfig(vocab_size=64, d_model=8, attention_window=4, **sides, **positions))
    assert sorted(fit.position_tables(led).values()) == [16, 64]
    config = ModelConfig(name="m", hub_id="m", family="seq2seq")
    assert fit.position_errors(config, led, 64) == []
    assert "ends at 64" in fit.position_errors(config, led, 65)[0]


def test_rows_beyond_rotary_positions_are_counted_before_weights_are_loaded(
    tiny_model_folder, tiny_settings, tmp_path, caplog
):
    """By the masks of the batches that the model gets."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    experiment = run_exp.experiment_of([*tiny_settings, f"model.hub_id={folder}", "dataset.max_length=64"])
    inputs = run_exp.prepare(experiment, CPU)
    trained = inputs.collate([inputs.rows.train[index] for index in range(len(inputs.rows.train))])
    lengths = trained["attention_mask"].sum(1).tolist()
    assert len(inputs.rows.validation) == 0
    assert "max_position_embeddings" not in caplog.text
    bound = max(lengths) - 1
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": bound}))
    run_exp.prepare(experiment, CPU)
    longer = sum(length > bound for length in lengths)
    assert longer > 0
    reported = (
        f"{longer} rows are longer than the {bound} tokens that {folder} was made for (max_position_embeddings), the "
    )
    assert caplog.text.count(reported + f"longest {max(lengths)}: ") == 1


def test_a_padding_token_beyond_the_embeddings_is_reported_before_weights_are_loaded(
    tiny_model_folder, tiny_settings, tmp_path
):
    folder = saved(tmp_path / "model", "llama", tiny_model_folder, **LARGE | {"vocab_size": 4096})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    experiment = run_exp.experiment_of([*tiny_settings, f"model.hub_id={folder}"])
    with pytest.raises(ConfigError) as caught:
        run_exp.prepare(experiment, CPU)
    (message,) = caught.value.errors
    assert message.startswith(f"Invalid tokenizer of {folder}: 1 ([PAD] (4096)) lie beyond the model's 4096 embeddings")
