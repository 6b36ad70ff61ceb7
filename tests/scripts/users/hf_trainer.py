"""HF Trainer with evaluation and compute_metrics.

hf_trainer.py MODEL TrainingArguments...      losses and metrics go to the file named by $LOSSES
"""

import json
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Which:
    model: str = field(metadata={"help": "folder of the model to train"})


which, args = HfArgumentParser((Which, TrainingArguments)).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(which.model)

draw = torch.Generator().manual_seed(0)
ids = torch.randint(model.config.vocab_size, (24, 16), generator=draw)
rows = [{"input_ids": row, "labels": row.masked_fill(row < 10, -100)} for row in ids]


def compute_metrics(prediction):
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    return {
        "accuracy": float((logits.argmax(-1) == labels)[counted].mean()),
        "logits_size": float(np.square(logits).mean()),
    }


trainer = Trainer(
    model=model,
    args=args,
    train_dataset=rows[:16],
    eval_dataset=rows[16:],
    compute_metrics=compute_metrics,
)
trainer.train()

if trainer.is_world_process_zero():
    log = trainer.state.log_history  # under ZeRO-0 in fp32 DeepSpeed keeps no gradient norm
    seen = {
        "losses": [row["loss"] for row in log if "loss" in row],
        "grad_norms": [row["grad_norm"] for row in log if "grad_norm" in row],
        "eval_losses": [row["eval_loss"] for row in log if "eval_loss" in row],
        "accuracies": [row["eval_accuracy"] for row in log if "eval_accuracy" in row],
        "logits_sizes": [row["eval_logits_size"] for row in log if "eval_logits_size" in row],
    }
    with open(os.environ["LOSSES"], "w") as f:
        json.dump({what: values for what, values in seen.items() if values}, f)
