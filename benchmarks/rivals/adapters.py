"""Linear layers under a low-rank adapter: x [1, M, K], weight [N, K], a [r, K] and b [N, r], which may be in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, our_ops

SCALING = 2.0


def _ours(t: Tensors) -> Call:
    op = our_ops().lora_linear
    return lambda: op(t["x"], t["weight"], t["a"], t["b"], scaling=SCALING)


def _layers(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As ``peft.tuners.lora.Linear.forward`` has it."""
    y = F.linear(x, weight)
    return (y + F.linear(F.linear(x.to(a.dtype), a), b) * SCALING).to(y.dtype)


def _peft(t: Tensors):
    return _layers, tuple(t[name] for name in ("x", "weight", "a", "b"))


LORA_LINEAR = {
    "ds_fused": Provider(_ours),
    "hf_eager": Provider(eager(_peft), note="PEFT's layers"),
    "compile": Provider(compiled(_peft), note="PEFT's layers"),
}
