"""A head alone in a real ZeRO-3 engine: a causal LM without a body, so that nothing but head and loss is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import deepspeed
import torch
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from benchmarks.head_ways import Case, Loss

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    # 0: the tiny shapes of a test are sharded like the others
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


class HeadForCausalLM(PreTrainedModel):
    """``inputs_embeds`` go straight to the head. Its loss is transformers' own, so ds_fused's switch finds it."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig, case: Case, loss: Loss | None, frozen: bool) -> None:
        super().__init__(config)
        self._case = case
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._loss = loss
        if frozen:
            self.lm_head.weight.requires_grad_(False)
            # something that trains, which DeepSpeed asks for; it takes no part
            self.other = nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, inputs_embeds: Tensor, labels: Tensor) -> Tensor:
        self._case.before()
        if self._loss is not None:
            return self._loss(self, inputs_embeds, labels)
        logits = self.lm_head(inputs_embeds)
        # shifted already: every token counts, as in the ways that bring a loss of their own
        return self.loss_function(logits, labels, self.config.vocab_size, shift_labels=labels)


class EngineRun:
    """See ``head_ways.Run``. The optimizer's step is taken between two calls, at a learning rate of 0."""

    def __init__(self, case: Case, loss: Loss | None, fused: Mapping[str, object] | None, frozen: bool) -> None:
        self._case, self._frozen = case, frozen
        block = {"enabled": fused is not None, "report": False, "fused_linear_cross_entropy": fused or False}
        config = {**CONFIG, "ds_fused": block}
        sizes = PretrainedConfig(hidden_size=case.shape.hidden, vocab_size=case.shape.vocab)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = HeadForCausalLM(sizes, case, loss, frozen)
        self._head = model.lm_head.weight
        with deepspeed.zero.GatheredParameters(self._head, modifier_rank=0), torch.no_grad():
            if case.rank == 0:
                self._head.copy_(case.weight())
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
        self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        if fused is not None:
            _check_mode(self._engine)

    def __call__(self) -> Tensor:
        loss = self._engine(self._case.x, self._case.labels)
        self._engine.backward(loss)
        return loss.detach()

    def gradient(self) -> Tensor | None:
        return None if self._frozen else safe_get_local_grad(self._head)

    def settle(self) -> None:
        self._engine.step()

    def uncounted(self) -> int:
        slab_mode = vars(self._engine).get("_ds_fused_slab_mode")
        return 0 if slab_mode is None else slab_mode.window_bytes

    def close(self) -> None:
        engine, self._engine = self._engine, None
        engine.destroy()
        # A cache of DeepSpeed's parameter coordinator (__params_to_release) keeps a destroyed engine for ever, with it
        # some 5 bytes a weight. It can't be reached from here, so the engine is emptied.
        for owner in (engine.optimizer.optimizer, engine.optimizer, engine, self._head):
            vars(owner).clear()


def _check_mode(engine: deepspeed.DeepSpeedEngine) -> None:
    """A head that was left, or whose weight is gathered in spite of the mode, is not the way that was asked for."""
    report = engine.ds_fused_report
    reasons = [left.reason for left in report.left if left.what.startswith(("head", "loss", "copy engines"))]
    if reasons or not any(claim.key == "fused_linear_cross_entropy" for claim in report.claims):
        raise RuntimeError(f"ds_fused did not take the head: {'; '.join(reasons) or report}")
