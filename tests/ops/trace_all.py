"""Traces every op of ds_fused.ops with torch.compile's dynamo, forward and backward, as on a GPU; none is needed.

    python tests/ops/trace_all.py

Needs a process of its own, without TRITON_INTERPRET. Tensors lie on the CPU, the kernels are traced and nothing is run.
Prints as JSON what stopped a trace. Each op is called with one shape after the other,
for that makes dynamo take the sizes that change for symbols; where a launcher then needs such a size as a number, it is
a symbol with a known value, in which dynamo 2.11 to 2.13 has a bug (see row_stride in ds_fused/ops/_triton.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.utils._triton
import triton
from compile_all import Elsewhere, leaf
from torch import Tensor
from triton.backends.compiler import GPUTarget

import ds_fused.ops as ops
from ds_fused.ops import _linear_divergence
from ds_fused.ops.registry import OPS

MULTIPROCESSORS = 132

# what one case calls, and with what, one after the other
Case = tuple[Callable[..., object], list[tuple[Tensor, ...]]]


def rms_norm() -> Iterator[Case]:
    # a whole row, one that is walked backward, one that is walked
    widths = (257, 20480, 40960)
    for first, second in ((a, b) for a in widths for b in widths if a != b):
        yield ops.rms_norm, [(leaf(65, d), leaf(d)) for d in (first, second)]
    yield ops.rms_norm, [(leaf(n, 4096), leaf(4096)) for n in (3, 65, 66)]
    yield lambda x: ops.rms_norm(x, None), [(leaf(2, 3, d),) for d in (64, 128)]


def glu() -> Iterator[Case]:
    yield ops.glu, [(leaf(5, d), leaf(5, d)) for d in (64, 128, 100)]
    yield ops.glu, [(leaf(2, n, 64), leaf(2, n, 64)) for n in (3, 4, 5)]
    yield lambda packed: ops.glu(*packed.chunk(2, -1)), [(leaf(5, 2 * d),) for d in (64, 128, 100)]


def rope() -> Iterator[Case]:
    def inputs(tokens: int, heads: int, width: int) -> tuple[Tensor, ...]:
        q, k = (leaf(1, tokens, h, width).transpose(1, 2) for h in (heads, 2))
        return q, k, torch.ones(1, tokens, width), torch.ones(1, tokens, width)

    yield ops.rope, [inputs(n, 4, 64) for n in (3, 4, 5)]
    yield ops.rope, [inputs(5, 4, d) for d in (64, 128)]
    yield ops.rope, [inputs(5, h, 64) for h in (4, 8)]


def labels(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def cross_entropy() -> Iterator[Case]:
    yield ops.cross_entropy, [(leaf(5, n_vocab), labels(5)) for n_vocab in (1024, 32000)]
    yield ops.cross_entropy, [(leaf(n, 1024), labels(n)) for n in (3, 4, 5)]
    overwriting = partial(ops.cross_entropy, overwrite_logits=True, label_smoothing=0.1, softcap=30.0)
    yield lambda x, labels: overwriting(x * 2, labels), [(leaf(5, 1024), labels(5))]


def linear_cross_entropy() -> Iterator[Case]:
    yield ops.linear_cross_entropy, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4, 5)]
    yield ops.linear_cross_entropy, [(leaf(5, d), leaf(1024, d), labels(5)) for d in (8, 16)]
    recomputed = partial(ops.linear_cross_entropy, keep_mb=0, reduction="sum", logit_scale=0.5)
    yield recomputed, [(leaf(n, 8), leaf(1024, 8), labels(n)) for n in (3, 4)]


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


EXAMPLES: tuple[Callable[[], Iterator[Case]], ...] = (
    rms_norm,
    glu,
    rope,
    cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
    linear_jsd,
    linear_kl_div,
)


class Traced(Exception):
    """Dynamo has its graph, which is all that was to be seen."""


def backend(*_: object) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise Traced

    return run


def problem(call: Callable[..., object], inputs: list[tuple[Tensor, ...]]) -> str | None:
    """What kept dynamo from making one graph of a call."""
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for tensors in inputs:
        try:
            compiled(*tensors)
        except Traced:
            pass
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            return f"{shapes}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return None


def pretend_to_have_a_gpu() -> None:
    triton.runtime.driver.set_active(Elsewhere(GPUTarget("cuda", 90, 32), 0))
    # dynamo asks before it looks whether a function is a kernel
    torch.utils._triton.has_triton = lambda: True
    for module in (*(op.module for op in OPS), _linear_divergence):
        for name, answer in (("runs_kernels", lambda *_: True), ("multiprocessors", lambda _: MULTIPROCESSORS)):
            if hasattr(module, name):
                setattr(module, name, answer)


def main() -> None:
    pretend_to_have_a_gpu()
    problems = {}
    for example in EXAMPLES:
        found = [p for case in example() if (p := problem(*case)) is not None]
        if found:
            problems[example.__name__] = found
    print(json.dumps({"examples": [example.__name__ for example in EXAMPLES], "problems": problems}))


if __name__ == "__main__":
    main()
