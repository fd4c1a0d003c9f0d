"""Distributed runs: launching processes, ranks, communication between processes, ZeRO-2 and FSDP2."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import DistributedType, PartialState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatlora.config.experiment import Experiment
from flatlora.config.sections import TrainerConfig
from flatlora.utils import console
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import physical_cores
from flatlora.utils.shards import is_sharded

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_BUILD_S = 600  # seconds; DeepSpeed's extensions take about 30


def world_size() -> int:
    """Returns the number of processes; torchrun sets WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the rank of this process; torchrun sets RANK."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and messages."""
    return rank() == 0


def must_launch(machine: TrainerConfig) -> bool:
    """Whether this process has to start those of the run: `trainer.gpus` is set, and torchrun did not start it."""
    return machine.gpus is not None and "WORLD_SIZE" not in os.environ


def launch(experiment: Experiment, script: Path, words: Sequence[str]) -> int:
    """Runs `script` in `trainer.gpus` processes on this machine, like torchrun.

    If a process fails or this one receives a signal, all others are terminated, and killed after `_patience_s`.

    Returns:
        The exit code of the first failure; 0 without one. After a signal 130 for SIGINT and SIGQUIT, else 75, as in a
        run with one process.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the processes cannot share a batch evenly.
    """
    machine = experiment.trainer
    errors = batch_errors(experiment, machine.gpus)
    if machine.device != "cpu" and (there := gpu_count()) < machine.gpus:
        errors.append(
            f"Invalid trainer.gpus={machine.gpus}: this machine has {there}; ask for fewer, or set "
            "trainer.device=cpu for processes on the CPU."
        )
    if errors:
        raise ConfigError(errors)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.run"):  # they repeat the processes' own errors
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_patience_s(machine))
    config = LaunchConfig(
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=machine.gpus,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, physical_cores() // machine.gpus)))
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *words)
        return 0
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        if failure.exitcode < 0:
            message = _ended_by_a_signal(first, failure.signal_name(), machine.timeout_s)
            console.console.print(message, markup=False, soft_wrap=True)
        return max(1, failure.exitcode)
    except SignalException as error:
        return 130 if error.sigval in (signal.SIGINT, signal.SIGQUIT) else 75


def _ended_by_a_signal(first: int, name: str, timeout_s: int) -> str:
    reasons = {
        "SIGABRT": "NCCL ends it like this if another process has not answered for "
        f"trainer.timeout_s={timeout_s}; its own lines above name the operation",
        "SIGKILL": "the system ends it like this if memory runs out",
    }
    reason = f" ({reasons[name]})" if name in reasons else ""
    return (
        f"Process {first} of the run was ended by {name}{reason}. The others were ended too; "
        "the same command with resume=true goes on from the newest checkpoint."
    )


def _patience_s(machine: TrainerConfig) -> int:
    """Returns the time from a signal to SIGKILL in seconds: enough for a checkpoint, below Slurm's two minutes."""
    return min(110, max(30, int(machine.timeout_s)))


_claimed: list[int] = []  # descriptor of the lock file of this process's GPU, held until it exits


def claim_gpu(count: int, folder: Path | None = None) -> int | None:
    """Claims a GPU of this machine until the process exits, and hides the others from it.

    For the workers of a sweep, which run several jobs one after another.

    Returns:
        The index of a GPU that no other process has claimed; None if there is none, or fewer than two GPUs.
    """
    if count < 2 or _claimed:
        return None
    folder = folder or Path(tempfile.gettempdir())
    for number in range(count):
        try:
            lock = _open_lock(folder / f"flatlora-gpu-{number}.lock")
        except OSError:  # a link, or a file that another user has closed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _claimed.append(lock)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        return number
    return None


def _open_lock(path: Path) -> int:
    """Opens a lock file, which may be another user's: a lock needs no permission to write."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT, 0o666)


def gpu_count() -> int:
    """Returns the number of visible GPUs without initializing CUDA, so that `claim_gpu` still takes effect."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return torch.cuda.device_count()  # uses NVML, which creates no context


def initialize(experiment: Experiment, device: torch.device) -> None:
    """Initializes communication with the other processes; does nothing for a single process without ZeRO.

    A process that waits for another longer than trainer.timeout_s fails, and torchrun terminates the others.
    """
    global _hosts
    machine = experiment.trainer
    if world_size() > 1 or machine.zero:
        if machine.zero:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # read by accelerate, here and in Trainer
        on_cpu = device.type == "cpu"
        timeout = datetime.timedelta(seconds=machine.timeout_s)
        state = PartialState(cpu=on_cpu, timeout=timeout)
        if machine.zero:
            _free_stale_builds()
        if machine.zero and on_cpu:  # accelerate supports DeepSpeed on accelerators only
            import deepspeed
            from deepspeed.accelerator import get_accelerator

            # The shared-memory reduction is for inference, and compiling it takes a minute or two.
            shared_memory = get_accelerator().create_op_builder("ShareMemCommBuilder")
            if shared_memory is not None:
                deepspeed.ops.__compatible_ops__[shared_memory.NAME] = False
            deepspeed.init_distributed(dist_backend=state.backend, auto_mpi_discovery=False)
            state.distributed_type = DistributedType.DEEPSPEED
        # On several nodes gloo would ask for names of hosts and interfaces, which NCCL does without.
        on_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        if world_size() > 1 and not on_cpu and on_one_node:
            _hosts = torch.distributed.new_group(backend="gloo", timeout=timeout)


_hosts: torch.distributed.ProcessGroup | None = None  # all processes of one node with GPUs, for tensors on the host


def _free_stale_builds() -> None:
    """Removes lock files of killed extension builds, for which torch would wait forever."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_S:
                lock.unlink()


def check_agreement(facts: Mapping[str, str | None], remedy: str) -> None:
    """Checks that all processes have the same `facts`.

    Args:
        facts: {name in the message: value}.
        remedy: end of the message.

    Raises:
        ConfigError: on every process, with the value of each rank for each fact that differs.
    """
    if world_size() == 1:
        return
    gathered: list[dict[str, str | None]] = [{}] * world_size()
    torch.distributed.all_gather_object(gathered, dict(facts))
    errors = []
    for name in facts:
        values = [rank_facts.get(name) for rank_facts in gathered]
        if len(set(values)) > 1:
            each = {value: [str(i) for i, other in enumerate(values) if other == value] for value in values}
            described = "; ".join(f"{str(value)[:12]} on rank {', '.join(ranks)}" for value, ranks in each.items())
            errors.append(f"The processes differ in {name}: {described}. {remedy}")
    if errors:
        raise ConfigError(errors)


def code_sha256() -> str:
    """Returns a hash of the project's source files, to detect nodes with different versions."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    folders = ("flatlora", "data", "eval")
    for path in [root / "run_exp.py", *(path for name in folders for path in sorted((root / name).rglob("*.py")))]:
        if path.is_file():
            digest.update(f"{path.relative_to(root)}|".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def deepspeed_settings(machine: TrainerConfig) -> dict[str, Any] | None:
    """Returns DeepSpeed's config for trainer.zero; None without ZeRO.

    bf16 and fp16 are off: they would cast the FP32 adapters. The backbone is loaded in BF16 and matrix products run
    under autocast; trained weights, their gradients, masters and moments stay FP32.
    """
    if not machine.zero:
        return None
    place = {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if machine.offload else {}
    return {
        "zero_optimization": {"stage": machine.zero, "contiguous_gradients": True, "overlap_comm": False, **place},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},  # it would synchronize in every micro-step
    }


def zero_step(engine: Any, gradient: torch.Tensor) -> None:
    """Reduces the gradients in the parameters' `.grad` and runs ZeRO's optimizer step.

    Args:
        gradient: the flat buffer behind all `.grad`; its sum over the processes is the gradient of the step.
    """
    gradient.mul_(world_size())  # ZeRO takes the mean
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.detach()  # ZeRO replaces its data; the buffer's views must stay
    with engine.coalesce_grad_reduction():
        pass  # gradients in .grad are reduced at the end of the block, without the engine's backward
    engine.set_gradient_accumulation_boundary(True)
    engine.step()


def zero_dtypes(engine: Any) -> dict[str, list[str]]:
    """Returns the dtypes that occur in ZeRO's {"backbone", "trained", "masters", "gradients"}."""

    def names(tensors: Any) -> list[str]:
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor is not None})

    optimizer = engine.optimizer
    return {
        "backbone": names(p for p in engine.module.parameters() if not p.requires_grad and p.is_floating_point()),
        "trained": names(p for p in engine.module.parameters() if p.requires_grad),
        "masters": names(optimizer.single_partition_of_fp32_groups),
        "gradients": [str(optimizer.gradient_accumulation_dtype).removeprefix("torch.")],
    }


def check_dtypes(found: Mapping[str, list[str]]) -> None:
    """Checks that ZeRO holds trained parameters, masters and gradients in FP32.

    Raises:
        RuntimeError: it does not.
    """
    lowered = {name: found[name] for name in ("trained", "masters", "gradients") if found[name] != ["float32"]}
    if lowered:
        raise RuntimeError(f"ZeRO does not keep what is trained in FP32 ({lowered}): use another DeepSpeed.")


def replicate_adapter(model: nn.Module) -> nn.Module:
    """Wraps a model whose weights FSDP2 shards, so that DDP reduces the gradients of its adapter, which are not."""
    ignored = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    ignored += [name for name, _ in model.named_buffers()]  # constants, equal in all processes
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


def largest(number: int) -> int:
    """Returns the largest of the processes' numbers; if all were started on one node, no host waits for its GPU."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device="cpu" if _hosts is not None else PartialState().device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=_hosts)
    return int(tensor)


def named_loss(error: Exception) -> Exception:
    """Returns ConnectionError for an error that says that another process is lost; any other error as it is.

    gloo raises RuntimeError with a place in its source. Errors of torch's store and of NCCL have classes of their own,
    which others than lost connections have too; where NCCL's watchdog finds one, it ends the process itself.
    """
    message = str(error)
    of_gloo = isinstance(error, RuntimeError) and _IN_GLOO.search(message)
    of_torch = isinstance(error, torch.distributed.DistError) and _IS_LOST.search(message)
    if world_size() == 1 or not (of_gloo or of_torch):
        return error
    reason = _IN_GLOO.sub("", message).strip().partition("\n")[0].partition(". ")[0]
    lost = ConnectionError(
        f"rank {rank()} lost another process of the run ({reason}): it ended, hangs for longer than "
        "trainer.timeout_s, or cannot be reached; see its own output, and start all processes again with resume=true, "
        "which goes on from the newest checkpoint."
    )
    lost.__cause__ = error
    return lost


_IN_GLOO = re.compile(r"\[\S*/gloo/\S*\]\s*")
_IS_LOST = re.compile(
    r"remote process|connection (was )?(closed|reset|refused)|timed? ?out|recvValue|broken pipe", re.IGNORECASE
)


def from_main_process(compute: Callable[[], T]) -> T:
    """Calls `compute` on rank 0 and returns its result on every rank.

    An exception on rank 0 is raised on every rank: ConfigError as it is, others as RuntimeError.
    """
    if world_size() == 1:
        return compute()
    answer: list[Any] = [None, None]
    if is_main_process():
        try:
            answer[0] = compute()
        except ConfigError as error:
            answer[1] = error
        except BaseException as error:  # the others must not wait forever
            answer[1] = RuntimeError(f"the main process failed: {type(error).__name__}: {error}")
            torch.distributed.broadcast_object_list(answer, src=0)
            raise
    torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def main_process_first(work: Callable[[], T]) -> T:
    """Calls `work` on every rank and returns its result; rank 0 goes first, so that the others can use its caches."""
    if world_size() == 1:
        return work()
    first: list[T] = []
    from_main_process(lambda: first.append(work()))
    return first[0] if first else work()


def check_launch(experiment: Experiment) -> None:
    """Checks the number of processes and the environment against the config.

    Raises:
        ConfigError: the batch size is not divisible, the run was launched in the wrong way, a package is missing, or
            accelerate's settings contradict the config.
    """
    processes, machine = world_size(), experiment.trainer
    errors = batch_errors(experiment, processes)
    if machine.launch == "single" and processes > 1:
        errors.append(f"Invalid trainer={machine.name} with {processes} processes: use trainer=ddp, or one process.")
    if machine.launch == "torchrun" and "WORLD_SIZE" not in os.environ:
        errors.append(
            f"Invalid trainer={machine.name} without processes: set trainer.gpus=N, start it by torchrun "
            f"--nproc_per_node N run_exp.py trainer={machine.name} ..., or use trainer=auto."
        )
    if machine.gpus is not None and processes not in (1, machine.gpus):
        errors.append(
            f"Invalid trainer.gpus={machine.gpus} with {processes} processes: torchrun started them already; leave the "
            "key out."
        )
    if machine.zero and importlib.util.find_spec("deepspeed") is None:
        errors.append(
            f"Invalid trainer={machine.name}: the package deepspeed is not installed; run pip install deepspeed ninja, "
            "or use trainer=ddp."
        )
    if machine.fsdp and machine.device == "cpu" and torch.cuda.is_available():
        errors.append(
            f"Invalid trainer.device=cpu with trainer={machine.name} on a machine with GPUs: transformers shards the "
            "weights over these; set CUDA_VISIBLE_DEVICES= to hide them."
        )
    if machine.fsdp and machine.offload and "WORLD_SIZE" in os.environ:
        if processes == 1:
            errors.append(
                f"Invalid trainer={machine.name} with one process: FSDP2 keeps shares of several processes on the "
                "host; start more of them, or use trainer=single."
            )
        if not torch.cuda.is_available():
            errors.append(
                f"Invalid trainer={machine.name} without a GPU: the weights are on the host in any case; use "
                "trainer=fsdp."
            )
    if optimizer := _optimizer_error(experiment):
        errors.append(optimizer)
    errors += _accelerate_errors(machine)
    if errors:
        raise ConfigError(errors)
    _name_what_is_ignored(experiment)


def batch_errors(experiment: Experiment, processes: int) -> list[str]:
    """Returns the error of a number of processes among which the micro-batches of a step cannot be divided."""
    batch, size = experiment.optim.batch_size, experiment.trainer.micro_batch_size
    micro_batches = batch // size
    if micro_batches % processes == 0:
        return []
    fitting = [str(count) for count in range(1, micro_batches + 1) if micro_batches % count == 0]
    some = ", ".join(fitting) if len(fitting) <= _MOST_LISTED else f"a divisor of {micro_batches}"
    return [
        f"Invalid optim.batch_size={batch} with {processes} processes: they cannot share its {micro_batches} "
        f"micro-batches of {size} evenly; start another number of processes ({some}), or change "
        "trainer.micro_batch_size."
    ]


_MOST_LISTED = 12

_OTHER_WAYS = {"FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism config"}


def _accelerate_errors(machine: TrainerConfig) -> list[str]:
    """Returns errors for settings of `accelerate launch` or its default_config.yaml that contradict the config."""
    launched = "accelerate launch (or its default_config.yaml)"
    errors = [
        f"Invalid ACCELERATE_USE_{name}={os.environ[f'ACCELERATE_USE_{name}']}: {launched} asks for {what}, which this "
        "suite does not take from there; unset it, and use trainer=ddp, fsdp or zero2."
        for name, what in _OTHER_WAYS.items()
        if _is_set(f"ACCELERATE_USE_{name}")
    ]
    if _is_set("ACCELERATE_USE_DEEPSPEED") and not machine.zero:
        errors.append(
            f"Invalid trainer={machine.name} with ACCELERATE_USE_DEEPSPEED=true: {launched} asks for DeepSpeed, and "
            "trainer.zero=0 for none; use trainer=zero2, or unset the variable."
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if machine.zero and stage not in (None, str(machine.zero)):
        errors.append(
            f"Invalid ACCELERATE_DEEPSPEED_ZERO_STAGE={stage} with trainer.zero={machine.zero}: {launched} asks for "
            "another stage of ZeRO; unset it."
        )
    if _is_set("ACCELERATE_USE_CPU") and machine.device != "cpu" and torch.cuda.is_available():
        errors.append(
            f"Invalid trainer.device={machine.device} with ACCELERATE_USE_CPU=true: {launched} asks for the CPU; use "
            "trainer.device=cpu, or unset the variable."
        )
    return errors


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _name_what_is_ignored(experiment: Experiment) -> None:
    """Warns about settings of accelerate that are ignored in favor of the config."""
    remedies = {
        "ACCELERATE_MIXED_PRECISION": f"trainer.autocast={experiment.trainer.autocast} and "
        f"model.dtype={experiment.model.dtype} say how this run computes",
        "ACCELERATE_DYNAMO_BACKEND": "this suite does not compile models",
    }
    for name, remedy in remedies.items():
        value = os.environ.get(name, "no")
        if value.lower() not in ("no", "") and is_main_process():
            source = "accelerate launch (or its default_config.yaml)"
            logger.warning("%s=%s of %s is ignored: %s.", name, value, source, remedy)


def _optimizer_error(experiment: Experiment) -> str | None:
    if experiment.optim.optimizer != "adamw_8bit":
        return None
    if experiment.trainer.device == "cpu" or not torch.cuda.is_available():
        return (
            "Invalid optim.optimizer=adamw_8bit on a CPU: bitsandbytes keeps 8-bit moments on a CUDA GPU alone; use "
            "optim.optimizer=adamw."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        return (
            "Invalid optim.optimizer=adamw_8bit: the package bitsandbytes is not installed; run pip install "
            "bitsandbytes, or use optim.optimizer=adamw."
        )
    return None
