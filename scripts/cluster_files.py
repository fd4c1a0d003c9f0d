"""Files that start one run on several nodes of a cluster, by torchrun on each: for Slurm and for Kubernetes."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import run_exp
from flatlora.config.experiment import Experiment
from flatlora.experiment import commandline
from flatlora.experiment.run import EXIT_PREEMPTED
from flatlora.runs.record import RECORD_FILE
from flatlora.runs.run_folder import RunFolder
from flatlora.train.distributed import batch_errors
from flatlora.utils.errors import ConfigError

PROJECT = Path(__file__).parents[1]

PORT = 29500
_GRACE_S = 120  # from SIGTERM to SIGKILL: for a step and a checkpoint
# How long torchrun waits for its processes after SIGTERM, within that time.
_SHUTDOWN = f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={_GRACE_S - 15}"
_BEGIN = "started=$(mktemp)  # a record that is older is that of an earlier start"


def experiments(words: Sequence[str]) -> list[Experiment]:
    """The experiments that run_exp.py would run for the overrides of a sweep.

    Raises:
        ConfigError: it lists every error of every experiment.
    """
    settings, _ = commandline.rewrite(commandline.split_flags(list(words))[1])
    settings, _ = commandline.name_jobs(settings)
    return run_exp.experiments_of(commandline.expand_sweep(settings))


class ClusterRun(NamedTuple):
    """A run on nodes × gpus processes.

    Args:
        words: its overrides, without `resume`.
    """

    experiment: Experiment
    words: list[str]
    nodes: int
    gpus: int

    @classmethod
    def of(cls, words: Sequence[str], nodes: int, gpus: int) -> ClusterRun:
        """The run of overrides.

        Raises:
            ConfigError: they do not define exactly one run, or it does not support these processes.
        """
        if nodes < 1 or gpus < 1:
            raise ConfigError([f"Invalid --nodes={nodes} --gpus={gpus}: both must be ≥ 1."])
        words = [word for word in commandline.split_flags(list(words))[1] if not word.startswith("resume=")]
        runs = experiments([*words, "resume=true"])
        if len(runs) != 1:
            message = f"Invalid overrides: they define {len(runs)} runs, but a file has one; print one for each."
            raise ConfigError([message])
        errors = batch_errors(runs[0], nodes * gpus)
        if runs[0].trainer.launch == "single" or runs[0].trainer.gpus is not None:
            errors.append(
                "Invalid trainer: torchrun starts the processes; use trainer=ddp, fsdp or zero2 without trainer.gpus."
            )
        if errors:
            raise ConfigError(errors)
        return cls(runs[0], words, nodes, gpus)

    def command(self, script: str) -> str:
        """The command of each process, quoted for a shell; it goes on if there is a checkpoint."""
        return " ".join(shlex.quote(word) for word in [script, *self.words, "resume=true"])

    @property
    def was_interrupted(self) -> str:
        """Condition of a shell: a record since `_BEGIN` says that a signal has ended the run."""
        record = shlex.quote(str(RunFolder.of(self.experiment).path / RECORD_FILE))
        return f'[ {record} -nt "$started" ] && grep -q \'"status": "interrupted"\' {record}'


def sbatch_file(run: ClusterRun, limit: str, partition: str | None, python: str = sys.executable) -> str:
    """Returns a Slurm batch file: SIGTERM two minutes before the end, and an interrupted run is queued again."""
    settings = [
        f"--job-name={run.experiment.run_name()}",
        f"--nodes={run.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={run.gpus}",
        f"--time={limit}",
        *([f"--partition={partition}"] if partition else []),
        f"--signal=TERM@{_GRACE_S}",
        "--requeue",
        "--open-mode=append",
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {setting}" for setting in settings),
        "set -u",
        _SHUTDOWN,
        _BEGIN,
        f"cd {shlex.quote(str(PROJECT))}",
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        f"srun --kill-on-bad-exit=1 {shlex.quote(python)} -m torch.distributed.run \\",
        f'    --nnodes="$SLURM_NNODES" --nproc_per_node={run.gpus} --rdzv_backend=c10d \\',
        f'    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER_ADDR:{PORT}" \\',
        f"    {run.command('run_exp.py')}",
        "code=$?",
        "# The run was interrupted: it continues from its newest checkpoint at the next start.",
        f"if [ $code -ne 0 ] && {run.was_interrupted}; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
    return "\n".join(lines)


def kubernetes_manifest(run: ClusterRun, image: str, claim: str) -> str:
    """Returns the manifest of a Job with a pod for each node, and of the service by which the pods find each other.

    The volume is the working directory: relative paths of results, data and checkpoints are on it. A pod that is
    evicted, or whose run a signal has ended, is created anew and does not count as a failure.
    """
    name, labels = _label(run.experiment.run_name()), {"app.kubernetes.io/name": "flatlora"}
    service: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they look for each other before they are ready
            "selector": {"job-name": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    container = {
        "name": "train",
        "image": image,
        "command": ["bash", "-c", pod_script(run, name)],
        "workingDir": "/experiments",
        "env": [{"name": "HF_HOME", "value": "/experiments/huggingface"}],
        "resources": {"limits": {"nvidia.com/gpu": run.gpus}},
        "volumeMounts": [
            {"name": "experiments", "mountPath": "/experiments"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # of NCCL and the loader's workers
        ],
    }
    ignored = [
        {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": [EXIT_PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": run.nodes,
            "parallelism": run.nodes,
            "backoffLimit": 4 * run.nodes,  # if a node is lost, the pods of all others fail
            "podFailurePolicy": {"rules": ignored},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "subdomain": name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": _GRACE_S,
                    "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},  # the image's user
                    "containers": [container],
                    "volumes": [
                        {"name": "experiments", "persistentVolumeClaim": {"claimName": claim}},
                        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
                    ],
                },
            },
        },
    }
    return yaml.dump_all([service, job], Dumper=_Dumper, sort_keys=False, width=4096)


def pod_script(run: ClusterRun, name: str, script: str = "/opt/flatlora/run_exp.py") -> str:
    """Returns the script of a pod's first process, bash, which does not pass signals on by itself."""
    lines = [
        _SHUTDOWN,
        _BEGIN,
        "child= stopped=",
        "trap 'stopped=yes; [ -z $child ] || kill -TERM $child' TERM INT",
        "python -m torch.distributed.run \\",
        f'    --nnodes={run.nodes} --nproc_per_node={run.gpus} --node_rank="${{JOB_COMPLETION_INDEX:-0}}" \\',
        f"    --master_addr={name}-0.{name} --master_port={PORT} \\",
        f"    {run.command(script)} &",
        "child=$!",
        "[ -z $stopped ] || kill -TERM $child",
        "wait $child; code=$?",
        "while kill -0 $child 2>/dev/null; do wait $child; code=$?; done  # a signal ends a wait",
        "wait $child 2>/dev/null; last=$?",
        "[ $last -eq 127 ] || code=$last  # it ended between a signal and the next wait",
        "for _ in 1 2 3 4 5 6 7 8; do  # another pod writes the record",
        "    [ $code -ne 0 ] || exit 0",
        f"    {{ {run.was_interrupted}; }} && exit {EXIT_PREEMPTED}  # it goes on from its checkpoint",
        "    sleep 1",
        "done",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


_LONGEST_LABEL = 50  # characters of a Job's name, of at most 63 with a pod's index


def _label(name: str) -> str:
    """A name of lower-case letters, digits and hyphens, which begins with a letter; different for different names."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if label == name and len(label) <= _LONGEST_LABEL and label[0].isalpha():
        return label
    return f"run-{label}"[: _LONGEST_LABEL - 7].rstrip("-") + f"-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and every value where it is used."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
