"""Adapters are whole or refused, and what was saved with them is what scores them."""

import copy
import json
import os
import shutil
import time

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flatlora.models import loading, saved_adapters
from flatlora.utils.errors import ConfigError
from tests.saved_models import ARCHITECTURES, CPU, model_config, without


def adapter_of(folder, target, *, trained=None, **changes):
    """A saved LoRA adapter of a model's folder, all of its tensors random; the model that it was saved from."""
    torch.manual_seed(1)
    model = trained or AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings | changes)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(target, save_embedding_layers=False)
    return adapted


def renamed(tensors):
    return {name.replace("base_model.model.", "model."): tensor for name, tensor in tensors.items()}


def half(tensors):
    return dict(sorted(tensors.items())[::2])


def foreign(tensors):
    return tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}


def not_finite(tensors):
    next(iter(tensors.values()))[0, 0] = float("inf")
    return tensors


def of_another_shape(tensors):
    return {name: torch.zeros(4, 33) if "q_proj.lora_A" in name else tensor for name, tensor in tensors.items()}


BROKEN_ADAPTERS = {
    "other prefixes": (renamed, "28 (", "missing"),
    "half of its tensors": (half, "14 (", "missing"),
    "foreign tensors": (foreign, "1 (base_model.model.model.layers.7.mlp.up_proj", "left over"),
    "infinity": (not_finite, "1 (", "with NaN or infinity"),
    "another shape": (of_another_shape, "size mismatch for", "q_proj.lora_A"),
    "no magnitudes": (without("magnitude"), "14 (", "missing"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused_with_the_names(name, tiny_model_folder, tmp_path):
    change, *reported = BROKEN_ADAPTERS[name]
    adapter_of(tiny_model_folder, tmp_path / "adapter", use_dora=name == "no magnitudes")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ConfigError) as caught:
        loading.load_for_inference(str(tmp_path / "adapter"), None, CPU)
    (message,) = caught.value.errors
    assert message.startswith(f"Invalid adapter {tmp_path}/adapter: ")
    assert all(part in message for part in reported), message


def test_biases_that_an_adapter_trained_and_lacks_are_named(tmp_path):
    """PEFT's own report of missing keys has none but LoRA's."""
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **ARCHITECTURES["gpt2"]))
    adapter_of(None, tmp_path, trained=copy.deepcopy(base), bias="all", fan_in_fan_out=True)
    saved_adapters.with_adapter(copy.deepcopy(base), tmp_path, family="causal_lm", name="base")  # as it is
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lacking = [key for key in tensors if key.endswith(("c_fc.bias", "c_fc.base_layer.bias"))]
    save_file({key: value for key, value in tensors.items() if key not in lacking}, path)
    with pytest.raises(ConfigError) as caught:
        saved_adapters.with_adapter(copy.deepcopy(base), tmp_path, family="causal_lm", name="base")
    assert f"{len(lacking)} ({lacking[0]}" in str(caught.value)
    assert "missing" in str(caught.value)


def test_an_adapter_whose_base_is_not_known_is_refused(tiny_model_folder, tmp_path):
    """PEFT's LoRA-GA moves a part of W into the adapter, and loads the adapter onto W all the same."""
    adapter_of(tiny_model_folder, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "lora_ga"}))
    with pytest.raises(ConfigError, match=r"Invalid init_lora_weights=lora_ga .*path_initial_model_for_weight"):
        loading.load_for_inference(str(tmp_path), None, CPU)


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS"])
def test_an_adapter_of_another_task_is_refused(tiny_model_folder, tmp_path, task):
    adapter_of(tiny_model_folder, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task}))
    with pytest.raises(ConfigError, match=f"Invalid task_type {task} in .*trained for it .CAUSAL_LM"):
        loading.load_for_inference(str(tmp_path), None, CPU)


COMPUTED_BY_PEFT = [
    {},
    {"use_dora": True},
    {"task_type": None},
    {"target_modules": ["q_proj"]},
    {"init_lora_weights": "pissa"},  # W is moved at each load
    {"init_lora_weights": "olora"},
]


@pytest.mark.parametrize("changes", COMPUTED_BY_PEFT)
def test_a_whole_adapter_computes_what_peft_does(tiny_model_folder, tmp_path, changes):
    trained = adapter_of(tiny_model_folder, tmp_path, **changes)
    loaded, _, _ = loading.load_for_inference(str(tmp_path), None, CPU)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
        with trained.disable_adapter():
            assert not torch.allclose(loaded(ids).logits, trained(ids).logits, atol=1e-3)


def chat_adapter(folder, target, *, save_embeddings=True):
    """An adapter trained with two tokens more, another end and a chat template; its model and tokenizer."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.add_special_tokens({"eos_token": "<end>", "additional_special_tokens": ["<user>"]})
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tokenizer))
    trained = adapter_of(folder, target, trained=model)
    if save_embeddings:
        trained.save_pretrained(target, save_embedding_layers=True)
    tokenizer.save_pretrained(target)
    return trained, tokenizer


def test_what_was_saved_with_an_adapter_is_what_scores_it(tiny_model_folder, tmp_path):
    """The trained model in memory and its tokenizer are the oracle."""
    trained, tokenizer = chat_adapter(tiny_model_folder, tmp_path / "adapter")
    run = model_config(tiny_model_folder)
    for config in (None, run):
        loaded, processor, _ = loading.load_for_inference(str(tmp_path / "adapter"), config, CPU)
        text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        assert text == "<user>Hello<end>"
        assert processor.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 2
        ids = processor(text, return_tensors="pt")["input_ids"]
        assert ids.tolist() == tokenizer(text, return_tensors="pt")["input_ids"].tolist()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, trained(ids).logits)


def test_the_tokenizer_in_the_folder_of_a_training_is_its_checkpoints_too(tiny_model_folder, tmp_path):
    _, tokenizer = chat_adapter(tiny_model_folder, tmp_path / "checkpoint-2")
    for path in (tmp_path / "checkpoint-2").glob("*token*"):
        path.rename(tmp_path / path.name)
    (tmp_path / "checkpoint-2/chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    _, processor, _ = loading.load_for_inference(str(tmp_path / "checkpoint-2"), None, CPU)
    assert processor.get_vocab() == tokenizer.get_vocab()
    assert processor.chat_template == tokenizer.chat_template


def test_tokens_without_embeddings_are_refused(tiny_model_folder, tmp_path):
    chat_adapter(tiny_model_folder, tmp_path, save_embeddings=False)
    with pytest.raises(ConfigError, match=r"Invalid tokenizer of .*2 \(<end> \(\d+\), <user> \(\d+\)\) lie beyond"):
        loading.load_for_inference(str(tmp_path), None, CPU)


def test_embeddings_that_were_resized_and_saved_in_part_are_refused(tiny_model_folder, tmp_path):
    chat_adapter(tiny_model_folder, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(without("lm_head")(load_file(path)), path)
    with pytest.raises(ConfigError, match=r"holds no such tensor for lm_head, whose new rows would be random"):
        loading.load_for_inference(str(tmp_path), None, CPU)


def test_a_missing_trained_head_is_refused_by_name(tiny_model_folder, tmp_path):
    adapter_of(tiny_model_folder, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    save_file(without("lm_head")(load_file(path)), path)
    with pytest.raises(ConfigError, match="lm_head"):
        loading.load_for_inference(str(tmp_path), None, CPU)


# --- adapters that nobody vouches for


def with_keys(**keys):
    def change(config):
        return config | keys

    return change


INVALID = [
    (with_keys(r=-1), "Invalid r=-1"),
    (with_keys(r="8"), "Invalid r=8"),
    (with_keys(r=10**9), "Invalid r=1000000000"),
    (with_keys(lora_alpha=float("nan")), "Invalid lora_alpha=nan"),
    (with_keys(lora_alpha=None), "Invalid lora_alpha=None"),
    (with_keys(rank_pattern={"q_proj": 10**9}), "Invalid rank_pattern.q_proj=1000000000"),
    (with_keys(rank_pattern={"q_proj": -4}), "Invalid rank_pattern.q_proj=-4"),
    (with_keys(rank_pattern={"q_proj": "many"}), "Invalid rank_pattern.q_proj=many"),
    (with_keys(rank_pattern=[1, 2]), "Invalid rank_pattern.?=[1, 2]"),
    (with_keys(alpha_pattern={"q_proj": {}}), "Invalid alpha_pattern.q_proj={}"),
    (with_keys(alpha_pattern="x" * 10**6), "Invalid alpha_pattern.?=xxx"),
    (with_keys(rank_pattern={"(": 4}), "Invalid patterns"),
    (with_keys(target_modules="("), "Invalid patterns"),
    (with_keys(target_modules="(" * 5000 + ")" * 5000), "Invalid patterns"),
    (with_keys(target_modules=5), "Invalid"),
    (with_keys(target_modules={"a": [1]}), "Invalid adapter"),
    (with_keys(exclude_modules="["), "Invalid patterns"),
    (with_keys(modules_to_save=["("]), "Invalid patterns"),
    (with_keys(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="("), "Invalid patterns"),
    (with_keys(init_lora_weights=[]), None),
]


@pytest.fixture(scope="module")
def whole_adapter(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    adapter_of(tiny_model_folder, folder)
    return folder


@pytest.mark.parametrize(("change", "head"), INVALID)
def test_what_an_adapter_says_of_itself_is_checked(change, head, whole_adapter, tmp_path):
    shutil.copytree(whole_adapter, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    if head is None:
        loading.load_for_inference(str(tmp_path / "adapter"), None, CPU)
        return
    with pytest.raises(ConfigError) as caught:
        loading.load_for_inference(str(tmp_path / "adapter"), None, CPU)
    (message,) = caught.value.errors
    assert message.startswith(head)
    assert "adapter_config.json" in message
    assert len(message) < 3000


HUGE = 10**9
OTHER_METHODS = [
    (peft.LoHaConfig(r=HUGE), "r"),
    (peft.LoKrConfig(r=HUGE), "r"),
    (peft.LoKrConfig(rank_pattern={"q_proj": HUGE}), "rank_pattern.q_proj"),
    (peft.VeraConfig(r=HUGE), "r"),
    (peft.OFTConfig(r=HUGE, oft_block_size=0), "r"),
    (peft.OFTConfig(oft_block_size=HUGE), "oft_block_size"),
    (peft.PromptTuningConfig(num_virtual_tokens=HUGE, task_type="CAUSAL_LM"), "num_virtual_tokens"),
    (peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=HUGE), "encoder_hidden_size"),
]


@pytest.mark.parametrize(("config", "name"), OTHER_METHODS)
def test_huge_sizes_of_other_methods_are_refused(config, name, whole_adapter, tmp_path):
    shutil.copytree(whole_adapter, tmp_path / "adapter")
    config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"Invalid {name}=1000000000 in .*adapter_config\.json: a size above 1,024"):
        saved_adapters.check_adapter(tmp_path / "adapter")


def test_names_are_sorted_whatever_order_peft_wrote(whole_adapter, tmp_path):
    texts = []
    for order in (1, -1):
        shutil.copytree(whole_adapter, folder := tmp_path / f"adapter{order}")
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])[::order]
        path.write_text(json.dumps(config))
        saved_adapters.sort_names(folder)
        assert json.loads(path.read_text()) == config | {"target_modules": sorted(config["target_modules"])}
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    saved_adapters.sort_names(tmp_path)  # no adapter


def test_sizes_that_the_tensors_of_another_method_have_are_taken(whole_adapter, tmp_path):
    shutil.copytree(whole_adapter, tmp_path / "adapter")
    peft.VeraConfig(r=3000, projection_prng_key=2**31).save_pretrained(tmp_path / "adapter")
    save_file({"vera_lambda_d": torch.zeros(3000)}, tmp_path / "adapter/adapter_model.safetensors")
    saved_adapters.check_adapter(tmp_path / "adapter")


SLOW = r"([\w.]+)+!"  # doubles its time with each letter of a name


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"exclude_modules": SLOW, "target_modules": None},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4.0}},
        {"modules_to_save": [SLOW]},
        {"layers_to_transform": [0], "layers_pattern": [SLOW], "target_modules": ["q_proj"]},
    ],
)
def test_patterns_that_take_for_ever_are_given_up(keys, whole_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_adapters, "_PATTERN_SECONDS", 0.2)
    shutil.copytree(whole_adapter, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"Invalid patterns in .*takes more than .* s; write names of modules"):
        loading.load_for_inference(str(tmp_path / "adapter"), None, CPU)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=["q_proj"]),
        peft.FourierFTConfig(target_modules=["q_proj"], n_frequency_pattern={SLOW: 4}),
        peft.C3AConfig(target_modules=["q_proj"], block_size_pattern={SLOW: 4}),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_patterns_of_other_methods_are_given_up_too(config, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_adapters, "_PATTERN_SECONDS", 0.2)
    if isinstance(config, peft.IA3Config):
        config.feedforward_modules = SLOW
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"Invalid patterns in .*takes more than .* s; write names of modules"):
        saved_adapters._try_patterns(tmp_path, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_pipe_in_an_adapters_folder_is_named(name, whole_adapter, tmp_path):
    shutil.copytree(whole_adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "adapter" / name)
    with pytest.raises(ConfigError, match=r"not all in it are files: 1 .*a pipe"):
        loading.load_for_inference(str(tmp_path / "adapter"), None, CPU)
