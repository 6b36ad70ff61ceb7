"""``"collectives": "in_place"``: under ZeRO-3, weights that are gathered together come straight to where they stay.

DeepSpeed has several weights come as one buffer, every rank's parts of all of them one after another, and copies each
weight out of it when it is waited for: these weights twice in memory for a moment, and read and written once more each
time. Here each weight is an all-gather of its own, whose output is the weight; all of a dtype go as one call, which
NCCL makes one kernel (on CPU ranks each goes alone).

A gather goes DeepSpeed's way where it does not fit that form: quantised weights, communication in another dtype
(torch.autocast), shards on NVMe, weights of several groups of ranks; and where DeepSpeed's communication logger is to
see it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero.partition_parameters import (
    GatheredParameters,
    PartitionedParamStatus,
    ZeroParamStatus,
    get_allgather_dtype,
)
from torch import Tensor, nn
from torch import distributed as dist

from ds_fused.engine.zero3.collective_claim import PROBES, CollectiveClaim

if TYPE_CHECKING:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from torch.distributed import Work

# a parameter's, of DeepSpeed
_GATHER = "all_gather_coalesced"


class GatherClaim(CollectiveClaim):
    """All sharded weights of a model: DeepSpeed asks any one of those that it wants, and not the same on every rank."""

    owner: DeepSpeedZeRoOffload
    replacement = "weights come straight to their places"

    def _difference(self) -> str | None:
        probes = sorted(filter(_fits, sharded(self.owner)), key=lambda p: (p.ds_numel, p.ds_id))
        # of one dtype, as GatheredParameters of DeepSpeed 0.19.0 takes them
        like_first = [(p.ds_process_group, p.dtype) == (probes[0].ds_process_group, probes[0].dtype) for p in probes]
        probes = list(compress(probes, like_first))[:PROBES]
        if not probes:
            return None
        with GatheredParameters(probes):
            expected = [p.detach().clone() for p in probes]
        try:
            WeightHandle(probes).wait()
            alike = all(torch.equal(p.detach(), whole) for p, whole in zip(probes, expected, strict=True))
        except Exception:
            for p in probes:
                p.ds_status = ZeroParamStatus.NOT_AVAILABLE
            raise
        with torch.no_grad():
            for p in probes:
                p.partition()
        return None if alike else "a weight that comes straight to its place is not the one that DeepSpeed gathers"

    def commit(self) -> None:
        for p in sharded(self.owner):
            setattr(p, _GATHER, InPlace(getattr(p, _GATHER)))

    def restore(self) -> None:
        for p in sharded(self.owner):
            gather = getattr(p, _GATHER)
            if isinstance(gather, InPlace):
                setattr(p, _GATHER, gather.stock)

    def in_place(self) -> bool:
        return all(isinstance(getattr(p, _GATHER), InPlace) for p in sharded(self.owner))


def sharded(offload: DeepSpeedZeRoOffload) -> list[nn.Parameter]:
    return [p for p in offload.module.parameters() if hasattr(p, _GATHER)]


class InPlace:
    """Stands where a parameter's ``all_gather_coalesced`` stood."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, params: Iterable[nn.Parameter], safe_mode: bool = False, quantize: bool = False) -> Any:
        # in one order on all ranks
        params = sorted(params, key=lambda p: p.ds_id)
        if safe_mode or quantize or not _fit(params):
            return self.stock(params, safe_mode=safe_mode, quantize=quantize)
        return WeightHandle(params)


def _fit(params: Sequence[nn.Parameter]) -> bool:
    """The same on all ranks."""
    return (
        len({p.ds_process_group for p in params}) == 1
        and dist.get_world_size(params[0].ds_process_group) > 1
        and not comm.comms_logger.enabled
        and all(map(_fits, params))
    )


def _fits(p: nn.Parameter) -> bool:
    return (
        p.ds_status == ZeroParamStatus.NOT_AVAILABLE
        and p.ds_secondary_tensor is None
        and p.ds_tensor.status == PartitionedParamStatus.AVAILABLE
        and not hasattr(p.ds_tensor, "ds_quant_scale")
        and get_allgather_dtype(p, p.ds_tensor) == p.ds_tensor.dtype
    )


class WeightHandle:
    """Weights on their way, started where it is made: DeepSpeed's handle, which is waited for once for each of them."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        group = params[0].ds_process_group
        self._wholes: list[tuple[nn.Parameter, Tensor]] = []
        # dtype -> whole weights, and this rank's parts of them: not every backend mixes them
        calls: defaultdict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for p in params:
            whole, part = _room(p, group)
            wholes, parts = calls[whole.dtype]
            wholes.append(whole)
            parts.append(part)
            self._wholes.append((p, whole))
            p.ds_status = ZeroParamStatus.INFLIGHT
        self._works: list[Work] = []
        for call in calls.values():
            if get_accelerator().device_name() == "cpu":
                # gloo writes into freed memory where several calls of the other kind are on their way (PyTorch 2.13)
                self._works += map(group._allgather_base, *call)
            else:
                self._works.append(group.allgather_into_tensor_coalesced(*call))

    def wait(self, handle_dependency: bool = True) -> None:
        """The current stream waits; nothing happens the second time. DeepSpeed tells the allocator who used a weight
        when it lets go of it, so there is no dependency to handle here.
        """
        for work in self._works:
            work.wait()
        for p, whole in self._wholes:
            # the last shard may end in padding
            p.data = whole[: p.ds_numel].view(p.ds_shape)
            p.ds_status = ZeroParamStatus.AVAILABLE
        self._works, self._wholes = [], []


def _room(p: nn.Parameter, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[W * P] for the whole weight, and this rank's part [P] of it, on the device."""
    device, shard = torch.device(get_accelerator().current_device_name()), p.ds_tensor.detach()
    whole = torch.empty(dist.get_world_size(group) * shard.numel(), dtype=shard.dtype, device=device)
    if shard.device == device:
        return whole, shard
    # an offloaded one: to its own place
    return whole, whole.view(-1, shard.numel())[dist.get_rank(group)].copy_(shard)
