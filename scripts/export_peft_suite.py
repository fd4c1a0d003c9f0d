"""Writes finished runs of `protocol=peft_suite` in the JSON form of PEFT's own suite (method_comparison/MetaMathQA).

    python -m scripts.export_peft_suite RUN [RUN ...] [--out DIR]     writes DIR/METHOD--MODEL-….json

RUN is a run's folder. What the suite records and a run does not is null: accuracy on validation rows and its time, the
hub's dates and hashes, commits of packages, and the loss on Wikipedia ("forgetting"). `regularizer`, beside the
adapter's settings, is the only key that the suite does not have. Time is that of the run's machine: compare it with
that of runs on the same one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import run_exp
from flatlora.config.experiment import Experiment, parse
from flatlora.inputs.templates import prompt
from flatlora.runs.metrics_log import MetricsLog
from flatlora.runs.record import RECORD_FILE, RunRecord
from flatlora.utils.console import quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.files import write_atomic
from scripts import cells

PROTOCOL = "peft_suite"
WINDOW_STEPS = 250  # of one entry of "metrics"
LONGEST = 800  # tokens of prompt and answer in the suite, which no prompt of GSM8K reaches with 300 new tokens
_GIB = 2**30


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if a run cannot be exported; then nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path(), help="the current folder by default")
    options = parser.parse_args(words)
    quiet_libraries()
    exported, errors = {}, []
    for run in options.runs:
        try:
            content = exported_run(run)
            name = f"{content['run_info']['experiment_name'].replace('/', '--')}.json"
            if name in exported:
                raise ConfigError([f"Cannot export {run}: an earlier RUN is written to {name} too; leave one out."])
            exported[name] = content
        except ConfigError as error:
            errors += error.errors
    if errors:
        report_errors(ConfigError(errors))
        return 2
    for name, content in exported.items():
        write_atomic(options.out / name, json.dumps(content, indent=2) + "\n")
        print(f"written: {options.out / name}")
    return 0


def exported_run(run: Path) -> dict[str, Any]:
    """A run in the suite's form.

    Raises:
        ConfigError: it is unfinished or damaged, of another protocol, or its record lacks what the form needs.
    """
    record = RunRecord.read(run)
    if record is None:
        raise ConfigError([f"Cannot export {run}: it has no {RECORD_FILE}; name the folder of a finished run."])
    if not record.is_finished:
        raise ConfigError([f"Cannot export {run}: it is {record.status}; finish it with resume=true."])
    experiment = parse(record.experiment, run_exp.SUITE)
    if experiment.protocol != PROTOCOL:
        raise ConfigError(
            [
                f"Cannot export {run}: its protocol is {experiment.protocol}, and the suite has settings of its own; "
                f"train with protocol={PROTOCOL}."
            ]
        )
    if missing := _missing(record):
        raise ConfigError(
            [
                f"Cannot export {run}: its record has no {', '.join(missing)}; memory needs a GPU, and the others a "
                "run of this version."
            ]
        )
    if damage := record.damage(run):
        reason = "; ".join(damage)
        raise ConfigError([f"Cannot export {run}: it is damaged ({reason}); restore it with resume=true."])
    try:
        return {
            "run_info": _run_info(run, record, experiment),
            "train_info": _train_info(run, record, experiment),
            "meta_info": _meta_info(record, experiment),
        }
    except cells.BROKEN as error:
        raise ConfigError([f"Cannot export {run}: {reason_of(error)}; restore it with resume=true."]) from error


_NEEDED = {
    "memory": ("peak_reserved_gib", "reserved_mean_gib", "reserved_p99_gib"),
    "timing": ("train_s", "score_s", "total_s"),
    "params": ("trainable", "total"),
}


def _missing(record: RunRecord) -> list[str]:
    """Names of what the form needs and the record does not have."""
    groups = {group: getattr(record, group) for group in _NEEDED}
    missing = [
        f"{group}.{key}" for group, keys in _NEEDED.items() for key in keys if getattr(groups[group], key, None) is None
    ]
    missing += [key for key in ("started_at", "env", "files") if getattr(record, key) is None]
    return missing + ([] if "gsm8k/exact_match" in record.metrics else ["metrics.gsm8k/exact_match"])


def experiment_name(experiment: Experiment) -> str:
    """The name in the suite's form METHOD/MODEL-SETTINGS, such as lora/llama-3.2-3B-rank32-flat0.05.

    A run on other weights, by model.hub_id, has their name.
    """
    rank = getattr(experiment.peft, "lora_r", None)
    model = experiment.model.hub_id.rstrip("/").rpartition("/")[2]
    parts = ["llama-3.2-3B" if model == "Llama-3.2-3B" else model, *([f"rank{rank}"] if rank else [])]
    parts += [] if experiment.peft.name in ("lora", "full_ft") else [experiment.peft.name]
    parts += [f"{experiment.rho.name}{experiment.rho.sigma:g}"] if experiment.regularized else []
    parts += [f"seed{experiment.seed}"] if experiment.seed else []  # the suite's is 0
    method = "full-finetuning" if experiment.peft.method == "full_ft" else "lora"
    return f"{method}/{'-'.join(parts)}"


def _run_info(run: Path, record: RunRecord, experiment: Experiment) -> dict[str, Any]:
    regularizer = experiment.rho.model_dump(mode="json") if experiment.regularized else None
    return {
        "created_at": record.started_at,
        "total_time": record.timing.total_s,
        "experiment_name": experiment_name(experiment),
        "peft_branch": f"release {record.env.versions['peft']}",
        "peft_worktree_is_dirty": False,
        "train_config": _train_config(experiment),
        "peft_config": _peft_config(run),
        "regularizer": regularizer,
        "error_msg": "",
    }


def _train_config(experiment: Experiment) -> dict[str, Any]:
    optim, trainer, asked = experiment.optim, experiment.trainer, experiment.eval["gsm8k"]
    return {
        "model_id": experiment.model.hub_id,
        "dtype": experiment.model.dtype,
        "max_seq_length": experiment.dataset.max_length,
        "batch_size": optim.batch_size,
        "batch_size_eval": asked.batch_size,
        "max_steps": trainer.max_steps,
        "eval_steps": min(WINDOW_STEPS, trainer.max_steps),
        "compile": False,
        "use_gc": trainer.gradient_checkpointing,
        "query_template": prompt(experiment.dataset.template, "{query}"),
        "seed": experiment.seed,
        "grad_norm_clip": optim.max_grad_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": optim.lr, "weight_decay": optim.weight_decay},
        "lr_scheduler": None if optim.lr_schedule == "constant" else optim.lr_schedule,
        "use_amp": trainer.autocast != "none",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_length": LONGEST, "max_new_tokens": asked.max_new_tokens},
        "attn_implementation": None if experiment.model.attn == "auto" else experiment.model.attn,
        "init_kv_cache_prefix": None,
    }


def _peft_config(run: Path) -> dict[str, Any] | None:
    """The adapter's configuration, as it was in training; None of a fully trained model."""
    path = run / "adapter/adapter_config.json"
    return json.loads(path.read_bytes()) | {"inference_mode": False} if path.is_file() else None


def _train_info(run: Path, record: RunRecord, experiment: Experiment) -> dict[str, Any]:
    memory, weights = record.memory, [name for name in record.files if name.endswith(".safetensors")]
    return {
        "accelerator_memory_reserved_avg": int(memory.reserved_mean_gib * _GIB),
        "accelerator_memory_max": int(memory.peak_reserved_gib * _GIB),
        "accelerator_memory_reserved_99th": int(memory.reserved_p99_gib * _GIB),
        "train_time": record.timing.train_s + record.timing.score_s,
        "file_size": sum(record.files[name]["bytes"] for name in weights if name.startswith("adapter/")),
        "num_trainable_params": record.params.trainable,
        "num_total_params": record.params.total,
        "status": "success",
        "metrics": _metrics(MetricsLog(run / "metrics.jsonl").rows(), record, experiment),
    }


def _metrics(rows: Sequence[Mapping[str, Any]], record: RunRecord, experiment: Experiment) -> list[dict[str, Any]]:
    """An entry every `WINDOW_STEPS` steps, and one of the test set.

    Raises:
        ValueError: there are no logged steps, or they do not say how many tokens they had.
    """
    steps = [row for row in rows if "loss" in row]
    if not steps or any("tokens" not in row for row in steps):
        raise ValueError("metrics.jsonl does not have the tokens of each logged step")
    entries = []
    last = steps[-1]["step"]
    for end in range(min(WINDOW_STEPS, last), last + 1, WINDOW_STEPS):
        window = [row for row in steps if end - WINDOW_STEPS < row["step"] <= end]
        if not window:  # trainer.logging_steps is larger
            continue
        tokens = sum(row["tokens"] for row in window)
        seconds = sum(row["tokens"] / row["tokens_per_s"] for row in window)
        entries.append(
            {
                "step": end,
                "valid accuracy": None,
                "train loss": sum(row["loss"] for row in window) / len(window),
                "train samples": end * experiment.optim.batch_size,
                "train time": seconds,
                "eval time": None,
                "tokens / sec": tokens / seconds,
                "mem allocated avg": None,
                "mem reserved avg": None,
                "elapsed time": None,
            }
        )
    final = [row["loss"] for row in steps if row["step"] > last - WINDOW_STEPS]
    return [
        *entries,
        {
            "step": last,
            "test accuracy": record.metrics["gsm8k/exact_match"],
            "train loss": sum(final) / len(final),
            "train samples": last * experiment.optim.batch_size,
            "train total tokens": sum(row["tokens"] for row in steps),
            "forgetting": None,
        },
    ]


def _meta_info(record: RunRecord, experiment: Experiment) -> dict[str, Any]:
    revisions = experiment.dataset.revision, experiment.dataset.test_revision
    packages = {}
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
        packages |= {f"{name}-version": record.env.versions.get(name), f"{name}-commit-hash": None}
    hardware = record.env.hardware
    return {
        "model_info": {"sha": experiment.model.revision, "created_at": None},
        "dataset_info": {
            name: {"sha": sha, "created_at": None} for name, sha in zip(("metamath", "gsm8k"), revisions, strict=True)
        },
        "package_info": packages,
        "system_info": {
            "system": None,
            "release": None,
            "version": None,
            "machine": None,
            "processor": hardware.cpu,
            "accelerator": hardware.gpus[0] if hardware.gpus else None,
        },
        "pytorch_info": f"torch {record.env.versions['torch']}",
    }


if __name__ == "__main__":
    sys.exit(main())
