"""Traces every op of ds_fused.ops with torch.compile's dynamo, forward and backward, as on a GPU; none is needed.

    python tests/ops/trace_all.py [all]

Needs a process of its own, without TRITON_INTERPRET. Tensors lie on the CPU, the kernels are traced and nothing is run.
Prints as JSON what stopped a trace: of every other case of each op, or of all. Each op is called with one shape after
the other, for that makes dynamo take the sizes that change for symbols; where a launcher then needs such a size as a
number, it is a symbol with a known value, in which dynamo 2.11 to 2.13 has a bug (see row_stride in
ds_fused/ops/common/_triton.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice

import torch
import torch.utils._triton
import triton
from compile_all import leaf, of_every_op
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    get_mutated_tensors,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ds_fused.ops as ops
from ds_fused.ops.common import _meet
from ds_fused.ops.common._launch import Kept
from ds_fused.ops.common._warmup import Absent

MULTIPROCESSORS = 132

# what one case calls, and with what, one after the other
Case = tuple[Callable[..., object], list[tuple[Tensor, ...]]]


def rms_norm() -> Iterator[Case]:
    # a whole row, one that is walked backward, one that is walked
    widths = (257, 20480, 40960)
    for first, second in ((a, b) for a in widths for b in widths if a != b):
        yield ops.rms_norm, [(leaf(65, d), leaf(d)) for d in (first, second)]
    # of the last ones programs share rows of partial sums
    yield ops.rms_norm, [(leaf(n, 4096), leaf(4096)) for n in (3, 65, 66, 8193, 8194)]
    yield lambda x: ops.rms_norm(x, None), [(leaf(2, 3, d),) for d in (64, 128)]
    yield ops.rms_norm, [(leaf(2, 3, d), leaf(d)) for d in (64, 128)]
    yield lambda x, bias: ops.rms_norm(x, None, bias=bias), [(leaf(n, 64), leaf(64)) for n in (3, 4, 5)]
    yield lambda x: ops.rms_norm(x, None, overwrite_grad=True), [(leaf(n, 64),) for n in (3, 4)]


def add_rms_norm() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield ops.add_rms_norm, [(leaf(65, d), leaf(65, d), leaf(d)) for d in (first, second)]
    yield ops.add_rms_norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.add_rms_norm, [(leaf(2, 3, d), leaf(2, 3, d), leaf(d)) for d in (64, 128)]
    yield lambda x, residual: ops.add_rms_norm(x, residual, None)[0], [(leaf(5, d), leaf(5, d)) for d in (64, 128)]
    mixed = [(leaf(n, 64), leaf(n, 64, dtype=torch.float32), leaf(64).detach()) for n in (3, 4)]
    yield ops.add_rms_norm, mixed
    yield ops.add_rms_norm, [(leaf(n, 64).detach(), leaf(n, 64).detach(), leaf(64)) for n in (3, 4)]


def gated_rms_norm() -> Iterator[Case]:
    for options in ({}, {"order": "gate_first", "group_size": 64}):
        norm = partial(ops.gated_rms_norm, **options)
        for widths in ((256, 40960), (40960, 256)):
            yield norm, [(leaf(65, d), leaf(65, d), leaf(d)) for d in widths]
        yield norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield lambda x, gate: ops.gated_rms_norm(x, gate, None), [(leaf(5, d).detach(), leaf(5, d)) for d in (64, 128)]
    yield lambda x: ops.gated_rms_norm(*x.chunk(2, -1), None), [(leaf(5, 2 * d),) for d in (64, 128, 100)]


def modulated_rms_norm() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield (
            ops.modulated_rms_norm,
            [(leaf(2, 65, d), leaf(d), leaf(2, 1, d), leaf(2, 1, d)) for d in (first, second)],
        )
    yield ops.modulated_rms_norm, [(leaf(2, n, 64), leaf(64), leaf(2, 1, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.modulated_rms_norm, [(leaf(n, 3, 64), leaf(64), leaf(n, 1, 64)) for n in (2, 3, 4)]
    yield ops.modulated_rms_norm, [(leaf(2, n, 4096), leaf(4096), leaf(2, 1, 4096)) for n in (65, 5000, 5001)]
    yield lambda x, scale: ops.modulated_rms_norm(x, None, scale), [(leaf(2, n, 64), leaf(2, n, 64)) for n in (3, 4)]
    six = [(leaf(2, 5, d), leaf(2, 1, 6 * d)) for d in (64, 128)]
    yield lambda x, six: ops.modulated_rms_norm(x, None, *six.chunk(6, -1)[:2]), six


def experts() -> Iterator[Case]:
    def routed(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        ids = torch.zeros(weights.shape, dtype=torch.int64)
        return ops.experts(x, gate_up, down, ids, weights, limit=7.0)

    for tokens, sizes in (((3, 4, 5), ((64, 48),)), ((70,), ((64, 48), (128, 32), (33, 7)))):
        yield (
            routed,
            [(leaf(n, h), leaf(3, 2 * i, h), leaf(3, h, i), leaf(n, 2)) for n in tokens for h, i in sizes],
        )
    # so many that tiles are copied
    yield routed, [(leaf(n, 2048), leaf(3, 1536, 2048), leaf(3, 2048, 768), leaf(n, 2)) for n in (700, 701, 702)]
    yield routed, [(leaf(n, 2, 64), leaf(3, 96, 64).detach(), leaf(3, 64, 48), leaf(n, 2, 2)) for n in (3, 4)]


def attention_residual() -> Iterator[Case]:
    yield ops.attention_residual, [(leaf(n, 3, 64), leaf(64), leaf(64)) for n in (3, 4, 5)]
    yield ops.attention_residual, [(leaf(3, 2, t, d), leaf(d), leaf(d)) for t, d in ((3, 64), (4, 64), (4, 128))]
    # blocks that the backward holds, or not
    yield ops.attention_residual, [(leaf(n, t, 4096), leaf(4096)) for n, t in ((4, 3), (5, 3), (6, 4), (6, 5))]
    yield ops.attention_residual, [(leaf(8, 3, d), leaf(d)) for d in (2048, 3072, 4096)]
    yield lambda query, *blocks: ops.attention_residual(blocks, query), [(leaf(4096), *[leaf(2, 3, 4096)] * 8)]
    # wider than its kernels take
    yield ops.attention_residual, [(leaf(2, 3, 20480), leaf(20480))]
    for n in (1, 3, 17):
        yield lambda query, *blocks: ops.attention_residual(blocks, query), [(leaf(64), *[leaf(2, 3, 64)] * n)]


def streams(*leading: int, n: int = 4, c: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    m = n * (n + 2)
    return leaf(*leading, n, c, dtype=dtype), leaf(m, n * c), leaf(m, dtype=torch.float32), leaf(3)


def mhc_coefficients() -> Iterator[Case]:
    yield ops.mhc_coefficients, [streams(2, t) for t in (3, 4, 5)]
    yield ops.mhc_coefficients, [streams(t, c=c) for t, c in ((64, 16), (64, 32), (200, 32))]
    yield (
        lambda x, phi, *more: ops.mhc_coefficients(x.transpose(0, 1), phi.T, *more)[2],
        [(x.detach(), leaf(64, 24), bias, scale) for x, _, bias, scale in (streams(2, t) for t in (3, 4))],
    )


def mhc_in() -> Iterator[Case]:
    yield ops.mhc_in, [streams(2, t) for t in (3, 4, 5)]


def mhc_pre() -> Iterator[Case]:
    yield ops.mhc_pre, [(leaf(2, t, 4, c), leaf(2, t, 4)) for t, c in ((3, 16), (4, 16), (4, 32))]


def mhc_post_res() -> Iterator[Case]:
    yield (
        ops.mhc_post_res,
        [(leaf(2, t, 4, c), leaf(2, t, c), leaf(2, t, 4), leaf(2, t, 4, 4)) for t, c in ((3, 16), (4, 16), (4, 32))],
    )


def embedding() -> Iterator[Case]:
    yield ops.embedding, [(labels(n), leaf(11, 64)) for n in (3, 4, 5)]
    yield ops.embedding, [(labels(600), leaf(11, h)) for h in (64, 128, 2000)]
    yield partial(ops.embedding, padding_idx=-1), [(labels(2 * n).view(2, n), leaf(v, 64)) for n, v in ((3, 5), (4, 6))]


def softmax() -> Iterator[Case]:
    yield from along_a_dimension(ops.softmax)


def sparsemax() -> Iterator[Case]:
    yield from along_a_dimension(ops.sparsemax)


def along_a_dimension(op: Callable[..., Tensor]) -> Iterator[Case]:
    for widths in ((257, 40960), (40960, 257), (257, 20480)):
        yield op, [(leaf(65, d),) for d in widths]
    yield op, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield op, [(leaf(b, 3, d, d),) for b, d in ((2, 64), (3, 128))]
    yield partial(op, dim=1), [(leaf(2, n, 64),) for n in (3, 4, 5)]


def multi_token_attention() -> Iterator[Case]:
    def planes(n: int, dtype: torch.dtype = torch.bfloat16, b: int = 1, heads: int = 4) -> tuple[Tensor, ...]:
        return leaf(b, heads, n, n, dtype=dtype), leaf(4, heads // 2, 3, 3, dtype=dtype), leaf(4, dtype=dtype)

    for dtype in (torch.bfloat16, torch.float32):
        call = partial(ops.multi_token_attention, padding=1, groups=2)
        yield call, [planes(n, dtype) for n in (33, 34, 64)]
        yield call, [planes(33, dtype, b) for b in (1, 2, 3)]
        yield partial(call, stride=2, sparse=True), [planes(n, dtype) for n in (33, 34)]
    yield lambda x, w: ops.multi_token_attention(x, w.detach(), dilation=2, groups=2), [planes(n)[:2] for n in (33, 65)]
    yield lambda x, *more: ops.multi_token_attention(x.detach(), *more, groups=2), [planes(n) for n in (33, 65)]


def neighborhood_attention() -> Iterator[Case]:
    def heads_of(tokens: int, d: int, n_heads: int = 2) -> tuple[Tensor, ...]:
        return tuple(leaf(1, tokens, n_heads, d).transpose(1, 2) for _ in range(3))

    yield ops.neighborhood_attention, [heads_of(n, 64) for n in (3, 4, 5)]
    yield ops.neighborhood_attention, [heads_of(65, d) for d in (64, 128, 80)]
    yield ops.neighborhood_attention, [tuple(leaf(b, 4, 33, 64) for _ in range(3)) for b in (1, 2, 3)]
    dilated = partial(ops.neighborhood_attention, kernel_size=255, dilation=3, scale=0.5, border="shift")
    yield lambda q, k, v: dilated(q, k.detach(), v.detach()), [heads_of(n, 64) for n in (70, 71, 72)]


def glu() -> Iterator[Case]:
    yield ops.glu, [(leaf(5, d), leaf(5, d)) for d in (64, 128, 100)]
    yield ops.glu, [(leaf(2, n, 64), leaf(2, n, 64)) for n in (3, 4, 5)]
    yield lambda packed: ops.glu(*packed.chunk(2, -1)), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
    yield lambda packed: ops.glu(packed, act="relu2"), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
    clamped = partial(ops.glu, interleaved=True, alpha=1.702, limit=7.0, offset=1.0)
    yield clamped, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield lambda gate, up: ops.glu(gate, up.detach()), [(leaf(5, d), leaf(5, d)) for d in (64, 128)]


def rope() -> Iterator[Case]:
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


def rms_norm_rope() -> Iterator[Case]:
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


def relu2() -> Iterator[Case]:
    yield ops.relu2, [(leaf(5, d),) for d in (64, 128, 100)]
    yield ops.relu2, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield lambda x: ops.relu2(x.chunk(2, -1)[0]), [(leaf(5, 2 * d),) for d in (64, 128, 100)]


def lora_linear() -> Iterator[Case]:
    adapted = [leaf(32, 64), leaf(4, 64), leaf(32, 4)]
    yield ops.lora_linear, [(leaf(5, n, 64), *adapted) for n in (3, 4, 5)]
    wide = [leaf(32, 64), leaf(4, 64).detach().float().requires_grad_(), leaf(32, 4).detach().float().requires_grad_()]
    yield ops.lora_linear, [(leaf(5, n, 64), *wide) for n in (3, 4, 5)]
    yield partial(ops.lora_linear, scaling=0.7), [(leaf(n, 64), *adapted, leaf(32), leaf(n, 64)) for n in (3, 4)]


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def cross_entropy() -> Iterator[Case]:
    yield ops.cross_entropy, [(leaf(5, n_vocab), labels(5)) for n_vocab in (1024, 32000)]
    yield ops.cross_entropy, [(leaf(n, 1024), labels(n)) for n in (3, 4, 5)]
    overwriting = partial(ops.cross_entropy, overwrite_logits=True, label_smoothing=0.1, softcap=30.0)
    yield lambda x, labels: overwriting(x * 2, labels), [(leaf(5, 1024), labels(5))]
    in_forward = partial(ops.cross_entropy, grad_in_forward=True, upstream=0.25)
    yield lambda x, labels: in_forward(x * 2, labels), [(leaf(n, 1024), labels(n)) for n in (3, 4)]
    for smoothing in (0.0, 0.1):
        more = partial(ops.cross_entropy, label_smoothing=smoothing, return_z_loss=True, return_accuracy=True)
        yield (
            lambda x, labels, weight, more=more: more(x, labels, weight=weight)[0],
            [(leaf(n, 1024), labels(n), torch.ones(1024)) for n in (3, 4, 5)],
        )


def linear_cross_entropy() -> Iterator[Case]:
    yield ops.linear_cross_entropy, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4, 5)]
    yield ops.linear_cross_entropy, [(leaf(5, d), leaf(1024, d), labels(5)) for d in (8, 16)]
    recomputed = partial(ops.linear_cross_entropy, keep_mb=0, reduction="sum", logit_scale=0.5)
    yield recomputed, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4)]
    one_pass = partial(ops.linear_cross_entropy, grad_in_forward=True)
    yield one_pass, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4)]
    more = partial(ops.linear_cross_entropy, label_smoothing=0.1, return_z_loss=True, return_accuracy=True)
    yield (
        lambda x, weight, labels, of_class: more(x, weight, labels, class_weight=of_class)[0],
        [(leaf(n, 8), leaf(1024, 8), labels(n), torch.ones(1024)) for n in (3, 4)],
    )


def linear_log_probs() -> Iterator[Case]:
    both = partial(ops.linear_log_probs, entropy=True, temperature=0.7)
    yield both, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4, 5)]
    recomputed = partial(ops.linear_log_probs, keep_mb=0, softcap=30.0)
    yield recomputed, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4)]


def heads(n: int, d: int = 8) -> tuple[Tensor, ...]:
    return leaf(n, d), leaf(1024, d), leaf(n, 16).detach(), leaf(1024, 16).detach()


def linear_jsd() -> Iterator[Case]:
    yield ops.linear_jsd, [(*heads(n), labels(n)) for n in (3, 4, 5)]
    yield ops.linear_jsd, [heads(5, d) for d in (8, 16)]
    yield partial(ops.linear_jsd, keep_mb=0, reduction="sum", beta=0.1), [(*heads(n), labels(n)) for n in (3, 4)]


def linear_kl_div() -> Iterator[Case]:
    for reverse in (False, True):
        yield partial(ops.linear_kl_div, reverse=reverse), [heads(n) for n in (3, 4)]


def linear_cosine() -> Iterator[Case]:
    yield ops.linear_cosine, [(*heads(n), labels(n)) for n in (3, 4, 5)]
    yield partial(ops.linear_cosine, keep_mb=0, reduction="sum"), [heads(n) for n in (3, 4)]


def kl_div() -> Iterator[Case]:
    for reduction in ("batchmean", "none"):
        call = partial(ops.kl_div, reduction=reduction)
        yield call, [(leaf(5, d), leaf(5, d)) for d in (64, 128, 100)]
        yield call, [(leaf(n, 64), leaf(n, 64).detach()) for n in (3, 4, 5)]
    yield lambda both: ops.kl_div(*both.chunk(2, -1), log_target=True), [(leaf(5, 2 * d),) for d in (64, 128)]


def pairs(n: int, n_vocab: int) -> tuple[Tensor, Tensor]:
    return leaf(n, n_vocab), leaf(n, n_vocab)


def jsd() -> Iterator[Case]:
    for beta in (0.0, 0.5):
        call = partial(ops.jsd, beta=beta)
        yield call, [pairs(5, n_vocab) for n_vocab in (1024, 32000)]
        yield call, [(*pairs(n, 1024), labels(n)) for n in (3, 4, 5)]
    yield partial(ops.jsd, reduction="none", temperature=2.0), [(leaf(n, 8), torch.ones(n, 8)) for n in (3, 4)]


def tvd() -> Iterator[Case]:
    yield ops.tvd, [pairs(5, n_vocab) for n_vocab in (1024, 32000)]
    yield ops.tvd, [(*pairs(n, 1024), labels(n)) for n in (3, 4, 5)]


def layer_norm() -> Iterator[Case]:
    # a whole row, one that is walked backward, one that is walked
    widths = (257, 20480, 40960)
    for first, second in ((a, b) for a in widths for b in widths if a != b):
        yield ops.layer_norm, [(leaf(65, d), leaf(d), leaf(d)) for d in (first, second)]
    yield ops.layer_norm, [(leaf(n, 4096), leaf(4096), leaf(4096)) for n in (3, 65, 66, 8193, 8194)]
    yield lambda x: ops.layer_norm(x, None), [(leaf(2, 3, d),) for d in (64, 128)]


def add_layer_norm() -> Iterator[Case]:
    yield ops.add_layer_norm, [(leaf(65, d), leaf(65, d), leaf(d), leaf(d)) for d in (257, 20480, 40960)]
    yield ops.add_layer_norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.add_layer_norm, [(leaf(5, 64).detach(), leaf(5, 64).detach(), leaf(64))]
    yield lambda *inputs: ops.add_layer_norm(*inputs)[0], [(leaf(5, 64), leaf(5, 64), leaf(64))]


def group_norm() -> Iterator[Case]:
    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, 8, weight, bias)

    # whole groups and groups in parts, one after the other
    for sides in ((16, 64, 128), (64, 16, 24)):
        yield normed, [(leaf(2, 80, side, side), leaf(80), leaf(80)) for side in sides]
    yield normed, [(leaf(n, c), leaf(c), leaf(c)) for n, c in ((3, 64), (4, 64), (5, 128))]
    yield lambda x: ops.group_norm(x, 8), [(leaf(n, 64, 7),) for n in (3, 4, 5)]


def dyt() -> Iterator[Case]:
    for sizes in (((5, 64), (5, 128), (5, 100)), ((3, 4096), (4, 4096), (4, 257))):
        yield ops.dyt, [(leaf(n, d), leaf(1), leaf(d), leaf(d)) for n, d in sizes]
    yield ops.dyt, [(leaf(2, 3, d), leaf(1), leaf(d)) for d in (64, 128)]


def poly_norm() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield ops.poly_norm, [(leaf(65, d), leaf(3), leaf(1)) for d in (first, second)]
    yield ops.poly_norm, [(leaf(2, n, 64), leaf(3), leaf(1)) for n in (3, 4, 5)]
    yield lambda x, weight: ops.poly_norm(x, weight), [(leaf(2, 3, d), leaf(3).detach()) for d in (64, 128)]


EXAMPLES = of_every_op(globals())
KEPT = [
    kept
    for name, module in [*sys.modules.items()]
    if name.startswith("ds_fused.ops.")
    for kept in vars(module).values()
    if isinstance(kept, Kept)
]


class Traced(Exception):
    """Dynamo has its graph, which is all that was to be seen."""


def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., None]:
    """What Inductor would do otherwise than a launch does is a problem, too: it gives each tensor that a kernel writes
    memory of its own, so one that goes in twice would be two; and it passes floats in fp64.
    """
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if node.target is triton_kernel_wrapper_mutation:
                kernel = kernel_of(node)
                tensors = [x for x in node.kwargs["kwargs"].values() if isinstance(x, torch.fx.Node)]
                # asked only where it matters: the answer takes Inductor a compilation's first steps
                names = names_written(node) if len(set(tensors)) < len(tensors) else []
                if len({node.kwargs["kwargs"][name] for name in names}) < len(names):
                    raise ValueError(f"{kernel.__name__} writes one tensor by two of {', '.join(names)}")
                if wide := floats_that_stay_wide(kernel, node):
                    raise ValueError(f"{kernel.__name__} does not make {', '.join(wide)} fp32 by tl.cast")

    def run(*_: object) -> None:
        raise Traced

    return run


def kernel_of(node: torch.fx.Node) -> JITFunction:
    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return kernel if isinstance(kernel, JITFunction) else kernel.fn  # in an autotuner, which holds num_warps


def floats_that_stay_wide(kernel: JITFunction, node: torch.fx.Node) -> list[str]:
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    floats = [name for name, x in {**node.kwargs["kwargs"], **constants}.items() if isinstance(x, float)]
    return [name for name in floats if name not in fixed and f"{name} = tl.cast({name}, tl.float32)" not in kernel.src]


def names_written(node: torch.fx.Node) -> list[str]:
    """The pointers by which a launch in a graph writes, as Inductor finds them."""
    kwargs = {
        name: arg.meta["example_value"] if isinstance(arg, torch.fx.Node) else arg
        for name, arg in node.kwargs["kwargs"].items()
    }
    where = [node.kwargs[key] for key in ("kernel_idx", "constant_args_idx")]
    return get_mutated_tensors(*where, kwargs, node.kwargs["tma_descriptor_metadata"])


def problem(call: Callable[..., object], inputs: list[tuple[Tensor, ...]]) -> str | None:
    """What kept dynamo from making one graph of a call, or has it make one again for the same call."""
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, more: list[Tensor]) -> Callable[..., None]:
        graphs.append(graph)
        return backend(graph, more)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for tensors in inputs:
        try:
            compiled(*tensors)
        except Traced:
            pass
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            return f"{shapes}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    made = len(graphs)
    # as eager calls of other shapes do
    for kept in KEPT:
        kept.keep(("eager",), None)
    with suppress(Traced):
        compiled(*inputs[-1])
    for kept in KEPT:
        kept.by_key.clear()
    return "what eager calls keep makes the graph anew" if len(graphs) > made else None


def pretend_to_have_a_gpu() -> None:
    triton.runtime.driver.set_active(Absent(GPUTarget("cuda", 90, 32), 0))
    # dynamo asks before it looks whether a function is a kernel
    torch.utils._triton.has_triton = lambda: True
    _meet.DEVICES = ("cpu",)
    answers = {
        "runs_kernels": lambda *_: True,
        "multiprocessors": lambda _: MULTIPROCESSORS,
        "copies_tiles": lambda _: True,
        # on a CPU it reads them
        "flat_ids": lambda _op, ids, _n_vocab, **_: ids.reshape(-1),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("ds_fused.ops.")]:
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)


def main(every: int) -> None:
    pretend_to_have_a_gpu()
    problems = {}
    for example in EXAMPLES:
        found = [p for case in islice(example(), 0, None, every) if (p := problem(*case)) is not None]
        if found:
            problems[example.__name__] = found
    print(json.dumps({"problems": problems}))


if __name__ == "__main__":
    main(every=1 if sys.argv[1:] == ["all"] else 2)
