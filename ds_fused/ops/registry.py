"""The table of ops. JSON keys, op builders and the README's table are derived from it.

A new op is its file in the room where it belongs, a row here, its test (tests/ops/test_<op>.py) and a case in
benchmarks/cases/; and its name in ops/__init__.py, ds_fused/__init__.py, the README's table and, with an example to
compile and to trace each, in tests/ops/compile_all.py and trace_all.py. Of all but its own test, what is missing fails
a test that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from ds_fused.ops.attention.multi_token_attention import multi_token_attention, multi_token_attention_reference
from ds_fused.ops.attention.neighborhood_attention import neighborhood_attention, neighborhood_attention_reference
from ds_fused.ops.attention.softmax import softmax, softmax_reference
from ds_fused.ops.attention.sparsemax import sparsemax, sparsemax_reference
from ds_fused.ops.common._tiles import ACCUMULATE
from ds_fused.ops.losses.cross_entropy import cross_entropy, cross_entropy_reference
from ds_fused.ops.losses.jsd import jsd, jsd_reference
from ds_fused.ops.losses.kl_div import kl_div, kl_div_reference
from ds_fused.ops.losses.tvd import tvd, tvd_reference
from ds_fused.ops.mlp.experts import experts, experts_reference
from ds_fused.ops.mlp.glu import glu, glu_reference
from ds_fused.ops.mlp.lora_linear import lora_linear, lora_linear_reference
from ds_fused.ops.mlp.relu2 import relu2, relu2_reference
from ds_fused.ops.norms.add_layer_norm import add_layer_norm, add_layer_norm_reference
from ds_fused.ops.norms.add_rms_norm import add_rms_norm, add_rms_norm_reference
from ds_fused.ops.norms.dyt import dyt, dyt_reference
from ds_fused.ops.norms.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from ds_fused.ops.norms.group_norm import group_norm, group_norm_reference
from ds_fused.ops.norms.layer_norm import layer_norm, layer_norm_reference
from ds_fused.ops.norms.modulated_rms_norm import modulated_rms_norm, modulated_rms_norm_reference
from ds_fused.ops.norms.poly_norm import poly_norm, poly_norm_reference
from ds_fused.ops.norms.rms_norm import rms_norm, rms_norm_reference
from ds_fused.ops.residual.attention_residual import attention_residual, attention_residual_reference
from ds_fused.ops.residual.mhc_coefficients import (
    mhc_coefficients,
    mhc_coefficients_reference,
)
from ds_fused.ops.residual.mhc_in import mhc_in, mhc_in_reference
from ds_fused.ops.residual.mhc_post_res import mhc_post_res, mhc_post_res_reference
from ds_fused.ops.residual.mhc_pre import mhc_pre, mhc_pre_reference
from ds_fused.ops.rotary.rms_norm_rope import rms_norm_rope, rms_norm_rope_reference
from ds_fused.ops.rotary.rope import rope, rope_reference
from ds_fused.ops.vocab.embedding import embedding, embedding_reference
from ds_fused.ops.vocab.linear_cosine import linear_cosine, linear_cosine_reference
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ds_fused.ops.vocab.linear_jsd import linear_jsd, linear_jsd_reference
from ds_fused.ops.vocab.linear_kl_div import linear_kl_div, linear_kl_div_reference
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs, linear_log_probs_reference


class Option(NamedTuple):
    """An option that the JSON object of a key accepts; a keyword argument of the op's function."""

    type: type
    default: object
    doc: str
    choices: tuple[object, ...] = ()  # what it may be, where not every value of its type
    least: int = 0  # of a number


@dataclass(frozen=True)
class Op:
    """One row: a public function, its specification in PyTorch and the JSON keys that switch it on (none: call it)."""

    name: str
    function: Callable[..., object]
    reference: Callable[..., object]
    keys: tuple[str, ...]
    summary: str
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    on: bool = True  # where a JSON block does not name its keys
    needs: tuple[str, ...] = ()  # keys of other ops, without which it does nothing

    @property
    def module(self) -> ModuleType:
        """The op's file (``ds_fused.ops.<name>`` as an attribute is the function)."""
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
        rms_norm,
        rms_norm_reference,
        ("rms_norm",),
        "root-mean-square norm; weight offset, bias, both cast orders",
    ),
    Op(
        "layer_norm",
        layer_norm,
        layer_norm_reference,
        ("layer_norm",),
        "layer norm; weight and bias may each be missing",
    ),
    Op("add_layer_norm", add_layer_norm, add_layer_norm_reference, (), "residual add and layer norm in one pass"),
    Op(
        "group_norm",
        group_norm,
        group_norm_reference,
        ("group_norm",),
        "group norm of [N, C, ...]; large groups in parts",
    ),
    Op("dyt", dyt, dyt_reference, (), "dynamic tanh: weight * tanh(alpha * x) + bias"),
    Op("poly_norm", poly_norm, poly_norm_reference, (), "PolyCom's activation: normed cube, square and x, weighted"),
    Op("rope", rope, rope_reference, ("rope",), "rotary embedding of q and k in one launch; sections, complex angles"),
    Op(
        "rms_norm_rope",
        rms_norm_rope,
        rms_norm_rope_reference,
        ("qk_norm_rope",),
        "root-mean-square norm and rotary embedding of the heads of q and k in one pass",
        needs=("rms_norm", "rope"),
    ),
    Op(
        "glu",
        glu,
        glu_reference,
        ("swiglu", "geglu", "reglu"),
        "gated linear unit: silu, gelu, relu, relu squared; packed, clamped",
    ),
    Op(
        "experts",
        experts,
        experts_reference,
        ("experts",),
        "experts of a mixture: products of rows grouped by expert, gate, sum of a token's choices",
    ),
    Op("relu2", relu2, relu2_reference, ("relu2",), "squared ReLU without a gate"),
    Op(
        "lora_linear",
        lora_linear,
        lora_linear_reference,
        ("lora",),
        "linear layer with a low-rank adapter of PEFT's, one node",
    ),
    Op(
        "add_rms_norm",
        add_rms_norm,
        add_rms_norm_reference,
        ("add_rms_norm",),
        "residual connection and root-mean-square norm in one pass",
        on=False,  # 0.4 to 1.1 % of a step, and nothing beside a recompute that keeps a part
        needs=("rms_norm",),
    ),
    Op(
        "gated_rms_norm",
        gated_rms_norm,
        gated_rms_norm_reference,
        ("gated_rms_norm",),
        "root-mean-square norm with a gate before or behind it, in groups",
    ),
    Op(
        "modulated_rms_norm",
        modulated_rms_norm,
        modulated_rms_norm_reference,
        (),
        "root-mean-square norm, scaled and shifted by the sample or the row: diffusion transformers",
    ),
    Op(
        "attention_residual",
        attention_residual,
        attention_residual_reference,
        (),
        "residual connection by attention over the outputs of earlier blocks, in a stack or each by itself",
    ),
    Op(
        "mhc_coefficients",
        mhc_coefficients,
        mhc_coefficients_reference,
        (),
        "hyper-connections (mHC): projection of a token's streams, gates, and Sinkhorn-Knopp's iterations",
    ),
    Op(
        "mhc_pre",
        mhc_pre,
        mhc_pre_reference,
        (),
        "hyper-connections: what a layer reads of the streams",
    ),
    Op(
        "mhc_in",
        mhc_in,
        mhc_in_reference,
        (),
        "hyper-connections: coefficients and what a layer reads, with one gradient of the streams",
    ),
    Op(
        "mhc_post_res",
        mhc_post_res,
        mhc_post_res_reference,
        (),
        "hyper-connections: streams mixed, and the layer's output to each",
    ),
    Op(
        "embedding",
        embedding,
        embedding_reference,
        (),
        "lookup of rows; deterministic gradient without atomics",
    ),
    Op("softmax", softmax, softmax_reference, (), "softmax along a dimension"),
    Op(
        "sparsemax",
        sparsemax,
        sparsemax_reference,
        (),
        "projection on the probability simplex along a dimension, without a sort",
    ),
    Op(
        "multi_token_attention",
        multi_token_attention,
        multi_token_attention_reference,
        (),
        "masked softmax or sparsemax of scores, and a convolution over queries, keys and heads",
    ),
    Op(
        "neighborhood_attention",
        neighborhood_attention,
        neighborhood_attention_reference,
        (),
        "attention of each token to those around it, side by side or in steps; nothing of T x T",
    ),
    Op(
        "cross_entropy",
        cross_entropy,
        cross_entropy_reference,
        ("cross_entropy",),
        "cross entropy of logits; the gradient may overwrite them, in the backward or the forward",
    ),
    Op(
        "linear_cross_entropy",
        linear_cross_entropy,
        linear_cross_entropy_reference,
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
        linear_log_probs,
        linear_log_probs_reference,
        (),
        "log-probabilities of labels, and entropies, from hidden states: RLHF, GRPO, DPO",
        MEMORY,
    ),
    Op(
        "linear_jsd",
        linear_jsd,
        linear_jsd_reference,
        (),
        "generalised Jensen-Shannon divergence of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    Op(
        "linear_kl_div",
        linear_kl_div,
        linear_kl_div_reference,
        (),
        "forward or reverse KL divergence of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    Op(
        "linear_cosine",
        linear_cosine,
        linear_cosine_reference,
        (),
        "angle between the logits of a student's head and a teacher's, from hidden states",
        DIVERGENCE,
    ),
    # losses that replace no layer
    Op("kl_div", kl_div, kl_div_reference, (), "KL divergence of log-probabilities from a target, as in PyTorch"),
    Op("jsd", jsd, jsd_reference, (), "distillation: generalized Jensen-Shannon divergence, both KLs; from logits"),
    Op("tvd", tvd, tvd_reference, (), "distillation: total variation distance; from logits"),
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
