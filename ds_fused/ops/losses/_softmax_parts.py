"""Device code of the losses' softmax passes: the cap on a logit, running sums of exponentials, gradients of a logit.

What the passes compute is said in cross_entropy.py.

Exponentials are in base 2: exp2 flushes numbers below the least normal one to zero, for whose sake exp takes three
instructions more. log2(e) is written out, since the key under which Triton keeps a kernel depends, where a function
within it reads a global, on whether another kernel has used that function before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._tanh import tanh_and_slope


@triton.jit
def capped(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits to (z, dz/dx), both fp32."""
    z = x * logit_scale
    slope = logit_scale
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(z / softcap)
        z = softcap * t
        slope *= logit_scale
    return z, slope


@triton.jit
def online(top, total, z):
    """Each lane's running maximum and sum of exponentials, with one exponential an element: either z or top is the new
    maximum, whose exponential is 1."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(z - top))
    total = tl.where(z > top, total * e + 1.0, total + e)
    return tl.maximum(z, top), total


@triton.jit
def online_entropy(top, total, below, z):
    """online, and each lane's sum of exponentials times their distance from the maximum."""
    gap = tl.minimum(tl.abs(z - top), 1e38, propagate_nan=tl.PropagateNan.ALL)  # finite: e is 0 there
    e = tl.exp(-gap)
    # a new maximum is that much farther from all that was before
    below = tl.where(z > top, (below + total * gap) * e, below + gap * e)
    total = tl.where(z > top, total * e + 1.0, total + e)
    return tl.maximum(z, top), total, below


@triton.jit
def dz_of_loss(z, peak, rest, is_label, wanted_label, wanted_other, on_lse):
    p = tl.exp((z - peak) - rest)
    # the difference first: what is left of it may be small
    return (p - tl.where(is_label, wanted_label, wanted_other)) + p * on_lse


@triton.jit
def dz_of_entropy(z, peak, rest, entropy):
    log_p = (z - peak) - rest
    # finite where p is 0
    return tl.exp(log_p) * -(tl.maximum(log_p, -1e38, propagate_nan=tl.PropagateNan.ALL) + entropy)
