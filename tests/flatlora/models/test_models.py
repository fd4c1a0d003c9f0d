"""Models are loaded as they were saved."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

import run_exp
from flatlora.config.sections import ModelConfig
from flatlora.experiment.run import EXIT_CONFIG
from flatlora.models import clip, language, loading, scorers
from flatlora.models.clip import Classes
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.random_weights import write_random_clip
from flatlora.models.sources import load_whole
from flatlora.utils import precision
from flatlora.utils.errors import ConfigError
from tests.conftest import tiny_llama
from tests.saved_models import CPU, model_config, rewritten, without


@pytest.mark.parametrize(("saved", "of_run"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_whole_model_keeps_the_dtype_that_it_was_saved_in(tiny_model_folder, tmp_path, saved, of_run, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(True, True, False, True))
    tokenizer = loading.load_tokenizer(ModelConfig(name="tiny", hub_id=str(tiny_model_folder), family="causal_lm"))
    tiny_llama(vocab_size=len(tokenizer)).to(getattr(torch, saved)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = ModelConfig(name="tiny", hub_id="nowhere", family="causal_lm", dtype=of_run)
    for config in (run, None):
        model, _, _ = loading.load_for_inference(str(tmp_path), config, CPU)
        weights = load_file(tmp_path / "model.safetensors")
        found = dict(model.named_parameters())
        assert len(weights) > 10
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype == getattr(torch, saved)
            assert torch.equal(found[name], tensor), name


def test_weights_are_read_straight_onto_the_device(tiny_model_folder, monkeypatch):
    given = []

    def spy(*args, **options):
        given.append(options.get("device_map"))
        return load_whole(*args, **options)

    monkeypatch.setattr(language, "load_whole", spy)
    family, config = FAMILIES["causal_lm"], model_config(tiny_model_folder)
    on_meta = family.load(config, LoadOptions(torch.device("meta")))
    usual = family.load(config, LoadOptions(CPU))
    assert given == [{"": torch.device("meta")}, None]
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    monkeypatch.setattr(language, "load_whole", lambda *args, **options: load_whole(*args, **options, device_map="cpu"))
    mapped = family.load(config, LoadOptions(CPU))
    for of in ("named_parameters", "named_buffers"):  # also those that are in no file
        tensors = dict(getattr(mapped, of)())
        assert tensors
        assert all(torch.equal(tensors[name], tensor) for name, tensor in getattr(usual, of)())


def test_an_adapter_without_weights_is_no_hub_id(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ConfigError, match=r"Missing file .*adapter_model\.safetensors: copy the adapter's folder whole"
    ):
        loading.load_for_inference(str(tmp_path), None, CPU)


def test_an_adapter_of_a_kind_that_peft_does_not_know_is_reported_with_the_weights_that_are_missing(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORAX"}')
    with pytest.raises(ConfigError) as reported:
        loading.load_for_inference(str(tmp_path), None, CPU)
    missing, unknown = reported.value.errors
    assert missing.startswith("Missing file ")
    assert f"Invalid peft_type LORAX in {tmp_path}/adapter_config.json: PEFT {peft.__version__} does not" in unknown


def as_other_class(cls):
    """Weights as another class of the architecture saves them."""

    def change(tensors):
        own = {} if cls is LlamaModel else {"score.weight": torch.zeros(2, 32)}
        prefix = "model." if cls is LlamaModel else ""
        return own | {name.removeprefix(prefix): t for name, t in without("lm_head")(tensors).items()}

    return change


INCOMPLETE = {
    "no head": (without("lm_head"), {}),
    "a layer less": (without("layers.1."), {}),
    "a layer more": (dict, {"num_hidden_layers": 1}),
    "a bare encoder": (as_other_class(LlamaModel), {}),
    "another head": (as_other_class(LlamaForSequenceClassification), {}),
    "another shape": (dict, {"intermediate_size": 60}),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused_with_the_names(name, tiny_model_folder, tmp_path):
    """The names are those of transformers' own report."""
    change, described = INCOMPLETE[name]
    folder = rewritten(tiny_model_folder, tmp_path / "broken", change, **described)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    shapes = [key for key, *_ in report["mismatched_keys"]]
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"], *shapes})
    assert wrong
    for load in (
        lambda: loading.load_backbone(model_config(folder), CPU),
        lambda: loading.load_for_inference(str(folder), None, CPU),
        lambda: loading.load_for_inference(str(folder), model_config("nowhere"), CPU),
    ):
        with pytest.raises(ConfigError) as reported:
            load()
        (message,) = reported.value.errors
        assert message.startswith(f"Invalid model.hub_id={folder}: its weights do not make a whole LlamaForCausalLM: ")
        shown = [key for key in wrong if key in message]
        assert shown == wrong or (shown and str(len(wrong)) in message)


def test_a_training_on_an_incomplete_checkpoint_is_refused(tiny_model_folder, tiny_settings, tmp_path, capsys):
    folder = rewritten(tiny_model_folder, tmp_path / "broken", without("lm_head"))
    assert run_exp.main([*tiny_settings, f"model.hub_id={folder}"]) == EXIT_CONFIG
    reported = capsys.readouterr().err
    assert "1 (lm_head.weight) missing" in reported
    assert "Traceback" not in reported


def test_tied_weights_need_not_be_in_the_files(tiny_model_folder, tmp_path):
    tied = tiny_llama(vocab_size=4096, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = loading.load_backbone(model_config(tmp_path), CPU)
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def test_constants_that_old_versions_saved_are_no_weights(tiny_model_folder, tmp_path):
    constants = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = rewritten(tiny_model_folder, tmp_path / "old", lambda tensors: tensors | constants)
    loaded, plain = (loading.load_backbone(model_config(path), CPU) for path in (folder, tiny_model_folder))
    read, expected = loaded.state_dict(), plain.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)  # made from the config


def test_weights_that_are_not_finite_are_refused(tiny_model_folder, tmp_path):
    def spoil(tensors):
        tensors["lm_head.weight"][3, 5] = float("nan")
        return tensors

    folder = rewritten(tiny_model_folder, tmp_path / "spoiled", spoil)
    with pytest.raises(ConfigError, match=r"1 \(lm_head\.weight\) with NaN or infinity"):
        loading.load_backbone(model_config(folder), CPU)


def test_a_torn_file_is_no_traceback(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "torn")
    path = tmp_path / "torn/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="its weight files are broken"):
        loading.load_backbone(model_config(tmp_path / "torn"), CPU)


@pytest.mark.parametrize(("fast", "products"), [(True, torch.bfloat16), (False, torch.float32)])
def test_clips_text_encoder_computes_in_the_dtype_of_its_cpu(tmp_path, monkeypatch, fast, products):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(*[fast] * 4))
    seen, embed = [], clip.class_embeddings

    def spy(model, *given):
        model.text_model.register_forward_hook(lambda _, args, output: seen.append(output.pooler_output.dtype))
        model.text_projection.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
        return embed(model, *given)

    monkeypatch.setattr(clip, "class_embeddings", spy)
    write_random_clip(tmp_path)
    config = model_config(tmp_path, family="clip", head="text", dtype="bfloat16")
    model = loading.load_backbone(config, CPU, Classes(["a", "b"], [["a"], ["b"]]))
    assert set(seen) == {products}
    assert model.class_embeddings.dtype == torch.float32


@pytest.mark.parametrize("part", ["visual_projection.weight", "vision_model.encoder.layers.3."])
def test_a_clip_without_some_weights_is_refused(tmp_path, part):
    write_random_clip(tmp_path / "clip")
    folder = rewritten(tmp_path / "clip", tmp_path / "broken", without(part))
    config = model_config(folder, family="clip", head="linear")
    classes = Classes(["a", "b"], [["a"], ["b"]])
    for load in (
        lambda: loading.load_backbone(config, CPU, classes),
        lambda: scorers.load_clip(str(folder), CPU),
    ):
        with pytest.raises(ConfigError, match=f"do not make a whole CLIPModel: .*{part}"):
            load()
