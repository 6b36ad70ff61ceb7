"""trl_sft.py, whose trainer leaves its loss to the model before it trains."""

import runpy
from pathlib import Path

import trl

import ds_fused


class Trainer(trl.SFTTrainer):
    def train(self, *args: object, **named: object) -> object:
        ds_fused.fuse_sft_loss(self)
        return super().train(*args, **named)


trl.SFTTrainer = Trainer
runpy.run_path(str(Path(__file__).with_name("trl_sft.py")), run_name="__main__")
