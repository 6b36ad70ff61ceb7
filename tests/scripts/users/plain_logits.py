"""A DeepSpeed loop that computes its own loss from the logits, and knows no DeepSpeed arguments.

plain_logits.py [--settings FILE]      losses go to the file named by $LOSSES
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from deepspeed import initialize
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--settings")
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
settings = {"config": args.settings} if args.settings else {}
engine, *_ = initialize(model=model, optimizer=optimizer, **settings)

rank = int(os.environ["RANK"])
draw = torch.Generator().manual_seed(100 + rank)
batches = torch.randint(config.vocab_size, (2, 2, 16), generator=draw).to(engine.device)
losses, accuracies = [], []
for step in range(8):
    ids = batches[step % len(batches)]
    logits = engine(input_ids=ids).logits[:, :-1].float()
    labels = ids[:, 1:]
    # the later a token stands, the more it counts: no model computes this loss by itself
    weight = torch.linspace(0.5, 1.5, labels.shape[1], device=labels.device)
    loss = (F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * weight).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    accuracies.append((logits.argmax(-1) == labels).float().mean().item())

if rank == 0:
    Path(os.environ["LOSSES"]).write_text(json.dumps({"losses": losses, "accuracies": accuracies}))
