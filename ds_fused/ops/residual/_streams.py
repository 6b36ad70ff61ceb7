"""What the ops of hyper-connections share: tensors [..., N, C] of N residual streams, of which kernels see [T, N C]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_fused.ops.common._triton import rows_of

# all of a token's are in a tile, and of res their square
MOST_STREAMS = 16


def tokens_of(x: Tensor) -> int:
    """T of x [..., N, C]."""
    return math.prod(x.shape[:-2])


def streams_of(x: Tensor) -> tuple[Tensor, int]:
    """x [..., N, C] where a token's streams lie one behind the other, and the elements from one token to the next."""
    if torch.compiler.is_compiling():
        # as in row_stride: dynamo can't say the strides of every tensor
        return x.contiguous(), x.shape[-2] * x.shape[-1]
    rows = rows_of(x.flatten(-2))
    return rows, rows.stride(0)


def check_streams(op: str, x: Tensor, least: int = 0) -> None:
    if x.ndim < 2:
        raise ValueError(f"{op}: x {tuple(x.shape)} must have two last dimensions, streams and columns")
    n, c = x.shape[-2:]
    if not least <= n <= MOST_STREAMS or c < least:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} has {n} streams of {c} columns; there may be {least} to {MOST_STREAMS}"
        )
