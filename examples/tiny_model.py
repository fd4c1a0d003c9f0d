"""What the examples with TRL share: a tiny random Llama and a tokenizer of bytes, so that nothing is downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Trainer

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


def train_and_report(trainer: Trainer, key: str) -> dict[str, float]:
    """Trains; prints and returns the first and the last logged `key`, and whether the backbone is unchanged."""
    parameters = dict(trainer.model.named_parameters())
    frozen = {name: p.detach().clone() for name, p in parameters.items() if not p.requires_grad}
    trainer.train()
    values = [row[key] for row in trainer.state.log_history if key in row]
    unchanged = all(torch.equal(parameters[name], weight) for name, weight in frozen.items())
    print(f"{key} {values[0]:.3f} → {values[-1]:.3f}; the backbone is unchanged: {unchanged}")
    return {"first": values[0], "last": values[-1], "unchanged": unchanged}
