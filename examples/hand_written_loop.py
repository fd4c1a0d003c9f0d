"""Flat-LoRA in a training loop of your own: begin() before a step's first micro-batch, end() after its last.

python examples/hand_written_loop.py        # a tiny random Llama, seconds on a CPU
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import WeightPerturbation, find_lora_layers

STEPS, MICRO_BATCHES = 20, 2


def main() -> dict[str, float]:
    """Trains and returns the first and the last loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    perturbation = WeightPerturbation(find_lora_layers(model), sigma=0.05, total_steps=STEPS, seed=42)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.arange(3, 19).repeat(8, 1)
    losses = []
    for step in range(STEPS):
        perturbation.begin(step)  # the layers read W + ε, one ε for all micro-batches
        total = 0.0
        for _ in range(MICRO_BATCHES):
            loss = model(input_ids=ids, labels=ids).loss / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        perturbation.end()  # and W again
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    perturbation.close()

    now = dict(model.named_parameters())
    unchanged = all(torch.equal(now[name], weight) for name, weight in frozen.items())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the backbone is unchanged: {unchanged}")
    return {"first": losses[0], "last": losses[-1], "unchanged": unchanged}


if __name__ == "__main__":
    main()
