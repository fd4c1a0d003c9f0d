"""LoRA-Pro without anything else of this library: an optimizer for the LoRA factors of a PEFT model.

python examples/lora_pro_alone.py        # a tiny random Llama, seconds on a CPU
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import LoRAPro


def main() -> dict[str, float]:
    """Trains and returns the first and the last loss."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **shape))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = LoRAPro(model, lr=1e-3)
    ids = torch.arange(3, 19).repeat(8, 1)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    now = dict(model.named_parameters())
    unchanged = all(torch.equal(now[name], weight) for name, weight in frozen.items())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; the backbone is unchanged: {unchanged}")
    return {"first": losses[0], "last": losses[-1], "unchanged": unchanged}


if __name__ == "__main__":
    main()
