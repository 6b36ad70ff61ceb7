"""Device code that reads 16-bit numbers a second time without their having been kept in fp32 since the first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide_again(x):
    """bf16 in fp32 by other instructions than .to: else the compiler keeps the numbers of an earlier conversion, in
    twice the registers. Nothing but .to makes fp16 fp32, so its numbers are kept."""
    wide = x.to(tl.float32)
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return wide
