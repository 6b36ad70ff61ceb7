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
from typing import TYPE_CHECKING

import torch
from deepspeed.comm import comm
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
from torch import Tensor, nn
from torch import distributed as dist

from ds_fused.engine.zero3.collective_claim import PROBES, CollectiveClaim

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

# of DeepSpeed's optimizer: parameters, dtype of communication -> this rank's parts of their gradients
_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"

Reduce = Callable[[list[nn.Parameter], torch.dtype], list[Tensor]]


class ReductionClaim(CollectiveClaim):
    """The gradients of all weights that an optimizer trains."""

    owner: DeepSpeedZeroOptimizer_Stage3
    replacement = "gradients leave from where they are"
    stock: Reduce

    def _difference(self) -> str | None:
        stock, trained = getattr(self.owner, _REDUCE), sum(self.owner.fp16_groups, [])
        probes = [p for p in trained if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        probes = [p for p in probes if p.ds_process_group is probes[0].ds_process_group and _splits(p)]
        probes = sorted(probes, key=lambda p: (p.ds_numel, p.ds_id))[:PROBES]
        # where it averages otherwise nothing is reduced this way
        if not probes or self._averages_otherwise(probes):
            return None
        ranks, rank = dist.get_world_size(probes[0].ds_process_group), dist.get_rank(probes[0].ds_process_group)
        comm_dtype = self.owner.get_param_comm_dtype(probes[0])

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
        self.stock = getattr(self.owner, _REDUCE)
        setattr(self.owner, _REDUCE, self)

    def restore(self) -> None:
        if self.in_place():
            delattr(self.owner, _REDUCE)

    def in_place(self) -> bool:
        return vars(self.owner).get(_REDUCE) is self

    def __call__(self, params: list[nn.Parameter], comm_dtype: torch.dtype) -> list[Tensor]:
        """Stands where the optimizer's method stood."""
        # of several dtypes DeepSpeed makes one
        is_one = len({p.grad.dtype for p in params}) == 1
        if comm.comms_logger.enabled or not (is_one and all(map(_splits, params))) or self._averages_otherwise(params):
            return self.stock(params, comm_dtype)
        return self._reduce(params, comm_dtype)

    def _averages_otherwise(self, params: Sequence[nn.Parameter]) -> bool:
        # of experts, in versions of DeepSpeed that place them
        averaged = getattr(self.owner, "_gradient_averaging_world_size", None)
        ranks = dist.get_world_size(params[0].ds_process_group)
        return averaged is not None and averaged(params, ranks) != ranks

    def _reduce(self, params: Sequence[nn.Parameter], comm_dtype: torch.dtype) -> list[Tensor]:
        group = params[0].ds_process_group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        grads = [p.grad.view(-1) for p in params]
        if comm_dtype != self.owner.dtype:
            grads = [grad.to(comm_dtype) for grad in grads]
        torch._foreach_div_(grads, float(ranks))
        mine = [grad.view(ranks, -1)[rank] for grad in grads]
        group.reduce_scatter_tensor_coalesced(mine, grads).wait()
        if comm_dtype != self.owner.gradient_accumulation_dtype:
            mine = [part.to(self.owner.gradient_accumulation_dtype) for part in mine]
        return mine


def _splits(p: nn.Parameter) -> bool:
    return p.ds_numel % dist.get_world_size(p.ds_process_group) == 0
