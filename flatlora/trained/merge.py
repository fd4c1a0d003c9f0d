"""Merges an adapter into the weights of its base model, and measures what rounding the result costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from flatlora.config.sections import ModelConfig
from flatlora.models.family import FAMILIES, LoadOptions
from flatlora.models.fit import packing_of
from flatlora.models.language import LanguageModel
from flatlora.models.loading import load_for_inference, skeleton
from flatlora.models.sources import described, validate_finite
from flatlora.trained.place import ResolvedModel, identify, validated_unchanged
from flatlora.utils.errors import ConfigError, reason_of
from flatlora.utils.precision import widen

CPU = torch.device("cpu")
PROMPTS = (
    "The capital of France is",
    "Q: Tom has 3 apples and buys 4 more. How many?\nA: ",
    "def add(a, b):\n    return",
    "translate English to German: The house is small.",
)
_EXACT = 1e-3  # largest difference of the FP32 merge, in units of the largest logit; it is about 1e-6 for a right one


@dataclass(frozen=True)
class Rounding:
    """Next-token logits of the merged folder, read back, and of the adapter on its base, both computed in FP32."""

    dtype: str
    difference: float  # largest absolute difference of two logits
    largest: float  # largest absolute logit
    same: int  # tokens of `PROMPTS` after which both have the same most likely token
    tokens: int

    def __str__(self) -> str:
        return (
            f"rounding to {self.dtype} changes logits by up to {self.difference:.2g} (the largest is "
            f"{self.largest:.3g}); the most likely next token is the same at {self.same} of {self.tokens} positions"
        )


def merge_errors(resolved: ResolvedModel, config: ModelConfig) -> list[str]:
    """Returns errors if an adapter cannot be merged into its base; no weights are loaded.

    Raises:
        ConfigError: a config.json cannot be read.
    """
    remedy = "--copy shares the trained files as they are"
    if not (Path(resolved.weights) / "adapter_config.json").is_file():
        return [f"Invalid --merge of {resolved.weights}: it holds a whole model and no adapter; {remedy}."]
    if not isinstance(FAMILIES[config.family], LanguageModel) or config.traits.classifies:
        return [
            f"Invalid --merge of {resolved.weights}: it adapts {config.hub_id} ({config.family}), and only language "
            f"models are merged; {remedy}."
        ]
    packing = config.quantize if config.quantize != "none" else packing_of(described(config))
    if packing is not None:
        return [
            f"Invalid --merge of {resolved.weights}: the weights of {config.hub_id} are quantized ({packing}), and "
            f"merging would round the adapter to those few bits; {remedy}."
        ]
    if PeftConfig.from_pretrained(resolved.weights).is_prompt_learning:
        return [f"Invalid --merge of {resolved.weights}: it adapts the input, not weights; {remedy}."]
    return []


def merged_bytes(config: ModelConfig, dtype: str) -> int:
    """Returns the size of a model's weights in `dtype`."""
    size = getattr(torch, dtype).itemsize
    return sum(parameter.numel() for parameter in skeleton(config).parameters()) * size


def merge(resolved: ResolvedModel, config: ModelConfig, folder: Path, dtype: str) -> Rounding:
    """Writes the merged model, its tokenizer and its generation settings to `folder`.

    W + s·B·A is computed in FP32 by PEFT and rounded once to `dtype`.

    Raises:
        ConfigError: the base is not the one that the adapter was trained on, the files do not fit each other, or the
            merged model does not compute what the adapter does.
    """
    with validated_unchanged(Path(resolved.weights)):
        identify(resolved)
        model, tokenizer, _ = load_for_inference(resolved.weights, config, CPU, autocast=resolved.autocast)
    expected = _logits(widen(model), tokenizer)
    _untie(model)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            [f"Cannot merge {resolved.weights}: {reason_of(error)}; --copy shares it as an adapter."]
        ) from error
    difference, largest, *_ = _compare(expected, _logits(model, tokenizer))
    if not difference <= _EXACT * max(1.0, largest):
        raise ConfigError(
            [
                f"Cannot merge {resolved.weights}: merged, the model's logits differ by {difference:.2g} before any "
                "rounding, so it is not the adapted one; --copy shares it as an adapter."
            ]
        )
    model.to(getattr(torch, dtype))
    validate_finite(model, f"{resolved.weights}, merged and rounded to {dtype}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    saved = config.at(str(folder)).model_copy(update={"dtype": "float32"})
    written = FAMILIES[config.family].load(saved, LoadOptions(CPU)).eval()
    return Rounding(dtype, *_compare(expected, _logits(written, tokenizer)))


def _untie(model: nn.Module) -> None:
    """Gives an adapted layer weights of its own if others share them: merged, the embedding of a head would change."""
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            weight = getattr(base, "weight", None)
            if weight is not None and owners[id(weight)] > 1:
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


@torch.inference_mode()
def _logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Returns the logits after each token of each prompt (of an encoder-decoder, which repeats the prompt)."""
    logits = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        logits.append(model(input_ids=ids, labels=ids).logits[0].float())
    return logits


def _compare(left: list[torch.Tensor], right: list[torch.Tensor]) -> tuple[float, float, int, int]:
    """Returns the largest difference, the largest logit, and the positions with the same maximum, and of all."""
    a, b = torch.cat(left), torch.cat(right)
    return (
        (a - b).abs().max().item(),
        a.abs().max().item(),
        int((a.argmax(-1) == b.argmax(-1)).sum()),
        len(a),
    )
