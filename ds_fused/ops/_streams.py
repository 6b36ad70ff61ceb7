"""What the ops of hyper-connections share: tensors [..., N, C] of N residual streams, of which kernels see [T, N C]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_fused.ops._triton import rows_of


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


def check_streams(op: str, x: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"{op}: x {tuple(x.shape)} must have two last dimensions, streams and columns")
