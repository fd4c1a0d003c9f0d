"""Flat-LoRA in TRL's DPOTrainer: the policy learns on W + ε, and its reference reads W.

The reference is the same model without its adapter. Its log-probabilities are computed inside the perturbed step, but
without gradients, and such passes read W.

pip install trl datasets && python examples/callback_in_dpo_trainer.py        # a tiny random Llama, seconds on a CPU
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_model import byte_tokenizer, random_llama, train_and_report
from trl import DPOConfig, DPOTrainer

from flatlora import FlatLoraCallback


def main() -> dict[str, float]:
    """Trains and returns the first and the last loss."""
    gpu = torch.cuda.is_available()
    rows = Dataset.from_list([{"prompt": "Two and two is", "chosen": " four.", "rejected": " five."}] * 64)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 20, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
        trainer = DPOTrainer(
            random_llama(),  # yours
            args=DPOConfig(folder, beta=0.5, bf16=gpu, use_cpu=not gpu, **settings),
            train_dataset=rows,
            processing_class=byte_tokenizer(),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[FlatLoraCallback(sigma=0.05)],
        )
        return train_and_report(trainer, "loss")


if __name__ == "__main__":
    main()
