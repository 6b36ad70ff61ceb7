"""The divergence between a student's head and a teacher's, token by token: how linear_jsd, linear_kl_div and
linear_cosine run.

The row passes are _teacher_divergence.py's and _cosine.py's. Chunks of tokens are walked, each with both models' whole
rows of logits: two matrix products and the passes. The teacher is frozen, so all that is wanted of a chunk is the
gradient of the student's logits, and that is linear in the token's upstream gradient, which is a number.

Of a mean or a sum this number is the same for all tokens, and one_pass.py makes the gradients in the forward, chunk
after chunk, at 8 MHV FLOPs with as wide a teacher. Both models' logits of a chunk take at most half of what dweight is
added up in: a smaller chunk would be more reading and writing of dweight than it spares. What follows here is for
losses that stay apart ("none"), for fp16, and for graphs of torch.compile.

For the tokens that fit `keep_mb` the forward writes the gradient of the logits, for an upstream gradient of 1, over the
student's logits; the backward is then two matrix products, with the upstream gradient as a factor of rows of x and dx,
and may run twice. Of the other tokens both logits are computed again, in tiles as linear_cross_entropy's: the rows'
statistics are known by then, so a tile need not have whole rows, and cutting the vocabulary spares an fp32 copy of
dweight.

What is summed over tiles is summed in fp32, and only then rounded. In fp16 kept gradients have a headroom, and upstream
gradients are divided by the largest of them, which comes back to an fp32 sum of dweight: the one such copy where all
tokens are kept.

Saved for backward: student_x and student_weight, 24 bytes a token (a cosine's: 8), the kept gradients (in x's dtype),
and unless all are kept the teacher's tensors.
Work, with as wide a teacher: 8 MHV FLOPs for kept tokens, 12 for the others. Traffic per pair of logits beside the
products: kept 6 reads + 1 write, all in the forward; else 4 reads there, 2 reads + 1 write in the backward.

Sizes: M tokens, K of them kept, H hidden (each model its own), V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._tiles import (
    Tiling,
    check_memory,
    of_chunk,
    product,
    side,
    tile,
    tile_elements,
    tiling,
    whole_rows,
    wide,
)
from ds_fused.ops.common._triton import (
    autocast_dtype,
    check_dtypes,
    check_here,
    refuse_transforms,
    rows_of,
    runs_kernels,
)
from ds_fused.ops.losses._labels import counting_tokens, flat_labels
from ds_fused.ops.losses._loss import LossOptions, check_loss, reduced
from ds_fused.ops.vocab._divergence_rows import DivergenceRows, Logits, Options
from ds_fused.ops.vocab.one_pass import Cut, OnePassFunction, cut

# what a kept gradient, which lies about in [-1, 1], is multiplied by in fp16: the small ones of a large vocabulary stay
# clear of its least number (6e-8), and a reverse KL's, which has no bound, far from its largest
FP16_HEADROOM = 64.0


class _Plan(NamedTuple):
    """How the logits are cut; a function of shapes and options alone."""

    chunk: int  # tokens whose rows the forward has at a time
    kept: int  # tokens whose gradients are kept: the first ones
    tiles: Tiling  # in which the backward has the logits of the others


class LinearDivergenceFunction(torch.autograd.Function):
    """x [M, H] and weight [V, H] of the student, those of the teacher and labels [M] to one loss a token [M], fp32."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        options: Options,
        plan: _Plan,
    ) -> Tensor:
        n_tokens, n_vocab = x.shape[0], weight.shape[0]
        whole = slice(0, n_vocab)
        student = Logits(x, weight, bias).slab(whole)
        teacher = Logits(teacher_x, teacher_weight, teacher_bias).slab(whole)
        loss, stats = (x.new_empty(size, dtype=wide(x)) for size in (n_tokens, (options.n_stats, n_tokens)))
        one = loss.new_full((1,), _headroom(x))
        kept = student.room(plan.kept, n_vocab)
        rows = DivergenceRows(teacher, teacher.room(plan.chunk, n_vocab), labels, options)
        room = student.room(plan.chunk, n_vocab) if plan.kept < n_tokens else None
        for tokens in (*_chunks(0, plan.kept, plan.chunk), *_chunks(plan.kept, n_tokens, plan.chunk)):
            is_kept = tokens.start < plan.kept
            z = student.rows(_rows_of_room(kept, tokens, n_vocab) if is_kept else room, tokens)
            rows.walk(z, tokens, loss[tokens], stats[:, tokens], one.expand(z.shape[0]) if is_kept else None)
        again = (teacher_x, teacher_weight, teacher_bias, stats) if plan.kept < n_tokens else (None,) * 4
        ctx.save_for_backward(x, weight, bias, labels, kept, *again)
        ctx.options, ctx.plan = options, plan
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels, kept, teacher_x, teacher_weight, teacher_bias, stats = ctx.saved_tensors
        plan, (n_tokens, n_vocab) = ctx.plan, (x.shape[0], weight.shape[0])
        tiles, again = plan.tiles, plan.kept < n_tokens
        sums = _Sums(x, weight, bias, tiles, plan.kept, ctx.needs_input_grad[:3])
        dz = tile(kept, plan.kept, n_vocab)
        if plan.kept:
            sums.begin_with(dz, _upstream(dloss[: plan.kept], labels, ctx.options))
        if again:
            _, gradient = ctx.options.passes(runs_kernels(x))
            student, teacher = Logits(x, weight, bias), Logits(teacher_x, teacher_weight, teacher_bias)
            room, teacher_room = student.room(tiles.tokens, tiles.rows), teacher.room(tiles.tokens, tiles.rows)
        for words in _chunks(0, n_vocab, tiles.rows if again else n_vocab):
            sums.open(words, dz[:, words])
            if again:
                slab, teacher_slab = student.slab(words), teacher.slab(words)
            for tokens in _chunks(plan.kept, n_tokens, tiles.tokens):
                z, t = slab.rows(room, tokens), teacher_slab.rows(teacher_room, tokens)
                gradient(dloss[tokens], z, t, of_chunk(labels, tokens), stats[:, tokens], z, ctx.options)
                sums.add(tokens, z, slab.weight)
            sums.close()
        return *sums.results(), None, None, None, None, None, None


class _Sums:
    """dx [M, H], dweight [V, H] and dbias [V] from the gradients of logits: kept ones [K, V], then tile by tile."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiling, kept: int, wants: tuple[bool, ...]
    ) -> None:
        self.x, self.weight, self.bias, self.kept = x, weight, bias, kept
        n_again = x.shape[0] - kept
        # dz @ weight is summed over slabs, dz.T @ x over chunks: fp32 where there is more than one
        self.slabs = -(-weight.shape[0] // tiles.rows) if n_again else 0
        n_sums = (1 if kept else 0) + -(-n_again // tiles.tokens)  # dynamo 2.11 can't add a bool
        # what fp16 holds of kept gradients has yet to be multiplied by the upstream gradient, and may be too large
        self.is_one_sum = n_sums <= 1 and not (kept and x.dtype == torch.float16)
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants[0] else None
        if wants[0]:
            self.dx_sum = self.dx[kept:] if self.slabs <= 1 else torch.empty_like(self.dx[kept:], dtype=wide(x))
        self.dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wants[1] else None
        self.dbias = weight.new_zeros(weight.shape[0], dtype=wide(x)) if wants[2] else None
        self.xs: Tensor | None = None
        self.unit: Tensor | None = None

    def begin_with(self, dz: Tensor, upstream: Tensor) -> None:
        """Kept gradients [K, V] for an upstream gradient of 1, times the headroom; and the real one of each token."""
        shrink = 1.0 / _headroom(self.x)
        kept = slice(0, self.kept)
        if self.dx is not None:
            product(self.dx[kept], dz, self.weight.to(dz.dtype), scale=shrink)
            self.dx[kept].mul_(upstream[:, None])
        if self.x.dtype == torch.float16:
            # a loss scale times x may be too large for fp16, one token's part of a mean too small
            self.unit = upstream.abs().amax().clamp_min(torch.finfo(upstream.dtype).tiny)
            upstream = upstream / self.unit
        if self.dbias is not None:
            # a factor in two numbers of dz's dtype loses nothing that dbias would show
            high = upstream.to(dz.dtype)
            low = (upstream - high).to(dz.dtype)
            parts = self.dbias.new_empty(2, dz.shape[1])
            product(parts, torch.stack([high, low]), dz, scale=shrink)
            self.dbias += parts.sum(0) if self.unit is None else parts.sum(0) * self.unit
        if self.dweight is not None:
            self.xs = torch.empty_like(self.x[kept], memory_format=torch.contiguous_format)
            torch.mul(self.x[kept], upstream[:, None], out=self.xs)

    def open(self, words: slice, dz: Tensor) -> None:
        """The slab of these words begins; of the kept gradients it has dz [K, n]."""
        self.words, self.begun = words, self.kept > 0
        if self.dweight is None:
            return
        self.dw = self.dw_sum = self.dweight[words]
        if not self.is_one_sum and self.dw.dtype != wide(self.x):
            self.dw_sum = torch.empty_like(self.dw, dtype=wide(self.x))
        if self.begun:
            product(self.dw_sum, dz.t(), self.xs, scale=1.0 / _headroom(self.x))
            if self.unit is not None:
                self.dw_sum.mul_(self.unit)
        elif self.x.shape[0] == 0:
            self.dw_sum.zero_()

    def add(self, tokens: slice, dz: Tensor, rows: Tensor) -> None:
        """A tile of this slab, whose rows of the weight are [n, H]."""
        if self.dx is not None:
            place = slice(tokens.start - self.kept, tokens.stop - self.kept)
            product(self.dx_sum[place], dz, rows, add=self.words.start > 0)
        if self.dweight is not None:
            product(self.dw_sum, dz.t(), self.x[tokens], add=self.begun)
        if self.dbias is not None:
            self.dbias[self.words] += dz.sum(0, dtype=self.dbias.dtype)
        self.begun = True

    def close(self) -> None:
        if self.dweight is not None and self.dw_sum is not self.dw:
            self.dw.copy_(self.dw_sum)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.dx is not None and self.slabs > 1:
            self.dx[self.kept :].copy_(self.dx_sum)
        return self.dx, self.dweight, None if self.dbias is None else self.dbias.to(self.bias.dtype)


def _headroom(x: Tensor) -> float:
    return FP16_HEADROOM if x.dtype == torch.float16 else 1.0


def _chunks(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _rows_of_room(room: Tensor, tokens: slice, n_words: int) -> Tensor:
    """The room of these tokens in a larger one."""
    return room[tile_elements(tokens.start, n_words) : tile_elements(tokens.stop, n_words)]


def _upstream(dloss: Tensor, labels: Tensor | None, options: Options) -> Tensor:
    """Zeros for ignored tokens: with all tokens ignored the mean's upstream gradient is infinite."""
    if labels is None:
        return dloss
    return dloss.masked_fill(labels[: dloss.shape[0]] == options.ignore_index, 0.0)


def linear_divergence(
    op: str,  # who speaks in an error
    student_x: Tensor,
    student_weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    options: Options,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    reduction: str,
    chunk_mb: float,
    keep_mb: float,
    grad_in_forward: bool,
) -> Tensor:
    """linear_jsd, linear_kl_div and linear_cosine."""
    refuse_transforms(op)
    shape = student_x.shape[:-1]
    autocast = autocast_dtype(student_x)
    _check_head(op, "student", student_x, student_weight, student_bias, student_x.device, autocast)
    _check_head(op, "teacher", teacher_x, teacher_weight, teacher_bias, student_x.device, autocast)
    n_vocab = student_weight.shape[0]
    if teacher_weight.shape[0] != n_vocab or teacher_x.shape[:-1] != shape:
        raise ValueError(
            f"{op}: student {tuple(student_x.shape)} with {n_vocab} words and teacher {tuple(teacher_x.shape)} with "
            f"{teacher_weight.shape[0]} must have the same tokens and the same vocabulary"
        )
    teachers = {"teacher_x": teacher_x, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    training = torch.is_grad_enabled()
    for name, tensor in teachers.items():
        if training and tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient, but the teacher is frozen; pass {name}.detach()")
    options.check(op)
    check_memory(op, chunk_mb, keep_mb)
    check_loss(op, LossOptions(options.ignore_index), labels, reduction, shape, n_vocab, student_x.device)

    x, t = (rows_of(x.to(autocast or x.dtype)) for x in (student_x, teacher_x))
    if labels is None:
        flat, count = None, x.shape[0]
    else:
        flat = flat_labels(labels)
        count = counting_tokens(op, flat, n_vocab, options.ignore_index)
    wants = [training and y is not None and y.requires_grad for y in (student_x, student_weight, student_bias)]
    in_forward = grad_in_forward and reduction != "none" and x.dtype != torch.float16
    if in_forward and any(wants) and not torch.compiler.is_compiling():
        how = _cut(x, student_weight, chunk_mb, dweight=wants[1])
        teacher = Logits(t, teacher_weight, teacher_bias).slab(slice(0, n_vocab))
        losses = DivergenceRows(teacher, teacher.room(min(how.tokens, x.shape[0]), n_vocab), flat, options)
        return OnePassFunction.apply(x, student_weight, student_bias, losses, count, op, reduction, *how)
    plan = _plan(x.shape[0], n_vocab, x, chunk_mb, keep_mb if any(wants) else 0, dx=wants[0], dweight=wants[1])
    loss = LinearDivergenceFunction.apply(
        x, student_weight, student_bias, t, teacher_weight, teacher_bias, flat, options, plan
    )
    return reduced(loss, shape, count, reduction)


def _cut(x: Tensor, weight: Tensor, chunk_mb: float, *, dweight: bool) -> Cut:
    """See the top. An fp32 sum of dweight is twice what bf16 is, to read and write too."""
    (n_vocab, n_hidden), size = weight.shape, x.element_size()

    def within(n_bytes: int) -> Cut:
        room = min(int(chunk_mb * 2**20), n_bytes)
        return cut(x.shape[0], n_vocab, n_hidden, 2 * size, room, "auto", trains=dweight)

    how = within(n_vocab * n_hidden * size // 2)
    return how if how.native else within(n_vocab * n_hidden * 4 // 2)


def _plan(n: int, n_vocab: int, x: Tensor, chunk_mb: float, keep_mb: float, *, dx: bool, dweight: bool) -> _Plan:
    chunk_bytes = int(chunk_mb * 2**20)
    a_row = tile_elements(1, n_vocab) * x.element_size()
    kept = whole_rows(n, int(keep_mb * 2**20) // a_row)
    # a row of each model
    chunk = side(max(n, 1), chunk_bytes // (2 * a_row))
    return _Plan(chunk, kept, tiling(n - kept, n_vocab, 2 * x.element_size(), chunk_bytes, 0, dx=dx, dweight=dweight))


def _check_head(
    op: str,
    whose: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    device: torch.device,
    autocast: torch.dtype | None,
) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{op}: {whose}_weight is {type(weight).__name__}; a divergence needs whole rows of logits, so gather the "
            "weight as a tensor"
        )
    check_here(op, f"{whose}_", x, weight, bias)
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {whose}_x {tuple(x.shape)} and {whose}_weight {tuple(weight.shape)} must be [..., H] and [V, H]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: {whose}_bias {tuple(bias.shape)} must be one number for each of the {weight.shape[0]} rows of the "
            "weight"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{op}: {whose}_{name} is on {tensor.device}, student_x on {device}; they must be on one")
        if autocast is None and tensor.dtype != x.dtype:
            raise ValueError(
                f"{op}: {whose}_x is {x.dtype} and {whose}_{name} is {tensor.dtype}; outside autocast they must be the "
                "same"
            )
        if runs_kernels(x):
            check_dtypes(op, **{f"{whose}_{name}": tensor})
