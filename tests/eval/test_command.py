"""`python -m eval.gsm8k PATH` on a finished run, its checkpoint and its adapter, and on what is broken."""

import dataclasses
import errno
import json
import os
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_exp
from eval import command, predictions
from eval.backends import Completion
from eval.command import main
from flatlora.config.sections import ModelConfig
from flatlora.inputs.rows import jsonl, prompt_text
from flatlora.runs import run_folder as runs
from flatlora.trained.place import resolve_model
from flatlora.utils import precision, records
from flatlora.utils.errors import ConfigError
from tests.conftest import run_folder, tiny_llama

SETTINGS = ("eval=[gsm8k]", "eval.gsm8k.max_new_tokens=6", "eval.gsm8k.batch_size=4")


@pytest.fixture
def finished(tiny_settings):
    settings = [*(word for word in tiny_settings if word != "eval=[]"), *SETTINGS]
    assert run_exp.main(settings) == 0
    return run_folder(settings)


def test_the_runs_own_answers_are_recognized_and_never_overwritten(finished):
    own = finished / "eval" / "gsm8k"
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert main("gsm8k", [str(finished), "device=cpu"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert main("gsm8k", [str(finished), "device=cpu", "max_rows=2"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    assert json.loads((finished / "eval/gsm8k-max_rows=2/score.json").read_text())["n"] == 2


@pytest.mark.extra
def test_answers_of_another_device_have_their_own_folder(finished):
    own = finished / "eval" / "gsm8k"
    made = json.loads((own / "generation.json").read_text())
    (own / "generation.json").write_text(json.dumps(made | {"device": "cuda"}))  # as if a GPU had trained and scored
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert main("gsm8k", [str(finished), "device=cpu"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    other = finished / "eval/gsm8k-device=cpu"
    assert json.loads((other / "generation.json").read_text()) == made
    assert (other / "score.json").is_file()


def test_another_backbone_than_the_runs_is_refused_or_answers_anew(tiny_settings, tiny_model_folder, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    settings = [*(word for word in tiny_settings if word != "eval=[]"), *SETTINGS, f"model.hub_id={base}"]
    assert run_exp.main(settings) == 0
    run = run_folder(settings)
    assert json.loads((run / "run.json").read_text())["base"].startswith("sha256:")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    bare = [str(tmp_path / "adapter"), "device=cpu", f"rows={run / 'test.jsonl'}", f"out={tmp_path / 'o'}"]
    bare.append("max_new_tokens=6")
    assert main("gsm8k", bare) == 0
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.mul_(-1.0)
    model.save_pretrained(base)
    (reported,) = errors([run, "device=cpu"], capsys)
    assert reported.startswith(f"Invalid backbone of {run}/adapter: {base} is now sha256:")
    assert main("gsm8k", bare) == 0  # nothing records what it was trained on
    assert (tmp_path / "o/predictions.stale.jsonl").is_file()


def test_a_whole_model_with_another_config_or_tokenizer_answers_anew(tiny_model_folder, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_folder, folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(jsonl([{"x": "Q: 1 + 1?\nA: ", "y": "#### 2"}]))
    words = [str(folder), "device=cpu", f"rows={rows}", f"out={out}", "max_new_tokens=4"]

    def stale_after(change=lambda content: None, file="config.json"):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
        assert main("gsm8k", words) == 0
        return len(list(out.glob("*.stale*")))

    assert stale_after() == 0
    assert stale_after(lambda config: config.update(use_cache=False)) == 0  # which changes no answer
    assert stale_after(lambda config: config.update(rope_parameters={"rope_type": "default", "rope_theta": 9.0})) == 1
    lower = {"type": "Lowercase"}
    assert stale_after(lambda tokenizer: tokenizer.update(normalizer=lower), "tokenizer.json") == 2
    record = out / "generation.json"
    made = json.loads(record.read_text())
    earlier = {key: value for key, value in made.items() if key not in ("tokenizer", "settings")}
    record.write_text(json.dumps(earlier))  # as an earlier version wrote it
    assert stale_after() == 2


@pytest.fixture
def with_own_base(tiny_settings, tiny_model_folder, tmp_path):
    """A finished run, and the folder of its base model."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    settings = [*(word for word in tiny_settings if word != "eval=[]"), *SETTINGS, f"model.hub_id={base}"]
    assert run_exp.main(settings) == 0
    return run_folder(settings), base


def completions(folder):
    return [json.loads(line)["completion"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def plain_completions(base, adapter, rows):
    """By transformers and PEFT alone, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    found = []
    for row in map(json.loads, rows.read_text().splitlines()):
        ids = tokenizer(prompt_text(row), return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        found.append(tokenizer.decode(out, skip_special_tokens=True))
    return found


def test_a_base_that_moved_is_named(with_own_base, tmp_path, capsys):
    run, base = with_own_base
    moved, own = tmp_path / "elsewhere", run / "eval/gsm8k"
    base.rename(moved)
    (reported,) = errors([run, "device=cpu"], capsys)
    wanted = f"Invalid base model {base} of {run}/adapter: there is no such folder; name its new place with base=PATH."
    assert reported == wanted
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert main("gsm8k", [str(run), "device=cpu", f"base={moved}"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before  # of the same bytes: the same model
    assert completions(own) == plain_completions(moved, run / "adapter", run / "test.jsonl")
    other = AutoModelForCausalLM.from_pretrained(moved)
    other.lm_head.weight.data.mul_(-1.0)
    other.save_pretrained(moved)
    (reported,) = errors([run, "device=cpu", f"base={moved}"], capsys)
    assert reported.startswith(f"Invalid backbone of {run}/adapter: {moved} is now sha256:")


def test_a_relative_base_is_looked_for_beside_its_adapter(with_own_base, tmp_path, monkeypatch, capsys):
    run, base = with_own_base
    adapter = tmp_path / "moved" / "adapter"
    shutil.copytree(run / "adapter", adapter)
    shutil.copytree(base, tmp_path / "moved" / "models" / "base")
    shutil.rmtree(base)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../models/base"}))
    expected = plain_completions(tmp_path / "moved/models/base", adapter, run / "test.jsonl")
    words = [str(adapter), "device=cpu", f"rows={run / 'test.jsonl'}", "max_new_tokens=6"]
    elsewhere = tmp_path / "some" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert main("gsm8k", [*words, f"out={tmp_path / 'beside'}"]) == 0
    assert completions(tmp_path / "beside") == expected
    shutil.copytree(tmp_path / "moved/models/base", tmp_path / "some/models/base")  # where PEFT itself would look
    assert main("gsm8k", [*words, f"out={tmp_path / 'working'}"]) == 0
    reported = " ".join(capsys.readouterr().err.split())
    assert "There are two folders ../models/base: the one in the working directory is used" in reported
    shutil.rmtree(tmp_path / "some/models")
    (tmp_path / "moved/models/base").rename(tmp_path / "third")
    assert main("gsm8k", [*words, f"out={tmp_path / 'named'}", f"base={tmp_path / 'third'}"]) == 0
    assert completions(tmp_path / "named") == expected


def test_a_base_that_nothing_reads_or_that_is_none_is_an_error(made, tiny_model_folder, tmp_path, capsys):
    (reported,) = errors([made, "base=/nope"], capsys)
    assert reported == "Invalid base=/nope: there is no such folder; name the folder of a complete model, or a hub id."
    (reported,) = errors([made, f"base={tmp_path}"], capsys)
    assert reported.startswith(f"Invalid base={tmp_path}: the folder holds no model;")
    (reported,) = errors([tiny_model_folder, "base=some/model", f"rows={made / 'test.jsonl'}"], capsys)
    assert reported == f"Invalid base=some/model: {tiny_model_folder} is no adapter and needs no base; drop it."
    served = ["served", "backend=openai", "base_url=http://127.0.0.1:9/v1", "base=some/model"]
    (reported,) = errors([*served, f"rows={made / 'test.jsonl'}", f"out={tmp_path / 'o'}"], capsys)
    assert reported == "Invalid base=some/model with backend=openai: the server has its own; drop it."


@pytest.mark.extra
def test_a_base_with_other_settings_is_named_and_a_record_without_them_still_counts(with_own_base, capsys):
    run, base = with_own_base
    own, config = run / "eval/gsm8k", json.loads((base / "config.json").read_bytes())
    changes = {"rope_parameters": {**config["rope_parameters"], "rope_theta": 500.0}}
    (base / "config.json").write_text(json.dumps(config | changes))
    (reported,) = errors([run, "device=cpu"], capsys)
    assert "which differ in settings; put the config.json of then back" in reported
    (base / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0", "dtype": "float32"}))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert main("gsm8k", [str(run), "device=cpu"]) == 0
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    shutil.rmtree(own)
    record = json.loads((run / "run.json").read_bytes())
    record["base"] = record["base"].partition("/config:")[0]  # as an earlier version recorded it
    records.write_signed(run / "run.json", record)
    assert main("gsm8k", [str(run), "device=cpu"]) == 0
    assert json.loads((own / "generation.json").read_bytes())["base"] == record["base"]


@pytest.mark.parametrize(
    ("base", "recorded", "label"),
    [("b/c", "b/c@0123", "gsm8k-base=c-"), ("b/c", "sha256:01", "gsm8k"), (None, "b/c@0123", "gsm8k")],
)
def test_answers_on_a_base_that_the_record_cannot_tell_have_their_own_folder(made, base, recorded, label):
    (made / "run.json").write_text(json.dumps({"status": "interrupted", "base": recorded}))
    assert main("gsm8k", [str(made), "device=cpu", *([f"base={base}"] if base else [])]) == 0
    (folder,) = (made / "eval").iterdir()
    assert folder.name.startswith(label)


def test_checkpoints_have_their_own_folder_and_other_weights_their_own_answers(finished, tmp_path):
    assert main("gsm8k", [str(finished / "checkpoint-6"), "device=cpu"]) == 0
    assert (finished / "eval/gsm8k-checkpoint-6/score.json").is_file()
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    command = [str(tmp_path / "adapter"), "device=cpu", f"rows={finished / 'test.jsonl'}", f"out={tmp_path / 'out'}"]
    base = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base  # a bare adapter finds its backbone by this name
    assert main("gsm8k", [*command, "max_new_tokens=6"]) == 0
    first = (tmp_path / "out/generation.json").read_text()
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert main("gsm8k", [*command, "max_new_tokens=6"]) == 0
    assert (tmp_path / "out/generation.json").read_text() != first
    assert (tmp_path / "out/predictions.stale.jsonl").is_file()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_run_with_damaged_files_is_not_scored_and_each_is_named(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("a model was loaded"))
    kept, wrote = tmp_path / "kept", "is not what the run wrote"
    finished.rename(kept)
    for damage, words, reported in [
        (
            lambda: flip(finished / "adapter/adapter_model.safetensors"),
            [],
            f"adapter/adapter_model.safetensors {wrote}",
        ),
        (lambda: shutil.rmtree(finished / "adapter"), [], "adapter/adapter_model.safetensors is missing"),
        (lambda: flip(finished / "test.jsonl"), [], f"test.jsonl {wrote}"),
        (lambda: change(finished / "config.yaml", "max_new_tokens: 6", "max_new_tokens: 7"), [], f"{wrote} (in eval)"),
        (lambda: (finished / "config.yaml").unlink(), [], f"Missing file {finished / 'config.yaml'}"),
        (lambda: flip(finished / "run.json"), [], f"Broken record {finished / 'run.json'}"),
        (lambda: flip(finished / "eval/gsm8k/predictions.jsonl"), ["score_only=true"], "eval/gsm8k/predictions.jsonl"),
    ]:
        shutil.copytree(kept, finished)
        damage()
        (message,) = errors([finished, "device=cpu", *words], capsys)
        assert reported in message
        shutil.rmtree(finished)
    shutil.copytree(kept, finished)
    flip(finished / "checkpoint-6/adapter_model.safetensors")
    (message,) = errors([finished / "checkpoint-6", "device=cpu"], capsys)
    assert message == (
        f"Invalid checkpoint {finished / 'checkpoint-6'}: adapter_model.safetensors is not what was written; name "
        "another checkpoint, or the run."
    )


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_answers_are_not_written_through_a_link(finished, tmp_path, capsys):
    (finished / "eval").rename(tmp_path / "elsewhere")
    (finished / "eval").symlink_to(tmp_path / "elsewhere")
    (message,) = errors([finished, "device=cpu", "max_rows=2"], capsys)
    assert message.startswith(f"Invalid {finished / 'eval'}: it is a link")
    assert not (tmp_path / "elsewhere/gsm8k-max_rows=2").exists()


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        (["/nope"], ["Invalid path /nope"]),
        (["some/model", "rows=/nope.jsonl"], ["Invalid rows=/nope.jsonl"]),
        (["x/y/z"], ["Invalid path x/y/z"]),
        (["/proc", "max_rowz=3", "batch_size=0"], ["Invalid path /proc", "Unknown key max_rowz", "Invalid batch_size"]),
    ],
)
def test_bad_commands_exit_with_2_and_tell_every_error(words, heads, capsys):
    reported = errors(words, capsys)
    assert len(reported) == len(heads)
    assert all(message.startswith(head) for message, head in zip(reported, heads, strict=True)), reported


@pytest.mark.parametrize("words", [[], ["max_rows=3"], ["-x"]])
def test_a_command_without_a_path_shows_its_usage(words, capsys):
    assert main("gsm8k", words) == 2
    assert "python -m eval.gsm8k PATH [key=value ...]" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_no_error(capsys, word):
    assert main("gsm8k", [word]) == 0
    assert "python -m eval.gsm8k PATH [key=value ...]" in capsys.readouterr().out


# --- errors, without a model


CONFIG = {
    "model": {"name": "tiny", "hub_id": "none", "family": "causal_lm"},
    "dataset": {},
    "peft": {},
    "rho": {},
    "optim": {},
    "trainer": {"name": "cpu"},
    "eval": {"gsm8k": {"max_rows": 3}},
}
ROWS = [{"x": f"Q: {i} + 1?\nA: ", "y": f"#### {i + 1}"} for i in range(5)]


class Right:
    """Answers "Q: N + 1?" by N + 1, two rows at a time."""

    batch_size = 2

    def describe(self):
        return {"backend": "right"}

    def prompt_length(self, prompt):
        return len(prompt)

    def generate(self, prompts, sampling, seeds=None):
        return [Completion(str(int(prompt.split()[1]) + 1), 1, True) for prompt in prompts]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run's folder without weights, answered by `Right`."""
    monkeypatch.setattr(command, "_load", lambda *_: Right())
    folder = tmp_path / "run"
    for weights in (folder / "adapter", folder / "checkpoint-6"):
        weights.mkdir(parents=True)
        (weights / "adapter_config.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "test.jsonl").write_text(jsonl(ROWS))
    (folder / "run.json").write_text('{"status": "interrupted"}')
    return folder


def errors(words, capsys):
    """The errors that a command ends with, as the user reads them."""
    capsys.readouterr()
    assert main("gsm8k", [str(word) for word in words]) == 2
    reported = capsys.readouterr().err
    assert "Traceback" not in reported
    return [line.split(". ", 1)[1] for line in reported.splitlines()[1:]]


def test_a_run_made_by_hand_is_scored_with_its_own_settings(made):
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    assert json.loads((made / "eval/gsm8k/score.json").read_text())["n"] == 3
    assert main("gsm8k", [str(made), "score_only=true"]) == 0


@pytest.fixture
def fast_in_bf16(monkeypatch):
    """A CPU with BF16 instructions, whatever this one has."""
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(True, True, False, True))


@pytest.mark.parametrize(
    ("made_with", "words", "name"),
    [
        ({"device": "cpu", "autocast": "torch.bfloat16"}, [], "gsm8k"),
        ({"device": "cpu", "autocast": "torch.float32"}, [], "gsm8k-autocast=bfloat16"),
        ({"device": "cuda", "autocast": "torch.bfloat16"}, [], "gsm8k-device=cpu"),
        ({"device": "cpu", "autocast": "None"}, [], "gsm8k-autocast=bfloat16"),
        ({"device": "cuda", "autocast": "None"}, ["max_rows=2"], "gsm8k-max_rows=2-device=cpu-autocast=bfloat16"),
        ({"backend": "right"}, [], "gsm8k"),
        ([], [], "gsm8k"),
    ],
)
@pytest.mark.usefixtures("fast_in_bf16")
def test_another_device_or_autocast_has_its_own_folder(made, made_with, words, name):
    own = made / "eval/gsm8k"
    own.mkdir(parents=True)
    (own / "generation.json").write_text(json.dumps(made_with))
    for place, folder in ((made, name), (made / "checkpoint-6", f"{name}-checkpoint-6")):
        assert main("gsm8k", [str(place), "device=cpu", *words]) == 0
        assert (made / "eval" / folder / "score.json").is_file()
    assert sorted(path.name for path in made.glob("eval/*")) == sorted({"gsm8k", name, f"{name}-checkpoint-6"})


def test_score_only_means_the_runs_own_answers_unless_a_device_is_named(made, capsys):
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    own = made / "eval/gsm8k"
    (own / "generation.json").write_text(json.dumps({"device": "cuda"}))
    (own / "score.json").unlink()
    assert main("gsm8k", [str(made), "score_only=true"]) == 0
    assert (own / "score.json").is_file()
    (reported,) = errors([made, "score_only=true", "device=cpu"], capsys)
    assert reported.startswith(f"{made}/eval/gsm8k-device=cpu/predictions.jsonl is not there")


def test_answers_of_a_slow_cpu_are_reported_from_those_of_a_fast_one(made, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(False, False, False, False))
    own = made / "eval/gsm8k"
    own.mkdir(parents=True)
    (own / "generation.json").write_text(json.dumps({"device": "cpu", "autocast": "torch.bfloat16"}))
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    assert (made / "eval/gsm8k-autocast=float32/score.json").is_file()


@pytest.mark.usefixtures("fast_in_bf16")
@pytest.mark.parametrize(("of_run", "expected"), [("bfloat16", torch.bfloat16), ("float32", None), (None, None)])
def test_autocast_follows_the_runs_setting_also_on_fp32_weights(monkeypatch, tmp_path, of_run, expected, capsys):
    loaded = tiny_llama(), SimpleNamespace(eos_token_id=2), {}
    monkeypatch.setattr(command, "load_for_inference", lambda *_: loaded)
    model = of_run and ModelConfig(name="tiny", hub_id="none", family="causal_lm", dtype=of_run)
    backend = command._load(command.ResolvedModel(str(tmp_path), model=model), torch.device("cpu"), 1, "text")
    assert backend.precision.autocast == expected
    assert capsys.readouterr().err.count("precision: ") == 1


@pytest.mark.parametrize(
    ("words", "fast", "dtype"),
    [({}, True, "bfloat16"), ({}, False, "float32"), ({"dtype": "bfloat16"}, False, "bfloat16")],
)
def test_vllm_computes_in_the_dtype_of_its_cpu(tmp_path, monkeypatch, words, fast, dtype):
    monkeypatch.setattr(precision, "cpu_features", lambda: precision.CPUFeatures(*[fast] * 4))
    monkeypatch.setattr(command, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(command, "identify", lambda *_: {})
    monkeypatch.setattr(command, "backbone_source", lambda model: "none")
    monkeypatch.setattr(command, "VLLMBackend", lambda *_, **settings: settings)
    model = ModelConfig(name="tiny", hub_id="none", family="causal_lm", dtype="bfloat16")
    target, module = command.Target(backend="vllm", **words), command.benchmarks.BENCHMARKS["gsm8k"]
    resolved = command.ResolvedModel(str(tmp_path), model=model)
    assert command._backend(resolved, target, None, 1, module)["dtype"] == dtype


def test_whole_numbers_are_printed_whole(capsys):
    command.print_score("gsm8k", {"n": 5, "scorer": "s", "metrics": {"n": 5, "exact_match": 0.4, "unparsed": None}})
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().err.splitlines()]
    assert [cell for cell in cells if len(cell) == 2] == [["n", "5"], ["exact_match", "0.4000"], ["unparsed", "—"]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rows=[", "Invalid rows=[: no such file; name a .jsonl file with x and y."),
        (
            "rows=",
            "Invalid rows='': it must not be empty; name a .jsonl file",
        ),
        ("max_rows=0", "Invalid max_rows=0: it must be ≥ 1; null scores every row"),
        ("max_rows=abc", "Invalid max_rows='abc': it must be a whole number; null scores every row"),
        ("max_rows=1e400", "Invalid max_rows='1e400': it must be a whole number;"),
        ("max_rows=[", "Cannot read 'max_rows=[': its value is not YAML; use a number"),
        ("max_rows=2024-13-45", "Cannot read 'max_rows=2024-13-45': its value is not YAML;"),  # a date, but none
        ("max_rows=!!python/name:os.system", "Cannot read"),
        ("max_new_tokens=0", "Invalid max_new_tokens=0: it must be ≥ 1; 512 as published."),
        ("batch_size=2.5", "Invalid batch_size=2.5: it must be a whole number; lower it when memory runs out."),
        ("device=gpu", "Invalid device='gpu': it must be one of 'auto', 'cpu' or 'cuda'."),
        ("score_only=5", "Invalid score_only=5: it must be true or false; true scores existing answers."),
        ("max_rowz=5", "Unknown key max_rowz: did you mean max_rows?"),
        ("=5", "Unknown key : known: "),
        ("max_rows", "Cannot read 'max_rows': a setting is written key=value"),
        ("data_root=/nope", "Invalid data_root=/nope: it has no effect, as the rows are those of "),
    ],
)
def test_a_bad_word_is_one_error_with_its_remedy(made, capsys, word, message):
    (reported,) = errors([made, word], capsys)
    assert reported.startswith(message)
    assert not (made / "eval").exists()


def test_errors_of_path_words_rows_and_folder_are_reported_together(made, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"x": null, "y": 5}\n')
    (tmp_path / "file").write_text("")
    words = [tmp_path / "nowhere", "batch_size=0", f"rows={tmp_path / 'rows.jsonl'}", f"out={tmp_path / 'file'}/out"]
    kinds = ["Invalid path", "Invalid batch_size", "Invalid out", "Invalid x", "Invalid y"]
    assert [" ".join(message.split()[:2]).partition("=")[0] for message in errors(words, capsys)] == kinds
    reported = errors([tmp_path / "nowhere", "device=gpu"], capsys)
    assert [message.partition("=")[0].split()[1] for message in reported] == ["path", "device"]


def test_text_is_taken_as_text(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").write_text(jsonl(ROWS))
    assert main("gsm8k", [str(made), "rows=7", "out=2024", "data_root=null", "device=cpu", "max_rows=null"]) == 0
    assert json.loads((tmp_path / "2024/score.json").read_text())["metrics"]["exact_match"] == 1.0
    assert json.loads((tmp_path / "2024/score.json").read_text())["n"] == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": "Q"}', "Missing column y in FILE, row 1: it has x;"),
        ('{"x": "Q", "y": "#### 1"}\n{"x": 5, "y": "#### 1"}', "Invalid x in FILE, row 2: it must be text, not 5;"),
        ('{"x": "Q", "y": "none"}', "Invalid answer in FILE, row 1: gsm8k scores a final number, and none can be read"),
        ("\n", "Empty data set: FILE has no rows"),
        ("{", "Broken row in FILE, line 1: not JSON"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_rows_that_cannot_be_scored_are_an_error_before_a_model_is_loaded(made, capsys, content, message, own):
    path = made / ("test.jsonl" if own else "rows.jsonl")
    path.write_text(content)
    (reported,) = errors([made] if own else [made, f"rows={path}"], capsys)
    assert reported.startswith(message.replace("FILE", str(path)))


def test_the_benchmarks_own_rows_are_checked_too(made, capsys, tmp_path):
    path = tmp_path / "root/openai/gsm8k/main/test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(jsonl([{"question": "Q", "answer": "#### none"}]))
    own = [f"data_root={tmp_path / 'root'}", "template=alpaca"]
    (reported,) = errors([made, *own, "rows=benchmark"], capsys)
    assert reported.startswith("Invalid answer in the benchmark's own rows, row 1:")
    refused = errors([made, *own], capsys)
    assert [message.partition("=")[0] for message in refused] == ["Invalid data_root", "Invalid template"]
    (made / "test.jsonl").write_text("")  # of a data set without test rows
    (reported,) = errors([made, *own], capsys)
    assert reported.startswith("Invalid answer in the benchmark's own rows, row 1:")
    (made / "test.jsonl").unlink()
    (reported,) = errors([made, *own], capsys)
    assert reported.startswith(f"Missing file {made}/test.jsonl: a run's test rows are in it;")


def test_an_output_folder_that_cannot_be_is_an_error(made, capsys, monkeypatch):
    (reported,) = errors([made, f"out={made}/run.json/a/b"], capsys)
    assert reported == f"Invalid out={made}/run.json/a/b: {made}/run.json is a file; name another folder with out=DIR."
    monkeypatch.setattr(command.os, "access", lambda path, mode: False)
    (reported,) = errors([made], capsys)
    assert reported == f"Invalid out={made}/eval/gsm8k: {made} cannot be written to; name another folder with out=DIR."


def test_broken_answers_are_an_error_of_score_only(made, capsys):
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    path = made / "eval/gsm8k/predictions.jsonl"
    record = json.loads(path.with_name("generation.json").read_text())
    del record[records.ROWS_HASH]  # of a version that kept no hash, which would tell of any change
    path.with_name("generation.json").write_text(json.dumps(record))
    for old, new, message in (("#### 1", "none", "Row 0 has no number"), ('"none"', "null", "row 1 has no valid")):
        path.write_text(path.read_text().replace(old, new))
        (reported,) = errors([made, "score_only=true"], capsys)
        assert reported.startswith(f"Broken file {path}: {message}")


# --- what belongs to a run


FOREIGN = ["{[1]: 2}", "model: {}\nlearning_rate: 1\n", "model: {}\ndataset: {}\noptim: {}\ntrainer: {}\n"]


@pytest.mark.parametrize("content", ["", "a: [", "- 1", "hello", "\x00", *FOREIGN])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_foreign_configuration_makes_no_run(tmp_path, capsys, monkeypatch, content, depth):
    places = []
    monkeypatch.setattr(command, "_load", lambda place, *_: places.append(place) or Right())
    weights = tmp_path / "a" / "b"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights, *weights.parents)[depth].joinpath("config.yaml").write_text(content)
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    assert main("gsm8k", [str(weights), f"rows={tmp_path / 'rows.jsonl'}", "device=cpu"]) == 0
    assert places == [command.ResolvedModel(str(weights))]
    assert len(list(weights.glob("eval/gsm8k-rows=rows-*/score.json"))) == 1


@pytest.mark.parametrize("name", ["", "adapter", "checkpoint-6"])
@pytest.mark.parametrize("content", ["", "a: [", "- 1", "\x00", "\xff"])
def test_a_runs_broken_configuration_is_an_error(made, capsys, content, name):
    (made / "config.yaml").write_bytes(content.encode("latin-1"))
    (reported,) = errors([made / name], capsys)
    assert reported.startswith(f"Broken file {made / 'config.yaml'}: it holds no settings; restore them from")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho": None, "optim": None}, "Invalid FILE: the run's rho, optim is missing; score the run with the version"),
        (
            dict.fromkeys(("peft", "rho", "optim", "trainer", "eval")),  # torn
            "Invalid FILE: the run's peft, rho, optim, trainer is missing;",
        ),
        ({"model": {"name": "tiny"}}, "Invalid model.hub_id in FILE: field required; score the run with the version"),
        ({"trainer": {"name": "cpu", "nodes": 1}}, "Invalid trainer.nodes in FILE: extra inputs are not permitted;"),
        ({"trainer": [1]}, "Invalid trainer in FILE:"),
        ({"eval": {"gsm8k": {"max_tokens": 5}}}, "Invalid eval.gsm8k.max_tokens in FILE:"),
        ({"eval": {"gsm8k": None}}, "Invalid eval.gsm8k in FILE:"),
        ({"eval": ["gsm8k"]}, "Invalid eval in FILE: a group of benchmarks is needed;"),
    ],
)
def test_a_configuration_of_another_version_is_an_error_that_names_it(made, capsys, changes, message):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    reported = errors([made / "checkpoint-6"], capsys)
    assert any(line.startswith(message.replace("FILE", str(made / "config.yaml"))) for line in reported), reported


@pytest.mark.parametrize("scored", [{}, None, {"other": {}}])
def test_a_run_that_was_not_scored_is_scored_with_the_defaults(made, scored):
    (made / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"eval": scored}))
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    assert json.loads((made / "eval/gsm8k/score.json").read_text())["n"] == 5


def test_a_folder_without_weights_is_an_error(made, capsys):
    shutil.rmtree(made / "adapter")
    (reported,) = errors([made], capsys)
    assert "this run has no adapter/ yet; finish it, or name one of its checkpoints" in reported
    (made / "empty").mkdir()
    (reported,) = errors([made / "empty"], capsys)
    assert "it holds neither weights nor a run; name a run, checkpoint, adapter or model folder" in reported


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", ""),
        ("adapter_config.json", "[]"),
        ("adapter_config.json", "{}"),
        ("adapter_model.safetensors", "torn"),
        ("adapter_model.safetensors", None),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_an_error(made, tiny_model_folder, capsys, monkeypatch, name, content):
    monkeypatch.undo()
    folder = made / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    command._load(command.ResolvedModel(str(folder)), torch.device("cpu"), 1, "text")  # whole, it can be loaded
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    (made / "config.yaml").unlink()
    (reported,) = errors([folder, f"rows={made / 'test.jsonl'}", "device=cpu"], capsys)
    if content is None:
        assert reported.startswith(f"Missing file {folder}/{name}: ")
    else:
        broken = name == "adapter_config.json"
        assert reported.startswith(f"Broken file {folder}/{name}: " if broken else f"Cannot load {folder}: ")


# --- failures on the way


def test_a_full_disk_ends_with_one_line_and_a_later_call_goes_on(made, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(Right, "generate", lambda self, prompts, *_: asked.extend(prompts) or answer(prompts))

    def answer(prompts):
        return [Completion(str(int(prompt.split()[1]) + 1), 1, True) for prompt in prompts]

    class Full:
        """A file that takes half of the second batch."""

        def __init__(self, path, mode, encoding):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, text):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text if len(asked) == 2 else text[:20])
            if len(asked) > 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    with monkeypatch.context() as full:
        full.setattr(predictions, "open", Full, raising=False)
        assert main("gsm8k", [str(made), "device=cpu"]) == 1
    reported = capsys.readouterr().err
    (line,) = [line for line in reported.splitlines() if "failed" in line]
    assert line.startswith("The evaluation failed: [Errno 28] No space left on device")
    assert "the same command continues with the missing answers" in line
    assert "Traceback" not in reported
    assert len(asked) == 3
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    assert len(asked) == 4  # the batch that was not written, and no other
    assert json.loads((made / "eval/gsm8k/score.json").read_text())["metrics"]["exact_match"] == 1.0


def test_too_little_memory_names_the_remedy(made, capsys, monkeypatch):
    def full(self, prompts, sampling, seeds=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(Right, "generate", full)
    assert main("gsm8k", [str(made), "device=cpu"]) == 1
    reported = capsys.readouterr().err
    assert "The evaluation failed: CUDA out of memory. Tried to allocate 2 GiB. more. A lower batch_size" in reported


def test_other_settings_of_a_model_that_no_run_describes_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "_load", lambda *_: Right())
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    for count in (1, 2):
        words = ["some/model", f"max_new_tokens={count}", "rows=rows.jsonl", "device=cpu", "parser=strict"]
        assert main("gsm8k", words) == 0
    made = sorted(path.name for path in (tmp_path / "results/eval/some/model").iterdir())
    assert [name.rpartition("-")[0] for name in made] == [f"gsm8k-max_new_tokens={count}-rows=rows" for count in (1, 2)]


@pytest.mark.parametrize(
    ("name", "path"), [("/models/llama", "models/llama"), ("../x", "x"), ("a/b", "a/b"), ("/", "model")]
)
def test_a_served_name_is_a_folder_below_the_results(name, path):
    assert command._safe(name) == path


def test_answers_of_a_long_name_have_a_folder_that_can_be_made(tmp_path):
    folder = tmp_path / command._safe(f"{'漢' * 200}/../{'n' * 300}")
    folder.mkdir(parents=True)
    assert folder.resolve().is_relative_to(tmp_path)


def test_a_value_of_references_is_not_unfolded(capsys):
    bomb = "[&a [1,1]" + "".join(f",&{after} [*{before},*{before}]" for before, after in pairwise("abcdefghijklmnop"))
    assert main("humaneval", ["served", "backend=openai", "base_url=http://127.0.0.1:1/v1", f"k={bomb}]"]) == 2
    reported = capsys.readouterr().err
    assert "its value is not YAML" in reported
    assert len(reported) < 2000


def test_words_that_are_no_text_are_named(capsys):
    assert main("gsm8k", ["a\udcff", "out=b\udcff"]) == 2
    assert "Cannot read 'a\\udcff'" in capsys.readouterr().err


def test_scoring_alone_takes_the_answers_lock_and_makes_no_folder(made, capsys, monkeypatch):
    folder = made / "eval/gsm8k"
    (reported,) = errors([made, "score_only=true"], capsys)
    assert reported.startswith(f"{folder}/predictions.jsonl is not there")
    assert not (made / "eval").exists()
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    before = (folder / "score.json").stat().st_mtime_ns
    with runs.answering(folder):  # as another process that answers, or scores, has it
        (reported,) = errors([made, "score_only=true"], capsys)
    assert reported.startswith(f"{folder} is in use: another process writes its answers there")
    assert (folder / "score.json").stat().st_mtime_ns == before
    seen, module = [], command.benchmarks.BENCHMARKS["gsm8k"]
    changed = dataclasses.replace(module, score_file=lambda path, config: seen.append(runs.is_answering(folder)))
    monkeypatch.setitem(command.benchmarks.BENCHMARKS._items, "gsm8k", changed)
    command.score_path("gsm8k", [str(made), "score_only=true"])
    assert seen == [True]  # an overwrite of the run is refused meanwhile
    assert not runs.is_answering(folder)


def test_a_run_whose_answers_go_elsewhere_is_not_overwritten_meanwhile(made, tmp_path, monkeypatch):
    busy = []

    def load(*_):
        busy.append([runs.is_answering(folder) for folder in made.glob("eval/*")])
        return Right()

    monkeypatch.setattr(command, "_load", load)
    assert main("gsm8k", [str(made), "device=cpu", f"out={tmp_path / 'out'}"]) == 0
    assert busy == [[True]]
    assert not (made / "eval").exists()  # nothing is left of it
    assert (tmp_path / "out" / "score.json").is_file()


@pytest.mark.parametrize("backend", ["hf", "vllm"])
@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_replaced_while_they_are_loaded_do_not_answer(tmp_path, monkeypatch, backend, whole):
    name = "model.safetensors" if whole else "adapter_model.safetensors"
    (tmp_path / ("config.json" if whole else "adapter_config.json")).write_text("{}")
    (tmp_path / name).write_bytes(b"one")

    def load(*_, **__):
        (tmp_path / "new").write_bytes(b"two")
        (tmp_path / "new").replace(tmp_path / name)
        return torch.nn.Linear(1, 1), None, None

    model = ModelConfig(name="tiny", hub_id="none", family="causal_lm")
    named = command.ResolvedModel(str(tmp_path), model=model)
    monkeypatch.setattr(command, "identify", lambda *_: {})
    monkeypatch.setattr(command, "load_for_inference", load)
    monkeypatch.setattr(command, "VLLMBackend", load)
    monkeypatch.setattr(command, "backbone_source", lambda model: "none")
    target, module = command.Target(backend=backend), command.benchmarks.BENCHMARKS["gsm8k"]
    with pytest.raises(ConfigError, match=f"{tmp_path} changed while it was read"):
        command._backend(named, target, torch.device("cpu"), 1, module)


def test_pipes_in_the_place_of_answers_and_of_an_adapters_config_are_named(made, capsys):
    assert main("gsm8k", [str(made), "device=cpu"]) == 0
    path = made / "eval/gsm8k/predictions.jsonl"
    path.unlink()
    os.mkfifo(path)
    (reported,) = errors([made, "score_only=true"], capsys)
    assert reported.startswith(f"Cannot read {path}: it is a pipe, not a file")
    config = made.parent / "model" / "adapter_config.json"
    config.parent.mkdir()
    (config.parent / "config.json").write_text("{}")
    os.mkfifo(config)
    assert resolve_model(str(config.parent)).weights == str(config.parent)  # and does not wait for a writer
