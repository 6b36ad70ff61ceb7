"""What operations allocate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The storages that operations made, in elements and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[int, torch.dtype, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                # holding the tensor keeps its address from being used again
                self.seen.setdefault(storage.data_ptr(), (storage.nbytes() // t.element_size(), t.dtype, t))
        return result
