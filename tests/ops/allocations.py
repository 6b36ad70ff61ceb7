"""What operations allocate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
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


class Peak(TorchDispatchMode):
    """The most bytes that storages which operations made took at once."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self._there = {t.untyped_storage().data_ptr() for t in there}
        self._living: dict[int, tuple[int, StorageWeakRef]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._living = {at: entry for at, entry in self._living.items() if not entry[1].expired()}
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and (at := t.untyped_storage().data_ptr()) not in self._there:
                storage = t.untyped_storage()
                self._living[at] = storage.nbytes(), StorageWeakRef(storage)
        self.bytes = max(self.bytes, sum(n for n, _ in self._living.values()))
        return result
