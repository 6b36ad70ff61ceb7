"""Whether the larger sizes of profile "fast" fit on each rank: an estimate before the first step, which can't know it.

States are counted as mixed-precision Adam's. Activations are those of a batch of the longest sequences that the model
knows, but of no more than LENGTH tokens: how long the user's are is not known here, models know far longer ones than
they are trained on, and what "fast" keeps of a layer's forward it measures itself (recompute).

Sizes: W ranks, N parameters of which N' are trained, L layers, T tokens of a rank, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ds_fused.engine.zero3.sizes import elements, sizes_of

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

# bytes of master weight and moments, for each trained parameter
STATES = 12
# tensors [T, H] that a layer without checkpointing keeps, at an inner width of 3.5 H; gradients of them come on top
KEPT = 17
# of the free memory, what must not be needed
MARGIN = 0.1
# tokens of a sequence that are counted at most
LENGTH = 8192


@dataclass(frozen=True)
class Job:
    """What the estimate depends on."""

    parameters: int  # N
    here: bool  # the device has its part of them already (zero.Init), or never will (offloaded)
    trained: int  # N'
    layer: int  # parameters of the largest layer
    layers: int  # L
    width: int  # H
    tokens: int  # T
    itemsize: int  # bytes of a weight in training
    ranks: int  # W
    stage: int  # of ZeRO
    checkpointing: bool
    offloaded: bool  # the optimizer's states are not on the device

    def bytes(self) -> dict[str, float]:
        """What -> bytes of a rank."""
        share = {held: self.ranks if self.stage >= stage else 1 for held, stage in (("o", 1), ("g", 2), ("w", 3))}
        token_rows = self.tokens * self.width * self.itemsize
        sizes = sizes_of("large", self.layer, self.trained)
        gathered = min(sizes["stage3_max_live_parameters"], self.parameters) + self.layer
        return {
            "weights": 0 if self.here else self.itemsize * self.parameters / share["w"],
            "gradients": self.itemsize * self.trained / share["g"],
            "states": 0 if self.offloaded else STATES * self.trained / share["o"],
            # a layer in its backward has about twice what it keeps
            "activations": token_rows * (self.layers + 2 * KEPT if self.checkpointing else KEPT * (self.layers + 1)),
            # what is gathered, and buckets of gradients, twice while they are sent
            "sizes": self.itemsize * (gathered + 2 * sizes["reduce_bucket_size"]) if self.stage == 3 else 0,
        }


def fitting(job: Job, free: float) -> tuple[str, str]:
    """The profile that "auto" stands for, and why."""
    parts = job.bytes()
    need, allowed = sum(parts.values()), (1 - MARGIN) * free
    said = ", ".join(f"{name} {n / 2**30:.1f}" for name, n in parts.items())
    profile = "fast" if need <= allowed else "small"
    return profile, f"{need / 2**30:.1f} GiB needed ({said}) of {free / 2**30:.1f} GiB free, of which 90 % may be"


def job_of(engine: DeepSpeedEngine, model: nn.Module, layers: list[nn.Module], dtype: torch.dtype) -> Job | str:
    """The job of an engine that is being made; why it can't be told where it can't."""
    from deepspeed import comm as dist

    config = next((m.config for m in model.modules() if hasattr(getattr(m, "config", None), "hidden_size")), None)
    longest = getattr(config, "max_position_embeddings", None)
    if not layers or not longest:
        return "the model names no hidden_size and max_position_embeddings, or has no repeated layers"
    return Job(
        parameters=elements(model.parameters()),
        here=engine.zero_offload_param() is not None or any(hasattr(p, "ds_id") for p in model.parameters()),
        trained=elements(p for p in model.parameters() if p.requires_grad),
        layer=max(elements(layer.parameters()) for layer in layers),
        layers=len(layers),
        width=config.hidden_size,
        tokens=engine.train_micro_batch_size_per_gpu() * min(longest, LENGTH),
        itemsize=dtype.itemsize,
        ranks=dist.get_world_size(),
        stage=engine.zero_optimization_stage(),
        checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        offloaded=engine.zero_offload_optimizer() is not None,
    )
