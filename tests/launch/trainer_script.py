"""The run of train.py as a HuggingFace Trainer does it: the same options, blocks, order and metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))

import text_blocks  # noqa: E402  (found by the line above)
import train  # noqa: E402

options = train.parse_options()
arguments = TrainingArguments(
    output_dir=str(options.out), deepspeed=options.deepspeed_config, max_steps=options.steps, seed=options.seed,
    per_device_train_batch_size=1, learning_rate=0.01, lr_scheduler_type="constant", adam_beta2=0.95,
    train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
    disable_tqdm=True,
)  # fmt: skip


class Journal(TrainerCallback):
    def on_log(self, args, state, control, logs, **_):
        if state.is_world_process_zero and "loss" in logs:
            with (options.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, "loss": float(logs["loss"])}) + "\n")


blocks, _ = text_blocks.token_blocks(options)
ordered = [{"input_ids": blocks[i], "labels": blocks[i]} for i in text_blocks.epoch_order(len(blocks), options.seed, 0)]
Trainer(train.load_model(options), arguments, train_dataset=ordered, callbacks=[Journal()]).train()
