"""Device code of the gates: the logistic function with its slope."""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._exp import exp_of


@triton.jit
def sigmoid_and_slope(x):
    # s * (1 - s) would keep few bits of a slope where s is near 1, and gelu_tanh multiplies it by up to 3 x^2
    q = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + q)
    return tl.where(x < 0.0, q * r, r), q * r * r


@triton.jit
def exact_slope(x):
    """As exact as PyTorch's: the gradient of a bias adds up those of all tokens."""
    q = exp_of(-tl.abs(x))
    r = tl.div_rn(1.0, 1.0 + q)
    return q * r * r
