"""The table of ops. JSON keys, op builders and the README's table are derived from it.

A new op is its file in the room where it belongs, a row here, its test (tests/ops/test_<op>.py) and a case in
benchmarks/cases/; and its name in ops/__init__.py, ds_fused/__init__.py and the README's table, and what to compile and
to trace of it, in tests/ops/examples/<op>.py. Of all but its own test, what is missing fails a test that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import ds_fused.ops as ops
from ds_fused.ops.common._tiles import ACCUMULATE


class Option(NamedTuple):
    """An option that the JSON object of a key accepts; a keyword argument of the op's function."""

    type: type
    default: object
    doc: str
    choices: tuple[object, ...] = ()  # what it may be, where not every value of its type
    least: int = 0  # of a number


@dataclass(frozen=True)
class Op:
    """One row: a public function of ds_fused.ops and the JSON keys that switch it on (none: call it)."""

    name: str
    keys: tuple[str, ...]
    summary: str
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    on: bool = True  # where a JSON block does not name its keys
    needs: tuple[str, ...] = ()  # keys of other ops, without which it does nothing

    @property
    def function(self) -> Callable[..., object]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., object]:
        """Its specification in PyTorch, which stands in its file."""
        return getattr(self.module, f"{self.name}_reference")

    @property
    def module(self) -> ModuleType:
        """The op's file."""
        return sys.modules[self.function.__module__]


# of every op that makes logits
MEMORY = MappingProxyType(
    {
        "chunk_mb": Option(int, 512, "MiB of logits that are worked on at a time", least=1),
        "keep_mb": Option(int, 2048, "MiB of logits kept for backward instead of being computed again"),
    }
)
DIVERGENCE = MappingProxyType(
    {
        **MEMORY,
        "grad_in_forward": Option(bool, True, "of a mean or a sum: gradients made in forward, so nothing is kept"),
    }
)


OPS: tuple[Op, ...] = (
    Op(
        "rms_norm",
        ("rms_norm",),
        "root-mean-square norm; weight offset, bias, both cast orders",
    ),
    Op(
        "layer_norm",
        ("layer_norm",),
        "layer norm; weight and bias may each be missing",
    ),
    Op("add_layer_norm", (), "residual add and layer norm in one pass"),
    Op(
        "group_norm",
        ("group_norm",),
        "group norm of [N, C, ...]; large groups in parts",
    ),
    Op("dyt", (), "dynamic tanh: weight * tanh(alpha * x) + bias"),
    Op("poly_norm", (), "PolyCom's activation: normed cube, square and x, weighted"),
    Op("rope", ("rope",), "rotary embedding of q and k in one launch; sections, complex angles"),
    Op(
        "rms_norm_rope",
        ("qk_norm_rope",),
        "root-mean-square norm and rotary embedding of the heads of q and k in one pass",
        needs=("rms_norm", "rope"),
    ),
    Op(
        "glu",
        ("swiglu", "geglu", "reglu"),
        "gated linear unit: silu, gelu, relu, relu squared; packed, clamped",
    ),
    Op(
        "experts",
        ("experts",),
        "experts of a mixture: products of rows grouped by expert, gate, sum of a token's choices",
    ),
    Op("relu2", ("relu2",), "squared ReLU without a gate"),
    Op(
        "lora_linear",
        ("lora",),
        "linear layer with a low-rank adapter of PEFT's, one node",
    ),
    Op(
        "add_rms_norm",
        ("add_rms_norm",),
        "residual connection and root-mean-square norm in one pass",
        on=False,  # 0.4 to 1.1 % of a step, and nothing beside a recompute that keeps a part
        needs=("rms_norm",),
    ),
    Op(
        "gated_rms_norm",
        ("gated_rms_norm",),
        "root-mean-square norm with a gate before or behind it, in groups",
    ),
    Op(
        "modulated_rms_norm",
        (),
        "root-mean-square norm, scaled and shifted by the sample or the row: diffusion transformers",
    ),
    Op(
        "attention_residual",
        (),
        "residual connection by attention over the outputs of earlier blocks, in a stack or each by itself",
    ),
    Op(
        "mhc_coefficients",
        (),
        "hyper-connections (mHC): projection of a token's streams, gates, and Sinkhorn-Knopp's iterations",
    ),
    Op(
        "mhc_pre",
        (),
        "hyper-connections: what a layer reads of the streams",
    ),
    Op(
        "mhc_in",
        (),
        "hyper-connections: coefficients and what a layer reads, with one gradient of the streams",
    ),
    Op(
        "mhc_post_res",
        (),
        "hyper-connections: streams mixed, and the layer's output to each",
    ),
    Op(
        "embedding",
        (),
        "lookup of rows; deterministic gradient without atomics",
    ),
    Op("softmax", (), "softmax along a dimension"),
    Op(
        "sparsemax",
        (),
        "projection on the probability simplex along a dimension, without a sort",
    ),
    Op(
        "multi_token_attention",
        (),
        "masked softmax or sparsemax of scores, and a convolution over queries, keys and heads",
    ),
    Op(
        "neighborhood_attention",
        (),
        "attention of each token to those around it, side by side or in steps; nothing of T x T",
    ),
    Op(
        "cross_entropy",
        ("cross_entropy",),
        "cross entropy of logits; the gradient may overwrite them, in the backward or the forward",
    ),
    Op(
        "linear_cross_entropy",
        ("fused_linear_cross_entropy",),
        "lm head and cross entropy without the whole logits",
        MappingProxyType(
            {
                **MEMORY,
                "grad_in_forward": Option(
                    bool, True, "where the weight is whole: gradients made in forward, so that no logits are kept"
                ),
                "accumulate": Option(
                    str,
                    "auto",
                    "what the gradient of the weight is added up in, chunk by chunk of tokens: fp32, rounded once, or "
                    '"native", its own dtype; "auto": fp32, but with grad_in_forward its own up to 8 chunks',
                    ACCUMULATE,
                ),
            }
        ),
    ),
    Op(
        "linear_log_probs",
        (),
        "log-probabilities of labels, and entropies, from hidden states: RLHF, GRPO, DPO",
        MEMORY,
    ),
    Op(
        "linear_jsd",
        (),
        "generalised Jensen-Shannon divergence of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    Op(
        "linear_kl_div",
        (),
        "forward or reverse KL divergence of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    Op(
        "linear_cosine",
        (),
        "angle between the logits of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    # losses that replace no layer
    Op("kl_div", (), "KL divergence of log-probabilities from a target, as in PyTorch"),
    Op("jsd", (), "distillation: generalized Jensen-Shannon divergence, both KLs; from logits"),
    Op("tvd", (), "distillation: total variation distance; from logits"),
)


# of every key, those of other ops without which it does nothing
NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType({key: row.needs for row in OPS for key in row.keys})


def switched(given: Mapping[str, object]) -> dict[str, object]:
    """Of every key what is given for it. One that is not named is on by its op's default, and if what it needs is."""
    return {
        key: given.get(key, row.on and all(given.get(need, True) is not False for need in row.needs))
        for row in OPS
        for key in row.keys
    }


def op(name: str) -> Op:
    """The row of that name."""
    for row in OPS:
        if row.name == name:
            return row
    raise ValueError(f"no op {name!r}; there are {', '.join(row.name for row in OPS)}")
