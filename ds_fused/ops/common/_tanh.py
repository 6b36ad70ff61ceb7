"""Device code of tanh, with the bits that fp32 has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2."""
    q = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + q)
    # 1 - tanh^2 would keep few bits of a slope near 0, and the quotient few of a tanh near 0: there a series, which
    # leaves out less than 1e-7 of the value
    s = x * x
    tail = s * (0.13333333333333333 - s * (0.05396825396825397 - s * (0.021869488536155203 - s * 0.008863235529902197)))
    series = x * (1.0 + s * (tail - 0.3333333333333333))
    quotient = (1.0 - q) * r
    return tl.where(s < 0.09, series, tl.where(x < 0.0, -quotient, quotient)), 4.0 * q * r * r
