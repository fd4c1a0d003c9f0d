"""Records: whatever stands there is read or named, and no changed byte of a signed one passes."""

import os

import pytest

from flatlora.utils import records
from flatlora.utils.errors import ConfigError
from flatlora.utils.files import cache_folder, write_folder

RECORD = {"status": "finished", "metrics": {"loss": 2.5e-17, "none": None, "nan": float("nan")}, "files": {}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.json"
    records.write_signed(path, RECORD | {"files": {"a": {"sha256": "0" * 64, "bytes": 1}}})
    return path


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        records.read_record(path, "do this")
    (message,) = caught.value.errors
    assert message.startswith(f"Broken record {path}: ")
    assert message.endswith("; do this.")
    return message


def test_a_signed_record_is_read_back(path):
    found = records.read_record(path)
    assert found["metrics"]["loss"] == 2.5e-17
    assert found["files"] == {"a": {"sha256": "0" * 64, "bytes": 1}}


def test_no_flipped_bit_of_a_signed_record_passes(path):
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ConfigError):
            records.read_record(path)


def test_a_record_of_before_signatures_is_read_as_it_is(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    assert records.read_record(tmp_path / "run.json") == {"status": "finished"}
    assert records.read_record(tmp_path / "none.json") is None
    assert records.read_record(tmp_path / "run.json" / "none.json") is None


def sparse(path, size):
    path.touch()
    os.truncate(path, size)


THINGS = {
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a loop of links": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a broken link": (lambda path: path.symlink_to("nothing"), "a broken link"),
    "a pipe": (os.mkfifo, "it is a pipe, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "brackets": (lambda path: path.write_text("[" * 100_000), "recursion"),
    "nested groups": (lambda path: path.write_text('{"a":' * 500 + "1" + "}" * 500), "nested deeper than 64"),
    "nothing": (lambda path: path.write_text(""), "Expecting value"),
    "no text": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "decode"),
    "a list": (lambda path: path.write_text("[1]"), "it must hold an object, not a list"),
    "200 GB": (lambda path: sparse(path, 200 << 30), "it has 204,800 MiB, and at most 64 are read"),
    "a long number": (lambda path: path.write_text("1" * 5000), "4300 digits"),
}


@pytest.mark.parametrize("thing", THINGS)
def test_anything_in_place_of_a_record_is_named(tmp_path, thing):
    make, reported = THINGS[thing]
    make(tmp_path / "x.json")
    assert reported in refusal(tmp_path / "x.json")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied")])
def test_a_record_that_the_disk_or_its_mode_withholds_is_named(path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, "open", fail)
    assert error.strerror in refusal(path)


# 9^40 items, and a list within itself
NESTED = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))


@pytest.mark.parametrize("text", ["[" * 2_000, "a: [1", "\x00", NESTED, "a: &a [*a]", "a: &a {b: 1}\nc: {<<: *a}"])
def test_settings_that_are_invalid_are_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"Broken file .*config\.yaml: .*; do this\."):
        records.read_settings(tmp_path / "config.yaml", "do this")


def test_settings_of_200_gb_are_named(tmp_path):
    sparse(tmp_path / "config.yaml", 200 << 30)
    with pytest.raises(ConfigError, match="it has 204,800 MiB, and at most 1 are read; do this"):
        records.read_settings(tmp_path / "config.yaml", "do this")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter/weights", "adapter/config.json", "test.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text(f"what {name} holds")
    return tmp_path


def test_damaged_files_are_named_each_with_what_became_of_it(run):
    entries = records.hash_files(run)
    assert records.damage(run, entries) == []
    (run / "adapter/weights").write_text("what adapter/weights h0lds")
    (run / "adapter/config.json").unlink()
    (run / "test.jsonl").unlink()
    (run / "test.jsonl").mkdir()
    assert sorted(records.damage(run, entries)) == [
        "adapter/config.json is missing",
        "adapter/weights is not what the run wrote",
        "test.jsonl cannot be read (Is a directory)",
    ]
    assert records.damage(run, entries, largest_bytes=4, wanted=lambda name: name == "adapter/weights") == []
    assert records.damage(run, None) == []  # of a version that kept no hashes


def test_links_and_folders_where_a_run_writes_are_named(run, tmp_path):
    assert records.own_paths_errors(run) == []
    (run / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    (run / "config.yaml").mkdir()
    (run / "eval" / "gsm8k").mkdir(parents=True)
    (run / "eval" / "gsm8k" / "predictions.partial.jsonl").symlink_to("nothing")
    (run / "checkpoint-3").symlink_to("nothing")  # nothing is written through it
    errors = records.own_paths_errors(run)
    assert len(errors) == 3
    for name in ("metrics.jsonl", "config.yaml", "eval/gsm8k/predictions.partial.jsonl"):
        assert any(message.startswith(f"Invalid {run / name}: ") for message in errors)


@pytest.mark.parametrize("value", ["", " ", "~nouser", "~nouser/cache"])
def test_a_cache_folder_that_is_invalid_is_rejected(monkeypatch, value):
    monkeypatch.setenv("FLATLORA_CACHE", value)
    with pytest.raises(ConfigError, match="Invalid FLATLORA_CACHE"):
        cache_folder()


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine").write_text("kept")
    (tmp_path / "adapter").symlink_to("outside")
    with write_folder(tmp_path / "adapter") as staging:
        (staging / "weights").write_text("new")
    assert not (tmp_path / "adapter").is_symlink()
    assert (tmp_path / "adapter/weights").read_text() == "new"
    assert os.listdir(tmp_path / "outside") == ["mine"]
