"""Flat-LoRA in a training loop of your own: begin before the first forward of a step, end after its last backward.

    python examples/hand_written_loop.py [MODEL]

MODEL is a Hugging Face name or a folder; without it a tiny random Llama reads the text byte by byte.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flatlora import WeightPerturbation, fast_dtype, find_lora_layers
from flatlora.models.hashes import backbone_sha256

STEPS, MICRO_BATCHES = 20, 2

torch.manual_seed(0)
text = "Flat minima generalize better than sharp ones."
if len(sys.argv) > 1:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=fast_dtype())
    ids = AutoTokenizer.from_pretrained(sys.argv[1])(text, return_tensors="pt")["input_ids"]
else:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    ids = torch.tensor([list(text.encode())])
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
before = backbone_sha256(model)

batch = ids.expand(4, -1)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
perturbation = WeightPerturbation(find_lora_layers(model), sigma=0.05, total_steps=STEPS, seed=0)
losses = []
try:
    for step in range(STEPS):
        perturbation.begin(step)  # the layers read W + ε from here on
        losses.append(0.0)
        for _ in range(MICRO_BATCHES):
            loss = model(input_ids=batch, labels=batch).loss / MICRO_BATCHES
            loss.backward()
            losses[-1] += loss.item()
        perturbation.end()  # and W again
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2d}  sigma {perturbation.sigma_at(step):.4f}  loss {losses[-1]:.3f}")
finally:
    perturbation.close()

unchanged = backbone_sha256(model) == before
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; mode {perturbation.mode}; backbone unchanged: {unchanged}")
