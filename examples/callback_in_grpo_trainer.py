"""Flat-LoRA in TRL's GRPOTrainer: rollouts and reference come from W, and the policy's loss from W + ε.

GRPO generates inside a step, from the model that it trains. Passes without gradients read W, so answers are drawn from
the model that will be saved.

pip install trl datasets && python examples/callback_in_grpo_trainer.py       # a tiny random Llama, seconds on a CPU
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_model import byte_tokenizer, random_llama, train_and_report
from trl import GRPOConfig, GRPOTrainer

from flatlora import FlatLoraCallback


def share_of_letters(completions: list[str], **_: object) -> list[float]:
    """The reward: the share of ASCII letters in an answer."""
    return [sum(sign.isascii() and sign.isalpha() for sign in text) / max(len(text), 1) for text in completions]


def main() -> dict[str, float]:
    """Trains and returns the first and the last mean reward."""
    gpu = torch.cuda.is_available()
    rows = Dataset.from_list([{"prompt": "Write a word: "}] * 64)
    sizes = {"per_device_train_batch_size": 32, "num_generations": 32, "max_completion_length": 8}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 20, "learning_rate": 5e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
        trainer = GRPOTrainer(
            random_llama(),  # yours
            reward_funcs=share_of_letters,
            args=GRPOConfig(folder, beta=0.01, bf16=gpu, use_cpu=not gpu, **sizes, **settings),
            train_dataset=rows,
            processing_class=byte_tokenizer(),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[FlatLoraCallback(sigma=0.05)],
        )
        return train_and_report(trainer, "reward")


if __name__ == "__main__":
    main()
