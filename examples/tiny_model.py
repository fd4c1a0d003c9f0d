"""A tiny random Llama and a tokenizer of bytes for the examples with TRL, so that nothing has to be downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from flatlora import fast_dtype


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def random_llama() -> PreTrainedModel:
    """In place of AutoModelForCausalLM.from_pretrained(NAME, dtype=fast_dtype(DEVICE))."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dtype = fast_dtype("cuda" if torch.cuda.is_available() else "cpu")  # FP32 on a CPU without BF16 instructions
    config = LlamaConfig(
        vocab_size=258, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, initializer_range=0.2, **shape
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
