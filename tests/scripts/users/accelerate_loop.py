"""A loop written for Accelerate, which finds DeepSpeed in the environment.

accelerate_loop.py      losses go to the file named by $LOSSES
"""

import json
import os

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

# where there is no GPU, Accelerate starts DeepSpeed's process group only when it is told which
cpu = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
accelerator = Accelerator(kwargs_handlers=cpu)
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
rows = torch.randint(config.vocab_size, (16, 16))
loader = DataLoader(rows, batch_size=2, shuffle=False)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses, right = [], []
for _ in range(2):
    for ids in loader:
        with accelerator.accumulate(model):
            output = model(input_ids=ids, labels=ids)
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(output.loss.detach()[None]).tolist())

model.eval()
with torch.no_grad():
    for ids in loader:
        output = model(input_ids=ids, labels=ids)
        guesses = accelerator.gather_for_metrics(output.logits.argmax(-1))
        right.append(int((guesses[:, :-1] == accelerator.gather_for_metrics(ids)[:, 1:]).sum()))

if accelerator.is_main_process:
    with open(os.environ["LOSSES"], "w") as f:
        json.dump({"losses": losses, "right": right}, f)
accelerator.end_training()
