"""``"collectives": "in_place"``: under ZeRO-3, gradients that leave together leave from where they are.

DeepSpeed lays the gradients of a bucket side by side, every rank's parts of all of them one after another, and has
that copy reduced and scattered. Here each gradient is a reduce-scatter of its own, in place; all of them go as one
call, which NCCL makes one kernel. They are divided by the number of ranks before, as DeepSpeed's are; a sum over more
than two ranks may be added up in another order.

Gradients that don't split evenly over the ranks or are of several dtypes, and those of experts that AutoEP places, go
DeepSpeed's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from deepspeed.comm import comm
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

# of DeepSpeed's optimizer: parameters, dtype of communication -> this rank's parts of their gradients
_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
# so many of the smallest gradients are reduced both ways before any is
_PROBES = 2

Reduce = Callable[[list[nn.Parameter], torch.dtype], list[Tensor]]


@dataclass(eq=False)
class ReductionClaim:
    """The gradients of all weights that an optimizer trains."""

    optimizer: DeepSpeedZeroOptimizer_Stage3
    key: str
    paths: tuple[str, ...] = ("",)
    replacement: str = "gradients leave from where they are"
    stock: Reduce | None = field(default=None, init=False)

    @property
    def original(self) -> str:
        cls = type(self.optimizer)
        return f"{cls.__module__}.{cls.__qualname__}"

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What differs of the smallest gradients, reduced this way and DeepSpeed's; all ranks ask."""
        try:
            return self._difference()
        except (AttributeError, RuntimeError, TypeError) as error:
            # a backend of PyTorch's that can't, or another DeepSpeed
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _difference(self) -> str | None:
        stock, trained = getattr(self.optimizer, _REDUCE), sum(self.optimizer.fp16_groups, [])
        probes = [p for p in trained if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        probes = [p for p in probes if p.ds_process_group is probes[0].ds_process_group and _splits(p)]
        probes = sorted(probes, key=lambda p: (p.ds_numel, p.ds_id))[:_PROBES]
        # where it averages otherwise nothing is reduced this way
        if not probes or self._averages_otherwise(probes):
            return None
        ranks, rank = dist.get_world_size(probes[0].ds_process_group), dist.get_rank(probes[0].ds_process_group)
        comm_dtype = self.optimizer.get_param_comm_dtype(probes[0])

        def reduced(reduce: Reduce) -> list[Tensor]:
            for p in probes:
                at = torch.arange(p.ds_numel, device=p.device)
                # one rank has something for each element, so that any order makes the same sum
                p.grad = (ranks * (1 + at % 3) * (at % ranks == rank)).to(p.dtype).view(p.shape)
            return [part.clone() for part in reduce(list(probes), comm_dtype)]

        with GatheredParameters(probes):
            try:
                pairs = zip(reduced(stock), reduced(self._reduce), strict=True)
                alike = all(a.dtype == b.dtype and torch.equal(a.flatten(), b.flatten()) for a, b in pairs)
            finally:
                for p in probes:
                    p.grad = None
        return None if alike else "a gradient that leaves from where it is does not come to what DeepSpeed's does"

    def commit(self) -> None:
        self.stock = getattr(self.optimizer, _REDUCE)
        setattr(self.optimizer, _REDUCE, self)

    def restore(self) -> None:
        if self.in_place():
            delattr(self.optimizer, _REDUCE)

    def in_place(self) -> bool:
        return vars(self.optimizer).get(_REDUCE) is self

    def watched(self) -> tuple[type, ...]:
        return ()

    def __call__(self, params: list[nn.Parameter], comm_dtype: torch.dtype) -> list[Tensor]:
        """Stands where the optimizer's method stood."""
        # of several dtypes DeepSpeed makes one
        is_one = len({p.grad.dtype for p in params}) == 1
        if comm.comms_logger.enabled or not (is_one and all(map(_splits, params))) or self._averages_otherwise(params):
            return self.stock(params, comm_dtype)
        return self._reduce(params, comm_dtype)

    def _averages_otherwise(self, params: Sequence[nn.Parameter]) -> bool:
        # of experts, in versions of DeepSpeed that place them
        averaged = getattr(self.optimizer, "_gradient_averaging_world_size", None)
        ranks = dist.get_world_size(params[0].ds_process_group)
        return averaged is not None and averaged(params, ranks) != ranks

    def _reduce(self, params: Sequence[nn.Parameter], comm_dtype: torch.dtype) -> list[Tensor]:
        group = params[0].ds_process_group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        grads = [p.grad.view(-1) for p in params]
        if comm_dtype != self.optimizer.dtype:
            grads = [grad.to(comm_dtype) for grad in grads]
        torch._foreach_div_(grads, float(ranks))
        mine = [grad.view(ranks, -1)[rank] for grad in grads]
        group.reduce_scatter_tensor_coalesced(mine, grads).wait()
        if comm_dtype != self.optimizer.gradient_accumulation_dtype:
            mine = [part.to(self.optimizer.gradient_accumulation_dtype) for part in mine]
        return mine


def _splits(p: nn.Parameter) -> bool:
    return p.ds_numel % dist.get_world_size(p.ds_process_group) == 0
