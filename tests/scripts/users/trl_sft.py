"""TRL's SFTTrainer on a few lines of text.

trl_sft.py --model_name_or_path MODEL SFTConfig...      losses and metrics go to the file named by $LOSSES
"""

import json
import os

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

args, which = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config()
lines = [" ".join(f"word{(i * step) % 19}" for i in range(12)) for step in range(1, 25)]

trainer = SFTTrainer(
    model=which.model_name_or_path,
    args=args,
    train_dataset=Dataset.from_dict({"text": lines[:16]}),
    eval_dataset=Dataset.from_dict({"text": lines[16:]}),
    processing_class=AutoTokenizer.from_pretrained(which.model_name_or_path),
)
trainer.train()

if trainer.is_world_process_zero():
    log = trainer.state.log_history
    seen = {
        "losses": [row["loss"] for row in log if "loss" in row],
        "entropies": [row["entropy"] for row in log if "entropy" in row],
        "accuracies": [row["mean_token_accuracy"] for row in log if "mean_token_accuracy" in row],
        "eval_losses": [row["eval_loss"] for row in log if "eval_loss" in row],
    }
    with open(os.environ["LOSSES"], "w") as f:
        json.dump({what: values for what, values in seen.items() if values}, f)
