"""Examples of rms_norm_rope."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for (q_heads, k_heads, d, r), dtype, weight_dtype, options in (
        ((32, 8, 128, 128), half, half, {}),  # Qwen3-8B
        ((8, 4, 256, 256), half, half, {"cast": "after_weight", "offset": 1.0}),  # Gemma 3
        ((16, 2, 256, 64), half, full, {"keep_dtype": True}),  # Qwen3-Next
        ((96, 8, 128, 64), half, half, {}),  # GLM-4.5
        ((3, 3, 96, 80), full, full, {"cast": "after_weight"}),
        ((1, 1, 4096, 4096), half, half, {}),  # heads wider than a tile
    ):
        q, k = (leaf(1, 3, heads, d, dtype=dtype).transpose(1, 2) for heads in (q_heads, k_heads))
        weights, cos = [leaf(d, dtype=weight_dtype) for _ in range(2)], torch.ones(1, 3, r, dtype=dtype)
        torch.autograd.backward([y.sum() for y in ops.rms_norm_rope(q, k, *weights, cos, cos, **options)])
    # under LoRA
    weights = [weight.detach() for weight in weights]
    torch.autograd.backward([y.sum() for y in ops.rms_norm_rope(q, k, *weights, cos, cos)])


def traced() -> Iterator[Case]:
    def inputs(tokens: int, heads: int, width: int, r: int) -> tuple[Tensor, ...]:
        q, k = (leaf(1, tokens, h, width).transpose(1, 2) for h in (heads, 2))
        return q, k, leaf(width), leaf(width), torch.ones(1, tokens, r), torch.ones(1, tokens, r)

    yield ops.rms_norm_rope, [inputs(n, 4, 64, 64) for n in (3, 4, 5)]
    yield ops.rms_norm_rope, [inputs(5, 4, d, 32) for d in (64, 128)]
    yield ops.rms_norm_rope, [inputs(5, h, 64, 64) for h in (4, 8)]
    as_gemma = partial(ops.rms_norm_rope, cast="after_weight", offset=1.0, keep_dtype=True, overwrite_grad=True)
    yield lambda q, k, *rest: as_gemma(q, k.detach(), *rest), [inputs(n, 4, 64, 64) for n in (3, 4, 5)]
    yield (
        lambda q, k, *rest: ops.rms_norm_rope(q.transpose(1, 2), k.transpose(1, 2), *rest, unsqueeze_dim=2),
        [inputs(n, 4, 64, 32) for n in (3, 4, 5)],
    )
