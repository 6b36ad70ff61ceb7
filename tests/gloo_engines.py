"""What stands for copy engines on CPUs: collectives of a gloo group of its own, over windows that begin as NaN."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ds_fused.engine.zero3.copy_engines import CopyEngines


class GlooEngines(CopyEngines):
    def _made_group(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")

    def window(self, n_elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((n_elements,), float("nan"), dtype=dtype)

    def gather(self, everyones: torch.Tensor) -> dist.Work:
        mine = everyones.view(dist.get_world_size(), -1)[dist.get_rank()].clone()
        return dist.all_gather_into_tensor(everyones.view(-1), mine, group=self._group, async_op=True)
