"""Checks of a model against the experiment, from its config.json and its architecture without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flatlora.config.sections import ModelConfig
from flatlora.models.sources import in_short

CLASSIFIER = "ForSequenceClassification"  # ends the names of transformers' text classifiers


def is_text_classifier(model: nn.Module) -> bool:
    """Whether a model of transformers gives a text scores of classes."""
    return isinstance(model, PreTrainedModel) and type(model).__name__.endswith(CLASSIFIER)


def packing_of(known: PreTrainedConfig) -> str | None:
    """Returns how the weights in a model's files are quantized, such as "bitsandbytes 8-bit"; None if they are not."""
    packed = getattr(known, "quantization_config", None)
    if not packed:
        return None
    settings = packed if isinstance(packed, dict) else packed.to_dict()
    bits = next((f" {n}-bit" for n in (4, 8) if settings.get(f"load_in_{n}bit")), "")
    return f"{settings.get('quant_method', 'bitsandbytes')}{bits}"


def packing_errors(config: ModelConfig, skeleton: nn.Module, *, reads_weights: str | None) -> list[str]:
    """Returns errors for a model whose files hold quantized weights that the run cannot use.

    Args:
        reads_weights: the setting that reads, changes or trains W; None if the run only multiplies by it.
    """
    packing = packing_of(skeleton.config) if config.traits.quantizable else None
    if packing is None:
        return []
    head, remedy = f"{config.hub_setting}={config.hub_id}", "name the model in float32, bfloat16 or float16"
    if config.quantize != "none":
        return [
            f"Invalid model.quantize={config.quantize} with {head}: its weights are packed already ({packing}); leave "
            f"the key out, or {remedy}."
        ]
    if reads_weights is None or (packing == "bitsandbytes 4-bit" and reads_weights.startswith("rho=")):
        return []
    return [
        f"Invalid {reads_weights} with {head}: its weights are packed ({packing}), which it cannot read or change; "
        f"{remedy} (model.quantize=nf4 packs them while they are loaded)."
    ]


def sharding_errors(config: ModelConfig, skeleton: nn.Module) -> list[str]:
    """Returns errors for a model whose decoder layers transformers cannot shard one by one, or that is packed."""
    head = f"Invalid trainer.fsdp=true with {config.hub_setting}={config.hub_id}"
    if packing := packing_of(skeleton.config):
        return [f"{head}: its weights are packed ({packing}); name the model in float32 or bfloat16."]
    names = {re.sub(r"\d+", "*", name) for name, _ in skeleton.named_modules()}
    if not any("*" in key and key in names for key in skeleton.fsdp_plan or {}):
        return [f"{head}: transformers has no plan for its layers ({type(skeleton).__name__}); use trainer=ddp."]
    return []


def position_errors(config: ModelConfig, skeleton: nn.Module, max_length: int) -> list[str]:
    """Returns errors for rows that may be longer than a model's table of position embeddings."""
    tables = position_tables(skeleton)
    longer = skeleton.config.is_encoder_decoder  # LED's encoder reads more than its decoder writes
    name = (max if longer else min)(tables, key=tables.get, default=None)
    if name is None or max_length <= tables[name]:
        return []
    return [
        f"Invalid dataset.max_length={max_length} with {config.hub_setting}={config.hub_id}: its table of positions "
        f"({name}) ends at {tables[name]}; set dataset.max_length={tables[name]} or less."
    ]


_POSITIONS = re.compile(r"(wpe|positions_embed|\w*positions?|\w*position_embeddings?)$")


def position_tables(model: nn.Module) -> dict[str, int]:
    """Returns {name: number of positions} of each table of learned or fixed positions; empty for computed ones."""
    tables = {}
    towers = [  # image and audio encoders, whose positions are not tokens
        f"{name}."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.main_input_name not in ("input_ids", "inputs_embeds")
    ]
    for name, module in model.named_modules():
        if name.startswith(tuple(towers)):
            continue
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, nn.Embedding) and _POSITIONS.match(last) and "relative" not in last:
            # OPT and BART skip the first two rows, RoBERTa those up to the padding token's.
            padding = -1 if module.padding_idx is None else module.padding_idx
            tables[name] = module.num_embeddings - getattr(module, "offset", padding + 1)
        if torch.is_tensor(table := getattr(module, "pos_encoding", None)):  # CTRL's
            tables[f"{name}.pos_encoding"] = len(table)
    buffers = {name: len(table) for name, table in model.named_buffers() if name.endswith(".embed_positions")}
    return tables | buffers  # GPT-J's


def first_position(model: nn.Module) -> int:
    """Returns the index of the first token in a model's table of positions: RoBERTa's begin after the padding token's.

    Tables that skip rows themselves, such as OPT's, begin at 0.
    """
    for name, module in model.named_modules():
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        begins_later = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if begins_later and _POSITIONS.match(last) and not hasattr(module, "offset"):
            return module.padding_idx + 1
    return 0


def rotary_positions(model: nn.Module) -> int | None:
    """Returns the number of tokens that a model without a table of positions was made for; None if it is unknown."""
    trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if position_tables(model) or model.config.is_encoder_decoder or getattr(model.config, "alibi", False):
        return None
    return trained if isinstance(trained, int) and trained > 0 else None


def long_rows_warning(config: ModelConfig, skeleton: nn.Module, lengths: Iterable[int]) -> str | None:
    """Returns a warning about rows longer than a model without a table of positions was made for; None for none."""
    trained = rotary_positions(skeleton)
    beyond = [length for length in lengths if trained is not None and length > trained]
    if not beyond:
        return None
    return (
        f"{len(beyond)} rows are longer than the {trained} tokens that {config.hub_id} was made for "
        f"(max_position_embeddings), the longest {max(beyond)}: beyond them its positions are untrained, and "
        f"losses may be far higher; dataset.max_length={trained} cuts these rows."
    )


def attention_implementation(config: ModelConfig, known: PreTrainedConfig, device: torch.device) -> str | None:
    """Returns the `attn_implementation` of from_pretrained, such that the model's own formula is computed.

    model.attn=auto gives None on a GPU, so that transformers chooses (SDPA if the architecture supports it, else
    eager), but eager if SDPA would ignore a part of the formula. On a CPU it gives eager: SDPA's backward is slower at
    the lengths that a CPU can train.

    Args:
        known: the model's config.json.
    """
    if config.attn != "auto":
        return config.attn
    return None if device.type == "cuda" and not caps_attention(known) else "eager"


def caps_attention(known: PreTrainedConfig) -> bool:
    """Whether attention logits are soft-capped, as in Gemma 2; transformers' SDPA silently ignores the cap."""
    parts = [known, *(getattr(known, name, None) for name in getattr(known, "sub_configs", {}))]
    return any(getattr(part, "attn_logit_softcapping", None) is not None for part in parts)


def attention_errors(config: ModelConfig, skeleton: nn.Module) -> list[str]:
    """Returns errors for a model.attn that the architecture does not support, or that computes another formula."""
    name = type(skeleton).__name__
    if config.attn == "sdpa" and not getattr(skeleton, "_supports_sdpa", True):
        reason = f"transformers' {name} has no SDPA"
    elif config.attn == "sdpa" and caps_attention(skeleton.config):
        reason = f"SDPA leaves out the cap on attention's logits that {name} has"
    elif config.attn == "flash_attention_2" and not getattr(skeleton, "_supports_flash_attn", True):
        reason = f"transformers' {name} has no FlashAttention"
    else:
        return []
    return [f"Invalid model.attn={config.attn} with {config.hub_id}: {reason}; use model.attn=auto or eager."]


def vocabulary_errors(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str, added: Iterable[str] = ()
) -> list[str]:
    """Returns errors for tokens that may occur in texts and for which a model has no embedding.

    Args:
        model: a language model, with or without weights.
        name: name of the model in the message.
        added: tokens to check besides the tokenizer's bos, eos, pad and unk tokens.
    """
    rows = embedding_rows(model)
    own = [getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")]
    tokens = sorted({token for token in (*own, *added) if token is not None})
    beyond = [f"{token} ({index})" for token in tokens if (index := tokenizer.convert_tokens_to_ids(token)) >= rows]
    if not beyond:
        return []
    return [
        f"Invalid tokenizer of {name}: {in_short(beyond)} lie beyond the model's {rows} embeddings; use a token that "
        "the model knows (such as pad_token = eos_token), or a model whose embeddings were resized and saved with it."
    ]


def embedding_rows(model: nn.Module) -> int:
    """Returns the number of rows of a language model's input embeddings."""
    layer = model.get_input_embeddings()
    return getattr(layer, "num_embeddings", None) or len(layer.weight)
