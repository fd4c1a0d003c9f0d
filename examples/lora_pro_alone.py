"""LoRA-Pro as an optimizer in any training loop, without the rest of the suite.

    python examples/lora_pro_alone.py [MODEL]

MODEL is a Hugging Face name or a folder; without it a tiny random Llama reads the text byte by byte.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flatlora import LoRAPro, fast_dtype, lora_pairs

STEPS = 20

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

batch = ids.expand(4, -1)
pairs = lora_pairs(model)
optimizer = LoRAPro(pairs, lr=1e-3, moments="bfloat16")
losses = []
for step in range(STEPS):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step:2d}  loss {losses[-1]:.3f}")

moments = sum(value.numel() * value.element_size() for each in optimizer.state.values() for value in each.values())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {len(pairs)} pairs; moments {moments / 2**20:.1f} MiB")
