"""Plans a run: the memory of its training step on several GPUs, and at least how long it takes, before it starts.

No weight is loaded, and no GPU is needed: `flatlora.train.footprint` runs the step on tensors without data. Rows are
read, since the longest decide the peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import get_peft_model
from rich.console import Group
from rich.table import Table
from torch import nn

from flatlora.config.experiment import Experiment
from flatlora.experiment.suite import Suite
from flatlora.fused.packing import attends_to_all_before
from flatlora.fused.varlen import SIZES
from flatlora.inputs.rows import gather
from flatlora.methods import ADAPTERS
from flatlora.methods.base import uses_kernels
from flatlora.models import loading
from flatlora.models.family import FAMILIES
from flatlora.train import distributed
from flatlora.train.footprint import StepMemory, step_memory
from flatlora.train.trainer import may_join_rows
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import choose_precision

GIB = 2**30


class Card(NamedTuple):
    """A kind of GPU.

    Args:
        gib: memory that its driver reports.
        tflops: peak of dense products in BF16 with sums in FP32, from its data sheet.
    """

    gib: float
    tflops: float


CARDS = {
    "RTX 4090, 24 GB": Card(23.5, 165.2),
    "A100, 40 GB": Card(39.4, 312.0),
    "RTX A6000, 48 GB": Card(47.4, 154.8),
    "A100, 80 GB": Card(79.2, 312.0),
    "H100, 80 GB": Card(79.2, 989.4),
    "H200, 141 GB": Card(139.8, 989.4),
}
# CUDA's context and libraries, which torch does not count, and the share that fragmentation leaves free.
_CONTEXT_GIB, _USABLE = 0.75, 0.97
# Share of the peak that whole steps of Llama-2-7B's shape reach on an H200: `bench gpu`, 8 × 1,024 tokens.
_SHARE_OF_PEAK = 0.53
# Methods whose step is that of two factors and AdamW; others keep more, such as LoRA-Pro's full-size moments.
_PLANNED = ("lora", "rslora", "lora_plus", "pissa", "olora", "lora_ga", "full_ft")
_MODES = ("off", "recompute", "copy")


class Plan(NamedTuple):
    """What `plan` finds.

    Args:
        unit: of micro-batches: "rows" or "tokens".
        longest: units of the longest row: tokens, or 0 for images.
        steps: number of optimizer steps.
        memory: {size of a micro-batch: its memory}, of those that were computed.
        sizes: sizes of micro-batches that the run could have.
        size: that of its settings; None if it follows from memory.
        flops: of an optimizer step of rows of mean length, without padding.
    """

    unit: str
    longest: int
    steps: int
    memory: Mapping[int, StepMemory]
    sizes: Sequence[int]
    size: int | None
    flops: float

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that the run could have: without factors there is no noise, and weights on the host have no copy."""
        if not all(each.copy for each in self.memory.values()):
            return _MODES[:1]
        return _MODES if not self.start else _MODES[:2]

    @property
    def start(self) -> float:
        """GiB before the first step, if weights leave the GPU then; else 0."""
        return max(each.start for each in self.memory.values()) / GIB

    def peak(self, size: int, mode: str) -> float:
        """GiB at the peak with micro-batches of a size: between two computed ones on the line through both."""
        low, high = min(self.memory), max(self.memory)
        first, last = (self.memory[each].peak(mode) for each in (low, high))
        slope = (last - first) / (high - low) if high > low else 0
        return (first + slope * (size - low)) / GIB

    def largest(self, card: Card, mode: str) -> int | None:
        """The largest micro-batch that fits; None if none does."""
        return max((size for size in self.sizes if self.fits(card, size, mode)), default=None)

    def needed(self, size: int, mode: str) -> float:
        """GiB of a run with micro-batches of a size: at the peak of a step, or before the first one."""
        return max(self.start, self.peak(size, mode))

    def fits(self, card: Card, size: int, mode: str) -> bool:
        return self.needed(size, mode) + _CONTEXT_GIB <= _USABLE * card.gib


def plan(suite: Suite, experiment: Experiment) -> Plan:
    """Returns the plan of an experiment.

    Raises:
        ConfigError: its memory cannot be planned, or model or rows cannot be read; all errors together.
    """
    if errors := refusals(experiment):
        raise ConfigError(errors)
    machine = experiment.trainer.model_copy(update={"cache_images": "off"})
    experiment = experiment.model_copy(update={"trainer": machine})
    kind, family = suite.kind(experiment), FAMILIES[experiment.model.family]
    skeleton, processor = gather(
        lambda: loading.skeleton(experiment.model), lambda: loading.load_processor(experiment.model)
    )
    rows = kind.read(experiment, processor).train
    collate, lengths = kind.collator(experiment.model, processor), list(rows.lengths)
    longest = sorted(range(len(rows)), key=lambda index: -lengths[index])

    def of_rows(indices: Sequence[int]) -> StepMemory:
        batch = family.without_mask(collate([rows[index] for index in indices]))
        inputs = family.graph_inputs(batch, torch.tensor(1), 1, None)
        return _memory(experiment, {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim() > 0})

    def of_tokens(count: int) -> StepMemory:
        return _memory(experiment, dict.fromkeys(("input_ids", "labels"), torch.zeros(1, count, dtype=torch.long)))

    joined = _joins_rows(experiment, skeleton)
    per_step = experiment.optim.batch_size
    sizes = SIZES if joined else [size for size in range(1, per_step + 1) if per_step % size == 0]
    known = (1024, 4096) if joined else sorted({1, max(size for size in sizes if size <= 8)})
    memory = {size: of_tokens(size) if joined else of_rows((longest * size)[:size]) for size in known}
    if machine.fsdp:
        processes, gathered = _processes(experiment), gathered_bytes(skeleton, getattr(torch, experiment.model.dtype))
        memory = {size: each.shared(processes, gathered, offload=machine.offload) for size, each in memory.items()}
    mean = sum(lengths) / len(lengths)
    flops = per_step * of_rows([min(range(len(rows)), key=lambda index: abs(lengths[index] - mean))]).flops
    set_size = (machine.micro_batch_tokens or None) if joined else machine.micro_batch_size
    steps = machine.max_steps or math.ceil(experiment.optim.epochs * math.ceil(len(rows) / per_step))
    unit = "tokens" if joined else "rows"
    return Plan(unit, max(lengths) if family.unit == "tokens" else 0, steps, memory, sizes, set_size, flops)


def refusals(experiment: Experiment) -> list[str]:
    """Returns an error for each choice whose memory is not planned."""
    model, peft, rho = experiment.model, experiment.peft, experiment.rho
    unplanned = []
    if FAMILIES[model.family].is_diffusion:
        unplanned.append((f"model={model.name}", "steps of text-to-image models are not planned"))
    if model.quantize != "none":
        unplanned.append((f"model.quantize={model.quantize}", "packed weights are not planned"))
    if peft.method not in _PLANNED:
        reason = f"it keeps more than two factors and AdamW's moments; plans are for {', '.join(_PLANNED)}"
        unplanned.append((f"peft={peft.name}", reason))
    if experiment.regularized and not experiment.flat:
        unplanned.append((f"rho={rho.name}", "plans are for off and flat"))
    if experiment.trainer.zero:
        reason = "parts of moments are not planned; trainer=ddp has all of them on each GPU"
        unplanned.append((f"trainer={experiment.trainer.name}", reason))
    if experiment.trainer.fsdp and _processes(experiment) < 2:
        reason = "its weights are split among two or more processes; set trainer.gpus=N"
        unplanned.append((f"trainer={experiment.trainer.name}", reason))
    remedy = "leave plan out, and run trainer.max_steps=3: run.json then has the peak in `memory`"
    return [f"Invalid {setting} with plan=true: {reason}; {remedy}." for setting, reason in unplanned]


def _processes(experiment: Experiment) -> int:
    return experiment.trainer.gpus or distributed.world_size()


def gathered_bytes(skeleton: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of whole weights that a process holds at the peak under FSDP2: a layer, the next, norm and head.

    Those that transformers' plan keeps are gathered from their forward to their backward.
    """
    size = {"keep_full_weight": 0, "free_full_weight": 0}
    for name, module in skeleton.named_modules():
        strategy = (skeleton.fsdp_plan or {}).get(re.sub(r"\d+", "*", name))
        own = dtype.itemsize * sum(parameter.numel() for parameter in module.parameters())
        if strategy == "keep_full_weight":
            size[strategy] += own
        elif strategy is not None and not isinstance(module, nn.Embedding):  # whose weight is freed after its forward
            size[strategy] = max(size[strategy], own)
    return size["keep_full_weight"] + 2 * size["free_full_weight"]


def _joins_rows(experiment: Experiment, skeleton: nn.Module) -> bool:
    """Whether the run joins rows on a GPU, as far as can be known without weights."""
    decoder = experiment.model.family == "causal_lm" and experiment.model.dtype == "bfloat16"
    return decoder and uses_kernels(experiment) and attends_to_all_before(skeleton) and may_join_rows(experiment)


def _memory(experiment: Experiment, inputs: Mapping[str, torch.Tensor]) -> StepMemory:
    model = loading.skeleton(experiment.model).requires_grad_(False)
    if experiment.peft.method == "full_ft":
        model.requires_grad_(True)
    else:
        config = ADAPTERS[experiment.peft.method].peft_config(model, experiment.peft)
        config.init_lora_weights = True  # others, such as PiSSA's, compute with the weights
        model = get_peft_model(model, config)
    return step_memory(
        model,
        inputs,
        dtype=getattr(torch, experiment.model.dtype),
        autocast=_autocast(experiment),
        kernels=uses_kernels(experiment),
        checkpointing=experiment.trainer.gradient_checkpointing,
        moment_bytes=1 if experiment.optim.optimizer == "adamw_8bit" else 4,
    )


def _autocast(experiment: Experiment) -> torch.dtype | None:
    """The dtype of products on a GPU under autocast; None without."""
    return choose_precision(experiment.trainer.autocast, experiment.model.dtype, "cuda").autocast


def shown(plan: Plan, experiment: Experiment) -> Group:
    """The plan as tables."""
    return Group(_kinds_table(plan, experiment), _cards_table(plan, experiment))


def _kinds_table(plan: Plan, experiment: Experiment) -> Table:
    size = plan.size or min(plan.memory)
    computed = plan.memory[min(plan.memory, key=lambda each: abs(each - size))]
    longest = f", the longest of {plan.longest:,} tokens" if plan.longest else ""
    title = (
        f"GiB at the peak of a step, micro-batches of {size:,} {plan.unit}\n"
        f"{plan.steps:,} steps of {experiment.optim.batch_size} rows{longest}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for mode in plan.modes:
        table.add_column(mode if mode == "off" else f"flat, {mode}", justify="right")
    static = (("frozen weights", computed.backbone), ("trained weights, gradients, moments", computed.trained))
    for name, value in static:
        table.add_row(name, *[f"{value / GIB:.2f}"] * len(plan.modes))
    without = plan.peak(size, "off")
    table.add_row("noise", *(f"{plan.peak(size, mode) - without:.2f}" for mode in plan.modes))
    rest = without - (computed.backbone + computed.trained) / GIB
    table.add_row("activations", *[f"{rest:.2f}"] * len(plan.modes))
    table.add_row("all", *(f"{plan.peak(size, mode):.2f}" for mode in plan.modes), style="bold")
    if plan.start:
        table.add_row("weights, before the first step", *[f"{plan.start:.2f}"] * len(plan.modes))
    return table


def _cards_table(plan: Plan, experiment: Experiment) -> Table:
    table = Table(title=f"largest micro-batch that fits, in {plan.unit}, and GiB that it needs", title_justify="left")
    table.add_column("GPU", no_wrap=True)
    for mode in plan.modes:
        table.add_column(mode if mode == "off" else f"flat, {mode}", justify="right")
    timed = experiment.model.dtype != "float32" or _autocast(experiment) is not None
    if timed:
        table.add_column("GPU hours, at least", justify="right")
    for name, card in CARDS.items():
        cells = [_cell(plan, card, mode) for mode in plan.modes]
        hours = plan.steps * plan.flops / (_SHARE_OF_PEAK * card.tflops * 1e12) / 3600
        table.add_row(name, *cells, *([f"{hours:.3g}"] if timed else []))
    return table


def _cell(plan: Plan, card: Card, mode: str) -> str:
    size = plan.largest(card, mode)
    if size is None:
        return f"no: {plan.needed(min(plan.sizes), mode):.1f}"
    return f"{size:,}: {plan.needed(size, mode):.1f}"
