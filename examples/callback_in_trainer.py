"""Flat-LoRA in a transformers Trainer: one callback.

python examples/callback_in_trainer.py        # a tiny random Llama, seconds on a CPU; put your own model and rows in
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from flatlora import FlatLoraCallback, fast_dtype


def main() -> dict[str, float]:
    """Trains and returns the first and the last loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    gpu = torch.cuda.is_available()
    dtype = fast_dtype("cuda" if gpu else "cpu")  # BF16, or FP32 on a CPU without BF16 instructions
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # yours: .from_pretrained(NAME, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 19).repeat(64, 1)]  # one text, to be learned
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not gpu,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[FlatLoraCallback(sigma=0.05)])
        trainer.train()

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    now = dict(model.named_parameters())
    unchanged = all(torch.equal(now[name].cpu(), weight) for name, weight in frozen.items())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the backbone is unchanged: {unchanged}")
    return {"first": losses[0], "last": losses[-1], "unchanged": unchanged}


if __name__ == "__main__":
    main()
