"""A vector under ZeRO-3 (the bias of a head in slabs), gathered whole for one use; its gradient goes the way of slabs'.

A number for each word is little beside a slab of rows, so one all-gather brings it in forward, and one reduce-scatter
takes its gradient in backward; both whatever the tokens are.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_fused.engine.zero3.delivery import Delivery
from ds_fused.ops.common._once import once_differentiable


class _Gather(torch.autograd.Function):
    """An empty anchor, which requires grad where the vector does, to the vector [V]."""

    @staticmethod
    def forward(ctx, anchor: Tensor, vector: ZeroVector) -> Tensor:
        ctx.vector = vector
        return vector.gather()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None]:
        ctx.vector.scatter(dy)
        return None, None


class ZeroVector:
    """One sharded vector. Every rank of its group calls the same methods in the same order."""

    def __init__(self, delivery: Delivery) -> None:
        self.param = param = delivery.param
        self._delivery = delivery
        self._group = param.ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._device = torch.device(get_accelerator().current_device_name())

    def __call__(self) -> Tensor:
        """The vector as autograd is to see it."""
        dtype = self.param.ds_tensor.dtype
        anchor = torch.empty(0, dtype=dtype, device=self._device, requires_grad=self._delivery.requires_grad)
        return _Gather.apply(anchor, self)

    def gather(self) -> Tensor:
        # offloaded shards lie on the CPU
        mine = self.param.ds_tensor.data.to(self._device, non_blocking=True)
        whole = mine.new_empty(self._ranks * mine.numel())
        dist.all_gather_into_tensor(whole, mine, group=self._group)
        # without what is behind the last shard's end
        return whole[: self.param.ds_numel]

    def scatter(self, dy: Tensor) -> None:
        optimizer, size = self._delivery.engine.optimizer, self.param.ds_tensor.ds_numel
        parts = dy.new_zeros(self._ranks * size, dtype=optimizer.get_param_comm_dtype(self.param))
        parts[: dy.numel()] = dy
        # stock's own order of roundings: each rank's share of the mean, then the sum
        parts.div_(self._ranks)
        mine = parts.new_empty(size)
        dist.reduce_scatter_tensor(mine, parts, group=self._group)
        self._delivery.give(mine.to(optimizer.gradient_accumulation_dtype))
