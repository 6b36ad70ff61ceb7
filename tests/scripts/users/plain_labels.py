"""A plain DeepSpeed loop: the model computes its loss from labels; a held-out loss at the end.

plain_labels.py [--deepspeed_config FILE]      losses go to the file named by $LOSSES
"""

import argparse
import json
import os

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=4)
args = deepspeed.add_config_arguments(parser).parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer)

draw = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
batches = torch.randint(config.vocab_size, (2, 2, 16), generator=draw).to(engine.device)
losses = []
for step in range(args.steps * engine.gradient_accumulation_steps()):
    ids = batches[step % len(batches)]
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())

engine.eval()
with torch.no_grad():
    held_out = engine(input_ids=ids, labels=ids).loss.item()

if torch.distributed.get_rank() == 0:
    with open(os.environ["LOSSES"], "w") as f:
        json.dump({"losses": losses, "held_out": held_out}, f)
