"""Examples of multi_token_attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import ds_fused.ops as ops
from ds_fused.ops.attention.softmax import softmax_bwd, softmax_fwd
from ds_fused.ops.attention.sparsemax import sparsemax_bwd, sparsemax_fwd
from ds_fused.ops.common._along_rows import LEFT, ZERO
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, heads, of_group, taps, dtype, sparse in (
        (256, 4, 1, (6, 11), half, False),
        (256, 4, 4, (3, 3), half, False),
        (48, 8, 2, (1, 1), half, True),
        (33, 4, 4, (6, 11), half, False),  # a ragged plane
        (1024, 1, 1, (3, 3), full, False),
        (1024, 1, 1, (3, 3), full, True),
    ):
        inputs = (
            leaf(1, heads, n, n, dtype=dtype),
            leaf(heads, of_group, *taps, dtype=dtype),
            leaf(heads, dtype=dtype),
        )
        options = {"padding": tuple(side // 2 for side in taps), "groups": heads // of_group, "sparse": sparse}
        ops.multi_token_attention(*inputs, **options).sum().backward()
    # of more tokens than rows that are taken whole have columns, two rows, whose matrix would take GiB
    x = torch.empty(2, 65536, dtype=half)
    for fwd, bwd in ((softmax_fwd, softmax_bwd), (sparsemax_fwd, sparsemax_bwd)):
        for above in (ZERO, LEFT):
            fwd(x, half, above)
        bwd(x, x, x, ZERO)


def traced() -> Iterator[Case]:
    def planes(n: int, dtype: torch.dtype = torch.bfloat16, b: int = 1, heads: int = 4) -> tuple[Tensor, ...]:
        return leaf(b, heads, n, n, dtype=dtype), leaf(4, heads // 2, 3, 3, dtype=dtype), leaf(4, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float32):
        call = partial(ops.multi_token_attention, padding=1, groups=2)
        yield call, [planes(n, dtype) for n in (33, 34, 64)]
        yield call, [planes(33, dtype, b) for b in (1, 2, 3)]
        yield partial(call, stride=2, sparse=True), [planes(n, dtype) for n in (33, 34)]
    yield lambda x, w: ops.multi_token_attention(x, w.detach(), dilation=2, groups=2), [planes(n)[:2] for n in (33, 65)]
    yield lambda x, *more: ops.multi_token_attention(x.detach(), *more, groups=2), [planes(n) for n in (33, 65)]
