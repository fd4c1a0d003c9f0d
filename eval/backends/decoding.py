"""Decodes token by token over buffers with fixed addresses; on a GPU a step is one launch of a CUDA graph.

transformers' `generate` launches each kernel of a step from the host. With one token a row, that takes several times as
long as the kernels of a 7B model with an adapter on every linear layer. `generate` also copies the whole cache at each
step, to append to it, and computes the rows that are done until the last one is.

Here prompts are read as in `generate`. Their keys and values then move to buffers, where a step writes one more
position, and rows that are done leave. A captured step needs a fixed shape: it reads the first 2ⁿ rows and 2ᵐ positions
of the buffers, so that a few graphs serve all batches, and masks the positions that are not written yet. Other steps,
such as those on a CPU, read exactly the rows and positions of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from flatlora.fused.graphs import Captured, GraphCapture

_LEAST_WIDTH = 256  # positions that a captured step reads at least
_LEAST_LENGTH = 1024  # positions that are reserved at first, if answers can become so long


def reason_against(model: nn.Module) -> str | None:
    """Returns why `Decoder` does not support a model; None if it does."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        return "it is not one of transformers' language models"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    for name in ("generate", "prepare_inputs_for_generation"):
        if getattr(getattr(model, name), "__func__", None) is not getattr(GenerationMixin, name):
            return f"it has its own {name}"
    known = inspect.signature(type(model).forward).parameters
    if not model._can_compile_fullgraph or not {"position_ids", "past_key_values", "logits_to_keep"} <= known.keys():
        return "transformers has no static cache for it"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers are on several devices"
    if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
        return f"its attention is {attention}"
    others = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    return f"its cache has {', '.join(sorted(others))}" if others else None


class Decoder:
    """Decodes one batch at a time: `start` reads prompts, `step` feeds a token of each row, `keep` drops rows.

    Buffers and graphs are kept for later batches. All calls are made in inference mode and under the same autocast.

    Args:
        capture: captures the steps; None: they are not captured.

    Attributes:
        rows: number of rows in the batch.
    """

    def __init__(self, model: PreTrainedModel, capture: GraphCapture | None = None) -> None:
        self.model, self._capture = model, capture
        self.release()

    @property
    def casts_may_be_cached(self) -> bool:
        """Whether autocast may keep casts of weights for later steps; a graph would read them after they are freed."""
        return self._capture is None

    def release(self) -> None:
        """Frees buffers and graphs."""
        self.rows = self._written = self._most = 0  # rows; positions that are written, and that can be
        self._padded: list[bool] = []  # rows with padding
        self._buffers: _Buffers | None = None
        self._graphs: dict[tuple[int, int], Captured[torch.Tensor]] = {}

    def start(self, input_ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Reads prompts with padding on the left; returns the logits of the first of up to `new_tokens`, FP32."""
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        padded = (mask == 0).any(1).tolist()
        logits = self.model(
            input_ids=input_ids,
            attention_mask=mask if any(padded) else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.rows, self._written = input_ids.shape
        self._most, self._padded = self._written + new_tokens - 1, padded  # the last token is not fed
        if self._buffers is None or not self._buffers.hold(self.rows, self._written + 1):
            self._graphs.clear()
            self._buffers = None  # before the larger ones are allocated
            self._buffers = _Buffers(cache, self.rows, self._reserved(self._written + 1))
        self._buffers.fill(cache, mask, positions[:, -1:] + 1)
        return logits.float()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds the newest token of each row; returns the logits of the next (rows × vocabulary, FP32).

        A later step may overwrite them.
        """
        if not self._buffers.hold(self.rows, self._written + 1):
            self._graphs.clear()
            self._buffers.lengthen(self._reserved(self._written + 1))
        self._buffers.ids[: self.rows, 0] = tokens
        logits = self._step_of_fixed_shape() if self._capture else self._run(self._written + 1)
        self._written += 1
        return logits.float()

    def keep(self, running: Sequence[int]) -> list[int]:
        """Keeps the rows at these places, and drops others; returns the earlier place of each row that stays.

        With captured steps, the number of rows stays or becomes a power of two: some that are done may stay.
        """
        rows = _power_of_two(len(running)) if self._capture else len(running)
        if rows >= self.rows:
            return list(range(self.rows))
        free = [place for place in range(rows) if place not in running]
        late = [place for place in running if place >= rows]
        order = list(range(rows))
        for place, source in zip(free, late, strict=False):
            order[place] = source
        if late:
            self._buffers.move(late, free[: len(late)], self._written)
        self.rows, self._padded = rows, [self._padded[place] for place in order]
        return order

    def _step_of_fixed_shape(self) -> torch.Tensor:
        width = max(_power_of_two(self._written + 1), _LEAST_WIDTH)  # depends on this batch alone, so its bits do too
        shape = self.rows, width
        if shape not in self._graphs:
            label = f"a step of {self.rows} rows and {width} positions"
            captured = self._capture(lambda: self._run(width, fixed=True), label, warm_ups=1)
            self._buffers.advance(-1)  # the warm-up's step, which the first replay repeats
            if captured is None:
                self._capture = None
                return self._run(self._written + 1)
            self._graphs[shape] = captured
        # Only replays decide tokens, so that a batch has the same answers whether its graphs are new or not.
        return self._graphs[shape].replay()

    def _run(self, width: int, *, fixed: bool = False) -> torch.Tensor:
        """Runs the model on the newest tokens, with `width` positions in view; `fixed`: also in later replays."""
        buffers, rows = self._buffers, self.rows
        written = buffers.written if fixed else width - 1
        masked = fixed or any(self._padded)
        logits = self.model(
            input_ids=buffers.ids[:rows],
            attention_mask=buffers.mask[:rows, :width] if masked else None,
            position_ids=buffers.positions[:rows],
            past_key_values=Cache(
                layers=[
                    _View(keys[:rows, :, :width], values[:rows, :, :width], buffers.written, written)
                    for keys, values in buffers.states
                ]
            ),
            use_cache=True,
        ).logits[:, -1]
        buffers.advance(1)
        return logits

    def _reserved(self, positions: int) -> int:
        """Number of positions to reserve when `positions` are needed."""
        return _power_of_two(max(positions, _LEAST_WIDTH, min(self._most, _LEAST_LENGTH)))


class _Buffers:
    """Tensors that steps read and write.

    Attributes:
        states: keys and values of each layer, each (rows, heads, positions, size of a head).
        written: number of positions that are written, (1,).
        ids, positions: newest token of each row and its position in its text, (rows, 1).
        mask: (rows, positions); 0 at padding, 1 also where nothing is written yet.
    """

    def __init__(self, cache: DynamicCache, rows: int, length: int) -> None:
        self.states = [[_empty(part, rows, length) for part in (layer.keys, layer.values)] for layer in cache.layers]
        device = self.states[0][0].device
        self.written = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.ones(rows, length, dtype=torch.long, device=device)

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def hold(self, rows: int, positions: int) -> bool:
        return rows <= len(self.mask) and positions <= self.length

    def fill(self, cache: DynamicCache, mask: torch.Tensor, positions: torch.Tensor) -> None:
        """Copies what the model has read, and frees it layer by layer."""
        rows, width = mask.shape
        for layer, (keys, values) in zip(cache.layers, self.states, strict=True):
            keys[:rows, :, :width], values[:rows, :, :width] = layer.keys, layer.values
            layer.keys = layer.values = None
        self.mask[:rows, :width], self.mask[:rows, width:] = mask, 1
        self.positions[:rows] = positions
        self.written.fill_(width)

    def advance(self, steps: int) -> None:
        """Moves the place of the next token of all rows."""
        self.written.add_(steps)
        self.positions.add_(steps)

    def lengthen(self, length: int) -> None:
        rows, old = self.mask.shape
        for parts in self.states:
            for index, part in enumerate(parts):
                parts[index] = _empty(part, rows, length)
                parts[index][:, :, :old] = part
        self.mask = nn.functional.pad(self.mask, (0, length - old), value=1)

    def move(self, sources: Sequence[int], targets: Sequence[int], written: int) -> None:
        """Copies rows to other places."""
        source, target = (torch.tensor(places, device=self.mask.device) for places in (sources, targets))
        views = [part[:, :, :written] for parts in self.states for part in parts]
        for tensor in (*views, self.positions, self.mask):
            tensor[target] = tensor[source]


def _empty(like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Zeros, as what is masked has to be a number."""
    return like.new_zeros(rows, like.shape[1], length, like.shape[3])


class _View(StaticLayer):
    """The first rows and positions of one layer's buffers; the next position to write is `place`, (1,).

    Under autocast, values can be narrower than keys, which rotary embeddings widen; the cache has the wider dtype.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor, written: int | torch.Tensor
    ) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.place, self.cumulative_length = keys, values, place, written
        self.is_initialized, self.is_compileable = True, isinstance(written, torch.Tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.place, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.place, value_states.to(self.values.dtype))
        return self.keys, self.values


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not less than a number."""
    return 1 << (number - 1).bit_length()
