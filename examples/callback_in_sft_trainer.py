"""Flat-LoRA in TRL's SFTTrainer: the same callback.

pip install trl datasets && python examples/callback_in_sft_trainer.py        # a tiny random Llama, seconds on a CPU
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from flatlora import FlatLoraCallback, fast_dtype


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that nothing has to be downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def main() -> dict[str, float]:
    """Trains and returns the first and the last loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpu = torch.cuda.is_available()
    dtype = fast_dtype("cuda" if gpu else "cpu")  # BF16, or FP32 on a CPU without BF16 instructions
    config = LlamaConfig(vocab_size=258, max_position_embeddings=128, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # yours: .from_pretrained(NAME, dtype=dtype)
    rows = Dataset.from_list([{"prompt": "Two and two is", "completion": " four."}] * 64)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 20, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
        trainer = SFTTrainer(
            model,
            SFTConfig(folder, bf16=gpu, use_cpu=not gpu, **settings),
            train_dataset=rows,
            processing_class=byte_tokenizer(),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[FlatLoraCallback(sigma=0.05)],
        )
        parameters = dict(trainer.model.named_parameters())
        frozen = {name: p.detach().clone() for name, p in parameters.items() if not p.requires_grad}
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    unchanged = all(torch.equal(parameters[name], weight) for name, weight in frozen.items())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the backbone is unchanged: {unchanged}")
    return {"first": losses[0], "last": losses[-1], "unchanged": unchanged}


if __name__ == "__main__":
    main()
