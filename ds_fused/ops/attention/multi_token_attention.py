"""Multi-token attention: scores are softmaxed under a causal mask, and the weights mixed by a convolution.

    y = tril(conv2d(softmax(scores where k <= q, else -inf), weight, bias))

over queries and keys, [L, L], and channels, the heads (Golovneva, Wang, Weston and Sukhbaatar, "Multi-Token Attention",
2025): with ``groups`` as many as heads each head's weights are mixed with those of neighbouring queries and keys, with
fewer also with other heads'. ``sparse`` has sparsemax in softmax's place.

The masks cost nothing: what lies above the diagonal is neither read nor, but for the zeros of y and of the scores'
gradient, written. In 16 bits, with a stride of 1 and few channels in a group, the convolution is one of our own
(_causal_conv.py); else it is PyTorch's, on weights with zeros above the diagonal, and as deterministic as that is.

Saved for backward: the weights of attention, and weight. Their gradient takes the memory of the scores'.
Traffic in planes [L, L], of our own convolution: forward reads and writes 2.5 (scores, weights of attention twice, half
of each; y), backward 4 (dy twice, weights of attention twice and their gradient twice, half of each; the scores').

Sizes: B batch entries, C heads, L tokens, [height, width] taps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.attention._causal_conv import Window, causal_conv, causal_conv_taps, fits
from ds_fused.ops.attention.softmax import softmax_bwd, softmax_fwd, softmax_reference
from ds_fused.ops.attention.sparsemax import sparsemax_bwd, sparsemax_fwd, sparsemax_reference
from ds_fused.ops.common._along_rows import LEFT, ZERO
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import WHOLE, check_whole
from ds_fused.ops.common._triton import autocast_dtype, check_dtypes, like, rows_of, runs_kernels

Pair = int | tuple[int, int]


def multi_token_attention_reference(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    p = sparsemax_reference(scores) if sparse else softmax_reference(scores)
    return F.conv2d(p, weight, bias, stride, padding, dilation, groups).tril()


class MultiTokenAttentionFunction(torch.autograd.Function):
    """Autograd around rows and convolution: scores come as rows [B C L, L], and with their shape; ``window`` is None
    where the convolution is PyTorch's.
    """

    @staticmethod
    def forward(
        ctx,
        scores: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        options: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
        window: Window | None,
        sparse: bool,
    ) -> Tensor:
        rows = sparsemax_fwd if sparse else softmax_fwd
        p = rows(scores, weight.dtype, ZERO if window is None else LEFT).view(shape)
        if window is None:
            y = F.conv2d(p, weight, bias, *options)
            # of what was changed in place a graph of torch 2.11 has gradients of 0
            y = y.tril() if torch.compiler.is_compiling() else y.tril_()
        else:
            y = p.new_empty(*p.shape[:1], *weight.shape[:1], *window.size(*p.shape[2:]))
            if y.numel():
                causal_conv(p, weight, bias, y, window)
        ctx.save_for_backward(p, weight, bias)
        ctx.options, ctx.window, ctx.sparse, ctx.dtype = options, window, sparse, scores.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, weight, bias = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if ctx.window is None:
            stride, padding, dilation, groups = ctx.options
            sizes = None if bias is None else bias.shape
            dp, dweight, dbias = torch.ops.aten.convolution_backward(
                dy.tril(), p, weight, sizes, stride, padding, dilation, False, (0, 0), groups, wants
            )
        else:
            dp, dweight, dbias = _conv_bwd(dy.contiguous(), p, weight, bias, ctx.window, wants)
        dscores = None
        if wants[0]:
            rows = sparsemax_bwd if ctx.sparse else softmax_bwd
            # over our own dp: PyTorch's may lie with its heads last, in a compiled graph unknown to us
            over = ctx.window is not None and dp.dtype == ctx.dtype
            dscores = rows(dp, p, dp if over else like(p, ctx.dtype), ZERO).flatten(0, 2)
        return dscores, dweight, dbias, None, None, None, None


def _conv_bwd(
    dy: Tensor, p: Tensor, weight: Tensor, bias: Tensor | None, window: Window, wants: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, p, weight -> dp, dweight, dbias, those that are wanted, by our own kernels. Of bias only its shape counts."""
    make = torch.empty_like if dy.numel() else torch.zeros_like
    dp = make(p) if wants[0] else None
    # dbias comes with it
    dweight = make(weight) if wants[1] or wants[2] else None
    dbias = make(bias) if wants[2] else None
    if dy.numel():
        if wants[0]:
            causal_conv(dy, weight, None, dp, window.back, flipped=True)
        if dweight is not None:
            causal_conv_taps(dy, p, dweight, dbias, window)
    return dp, dweight if wants[1] else None, dbias


def _pair(name: str, n: Pair) -> tuple[int, int]:
    """Of rows and of columns."""
    pair = tuple(n) if isinstance(n, (tuple, list)) else (n, n)
    if len(pair) != 2 or not all(isinstance(side, WHOLE) for side in pair):
        raise ValueError(f"multi_token_attention: {name} is {n!r}; it must be a whole number, or two")
    return pair


def _check(
    scores: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    op = "multi_token_attention"
    if scores.ndim != 4 or scores.shape[2] != scores.shape[3]:
        raise ValueError(f"{op}: scores {tuple(scores.shape)} must be [batch, heads, tokens, tokens]")
    check_whole(op, groups=groups)
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: stride is {stride}, dilation {dilation}, groups {groups} and padding {padding}; they must be 1 or "
            f"more, and 0 or more"
        )
    heads = scores.shape[1]
    if weight.ndim != 4 or heads != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} must be [heads of the result, heads / groups, height, width], with "
            f"{heads} heads and {groups} groups, which divide both"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be one value per head of the result, {weight.shape[0]}")
    for taps, p, d in zip(weight.shape[2:], padding, dilation, strict=True):
        if scores.shape[2] + 2 * p <= d * (taps - 1):
            raise ValueError(
                f"{op}: {scores.shape[2]} tokens with a padding of {padding} are fewer than {tuple(weight.shape[2:])} "
                f"taps with a dilation of {dilation} span"
            )


def multi_token_attention(
    scores: Tensor,  # [B, C, L, L]
    weight: Tensor,  # [C_out, C / groups, height, width]
    bias: Tensor | None = None,  # [C_out]
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    sparse: bool = False,
) -> Tensor:
    """``tril(conv2d(softmax(scores under a causal mask), weight, bias))``: [B, C_out, ., .], as conv2d has it.

    What lies above the diagonal of y, by its own rows and columns, is 0. A padding of half of the taps keeps L, and
    mixes weights of later queries into a query's; the paper's, which doesn't, is ``padding=(height - 1, width // 2)``
    and of y the first L rows. ``sparse``: sparsemax for softmax. Scores, weight and bias have one dtype, which the
    weights of attention get too; under autocast it is autocast's.
    """
    options = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups
    dtype = autocast_dtype(scores)
    _check(scores, weight, bias, *options)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if dtype is None and parameter is not None and parameter.dtype != scores.dtype:
            raise ValueError(
                f"multi_token_attention: {name} is {parameter.dtype}, scores {scores.dtype}; without autocast "
                f"they must be the same"
            )
    if not runs_kernels(scores, weight, bias):
        return multi_token_attention_reference(
            scores, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, sparse=sparse
        )
    check_dtypes("multi_token_attention", scores=scores, weight=weight, bias=bias)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    n_out, n_sources, height, width = weight.shape
    window = Window(n_out // groups, n_sources, height, width, options[2], options[1])
    if options[0] != (1, 1) or not fits(window, weight):
        window = None
    # flattened here: dynamo 2.11 can't hold the sizes of what was made of an input
    rows = rows_of(scores.contiguous())
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return MultiTokenAttentionFunction.apply(rows, weight, bias, scores.shape, options, window, sparse)
