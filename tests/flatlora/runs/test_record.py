"""run.json: records of earlier versions are read, those of newer ones refused, and no key is lost."""

import json
from pathlib import Path

import pytest

from flatlora.runs.record import SCHEMA_VERSION, BackboneHashes, RunRecord, Timing
from flatlora.utils.errors import ConfigError

STUDY = Path(__file__).parents[3] / "results/study"


def write(run, content):
    (run / "run.json").write_text(json.dumps(content))


def refusal(run):
    with pytest.raises(ConfigError) as caught:
        RunRecord.read(run, "do this")
    (message,) = caught.value.errors
    return message


RECORDS = sorted(STUDY.glob("flatlora_*/*/0/run.json"))
BEFORE_THE_SCHEMA = [path for path in RECORDS if "schema_version" not in json.loads(path.read_bytes())]


@pytest.mark.parametrize("path", BEFORE_THE_SCHEMA[::6], ids=lambda path: path.parts[-3])
def test_a_record_of_before_the_schema_is_read_and_written_again_with_every_value(path, tmp_path):
    old = json.loads(path.read_bytes())
    record = RunRecord.read(path.parent)
    assert record.timing.train_s == old["timing"]["train_s"]
    assert record.env.hardware.gpus == old["env"]["hardware"]["gpus"]
    assert record.metrics == old["metrics"]
    assert record.files is None
    record.write(tmp_path)
    new = json.loads((tmp_path / "run.json").read_bytes())
    assert new["schema_version"] == SCHEMA_VERSION == 1
    later = {"timing": ("images_per_s", "score_s", "total_s")}
    later |= {"memory": ("peak_reserved_gib", "reserved_mean_gib", "reserved_p99_gib")}
    assert {key: new[key] for key in old if key not in later} == {key: old[key] for key in old if key not in later}
    assert all(new[group] == old[group] | dict.fromkeys(keys) for group, keys in later.items())
    assert RunRecord.read(tmp_path).record_sha256 == new["record_sha256"]


def test_keys_of_other_versions_are_kept_when_a_record_is_updated(tmp_path):
    write(tmp_path, {"status": "interrupted", "of_then": [1], "timing": {"train_s": 2, "wait_s": 0.5}})
    record = RunRecord.read(tmp_path)
    record.status = "finished"
    record.write(tmp_path)
    found = json.loads((tmp_path / "run.json").read_bytes())
    assert (found["status"], found["of_then"]) == ("finished", [1])
    assert found["timing"] == {
        "train_s": 2.0,
        "step_s_median": None,
        "tokens_per_s": None,
        "images_per_s": None,
        "perturb_s": None,
        "score_s": None,
        "total_s": None,
        "wait_s": 0.5,
    }


def test_a_newer_version_is_refused_by_its_number_whatever_else_it_holds(tmp_path):
    write(tmp_path, {"schema_version": 2, "state": {"ended": True}})
    assert refusal(tmp_path) == (
        f"Invalid schema_version=2 in {tmp_path}/run.json: this version of the suite reads records up to 1; use the "
        "version that wrote it, or a newer one."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "status: field required"),
        ({"status": "done"}, "status: input should be 'finished', 'failed' or 'interrupted'"),
        ({"status": "finished", "timing": {"train_s": "9"}}, "timing.train_s: input should be a valid number"),
        ({"status": "finished", "schema_version": True}, "schema_version: input should be a valid integer"),
        ({"status": "finished", "schema_version": 0}, "schema_version: input should be greater than or equal to 1"),
    ],
)
def test_what_no_run_wrote_is_named_with_its_key(tmp_path, content, reason):
    write(tmp_path, content)
    assert refusal(tmp_path) == f"Broken record {tmp_path}/run.json: it is not what a run wrote ({reason}); do this."


def test_a_value_of_another_type_cannot_be_assigned():
    record = RunRecord(status="failed")
    for key, value in (("status", "ended"), ("timing", {"train_s": "9"}), ("adapter_sha256", b"00")):
        with pytest.raises(ValueError, match=key):
            setattr(record, key, value)
    record.timing = Timing(train_s=9.0)
    assert record.timing.train_s == 9.0


def test_metrics_of_a_benchmark_are_those_with_its_whole_name():
    record = RunRecord(status="finished", metrics={"train_loss": 1.0, "glue/n": 4, "glue2/n": 5, "glue/a/b": None})
    assert record.metrics_of("glue") == {"n": 4, "a/b": None}
    assert BackboneHashes().unchanged
    assert not BackboneHashes(before="a").unchanged
