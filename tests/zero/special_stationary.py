"""Mode "stationary": the cases of mode "stream", and its own; mode "auto"."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed
import jobs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from special import STATIONARY, Batch, both, case, engine_of, mine, model_of, my_steps, streaming, train
from transformers import LlamaForCausalLM

import ds_fused
from ds_fused.engine.zero3 import choice, lookup
from ds_fused.engine.zero3.delivery import Delivery
from ds_fused.engine.zero3.figures import Figures, Rates
from ds_fused.engine.zero3.stationary import ZeroShard


@contextmanager
def lookups() -> Iterator[list[int]]:
    """Of each lookup for which the tokens travelled, the largest number of them on a rank."""
    seen, function = [], lookup.stationary_embedding

    def noted(*args: object, most: int, **options: object) -> torch.Tensor:
        seen.append(most)
        return function(*args, most=most, **options)

    lookup.stationary_embedding = noted
    try:
        yield seen
    finally:
        lookup.stationary_embedding = function


def stationary(twin: Callable[[], dict]) -> Callable[[], dict]:
    """A case of mode "stream" in the other mode, and its lookups."""

    def run() -> dict:
        with streaming(mode="stationary"), lookups() as seen:
            return twin() | {"lookups": seen}

    return run


def gathered(twin: Callable[[], dict]) -> Callable[[], dict]:
    """A case of mode "stream" in mode "auto", where that has the whole weight gathered if it can; and what it took."""

    def run() -> dict:
        seen, before = [], choice.chosen

        def last(ways: list[Figures], free: float, rates: Rates) -> Figures:
            seen.append(ways[-1].mode)
            return ways[-1]

        choice.chosen = last
        try:
            with streaming(mode="auto"):
                return twin() | {"chosen": seen}
        finally:
            choice.chosen = before

    return run


@case
def stationary_weighted_ranks() -> dict:
    """Each rank's loss counts differently, so the gradients of the forward are of no use."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        return train(engine, mine(), loss_of=lambda output: (1 + dist.get_rank()) * output.loss)

    return both(model_of, stage=3, run=run, block=STATIONARY)


@case
def stationary_both_ways() -> dict:
    """Batches of few tokens and of many, in one accumulation and the other way round in the next."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        batches = []
        for number, step in enumerate(my_steps(2)):
            for micro, (ids, labels) in enumerate(step):
                twice = (number + micro) % 2
                batches.append((torch.cat([ids, ids]), torch.cat([labels, labels])) if twice else (ids, labels))
        return train(engine, batches)

    with lookups() as seen:
        out = both(partial(model_of, tied=True), 3, block=STATIONARY, run=run, gradient_accumulation_steps=2)
    return out | {"lookups": seen}


class OfItsOwn(LlamaForCausalLM):
    """A forward with a loss that transformers does not know: `loss_of` (hidden states, head, labels), both flat."""

    loss_of: Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor], torch.Tensor]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> types.SimpleNamespace:
        # of the sequences that have labels, which may be none
        hidden = self.model(input_ids).last_hidden_state[: len(labels)]
        return types.SimpleNamespace(loss=self.loss_of(hidden.flatten(0, 1), self.lm_head, labels.reshape(-1)))


def with_own_loss(loss_of: Callable) -> OfItsOwn:
    model = model_of(kind=OfItsOwn)
    model.loss_of = loss_of
    return model


def uneven() -> list[Batch]:
    """Rank 1 has no label in the second step, and no token of the loss in the third."""
    batches = mine()
    if dist.get_rank() == 1:
        batches[1] = batches[1][0], torch.full_like(batches[1][1], jobs.IGNORED)
        batches[2] = batches[2][0], batches[2][1][:0]
    return batches


DTYPES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


@case
def stationary_class_weights() -> dict:
    """With smoothing; each rank has its own weights."""

    def loss_of(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
        of_class = torch.linspace(0.2, 2.0 + dist.get_rank(), head.out_features)
        # as a sum, since a mean over no tokens would be NaN
        logits = head(hidden).float()
        return F.cross_entropy(logits, labels, of_class, label_smoothing=0.1, reduction="sum") / 20

    build, run = partial(with_own_loss, loss_of), lambda engine: train(engine, uneven())
    return {name: both(build, 3, block=STATIONARY, run=run, **more) for name, more in DTYPES.items()}


@case
def stationary_entropies() -> dict:
    """A policy's loss with a bonus for entropy. The op is called with the shard, so the flag has no part in it."""

    def policy_loss(log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        advantages = torch.linspace(-0.5, 1.0, log_probs.numel())  # of each token another
        return -(advantages * log_probs + 0.1 * entropies).sum() / 20

    def plain(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
        log_p = head(hidden).float().log_softmax(-1)
        counts = labels != jobs.IGNORED
        log_probs = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        return policy_loss(log_probs * counts, -(log_p.exp() * log_p).sum(-1) * counts)

    def losses(stays: bool, **more: object) -> list[float]:
        model = with_own_loss(plain)
        engine = engine_of(model, 3, None, **more)
        if stays:
            shard = ZeroShard(Delivery(model.lm_head.weight, engine))
            log_probs = partial(ds_fused.linear_log_probs, entropy=True)
            model.loss_of = lambda hidden, head, labels: policy_loss(*log_probs(hidden, shard, labels))
        found = train(engine, uneven())
        engine.destroy()
        return found

    return {name: {"stock": losses(False, **more), "fused": losses(True, **more)} for name, more in DTYPES.items()}


@case
def forced() -> dict:
    """What the report says of the head in each mode that may be asked for, before and after a step."""
    found = {}
    for mode in ("stream", "stationary", "gather"):
        engine = engine_of(model_of(), 3, {"fused_linear_cross_entropy": {"mode": mode}})
        (head,) = (claim for claim in engine.ds_fused_report.claims if claim.key == "fused_linear_cross_entropy")
        found[mode] = [head.replacement]
        train(engine, mine()[:1])
        found[mode].append(head.replacement)
        engine.destroy()
    return found


@case
def auto() -> dict:
    """Which mode is chosen for few tokens and for many, and that training is right in it."""

    def run(engine: deepspeed.DeepSpeedEngine) -> dict:
        losses = train(engine, mine())
        return {"losses": losses, "report": str(getattr(engine, "ds_fused_report", ""))}

    return both(model_of, stage=3, run=run, block={"fused_linear_cross_entropy": {"mode": "auto"}})
