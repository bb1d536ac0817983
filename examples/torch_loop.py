"""A bare torch loop: `param_groups` finds the matrices, `Pion` updates all of the model.

python examples/torch_loop.py --steps 10
python examples/torch_loop.py --steps 10 --keep 16    # less forgetting: see `Inputs`
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pion_hf import Inputs, Pion, param_groups, routing_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/smollm2-135m-instruct")
parser.add_argument("--text", default="data/python_docs.txt")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--keep", type=int, default=0, help="directions of every layer's inputs whose outputs stay")
chosen = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(chosen.model)
with open(chosen.text, encoding="utf-8") as file:
    ids = tokenizer(file.read(), return_tensors="pt", verbose=False)["input_ids"][0]
rows = ids[: len(ids) // 64 * 64].view(-1, 64)

print(routing_table(model))
inputs = Inputs(model, chosen.keep) if chosen.keep else None
groups = param_groups(model, "pion_ambient", lr=1e-4, adamw_lr=3e-5)
optimizer = Pion(groups, preset="ambient", keep=chosen.keep, inputs=inputs)
for step in range(chosen.steps):
    batch = rows[torch.arange(4 * step, 4 * step + 4) % len(rows)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
