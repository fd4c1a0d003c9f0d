"""Measures how flat the loss of finished runs is, on their merged weights; writes flatness.json into each run's folder.

    python -m scripts.flatness RUN [RUN ...] [--data-root DIR] [--rows 512] [--parts rise,hessian,landscape]

RUN is the folder of a finished run with an adapter. flatlora/perturb/flatness.py describes the measures and their
shared directions; the loss is that of some of the run's training rows. Parts that a run already has are skipped, so an
interrupted command can be repeated. scripts/tables.py and scripts/figures.py read the files.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import run_exp
from flatlora.config.experiment import Experiment, parse
from flatlora.experiment.prepare import Inputs
from flatlora.inputs.rows import gather
from flatlora.methods.adapters.lora import find_targets
from flatlora.models import loading
from flatlora.models.family import FAMILIES
from flatlora.models.hashes import weights_sha256
from flatlora.perturb import flatness
from flatlora.perturb.layers import PerturbedLayer, find_lora_layers
from flatlora.runs import environment
from flatlora.runs.run_folder import RunFolder
from flatlora.utils import records
from flatlora.utils.console import console, progress, quiet_libraries, report_errors
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import widen
from scripts.arguments import above_zero, odd, positive, several_above_zero

FILE = "flatness.json"
PARTS = ("rise", "hessian", "landscape")
WELL_SETTLED = 0.05  # largest residual of a converged top eigenvalue


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 if a run cannot be measured; all runs are checked before the first is measured."""
    options = _options(words)
    quiet_libraries()
    try:
        device = loading.choose_device(options.device)
        experiments = _experiments(options)
        runs = gather(
            *(
                lambda run=run, experiment=experiment: (run, experiment, _inputs(run, experiment, device))
                for run, experiment in experiments
            )
        )
        for run, experiment, inputs in runs:
            measure(run, experiment, inputs, options)
    except ConfigError as error:
        report_errors(error)
        return 2
    return 0


def _experiments(options: argparse.Namespace) -> list[tuple[Path, Experiment]]:
    """The experiments of all runs.

    Raises:
        ConfigError: it lists the errors of all runs.
    """
    runs = [Path(run) for run in options.runs]
    experiments = gather(*(lambda run=run: _experiment(run, options.data_root) for run in runs))
    return list(zip(runs, experiments, strict=True))


def _inputs(run: Path, experiment: Experiment, device: torch.device) -> Inputs:
    """The data of a run.

    Raises:
        ConfigError: the data cannot be read, or differ from those that the run was trained on.
    """
    if FAMILIES[experiment.model.family].is_diffusion:
        raise ConfigError(
            [
                f"Invalid run {run}: the loss of a diffusion model depends on random noise and timesteps, and flatness "
                "needs a deterministic loss; name runs of language or image models."
            ]
        )
    inputs, trained_on = run_exp.prepare(experiment, device), RunFolder(run).record.data_sha256
    if inputs.data_sha256 != trained_on:
        raise ConfigError(
            [
                f"Invalid data of {run}: the hash of its training rows is {inputs.data_sha256[:12]}, but it was "
                f"trained on {trained_on[:12]} (data_sha256 in its run.json); set --data-root to their folder."
            ]
        )
    return inputs


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-root", help="instead of the run's own")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--parts", type=_parts, default=PARTS, help="some of " + ",".join(PARTS))
    parser.add_argument("--rows", type=positive, default=512, help="number of training rows for the loss")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument(
        "--sigmas", type=several_above_zero, default=(0.01, 0.05, 0.1, 0.15, 0.2), help="σ of the expected rise"
    )
    parser.add_argument("--draws", type=positive, default=16, help="number of draws of ε at each σ")
    parser.add_argument("--probes", type=positive, default=16, help="number of probes for the trace")
    parser.add_argument("--iterations", type=positive, default=50, help="maximum of the power iteration")
    parser.add_argument(
        "--radius", type=above_zero, default=0.5, help="of the landscape; 1 is the norm of each row of W'"
    )
    parser.add_argument("--points", type=odd, default=21, help="of the landscape, per dimension")
    parser.add_argument("--seed", type=int, default=0, help="of directions, draws and probes; not that of the run")
    return parser.parse_args(words)


def _parts(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(PARTS)}")
    return words


def _experiment(run: Path, data_root: str | None) -> Experiment:
    """The experiment of a finished run.

    Raises:
        ConfigError: the run is not finished, has no adapter or model, or its weights are packed.
    """
    record = RunFolder(run).record
    if record is None:
        raise ConfigError([f"Invalid run {run}: it has no run.json; finish it with resume=true, or name another."])
    if not record.is_finished or not os.path.isdir(run / "adapter"):
        problem = "has no adapter/" if record.is_finished else f"is {record.status}"
        raise ConfigError([f"Invalid run {run}: it {problem}; finish it with resume=true, or name another."])
    if damage := record.file_damage(run, lambda name: name.startswith(("adapter/", "classes.json"))):
        raise ConfigError([f"Invalid run {run}: {'; '.join(damage)}; restore it by its command with resume=true."])
    experiment = parse(record.experiment, run_exp.SUITE)
    if experiment.model.quantize != "none":
        raise ConfigError(
            [f"Invalid run {run}: its backbone is packed (model.quantize), so small shifts of W would be lost."]
        )
    changed = {"eval": {}} | ({"data_root": data_root} if data_root else {})
    return experiment.model_copy(update=changed)


def measure(run: Path, experiment: Experiment, inputs: Inputs, options: argparse.Namespace) -> None:
    """Measure the parts that the run's file does not have yet; it is written after each part.

    Raises:
        ConfigError: the model or the data cannot be loaded.
    """
    common = {"rows": min(options.rows, len(inputs.rows.train)), "seed": options.seed, "streams": flatness.FIRST_STREAM}
    how = {
        "rise": common | {"sigmas": list(options.sigmas), "draws": options.draws},
        "hessian": common | {"probes": options.probes},
        "landscape": common | {"radius": options.radius, "points": options.points},
    }
    adapter = RunFolder(run).record.adapter_sha256
    saved = _saved_parts(run, adapter)
    weights = weights_sha256(run / "adapter")  # of the files as they are now, unlike the hash in the record

    def is_done(part: str) -> bool:
        part_saved = saved["parts"].get(part, {})
        return part_saved.get("how") == how[part] and part_saved.get("weights_sha256", weights) == weights

    missing = [part for part in options.parts if not is_done(part)]
    if not missing:
        console.print(f"{run}: already measured", markup=False, soft_wrap=True)
        return
    model, layers, batches = _loaded(run, experiment, inputs, options)
    for part in missing:
        begun = time.monotonic()
        values = _MEASURES[part](model, layers, batches, options)
        result = {"how": how[part], **values, "loss": flatness.mean_loss(model, batches)}
        result |= {"weights_sha256": weights, "git_sha": environment.git_sha(), "env": environment.environment()}
        saved = _saved_parts(run, adapter)  # another process may have measured another part by now
        saved["parts"][part] = result | {"seconds": round(time.monotonic() - begun, 1)}
        records.write_signed(run / FILE, saved)
    console.print(f"written: {run / FILE}", markup=False, soft_wrap=True)


def _saved_parts(run: Path, adapter_sha256: str) -> dict[str, Any]:
    """Returns the content of the run's file, or an empty one if there is none for this adapter."""
    try:
        saved = records.read_record(run / FILE)
        if saved is None:  # not measured yet
            return {"adapter_sha256": adapter_sha256, "parts": {}}
        if saved["adapter_sha256"] == adapter_sha256 and all("how" in part for part in saved["parts"].values()):
            return saved
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        console.print(f"{run / FILE} is broken ({error}): it will be measured again", markup=False, soft_wrap=True)
    return {"adapter_sha256": adapter_sha256, "parts": {}}


def _loaded(
    run: Path, experiment: Experiment, inputs: Inputs, options: argparse.Namespace
) -> tuple[nn.Module, list[PerturbedLayer], list[flatness.Batch]]:
    """The merged model in FP32 and evaluation mode, the layers that adapters act on, and the training rows."""
    device = inputs.device
    classes = FAMILIES[experiment.model.family].classes_of_run(run)
    eager = experiment.model.model_copy(update={"attn": "eager"})  # the only attention with a second derivative
    model, _, metadata = loading.load_for_inference(str(run / "adapter"), eager, device, classes)
    widen(model)
    if metadata["adapter"]:
        names = [layer.name for layer in find_lora_layers(model)]
        model = model.merge_and_unload()
    else:
        names = find_targets(model, "all")
    model.requires_grad_(False)
    rows = inputs.rows.train
    chosen = random.Random(options.seed).sample(range(len(rows)), min(options.rows, len(rows)))
    chosen.sort(key=lambda index: rows.lengths[index])  # little padding
    batches = []
    for first in range(0, len(chosen), options.batch_size):
        batch = inputs.collate([rows[index] for index in chosen[first : first + options.batch_size]])
        batches.append({key: value.to(device) for key, value in batch.items()})
    return model.eval(), flatness.plain_layers(model, names), batches


def _rise(model, layers, batches, options) -> dict[str, Any]:
    draws = {}
    with progress("expected rise", options.draws * len(options.sigmas)) as advance:
        for sigma in options.sigmas:
            draws[f"{sigma:g}"] = flatness.expected_rises(
                model, layers, batches, sigma, draws=options.draws, seed=options.seed, on_progress=advance
            )
    return {"draws": draws}


def _hessian(model, layers, batches, options) -> dict[str, Any]:
    hessian = flatness.Hessian(model, layers, batches)
    with progress("top eigenvalue", None) as advance:
        top = hessian.top_eigenvalue(seed=options.seed, iterations=options.iterations, on_progress=advance)
    if top.residual > WELL_SETTLED:
        residual = f"‖Hv − λv‖ / |λ| is {top.residual:.3f} after {top.iterations} iterations"
        console.print(f"the top eigenvalue has not converged: {residual}; raise --iterations", soft_wrap=True)
    with progress("trace", options.probes) as advance:
        samples = hessian.trace_samples(seed=options.seed, probes=options.probes, on_progress=advance)
    return {
        "top_eigenvalue": top.value,
        "iterations": top.iterations,
        "residual": top.residual,
        "trace_samples": samples,
    }


def _landscape(model, layers, batches, options) -> dict[str, Any]:
    at = torch.linspace(-options.radius, options.radius, options.points).tolist()
    settings = {"seed": options.seed}
    with progress("landscape", options.points + options.points**2) as advance:
        line = flatness.landscape(model, layers, batches, at, dimensions=1, on_progress=advance, **settings)
        plane = flatness.landscape(model, layers, batches, at, dimensions=2, on_progress=advance, **settings)
    return {"at": at, "line": line.tolist(), "plane": plane.tolist()}


_MEASURES: Mapping[str, Callable[..., dict[str, Any]]] = {"rise": _rise, "hessian": _hessian, "landscape": _landscape}


if __name__ == "__main__":
    sys.exit(main())
