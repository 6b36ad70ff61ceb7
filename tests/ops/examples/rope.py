"""Examples of rope."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for d, r, interleaved, dtype in (
        (128, 128, False, torch.bfloat16),
        (128, 64, True, torch.bfloat16),
        (96, 80, False, torch.float32),
    ):
        cos = torch.ones(1, 3, r, dtype=dtype)
        q, k = leaf(1, 3, 32, d, dtype=dtype).transpose(1, 2), leaf(1, 3, 8, d, dtype=dtype).transpose(1, 2)
        torch.autograd.backward([y.sum() for y in ops.rope(q, k, cos, cos, interleaved=interleaved)])
    # columns that stay are neither read nor written
    ys = ops.rope(q, k, cos, cos, overwrite_grad=True)
    torch.autograd.backward(ys, [y.detach() for y in ys])
    q, k = leaf(1, 3, 32, 128), leaf(1, 3, 8, 128)
    freqs = torch.ones(1, 3, 64, dtype=torch.complex64)
    turned = ops.rope(q, k, freqs, interleaved=True, unsqueeze_dim=2, keep_dtype=True)  # Llama-4
    torch.autograd.backward([y.sum() for y in turned])
    cos = torch.ones(3, 1, 3, 128, dtype=torch.bfloat16)
    for sections, alternating in (((16, 24, 24), False), ((24, 20, 20), True)):  # Qwen2-VL, Qwen3-VL
        options = {"sections": sections, "alternating": alternating, "unsqueeze_dim": 2}
        torch.autograd.backward([y.sum() for y in ops.rope(q, k, cos, cos, **options)])
    ops.rope(q.detach(), k.detach(), cos[0], cos[0], unsqueeze_dim=2, inplace=True)


def traced() -> Iterator[Case]:
    def inputs(tokens: int, heads: int, width: int) -> tuple[Tensor, ...]:
        q, k = (leaf(1, tokens, h, width).transpose(1, 2) for h in (heads, 2))
        return q, k, torch.ones(1, tokens, width), torch.ones(1, tokens, width)

    yield ops.rope, [inputs(n, 4, 64) for n in (3, 4, 5)]
    yield ops.rope, [inputs(5, 4, d) for d in (64, 128)]
    yield ops.rope, [inputs(5, h, 64) for h in (4, 8)]
    yield lambda q, k, *rest: ops.rope(q, k.detach(), *rest), [inputs(n, 4, 64) for n in (3, 4, 5)]
    by_sections = partial(ops.rope, sections=(8, 12, 12))
    yield (
        lambda q, k, *three: by_sections(q, k, *(x.expand(3, *x.shape) for x in three)),
        [inputs(n, 4, 64) for n in (3, 4, 5)],
    )
    by_pairs = partial(ops.rope, interleaved=True, keep_dtype=True, inplace=True, overwrite_grad=True)
    yield (
        lambda q, k, cos, sin: by_pairs(q * 1, k * 1, torch.complex(cos, sin)),
        [(*inputs(n, 4, 64)[:2], *inputs(n, 4, 32)[2:]) for n in (3, 4, 5)],
    )
