"""Attention, whole and by its rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.cases.case import ROWS_OF_WIDTHS, SIZE, Case, Inputs, randn
from benchmarks.rivals import attention as rivals


def row_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    return Inputs({"x": randn(generator, n, d).requires_grad_(), "dy": randn(generator, n, d)}, ("dy",))


def attention_inputs(generator: torch.Generator, b: int, h: int, t: int, d: int) -> Inputs:
    # as projections hand them over: [B, H, T, D] as a view of [B, T, H, D]
    q, k, v, dy = (randn(generator, b, t, h, d).transpose(1, 2) for _ in range(4))
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    return Inputs(tensors | {"dy": dy}, ("dy",))


def multi_token_inputs(
    generator: torch.Generator, b: int, c: int, n: int, *, of_group: int, taps: tuple[int, int]
) -> Inputs:
    scores, dy = (randn(generator, b, c, n, n) for _ in range(2))
    weight = nn.Parameter(randn(generator, c, of_group, *taps, scale=(of_group * taps[0] * taps[1]) ** -0.5))
    bias = nn.Parameter(randn(generator, c))
    # dy leans on a constant and on the weights: dbias and dweight would be sums that cancel otherwise
    dy = dy + 1 + scores.softmax(-1)
    return Inputs({"scores": scores.requires_grad_(), "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def _row_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; y, dy -> dx
    return SIZE * 2 * n * d, SIZE * 5 * n * d


def _sparse_row_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; y -> dx, with dy on the support alone, which is nothing beside them
    return SIZE * 2 * n * d, SIZE * 4 * n * d


def _attention_bytes(b: int, h: int, t: int, d: int) -> tuple[int, int]:
    # q, k, v -> y; q, k, v, y, dy -> dq, dk, dv
    return SIZE * 4 * b * h * t * d, SIZE * 12 * b * h * t * d


def _multi_token_bytes(b: int, c: int, n: int) -> tuple[int, int]:
    # half of the scores -> y; half of the scores and of dy -> dscores
    return SIZE * b * c * n * (3 * n) // 2, SIZE * b * c * n * (7 * n) // 2


# 4096 queries of 32 heads, each over 4096 keys; a vocabulary
ROW_SWEEP = ((131072, 4096), (8192, 128256))
# fewer rows: the sort of the reference takes 40 bytes an element
SPARSE_ROW_SWEEP = ((32768, 4096), (2048, 128256))

CASES = (
    Case(
        "softmax", "", row_inputs, rivals.SOFTMAX,
        sweep=ROW_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_row_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "sparsemax", "", row_inputs, rivals.SPARSEMAX,
        sweep=SPARSE_ROW_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_sparse_row_bytes,
        widths=ROWS_OF_WIDTHS[::4],
    ),
    # nearly the paper's taps, for each head its own (with its 6x11 Liger's planes would not be square); Liger's example
    Case(
        "multi_token_attention", "5x11 a head", partial(multi_token_inputs, of_group=1, taps=(5, 11)),
        rivals.multi_token_providers((2, 5)),
        sweep=((2, 16, 2048), (1, 16, 4096)), launch_bound=(1, 4, 64), tiny=(2, 4, 20), bytes=_multi_token_bytes,
    ),
    Case(
        "multi_token_attention", "3x3 of 4 heads", partial(multi_token_inputs, of_group=4, taps=(3, 3)),
        rivals.multi_token_providers((1, 1)),
        sweep=((8, 4, 2048),), launch_bound=(1, 4, 64), tiny=(2, 4, 20), bytes=_multi_token_bytes,
    ),
    # as long as a score for each pair of tokens allows, which plain PyTorch and Liger hold
    Case(
        "neighborhood_attention", "window 7", attention_inputs, rivals.neighborhood_providers(7),
        sweep=((64, 16, 1024, 128), (4, 16, 4096, 64)), launch_bound=(1, 4, 64, 32), tiny=(2, 2, 20, 8),
        bytes=_attention_bytes,
    ),
    Case(
        "neighborhood_attention", "window 255", attention_inputs, rivals.neighborhood_providers(255),
        sweep=((16, 16, 2048, 128),), launch_bound=(1, 4, 64, 32), tiny=(2, 2, 20, 8), bytes=_attention_bytes,
    ),
)  # fmt: skip
