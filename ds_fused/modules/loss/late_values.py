"""What logits that somebody reads later are computed from, and what is said when they are.

A source has the values that one head call led to, computed once; a read is how: the hidden states of the forward, and
the head's weight, whole again for that moment.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from ds_fused.modules.loss.head_call import HeadCall, unwritten, version
from ds_fused.modules.loss.meeting import meet
from ds_fused.modules.loss.steps import Step, replay
from ds_fused.ops.common._say import say_once

log = logging.getLogger("ds_fused")

WholeWeight = Callable[[nn.Module], contextlib.AbstractContextManager]

# what tells of a head whether its weight is still the same: it or this rank's part; None where there is no telling
Seen = Callable[[nn.Module], Tensor | None]
# spread over it, these do: a step of an optimizer changes nearly all
SAMPLED_ELEMENTS = 256


def sample(weight: Tensor) -> Tensor:
    """A copy of a few elements, without waiting for the device."""
    flat = weight.detach().reshape(-1)
    # odd: no power of two between samples, or they would all lie in one column
    return flat[:: (flat.numel() // SAMPLED_ELEMENTS) | 1].clone()


def say_if_changed(weight: Tensor, sampled: Tensor) -> None:
    """Warn where it is no longer the weight that ``sampled`` was taken of."""
    if not torch.equal(sample(weight).to(sampled), sampled):
        log.warning(
            "ds_fused: these logits are read after the head's weight changed, so they are those of the new "
            'weight; read them before the optimizer steps, or set "logits": "keep" in the ds_fused block'
        )


class Source:
    """The values behind one or more ``LogitsOnDemand``, and what they look like. Computed once, without a graph."""

    __slots__ = ("__weakref__", "_compute", "_unwritten", "_values", "device", "dtype", "origin", "shape", "together")

    def __init__(
        self,
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        together: Callable[[], bool],  # whether all ranks have to
        origin: tuple[object, ...] | None = None,  # whose logits they are, and the steps on them but casts
    ) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._values: Tensor | None = None
        # their version before anybody wrote to them
        self._unwritten = 0.0
        self.origin = (object(),) if origin is None else origin
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.together = together

    # whoever's graph reads them, they are computed in front of it
    @torch.compiler.disable
    def values(self) -> Tensor:
        if self._values is None:
            with torch.no_grad():
                self._values = self._compute()
            self._unwritten = version(self._values)
            # lets go of the hidden states
            self._compute = None
        return self._values

    def after(self, steps: tuple[Step, ...], shape: torch.Size, dtype: torch.dtype) -> Source:
        """The values with recorded steps on them, which have this shape and dtype."""
        origin = (*self.origin, *(step for step in steps if step[0] != "to"))
        return Source(lambda: replay(self.values(), steps), shape, dtype, self.device, self.together, origin)

    def is_written(self) -> bool:
        return self._values is not None and version(self._values) != self._unwritten


class Read:
    """How the logits of one forward are computed: head(hidden), under the forward's autocast."""

    __slots__ = ("autocast", "head", "hidden", "is_late", "kept", "name", "sample", "seen", "version", "whole_weight")

    def __init__(
        self,
        call: HeadCall,
        whole_weight: WholeWeight,
        seen: Seen,
        now: Tensor | None,  # what ``seen`` gives
        kept: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.head = call.head
        self.hidden = call.hidden.detach()
        self.version = call.version
        self.autocast = call.autocast
        self.seen = seen
        self.sample = None if now is None else sample(now)
        self.whole_weight = whole_weight
        # weight and bias where they stay whole: the head may have others by then, of functional_call or parametrized
        self.kept = kept
        # of what a restored head no longer has
        scope = call.head._ds_fused_scope
        self.name, self.is_late = scope.name_of_read(), scope.logits == "defer"

    def is_sharded_since(self) -> bool:
        """Whether what was kept is no longer there: FSDP takes the memory of a weight away when a forward is over."""
        return self.kept is not None and self.kept[0].numel() > 0 and self.kept[0].untyped_storage().size() == 0

    def __call__(self) -> Tensor:
        # where they are kept already, that is no remedy
        if self.is_late:
            _say_who_reads(_caller())
        # not the head's own call: outside the model's forward its hooks have no place in ZeRO-3's order of gathering
        with torch.inference_mode(self.hidden.is_inference()), torch.no_grad(), self.whole_weight(self.head):
            kept = gathered(self.head, self.kept, self.name) if self.is_sharded_since() else self.kept
            weight, bias = kept or (self.head.weight, self.head.bias)
            now = weight if kept else self.seen(self.head)
            if self.sample is not None and now is not None:
                say_if_changed(now, self.sample)
            return self.logits(unwritten(self.hidden, self.version), weight, bias)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return F.linear(hidden, weight, bias)


def gathered(head: nn.Module, kept: tuple[Tensor, Tensor | None], name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head that FSDP2 has sharded since, whole, in the dtype that the forward had them in."""
    found = [None if was is None else getattr(head, each) for each, was in zip(("weight", "bias"), kept, strict=True)]
    if not hasattr(found[0], "full_tensor"):
        raise RuntimeError(
            "ds_fused: outputs.logits are read when the memory of the head's weight was taken away, as by FSDP1; set "
            '"logits": "keep", which computes them inside the forward, or "eval": "stock" where it is an evaluation'
        )
    for i, placement in enumerate(found[0].placements):
        ranks = dist.get_process_group_ranks(found[0].device_mesh.get_group(i))
        if placement.is_shard() and len(ranks) > 1:
            meet(name, ranks, "FSDP")
    weight, bias = found
    return weight.full_tensor().to(kept[0].dtype), None if bias is None else bias.full_tensor().to(kept[1].dtype)


def _caller() -> str:
    """file:line of whoever reads, the first frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ds_fused", "torch"):
        frame = frame.f_back
    return "C++" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _say_who_reads(caller: str) -> None:
    """One line for each place that reads."""
    say_once(
        f"ds_fused: {caller} reads the logits of a forward whose loss was fused; they are computed now. "
        'Where that is too late (sharded weights), set "logits": "keep" in the ds_fused block'
    )
