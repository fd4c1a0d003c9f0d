"""Folders of models for tests: their configs, and copies with other tensors or settings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flatlora.config.sections import ModelConfig

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
# Configs of tiny models of many architectures: AutoConfig.for_model(name.split()[0], **ARCHITECTURES[name]).
ARCHITECTURES = {
    "llama": SHAPE,
    "llama rope3": SHAPE
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": SHAPE | {"sliding_window": 8},
    "qwen2": SHAPE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": SHAPE,
    "gemma": SHAPE,
    "gemma2": SHAPE | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": SHAPE | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": SHAPE | {"sliding_window": 8},
    "gpt2": GPT | {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": SHAPE,
    "mixtral": SHAPE | EXPERTS,
    "qwen2_moe": SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "bitnet": SHAPE,
    "gpt_oss": SHAPE | EXPERTS | {"sliding_window": 8},
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "pad_token_id": 0,
    },
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "pad_token_id": 0},
    "codegen": GPT | {"rotary_dim": 4},
    "xglm": {"vocab_size": 96, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "pad_token_id": 0},
    "opt": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    | {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "cohere2": SHAPE | {"sliding_window": 8},
    "stablelm": SHAPE,
    "t5": {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    | {"pad_token_id": 0, "decoder_start_token_id": 0},
}

_ENCODER = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DISENTANGLED = {"relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}
# As ARCHITECTURES, of encoders; deberta-v2 with the settings of DeBERTa-v3.
ENCODERS = {
    "roberta": _ENCODER | {"type_vocab_size": 1},
    "deberta-v2": _ENCODER
    | _DISENTANGLED
    | {"pos_att_type": "p2c|c2p", "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "deberta": _ENCODER | _DISENTANGLED | {"pos_att_type": "c2p|p2c"},
    "bert": _ENCODER,
    "modernbert": _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
}


def model_config(folder: Path | str, **changes: Any) -> ModelConfig:
    settings = {"name": "tiny", "hub_id": str(folder), "family": "causal_lm", "dtype": "float32"}
    return ModelConfig(**settings | changes)


def rewritten(folder: Path, target: Path, change: Callable[[Tensors], Tensors], **described: Any) -> Path:
    """A copy of a model's folder whose tensors are `change(tensors)`, and whose config.json says otherwise in part."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (path,) = target.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    if described:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | described))
    return target


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}
