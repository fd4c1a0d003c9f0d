"""Flat-LoRA in TRL's SFTTrainer, which wraps the model with PEFT itself.

    python examples/callback_in_sft_trainer.py [MODEL]

MODEL is a Hugging Face name or a folder; without it a tiny random Llama and a tokenizer of bytes are made.
"""

import sys
import tempfile

import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from flatlora import FlatLoraCallback, fast_dtype

set_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=fast_dtype())
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:
    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

folder = tempfile.mkdtemp(prefix="flatlora-")
arguments = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
trainer = trl.SFTTrainer(
    model,
    trl.SFTConfig(folder, use_cpu=True, bf16=False, save_strategy="no", report_to=[], **arguments),
    train_dataset=Dataset.from_dict({"prompt": ["What is flat?"] * 32, "completion": [" A wide minimum."] * 32}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[FlatLoraCallback(sigma=0.05)],
)
trainer.train()
trainer.save_model(f"{folder}/adapter")

losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter: {folder}/adapter")
