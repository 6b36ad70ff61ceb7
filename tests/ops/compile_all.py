"""Compiles every kernel of ds_fused.ops for targets that need not be there, and prints what came out as JSON.

    python tests/ops/compile_all.py cuda:80:32:largest cuda:90:32:all hip:gfx942:64:largest

Needs a process of its own, without TRITON_INTERPRET. The ops are called as users call them, on CPU tensors: launches
are compiled, with the real block sizes, and not run: all of them, or of each kernel the one with the largest tiles (see
CHOICES). A kernel that no example reaches is reported under "unreached".
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from shards import Landed
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ds_fused.ops as ops
import ds_fused.ops.common._triton as shared
from ds_fused.ops.attention.softmax import softmax_bwd, softmax_fwd
from ds_fused.ops.attention.sparsemax import sparsemax_bwd, sparsemax_fwd
from ds_fused.ops.common import _meet
from ds_fused.ops.common._along_rows import LEFT, ZERO
from ds_fused.ops.common._parts import sum_parts
from ds_fused.ops.common._warmup import Absent, copies_tiles_on, in_flight_on
from ds_fused.ops.losses._lent_logits_parts import lent_logits_in_parts
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.mlp._gates import GLUForm
from ds_fused.ops.mlp.glu import glu_again
from ds_fused.ops.registry import OPS
from ds_fused.ops.vocab.vocab_shard import VocabShard


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def rms_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, x_dtype, weight_dtype, cast in (
        (64, 128, half, half, "before_weight"),  # Qwen3's q_norm: many rows in a tile
        (2, 4096, half, half, "before_weight"),
        (2, 4096, half, full, "after_weight"),
        (64, 576, half, half, "before_weight"),  # rows in five blocks
        (2, 5120, full, full, "before_weight"),
        (2, 10240, full, full, "before_weight"),
        (2, 16384, full, full, "before_weight"),  # the widest whole row of the backward
        (2, 32768, half, half, "after_weight"),  # the widest of the forward; walked backward
        (2, 65536, half, half, "before_weight"),
    ):
        x, weight = leaf(n, d, dtype=x_dtype), leaf(d, dtype=weight_dtype)
        ops.rms_norm(x, weight, cast=cast, offset=float(cast == "after_weight")).sum().backward()
    ops.rms_norm(leaf(2, 4096), None).sum().backward()
    for d in (4096, 5120, 8192, 65536):  # 8192: the widest whole row of a backward with dbias
        ops.rms_norm(leaf(2, d), leaf(d), bias=leaf(d)).sum().backward()


def add_rms_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, cast in (
        (64, 128, half, "before_weight"),
        (2, 4096, half, "before_weight"),
        (2, 5120, full, "before_weight"),
        (2, 16384, half, "after_weight"),
        (2, 16384, full, "before_weight"),
        (2, 32768, half, "before_weight"),
        (2, 65536, half, "before_weight"),
    ):
        inputs = leaf(n, d, dtype=dtype), leaf(n, d, dtype=dtype), leaf(d, dtype=dtype)
        torch.autograd.backward([y.sum() for y in ops.add_rms_norm(*inputs, cast=cast)])
    ops.add_rms_norm(leaf(2, 4096), leaf(2, 4096, dtype=full), leaf(4096))[0].sum().backward()


def gated_rms_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, options in (
        (64, 128, half, {}),  # Qwen3-Next: a norm per head
        (64, 576, half, {}),  # in five blocks
        (2, 5120, full, {"order": "gate_first"}),
        (2, 6144, full, {}),
        (2, 8192, half, {"order": "gate_first"}),  # the widest whole group of the backward
        (2, 8192, full, {"cast": "after_weight", "act": "sigmoid"}),
        (2, 7680, half, {"order": "gate_first", "group_size": 960}),
        (2, 16384, full, {"order": "gate_first", "cast": "after_weight"}),  # the widest of the forward
        (2, 65536, half, {}),
        (2, 65536, half, {"order": "gate_first", "group_size": 32768}),
    ):
        inputs = leaf(n, d, dtype=dtype), leaf(n, d, dtype=dtype), leaf(d, dtype=dtype)
        ops.gated_rms_norm(*inputs, **options).sum().backward()
    for d in (4096, 65536):
        ops.gated_rms_norm(leaf(2, d), leaf(2, d), None).sum().backward()


def modulated_rms_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, options in (
        (64, 128, half, {}),
        (2, 3072, half, {}),  # FLUX
        (2, 5120, full, {}),  # in five blocks
        (2, 8192, full, {"offset": 1.0, "cast": "after_weight"}),  # the widest whole row of the backward
        (2, 32768, half, {}),  # the widest of the forward
        (2, 65536, half, {"cast": "after_weight"}),
    ):
        for rows in (1, n):
            inputs = (
                leaf(2, n, d, dtype=dtype),
                leaf(d, dtype=dtype),
                *(leaf(2, rows, d, dtype=dtype) for _ in range(2)),
            )
            ops.modulated_rms_norm(*inputs, **options).sum().backward()
    ops.modulated_rms_norm(leaf(2, 2, 4096), None, leaf(2, 1, 4096)).sum().backward()
    ops.modulated_rms_norm(leaf(2, 2, 4096), None, leaf(2, 1, 4096, dtype=full), leaf(4096).detach()).sum().backward()


def attention_residual() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, t, d, dtype in (
        (8, 64, 128, half),
        (4, 2, 4096, half),
        (5, 2, 4096, half),  # the least and the most that a program of the backward holds
        (8, 2, 4096, half),
        (9, 2, 4096, half),
        (8, 2, 4096, full),
        (3, 2, 16384, half),  # the widest
        (3, 2, 16384, full),
    ):
        ops.attention_residual(leaf(n, t, d, dtype=dtype), leaf(d, dtype=dtype), leaf(d, dtype=dtype)).sum().backward()
    for n in (8, 16):
        ops.attention_residual([leaf(2, 4096) for _ in range(n)], leaf(4096)).sum().backward()


def mhc_coefficients() -> None:
    half, full = torch.bfloat16, torch.float32
    for t, n, c, dtype, weight_dtype in (
        (64, 4, 4096, half, half),  # the largest tiles
        (64, 4, 4096, half, full),
        (64, 4, 1024, torch.float16, torch.float16),
        (64, 4, 1024, full, full),
        (16, 2, 1024, half, half),  # a thread has one number of a token's matrix
    ):
        m = n * (n + 2)
        tensors = leaf(m, n * c, dtype=weight_dtype), leaf(m, dtype=full), leaf(3, dtype=full)
        outputs = ops.mhc_coefficients(leaf(t, n, c, dtype=dtype), *tensors)
        torch.autograd.backward([y.sum() for y in outputs])


def mhc_in() -> None:
    # what the backward of the coefficients adds to
    tensors = leaf(24, 4 * 4096), leaf(24), leaf(3)
    torch.autograd.backward([y.sum() for y in ops.mhc_in(leaf(64, 4, 4096), *tensors)])


def mhc_pre() -> None:
    for n, c, dtype in ((4, 4096, torch.bfloat16), (4, 4096, torch.float32), (8, 1024, torch.bfloat16)):
        ops.mhc_pre(leaf(2, n, c, dtype=dtype), leaf(2, n, dtype=torch.float32)).sum().backward()


def mhc_post_res() -> None:
    full = torch.float32
    for n, c, dtype in (
        (4, 4096, torch.bfloat16),
        (4, 4096, full),
        (8, 1024, torch.bfloat16),
    ):
        streams = leaf(2, n, c, dtype=dtype), leaf(2, c, dtype=dtype)
        ops.mhc_post_res(*streams, leaf(2, n, dtype=full), leaf(2, n, n, dtype=full)).sum().backward()


def embedding() -> None:
    for h, dtype in ((576, torch.bfloat16), (4096, torch.float32)):
        # more than one chunk, so that there is something to join
        ops.embedding(torch.zeros(300, dtype=torch.int64), leaf(11, h, dtype=dtype), 3).sum().backward()


def softmax() -> None:
    for n, d, dtype in (
        (64, 128, torch.bfloat16),
        (2, 4096, torch.float16),
        (2, 16384, torch.float32),  # the widest whole row of the backward
        (2, 32768, torch.float32),  # the widest of the forward; in parts backward
        (2, 65536, torch.bfloat16),
    ):
        ops.softmax(leaf(n, d, dtype=dtype)).sum().backward()


def sparsemax() -> None:
    for n, d, dtype in (
        (64, 128, torch.bfloat16),
        (2, 4096, torch.float16),
        (2, 16384, torch.float32),  # the widest whole row of the backward
        (2, 32768, torch.float32),  # the widest of the forward; in parts backward
        (2, 65536, torch.bfloat16),
        (2, 65537, torch.float16),
    ):
        ops.sparsemax(leaf(n, d, dtype=dtype)).sum().backward()


def multi_token_attention() -> None:
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


def neighborhood_attention() -> None:
    half, full = torch.bfloat16, torch.float32
    for d, kernel_size, dtype in (
        (64, 7, half),
        (128, 255, half),
        (256, 255, half),
        (128, 7, full),
    ):
        q, k, v = (leaf(1, 300, 2, d, dtype=dtype).transpose(1, 2) for _ in range(3))
        ops.neighborhood_attention(q, k, v, kernel_size=kernel_size).sum().backward()
    ops.neighborhood_attention(q, k.detach(), v.detach(), dilation=2, border="shift").sum().backward()


def glu() -> None:
    for act in ("silu", "gelu_tanh", "gelu", "relu", "relu2"):
        ops.glu(leaf(2, 4096), leaf(2, 4096), act).sum().backward()
    ops.glu(leaf(2, 8192)).sum().backward()
    ops.glu(leaf(2, 5760), interleaved=True, alpha=1.702, limit=7.0, offset=1.0).sum().backward()  # GPT-OSS
    ops.glu(leaf(2, 4096), leaf(2, 4096), limit=10.0).sum().backward()  # DeepSeek-V4
    ops.glu(leaf(2, 4096), leaf(2, 4096).detach()).sum().backward()
    ops.glu(leaf(2, 4096, dtype=torch.float32), leaf(2, 4096, dtype=torch.float32)).sum().backward()
    for form, interleaved in ((GLUForm(), False), (GLUForm("silu", 1.702, 7.0, 1.0), True)):
        glu_again(leaf(2, 4096).detach(), leaf(2, 8192).detach(), form, interleaved)


def experts() -> None:
    half, full = torch.bfloat16, torch.float32
    for t, h, i, dtype, options in (
        (64, 2048, 768, half, {}),  # Qwen3-30B-A3B
        (512, 2048, 768, half, {"act": "gelu_tanh"}),
        (512, 2880, 2880, half, {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}),  # GPT-OSS
        (512, 100, 36, half, {}),
        (2048, 2048, 768, half, {}),  # in tiles that are copied, where the target can
        (64, 2048, 768, full, {}),
    ):
        weights = leaf(2, 2 * i, h, dtype=dtype), leaf(2, h, i, dtype=dtype)
        ids = torch.zeros(t, 1, dtype=torch.int64)
        ops.experts(leaf(t, h, dtype=dtype), *weights, ids, leaf(t, 1, dtype=dtype), **options).sum().backward()
    frozen = [weight.detach() for weight in weights]
    ops.experts(leaf(t, h, dtype=full), *frozen, ids, leaf(t, 1).detach()).sum().backward()


def rope() -> None:
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


def rms_norm_rope() -> None:
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


def relu2() -> None:
    ops.relu2(leaf(2, 4096)).sum().backward()
    ops.relu2(leaf(2, 8192)[:, :4096]).sum().backward()
    ops.relu2(leaf(2, 4096, dtype=torch.float32)).sum().backward()


def lora_linear() -> None:
    half, full = torch.bfloat16, torch.float32
    for rank in (16, 64):
        adapter = leaf(rank, 4096, dtype=full), leaf(1024, rank, dtype=full)
        ops.lora_linear(leaf(2, 4096, dtype=half), leaf(1024, 4096, dtype=half), *adapter).sum().backward()


def cross_entropy() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        ops.cross_entropy(leaf(2, 128256, dtype=dtype), labels).backward()
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    for in_forward in (False, True):
        ops.cross_entropy(leaf(2, 50257), labels, grad_in_forward=in_forward, **options).backward()
        for dtype in (torch.bfloat16, torch.float32):
            logits, more = leaf(2, 128256, dtype=dtype), {"label_smoothing": 0.1, "return_accuracy": True}
            more |= {"weight": leaf(128256).detach(), "grad_in_forward": in_forward}
            ops.cross_entropy(logits, labels, **more)[0].backward()
    # a walked row, and one that is held whole
    for n_vocab, dtype in ((128256, torch.bfloat16), (128256, torch.float32), (8192, torch.bfloat16)):
        ops.cross_entropy(leaf(2, n_vocab, dtype=dtype), labels, grad_in_forward=True).backward()
    # where programs can't meet, a program has a row
    for n_vocab, dtype in ((128256, torch.bfloat16), (50257, torch.float16), (128256, torch.float32)):
        loss, lse = torch.empty(2), torch.empty(2, 2)
        lent_logits_in_parts(torch.empty(2, n_vocab, dtype=dtype), labels, loss, lse, loss, LossOptions())


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


def linear_cross_entropy() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    ops.linear_cross_entropy(leaf(2, 8), leaf(32000, 8), labels).backward()
    ops.linear_cross_entropy(leaf(2, 8), leaf(32000, 8), labels, grad_in_forward=True).backward()
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
    ops.linear_cross_entropy(leaf(2, 8), leaf(50257, 8), labels, bias=leaf(50257), **options).backward()
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels)
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels, return_accuracy=True)
    weights = {"class_weight": leaf(32000).detach(), "label_smoothing": 0.1}
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels, **weights)
    # slabs that copy engines move
    for dtype, adds in ((torch.bfloat16, False), (torch.float32, True)):
        for beside in (False, True):
            sum_parts(leaf(4, 64).detach(), leaf(64, dtype=dtype).detach(), adds=adds, beside=beside)


def linear_log_probs() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for options in ({}, {"softcap": 30.0, "temperature": 0.7}):
        sum(ops.linear_log_probs(leaf(2, 8), leaf(32000, 8), labels, entropy=True, **options)).sum().backward()
    ops.linear_log_probs(leaf(2, 8), leaf(50257, 8), labels).sum().backward()
    ops.linear_log_probs(leaf(2, 8).detach(), OneOfTwo(), labels, entropy=True)


def linear_jsd() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        student, teacher = ((leaf(2, h, dtype=dtype), leaf(32000, h, dtype=dtype)) for h in (8, 16))
        ops.linear_jsd(*student, *(t.detach() for t in teacher), labels).backward()


def linear_kl_div() -> None:
    teacher = leaf(2, 16).detach(), leaf(50257, 16).detach()
    for reverse in (False, True):
        ops.linear_kl_div(leaf(2, 8), leaf(50257, 8), *teacher, reverse=reverse, temperature=2.0).backward()


def linear_cosine() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for v, dtype in ((32000, torch.bfloat16), (32000, torch.float32), (50257, torch.bfloat16)):
        student, teacher = ((leaf(2, h, dtype=dtype), leaf(v, h, dtype=dtype)) for h in (8, 16))
        ops.linear_cosine(*student, *(t.detach() for t in teacher), labels).backward()
    ops.linear_cosine(*student, *(t.detach() for t in teacher)).backward()


def kl_div() -> None:
    for dtype, log_target in ((torch.bfloat16, False), (torch.float32, True)):
        for reduction in ("batchmean", "none"):
            x, t = leaf(2, 4096, dtype=dtype), leaf(2, 4096, dtype=dtype)
            ops.kl_div(x, t, log_target=log_target, reduction=reduction).sum().backward()
    ops.kl_div(leaf(2, 50257), leaf(2, 50257).detach()).backward()
    ops.kl_div(leaf(2, 8192)[:, :4096], leaf(2, 4096).detach()).backward()


def jsd() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for beta in (0.0, 0.5):
        for dtype in (torch.bfloat16, torch.float32):
            ops.jsd(leaf(2, 128256, dtype=dtype), leaf(2, 128256, dtype=dtype), beta=beta).backward()
        ops.jsd(leaf(2, 50257), leaf(2, 50257).detach(), labels, beta=beta, temperature=2.0).backward()


def tvd() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        ops.tvd(leaf(2, 128256, dtype=dtype), leaf(2, 128256, dtype=dtype)).backward()
    ops.tvd(leaf(2, 50257), leaf(2, 50257).detach(), labels, temperature=2.0).backward()


def layer_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, x_dtype, weight_dtype in (
        (64, 128, half, half),  # many rows in a tile
        (2, 768, half, full),
        (64, 576, half, half),  # in five blocks
        (2, 5120, full, full),
        (2, 8192, full, full),
        (2, 10240, half, half),  # the widest whole row of the backward
        (2, 10240, full, full),
        (2, 32768, half, half),  # the widest of the forward; walked backward
        (2, 32768, full, full),
        (2, 65536, half, half),
    ):
        vectors = (leaf(d, dtype=weight_dtype) for _ in range(2))
        ops.layer_norm(leaf(n, d, dtype=x_dtype), *vectors).sum().backward()
    ops.layer_norm(leaf(2, 4096), None).sum().backward()


def add_layer_norm() -> None:
    for d, dtype in (
        (768, torch.bfloat16),
        (5120, torch.float32),
        (8192, torch.float32),
        (10240, torch.bfloat16),
        (10240, torch.float32),
        (32768, torch.bfloat16),
        (65536, torch.bfloat16),
    ):
        x, residual = leaf(2, d, dtype=dtype), leaf(2, d, dtype=dtype)
        outputs = ops.add_layer_norm(x, residual, leaf(d, dtype=dtype), leaf(d, dtype=dtype))
        torch.autograd.backward([y.sum() for y in outputs])


def group_norm() -> None:
    for shape, n_groups, dtype in (
        ((2, 1280, 16, 16), 32, torch.bfloat16),
        ((64, 1024), 32, torch.bfloat16),  # several samples in a tile
        ((2, 64, 16, 16), 1, torch.float32),  # the largest whole group of the backward
        ((2, 128, 16, 16), 1, torch.float32),  # of the forward; in parts backward
        ((2, 320, 64, 64), 32, torch.bfloat16),
        ((2, 384, 14, 14), 1, torch.float32),
    ):
        vectors = (leaf(shape[1], dtype=dtype) for _ in range(2))
        ops.group_norm(leaf(*shape, dtype=dtype), n_groups, *vectors).sum().backward()
    ops.group_norm(leaf(2, 64, 8, 8), 8).sum().backward()


def dyt() -> None:
    for n, d, dtype in ((64, 128, torch.bfloat16), (2, 4096, torch.bfloat16), (2, 4096, torch.float32)):
        ops.dyt(
            leaf(n, d, dtype=dtype), leaf(1, dtype=dtype), leaf(d, dtype=dtype), leaf(d, dtype=dtype)
        ).sum().backward()


def poly_norm() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype in (
        (64, 128, half),
        (64, 576, half),  # in five blocks
        (2, 10240, full),
        (2, 14336, half),
        (2, 16384, full),  # the widest whole row of the backward
        (2, 32768, half),  # the widest of the forward
        (2, 65536, half),
    ):
        ops.poly_norm(leaf(n, d, dtype=dtype), leaf(3, dtype=full), leaf(1, dtype=full)).sum().backward()
    ops.poly_norm(leaf(2, 4096), leaf(3).detach()).sum().backward()


def of_every_op(functions: Mapping[str, object]) -> tuple[Callable[[], object], ...]:
    """Of a file's functions those that are named as the ops are, one for each."""
    missing = [op.name for op in OPS if op.name not in functions]
    if missing:
        sys.exit(f"{functions['__file__']} has no example of {', '.join(missing)}: a function of that name")
    return tuple(functions[op.name] for op in OPS)


EXAMPLES = of_every_op(globals())


def kernels(target: GPUTarget) -> set[str]:
    """Every kernel of the package by its rule of names: a jitted function that ends in _kernel, in a file that ends in
    _tma or _held for targets that copy tiles."""
    found = set()
    for info in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if info.name.endswith(("_tma", "_held")) and not copies_tiles_on(target):
            continue
        module = import_module(info.name)
        # a launcher's file has the kernels of other files by their names
        own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
        found |= {value.__name__ for value in own if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


class Launch(NamedTuple):
    """``kernel[grid](*args, **constants)``"""

    kernel: JITFunction
    grid: object
    args: tuple[object, ...]
    constants: dict[str, object]

    @property
    def size(self) -> tuple[int, ...]:
        """Of what a program holds at once, comparable between launches of one kernel: sides of tiles, how many tiles
        and stages, and of which dtypes; of two that hold as much, the one with the longer side is the larger."""
        counts = [v for k, v in self.constants.items() if type(v) is int and v > 1 and k != "num_warps"]
        element_bytes = sum(x.element_size() for x in self.args if isinstance(x, Tensor))
        return math.prod(counts) * element_bytes, max(counts, default=1)


def launches_of_all() -> list[Launch]:
    """What the examples launch; nothing is compiled."""
    launches = []
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **constants: object) -> None:
        launches.append(Launch(self, grid, args, constants))

    JITFunction.run = run
    try:
        for example in EXAMPLES:
            example()
    finally:
        JITFunction.run = stock_run
    return launches


def largest(launches: list[Launch], by_dtypes: bool = False) -> list[Launch]:
    """Of each kernel one; of those whose programs can't meet, one that measures and one that writes. With `by_dtypes`
    one for all dtypes that its tensors have together."""
    found: dict[tuple[object, ...], Launch] = {}
    for launch in launches:
        key = launch.kernel, launch.constants.get("MEASURES"), launch.constants.get("WRITES")
        if by_dtypes:
            key += tuple(x.dtype for x in launch.args if isinstance(x, Tensor))
        if key not in found or launch.size > found[key].size:
            found[key] = launch
    return list(found.values())


# what a target's name may end in
CHOICES = {"all": list, "largest": largest, "largest_by_dtypes": partial(largest, by_dtypes=True)}


def spilled_bytes(target: GPUTarget, asm: dict[str, str | bytes], said: str) -> int | None:
    """Registers that went to memory, as the assembler (NVIDIA) or the code object's notes (AMD) tell."""
    if target.backend == "hip":
        found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"])
        return int(found.group(1)) if found else None
    if not said:
        # a kernel that lay in Triton's cache
        arch = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"]
        said = subprocess.run(command, input=asm["ptx"], capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    return int(found.group(1)) if found else None


def sums_apart(asm: dict[str, str | bytes]) -> int | None:
    """Additions that take a thread's own number unrounded to another's, so that their sums differ (NVIDIA)."""
    if "ptx" not in asm:
        return None
    others = re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)[|,]", asm["ptx"])
    return len(re.findall(rf"fma\.rn\.f32\s[^;]*, (?:{'|'.join(others)});", asm["ptx"])) if others else 0


def compile_all(target: GPUTarget, index: int, choose: Callable[[list[Launch]], list[Launch]]) -> dict[str, object]:
    """The examples' launches for one target, those that are chosen."""
    triton.runtime.driver.set_active(Absent(target, index))
    shared.LANES = target.warp_size
    shared._copies_tiles[torch.device("cpu")] = copies_tiles_on(target)
    shared._in_flight[torch.device("cpu")] = in_flight_on(target)
    _meet.can_meet = lambda x, size: target.backend == "cuda"
    # registers are limited as they are on a GPU
    _meet.DEVICES = ("cpu",) if target.backend == "cuda" else ()
    # as on a GPU, where its kernel says that an id is wrong
    import_module("ds_fused.ops.vocab.embedding").looks_itself = lambda ids: True
    compiled: dict[str, dict[str, object]] = {}
    for launch in choose(launches_of_all()):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants)
        if kernel.hash in compiled:
            continue
        binary = kernel.asm["hsaco" if target.backend == "hip" else "cubin"]
        compiled[kernel.hash] = {
            "kernel": launch.kernel.__name__,
            "bytes": len(binary),
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "spilled": spilled_bytes(target, kernel.asm, said.getvalue()),
            "apart": sums_apart(kernel.asm),
            "constants": {k: v for k, v in launch.constants.items() if isinstance(v, (bool, int, float, str))},
        }
    rows = sorted(compiled.values(), key=lambda row: (row["kernel"], str(row["constants"])))
    return {
        "compiled": rows,
        "unreached": sorted(kernels(target) - {row["kernel"] for row in rows}),
    }


def main(names: list[str]) -> None:
    if triton.knobs.runtime.interpret:
        sys.exit(f"{Path(__file__).name}: TRITON_INTERPRET is set, there is nothing to compile")
    os.environ["TRITON_INTERPRET"] = "1"  # after the kernels were made: only so that ops take CPU tensors to them
    # printed as a kernel is compiled: the assembler need not be asked again
    triton.knobs.nvidia.dump_ptxas_log = True
    results = {}
    for index, name in enumerate(names):
        backend, arch, lanes, choice = name.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))
        results[name] = compile_all(target, index, CHOICES[choice])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
