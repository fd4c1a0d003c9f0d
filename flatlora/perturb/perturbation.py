"""Flat-LoRA's weight perturbation (paper section 3): gradients at W + ε, while W stays unchanged.

    ε_ij = c_i z_ij,   c_i = σ_t/√n · ‖W'_i‖,   W' = W + Σ s·B·A     (row i = output filter i, n = input dimension)

One ε is used from `begin(step)` to `end()`, for all micro-batches of an optimizer step. There are three modes, with
bit-identical loss and gradients:

- copy:       W + ε is written once into a second buffer that the layers' forwards read. W is never modified.
- recompute:  W + ε is written to one scratch buffer in each layer's forward and again in its backward. Neither the
              memory of a copy is needed, nor is W modified.
- inplace:    the published way: W += ε, later W −= ε. Rounding makes a BF16 backbone drift; kept for comparison.

In copy and recompute mode the parameter is W except during a forward of its layer, so code that hashes, saves or merges
weights within a step sees W. A layer that overrides forward, or a DoRA module, which takes the norm of its layer's
weight, runs its own code with W + ε in place of the weight.

ε is determined by a seed and the m row norms of each layer, so it is recomputed wherever it is needed.

If FSDP2 shards the rows of W, copy mode keeps those of this process in a second shard and writes W + ε in their place,
from `begin` to `end`; FSDP2 gathers it, and all passes read it. Recompute mode adds ε to the gathered W.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import psutil
import torch

from flatlora.noise import philox
from flatlora.perturb.epsilon import Draw, Epsilon, epsilon_of
from flatlora.perturb.forward import PerturbedForward, PerturbedReader, Reading, _Wrapper
from flatlora.perturb.layers import PerturbedLayer
from flatlora.perturb.schedule import sigma_at
from flatlora.perturb.settings import NoiseSettings, errors_if_sharded
from flatlora.utils.deferred import Moment
from flatlora.utils.precision import warn_of_unscaled_fp16
from flatlora.utils.shards import whole

logger = logging.getLogger(__name__)

_HOLDER = "_weight_perturbation"  # attribute of a module: the perturbation that acts on it


class WeightPerturbation:
    """Perturbs a set of layers between `begin(step)` and `end()`.

    If an interrupted loop left another perturbation on the layers, that one is closed.

    Args:
        layers: the layers to perturb; see `flatlora.find_lora_layers`.
        total_steps: T of the ramp, in optimizer steps.
        seed: seed of the noise; all ranks must use the same.
        training_only: whether layers in evaluation mode, and in passes without gradients, read W even inside a step (in
            copy and recompute mode), so that generation, or an evaluation after an interrupted step, uses W. The loop
            must call `model.train()`, and use `within_pass` around passes with reentrant checkpoints.
        loss_scaled: whether the loop scales its loss (`torch.amp.GradScaler`); if not, FP16 backbones are warned about.
        rank, world_size: rank of this process and number of processes.
        settings: fields of `NoiseSettings`; `sigma` is required.

    Raises:
        ValueError: there is no layer, or a setting is out of range; the message lists every error.
    """

    def __init__(
        self,
        layers: Sequence[PerturbedLayer],
        *,
        total_steps: int,
        seed: int,
        training_only: bool = False,
        loss_scaled: bool = False,
        rank: int = 0,
        world_size: int = 1,
        **settings: Any,
    ) -> None:
        self.noise = _validated(layers, total_steps, settings)
        self.layers = list(layers)
        if not loss_scaled:
            warn_of_unscaled_fp16(layer.dtype for layer in self.layers)
        for layer in self.layers:
            if _HOLDER in layer.module.__dict__:
                layer.module.__dict__[_HOLDER].close()
        self.total_steps, self.training_only, self.rank, self.world_size = total_steps, training_only, rank, world_size
        self.mode = choose_mode(self.layers) if self.noise.mode == "auto" else self.noise.mode
        self.active = False
        self._watch = _Stopwatch(self.layers[0].device)
        self._keys = [philox.layer_key(seed, layer.name) for layer in self.layers]
        self._coefficients: list[torch.Tensor] = []  # c of every layer at `_drawn_step`
        self._drawn_step: int | None = None
        self._sigma_drawn = 0.0
        self._draws: _Draws | None = None  # the ε that layers read now; None while they read W
        self._pass_gradients: bool | None = None  # whether the pass around a checkpoint has gradients; None: ask torch
        self._written: tuple[int, int] | None = None  # (drawn step, stream) of the copies
        self._sharded = self.layers[0].sharded
        self._copies = self._allocated_copies()
        self._originals: list[torch.Tensor] = []
        self._epsilon = self._epsilon_of_layers()
        if self.mode == "inplace" and self.noise.sigma > 0:
            self._keep_originals()
        for index, layer in enumerate(self.layers):
            layer.module.__dict__[_HOLDER] = self
            if not self._replaces_weights:
                PerturbedForward(self, index, layer.module).attach()
                for reader in layer.readers:
                    PerturbedReader(self, index, reader).attach()

    def begin(self, step: int, micro_batch: int = 0) -> None:
        """Perturb the layers for optimizer step `step` (counted from 0) and its first micro-batch."""
        if self.active:
            raise RuntimeError(f"begin(step={step}) inside a perturbed step: call end() first.")
        if self.layers[0].module.__dict__.get(_HOLDER) is not self:
            raise RuntimeError(
                f"begin(step={step}) of a perturbation that was closed, or replaced by another one on its layers: a "
                "layer has one perturbation at a time; create a new WeightPerturbation."
            )
        with self._watch:
            self._draw_coefficients(step)
            if self._sigma_drawn > 0:
                self._apply(micro_batch)
        self.active = True

    def next_micro_batch(self, micro_batch: int) -> None:
        """Draw the ε of another micro-batch of the same step; does nothing if the step shares one ε."""
        if not self.active or self.noise.resample == "step" or self._sigma_drawn == 0:
            return
        with self._watch:
            self._remove()
            self._apply(micro_batch)

    def end(self) -> None:
        """Let the layers read W again; does nothing outside of a step."""
        if not self.active:
            return
        with self._watch:
            self._remove()
        self.active = False

    def close(self) -> None:
        """Call `end()`, unwrap the forwards and free the buffers."""
        self.end()
        for layer in self.layers:
            if layer.module.__dict__.get(_HOLDER) is self:
                del layer.module.__dict__[_HOLDER]
                for module in (layer.module, *layer.readers):
                    _Wrapper.detach(module)
        self._copies, self._written = [], None
        self._epsilon = self._epsilon_of_layers()

    @property
    def seconds(self) -> float:
        """Time spent in begin, next_micro_batch and end, in seconds. On a GPU it is device time; reading it waits."""
        return self._watch.seconds()

    def check_finite(self) -> None:
        """Check the row norms of all steps before the last call; on a CPU they were checked as they were computed.

        Raises:
            FloatingPointError: a weight or an adapter contained NaN or infinity.
        """
        self._epsilon.check()

    def sigma_at(self, step: int) -> float:
        """σ_t that `begin(step)` uses; 0 in the steps between those that `interval` perturbs."""
        if step % self.noise.interval:
            return 0.0
        return sigma_at(step - step % self.noise.every, self.total_steps, self.noise.sigma, self.noise.ramp)

    def drift(self) -> dict[str, float] | None:
        """How inplace mode has changed W: ‖ΔW‖/‖W‖ and the share of changed elements; None in the other modes."""
        if not self._originals:
            return None
        changed = total = 0
        delta = norm = 0.0
        for layer, original in zip(self.layers, self._originals, strict=True):
            weight = layer.weight.detach().to(original.device)
            changed += int((weight != original).sum())
            total += original.numel()
            delta += float((weight.double() - original.double()).square().sum())
            norm += float(original.double().square().sum())
        return {"relative_norm": math.sqrt(delta / norm) if norm else 0.0, "changed_share": changed / total}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The c vectors and step of the current draw, needed to resume inside a window of `every` steps; else empty."""
        if self.noise.every == 1 or self._drawn_step is None:
            return {}
        state = {layer.name: c.cpu() for layer, c in zip(self.layers, self._coefficients, strict=True)}
        return {**state, "step": torch.tensor(self._drawn_step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the draw that `state_dict` returned."""
        self._drawn_step, self._written = int(state["step"]), None
        self._sigma_drawn = self.sigma_at(self._drawn_step)
        self._coefficients = self._epsilon.restore([state[layer.name] for layer in self.layers])

    def draw(self, index: int, micro_batch: int = 0) -> Draw:
        """The draw of ε of layer number `index` in the current step."""
        if self._drawn_step is None:
            raise RuntimeError("draw() before the first begin(): there is no ε yet.")
        stream = philox.noise_stream(
            self.rank,
            micro_batch,
            self.world_size,
            per_rank=self.noise.per_rank,
            per_micro_batch=self.noise.resample == "micro_batch",
        )
        return Draw(self._keys[index], self._drawn_step, stream, self._coefficients[index])

    def _draw_coefficients(self, step: int) -> None:
        """Compute c of every layer for this step, unless its window of `every` steps has them already."""
        window = step - step % self.noise.every
        if self._drawn_step == window and self.noise.every > 1:
            return
        if step != window:
            raise RuntimeError(
                f"Cannot begin at step {step}: with every={self.noise.every} its ε was drawn at step {window}, whose "
                "row norms are gone; restore them with load_state_dict(), or start at a multiple of `every`."
            )
        self._drawn_step, self._sigma_drawn = step, self.sigma_at(step)
        self._written = None  # the adapter may have changed since the copies were written, even for the same step
        if self._sigma_drawn > 0:
            self._coefficients = self._epsilon.coefficients(
                self._sigma_drawn, scale=self.noise.scale, fan_in=self.noise.fan_in
            )
        else:
            self._coefficients = [
                torch.zeros(layer.shape[0], dtype=torch.float32, device=layer.device) for layer in self.layers
            ]

    def _apply(self, micro_batch: int) -> None:
        draws = _Draws(self, micro_batch)
        if self.mode == "copy":
            self._write_copies(draws)
        elif self.mode == "recompute":
            self._epsilon.set_counter(draws)
        else:
            self._epsilon.write(draws, [layer.weight.detach() for layer in self.layers])
        self._draws = draws

    def _remove(self) -> None:
        if self.mode == "inplace" and self._draws is not None:
            self._epsilon.write(self._draws, [layer.weight.detach() for layer in self.layers], sign=-1.0)
        elif self._replaces_weights and self._draws is not None:
            torch._foreach_copy_(self._shares(), self._copies)
        self._draws = None

    def _allocated_copies(self) -> list[torch.Tensor]:
        """Buffers of copy mode, which exist before σ_t rises from 0: what is free then is free for activations."""
        if self.mode != "copy" or self.noise.sigma == 0:
            return []
        if self._sharded:
            return [rows.clone() for rows in self._shares()]
        return [torch.empty_like(layer.weight, requires_grad=False) for layer in self.layers]

    @property
    def _replaces_weights(self) -> bool:
        """Whether W + ε takes the place of W from `begin` to `end`, instead of being read in the forwards alone."""
        return self.mode == "inplace" or (self.mode == "copy" and self._sharded)

    def _shares(self) -> list[torch.Tensor]:
        """The rows of each W that this process holds. FSDP2 may move them before the first forward."""
        return [layer.share_of_rows() for layer in self.layers]

    def _epsilon_of_layers(self) -> Epsilon:
        return epsilon_of(self.layers, self._keys, (self._copies or self._shares()) if self._sharded else None)

    def _write_copies(self, draws: _Draws) -> None:
        if self._sharded:
            self._epsilon.write(draws, self._shares())
            return
        wanted = (draws[0].step, draws[0].stream)
        if self._written == wanted:
            return
        self._written = None  # copies that an interrupt left half-written must not be used
        self._epsilon.write(draws, self._copies)
        self._written = wanted

    def _keep_originals(self) -> None:
        self._originals = [layer.weight.detach().to("cpu", copy=True) for layer in self.layers]
        rounded = [layer.stored_dtype for layer in self.layers if layer.stored_dtype in (torch.bfloat16, torch.float16)]
        if rounded:
            logger.warning(
                "rho.mode=inplace on a %s backbone: (W + ε) − ε does not round back to W, so the frozen weights drift "
                "and the adapter is trained for a backbone that no longer exists; use rho.mode=copy or recompute.",
                str(rounded[0]).removeprefix("torch."),
            )

    @property
    def perturbed(self) -> bool:
        """Whether layers read W + ε now: True between begin() and end() unless σ_t = 0."""
        return self._draws is not None

    def weight_sha256(self, index: int) -> str:
        """SHA-256 of the weight that layer number `index` reads now, to compare the noise of processes.

        All processes must call it together if the weights are sharded.
        """
        if self._draws is None or self._replaces_weights:
            weight = whole(self.layers[index].weight)
        else:
            weight = Reading(self, index, self._draws[index]).weight()
        stored = weight.detach().contiguous().cpu().view(torch.uint8)
        return hashlib.sha256(stored.numpy()).hexdigest()

    def perturbed_weight(self, index: int, draw: Draw) -> torch.Tensor:
        """W + ε of layer number `index` in the stored layout: its copy, or a buffer that the next call overwrites."""
        return self._copies[index] if self.mode == "copy" else self._epsilon.materialize(index, draw)

    def reading(self, index: int) -> Reading | None:
        """The `Reading` of layer number `index` now; None while it reads W."""
        layer = self.layers[index]
        if self._draws is None or not layer.enabled() or (self.training_only and not self._trains(layer)):
            return None
        return Reading(self, index, self._draws[index])

    def _trains(self, layer: PerturbedLayer) -> bool:
        """Whether a forward of this layer now belongs to a training pass; generation may run in training mode."""
        gradients = torch.is_grad_enabled() if self._pass_gradients is None else self._pass_gradients
        return layer.module.training and gradients

    @contextlib.contextmanager
    def within_pass(self, *, gradients: bool) -> Iterator[None]:
        """Context for a forward with reentrant checkpoints, whose first forward torch always runs without gradients.

        Args:
            gradients: whether the pass computes gradients; if so, checkpoints in it read W + ε, as their recomputation
                will.
        """
        before, self._pass_gradients = self._pass_gradients, gradients
        try:
            yield
        finally:
            self._pass_gradients = before


class _Draws(Sequence):
    """The draws of all layers in one micro-batch, computed lazily: a replayed step only needs the first."""

    def __init__(self, perturbation: WeightPerturbation, micro_batch: int) -> None:
        self._perturbation, self._micro_batch = perturbation, micro_batch

    def __len__(self) -> int:
        return len(self._perturbation.layers)

    def __getitem__(self, index: int) -> Draw:  # type: ignore[override]  # slices are not used
        return self._perturbation.draw(index, self._micro_batch)


class _Stopwatch:
    """Sums the time of its `with` blocks: host time on a CPU, stream time on a GPU, without waiting for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._total = device, 0.0
        self._pending: list[tuple[Moment, Moment]] = []

    def __enter__(self) -> None:
        self._began = Moment(self._device)

    def __exit__(self, *exception: object) -> None:
        self._pending.append((self._began, Moment(self._device)))
        if len(self._pending) > 100:
            self._collect(only_done=True)

    def seconds(self) -> float:
        self._collect(only_done=False)
        return self._total

    def _collect(self, *, only_done: bool) -> None:
        while self._pending and (not only_done or self._pending[0][1].reached):
            began, ended = self._pending.pop(0)
            self._total += began.seconds_to(ended)


def choose_mode(layers: Sequence[PerturbedLayer]) -> Literal["copy", "recompute"]:
    """Returns "copy" if a second set of weights takes at most half of the device's free memory, else "recompute".

    Packed weights are always recomputed: an unpacked copy would take the memory that packing saves. So are those that
    FSDP2 keeps on the host: a copy would be moved there and back in each step.
    """
    if any(layer.quantized or layer.offloaded for layer in layers):
        return "recompute"
    needed = sum(rows.numel() * rows.element_size() for rows in (layer.share_of_rows() for layer in layers))
    device = layers[0].device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "copy" if needed <= free / 2 else "recompute"


def _sharding_errors(layers: Sequence[PerturbedLayer], settings: dict[str, Any]) -> list[str]:
    """Errors about weights that FSDP2 shards."""
    sharded = [layer for layer in layers if layer.sharded]
    if not sharded:
        return []
    offload = any(layer.offloaded for layer in sharded)
    errors = list(errors_if_sharded(**settings, offload=offload).values())
    if len(sharded) < len(layers):
        errors.append(f"Invalid layers: FSDP2 shards {len(sharded)} of {len(layers)} weights; shard all or none.")
    tied = [f"{layer.name} (to {layer.tied_to[0]})" for layer in sharded if layer.tied_to]
    if tied and settings.get("mode") != "recompute":
        errors.append(
            f"Invalid mode={settings.get('mode', 'auto')} with tied weights that FSDP2 shards, such as {tied[0]}: the "
            "other module would read W + ε too; use mode=recompute, or leave the layer out of target_modules."
        )
    return errors


def _validated(layers: Sequence[PerturbedLayer], total_steps: int, settings: dict[str, Any]) -> NoiseSettings:
    """Builds the settings and validates them with the layers.

    Raises:
        ValueError: the message lists all errors.
    """
    errors = []
    try:
        noise = NoiseSettings(**settings)
    except ValueError as error:
        errors.append(str(error))
    if total_steps < 1:
        errors.append(f"Invalid total_steps={total_steps}: it counts optimizer steps and must be ≥ 1.")
    if not layers:
        errors.append("Invalid layers=[]: it must have at least one LoRA layer; wrap the model with PEFT's LoRA first.")
    trained = [layer.name for layer in layers if layer.weight.requires_grad]
    if trained:
        errors.append(
            f"Invalid layers: the weights of {len(trained)} of them are trained, such as {trained[0]}; Flat-LoRA "
            "perturbs a frozen backbone: call requires_grad_(False) on them, as PEFT does."
        )
    elsewhere = {layer.name: reason for layer in layers if (reason := layer.elsewhere)}
    if elsewhere:
        name, reason = next(iter(elsewhere.items()))
        errors.append(
            f"Invalid layers: the weights of {len(elsewhere)} of them are not on this device, such as {name} "
            f"({reason}); load the model without device_map='auto' or offloading, and use FSDP2, DDP or ZeRO-2 instead "
            "of ZeRO-3."
        )
    errors += _sharding_errors(layers, settings)
    devices = sorted({str(layer.device) for layer in layers if layer.name not in elsewhere})
    if len(devices) > 1:
        errors.append(
            f"Invalid layers: their weights are on {len(devices)} devices ({', '.join(devices)}), but ε is drawn on "
            "one; load the model without device_map='auto', and train on several GPUs with DDP or ZeRO-2."
        )
    packed = [layer.name for layer in layers if layer.quantized]
    mode = settings.get("mode")
    if packed and mode in ("copy", "inplace"):
        errors.append(
            f"Invalid mode={mode} with packed weights ({packed[0]} and {len(packed) - 1} more): a copy would take the "
            "memory that packing saves, and noise cannot be added to 4 bits; use mode=recompute."
        )
    multiplied = [layer.name for layer in layers if layer.multiplies]
    if multiplied and mode == "inplace":
        errors.append(
            f"Invalid mode=inplace with HiRA's layers, such as {multiplied[0]}: W' = W ⊙ (1 + B·A) would have the "
            "noise ε ⊙ (1 + B·A) instead of ε; use mode=copy or recompute."
        )
    tied = [f"{layer.name} (to {layer.tied_to[0]})" for layer in layers if layer.tied_to]
    if tied and mode == "inplace":
        errors.append(
            f"Invalid mode=inplace with tied weights, such as that of {tied[0]}: the other module would read W + ε "
            "too; use mode=copy or recompute, or leave the layer out of the adapter's target_modules."
        )
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        errors.append(f"Invalid layers: {len(names) - len(set(names))} names occur twice; noise is keyed by name.")
    if errors:
        raise ValueError("\n".join(errors))
    return noise
