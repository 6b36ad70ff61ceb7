"""Device code of exponentials that are as exact as PyTorch's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_of(x):
    """e^x, x <= 0. tl.exp rounds x log2(e), by more the farther from zero it is; here that product is at most 1/2."""
    # from there on it is zero, and what is infinite has no rest
    x = tl.where(x < -200.0, -200.0, x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln(2) in two parts, of which the first has few bits: what is taken away is exact
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4
    # fma: of what is added up every sum then takes the rounded number, as _mhc_kernels.scaled has it
    return tl.fma(tl.exp2(whole), tl.exp2(rest * 1.4426950408889634), 0.0)
