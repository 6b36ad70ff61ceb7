"""Memory for copy engines, of a stand-in: the engines themselves need several GPUs (tests/zero, marker gpus)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.engine.zero3.windows import TokenWindows


class Engines:
    def window(self, n_elements: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n_elements, dtype=dtype)


def test_smaller_windows_are_no_more_than_twice_the_last_one():
    windows, like = TokenWindows(Engines(), 2, 0), torch.empty(1, 64, dtype=torch.bfloat16)
    for n in range(100, 400):
        assert windows.room(n, like).shape == (n, 64)
        # the last one is 1.5 times what is asked for at most
        assert windows.n_bytes <= (1 + 2) * 1.5 * n * 64 * like.itemsize
    few = windows.n_bytes
    windows.room(100, like)
    assert windows.n_bytes == few
    windows.close()
    assert windows.n_bytes == 0


def test_a_first_window_is_as_large_as_asked_for():
    windows = TokenWindows(Engines(), 2, 0)
    windows.parts(100, torch.empty(1, 64, dtype=torch.bfloat16))
    assert windows.n_bytes == 100 * 64 * 4
