"""What is measured: one row per op and variant, each with its shapes, its rivals and its floor.

The floor's numerator is what any implementation must do: every input read once and every output written once (bytes),
or the products that no algebra avoids (FLOPs). It doesn't know how ours works. Sizes in elements, bf16.
"""

from benchmarks.cases import (
    adapters,
    attention,
    distillation,
    embedding,
    gates,
    heads,
    mlps,
    norms,
    preference,
    residuals,
    rms_norms,
    rotary,
)

CASES = (
    *rms_norms.CASES,
    *residuals.CASES,
    *embedding.CASES,
    *attention.CASES,
    *norms.CASES,
    *gates.CASES,
    *rotary.CASES,
    *mlps.CASES,
    *adapters.CASES,
    *heads.CASES,
    *preference.CASES,
    *distillation.CASES,
)
