"""What examples of several ops are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from shards import Landed
from torch import Tensor

from ds_fused.ops.vocab.vocab_shard import VocabShard

# what one case calls, and with what, one after the other
Case = tuple[Callable[..., object], list[tuple[Tensor, ...]]]


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


class OneOfTwo(VocabShard):
    """The first of two ranks, which sees itself in the other."""

    ranks, rank, first_id, requires_grad = 2, 0, 0, False
    shape, n_rows, dtype, device = (32000, 8), 16000, torch.bfloat16, torch.device("cpu")

    def rows(self) -> tuple[Tensor, ...]:
        return (leaf(self.n_rows, 8).detach(),)

    def most(self, n: int) -> int:
        return n

    def gather(self, mine: Tensor) -> Landed:
        return Landed(torch.stack([mine, mine]))

    def reduce_scatter(self, parts: Tensor) -> Landed:
        return Landed(parts[0])

    def gradient(self) -> None:
        raise AssertionError("nobody asked for one")


def streams(*leading: int, n: int = 4, c: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    m = n * (n + 2)
    return leaf(*leading, n, c, dtype=dtype), leaf(m, n * c), leaf(m, dtype=torch.float32), leaf(3)


def ids_of(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def heads(n: int, d: int = 8) -> tuple[Tensor, ...]:
    return leaf(n, d), leaf(1024, d), leaf(n, 16).detach(), leaf(1024, 16).detach()


def pairs(n: int, n_vocab: int) -> tuple[Tensor, Tensor]:
    return leaf(n, n_vocab), leaf(n, n_vocab)


def along_a_dimension(op: Callable[..., Tensor]) -> Iterator[Case]:
    for widths in ((257, 40960), (40960, 257), (257, 20480)):
        yield op, [(leaf(65, d),) for d in widths]
    yield op, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield op, [(leaf(b, 3, d, d),) for b, d in ((2, 64), (3, 128))]
    yield partial(op, dim=1), [(leaf(2, n, 64),) for n in (3, 4, 5)]
