"""Flat-LoRA in a transformers Trainer: one more line, the callback.

    python examples/callback_in_trainer.py [MODEL]

MODEL is a Hugging Face name or a folder; without it a tiny random Llama reads the text byte by byte.
"""

import sys
import tempfile

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flatlora import FlatLoraCallback, fast_dtype
from flatlora.models.hashes import backbone_sha256

set_seed(0)
text = "Flat minima generalize better than sharp ones."
if len(sys.argv) > 1:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=fast_dtype())
    ids = AutoTokenizer.from_pretrained(sys.argv[1])(text)["input_ids"]
else:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    ids = list(text.encode())
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
before = backbone_sha256(model)

folder = tempfile.mkdtemp(prefix="flatlora-")
arguments = TrainingArguments(
    folder,
    max_steps=20,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
)
rows = [{"input_ids": ids, "labels": ids}] * 32
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[FlatLoraCallback(sigma=0.05)])
trainer.train()
model.save_pretrained(f"{folder}/adapter")

losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
unchanged = backbone_sha256(model) == before
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; backbone unchanged: {unchanged}; adapter: {folder}/adapter")
