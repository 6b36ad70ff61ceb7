"""Rotary embeddings, with and without the norms before them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rivals.provider import EPS, Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- rope: q [B, Hq, T, D], k [B, Hk, T, D] (views of [B, T, H, D]), cos and sin [1, T, D] ---


def _hf_rope(t: Tensors):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb, (t["q"], t["k"], t["cos"], t["sin"])


def _liger_rope(t: Tensors) -> Call:
    rope = liger_ops().liger_rope
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"])


class _Produced(torch.autograd.Function):
    """x as if something had computed it: a leaf may not be overwritten."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx, dx: Tensor) -> Tensor:
        return dx


def _our_rope(*angles: str, sections: bool = False, **options) -> Callable[[Tensors], Call]:
    """``angles``: names of what q and k are turned by; none: cos and sin."""

    def build(t: Tensors) -> Call:
        rope, turned_by = our_ops().rope, [t[name] for name in angles or ("cos", "sin")]
        more = options | ({"sections": _sections_of(t["q"].shape[-1])} if sections else {})
        if not more.get("inplace"):
            return lambda: rope(t["q"], t["k"], *turned_by, **more)
        produced = _Produced.apply
        return lambda: rope(produced(t["q"]), produced(t["k"]), *turned_by, **more)

    return build


_ALL = "q", "k", "dq", "dk"


def _our_ropes(*angles: str, **options) -> dict[str, Provider]:
    """Ours as it is, and with what it may be allowed to write over."""
    over_all = {"inplace": True, "overwrite_grad": True}
    return {
        "ds_fused": Provider(_our_rope(*angles, **options)),
        "ds_fused inplace": Provider(
            _our_rope(*angles, **options, inplace=True), ("q", "k"), "forward over q and k; both restored untimed"
        ),
        "ds_fused inplace overwrite_grad": Provider(
            _our_rope(*angles, **options, **over_all), _ALL, "in place on q, k, dq, dk; all restored untimed"
        ),
    }


ROPE = {
    **_our_ropes(),
    "hf_eager": Provider(eager(_hf_rope)),
    "compile": Provider(compiled(_hf_rope)),
    "liger": Provider(_liger_rope, _ALL, "in place on q, k, dq, dk; all restored untimed"),
}


# --- rms_norm_rope: as rope, and q_weight, k_weight [D] ---


def _norm_then_rope(norm: Callable[[Tensor, Tensor], Tensor], rope: Callable, t: Tensors):
    """Norms over [B, T, H, D], as models call them: of transposed heads some would make a copy first."""

    def norm_rope(q, k, cos, sin):
        q, k = (norm(x.transpose(1, 2), t[name]).transpose(1, 2) for x, name in ((q, "q_weight"), (k, "k_weight")))
        return rope(q, k, cos, sin)

    return norm_rope, (t["q"], t["k"], t["cos"], t["sin"])


def _hf_norm_rope(t: Tensors):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    norms = {}
    for weight in (t["q_weight"], t["k_weight"]):
        norms[id(weight)] = norm = Qwen3RMSNorm(weight.numel(), eps=EPS)
        norm.weight = weight
    return _norm_then_rope(lambda x, weight: norms[id(weight)](x), apply_rotary_pos_emb, t)


def _liger_norm_rope(t: Tensors) -> Call:
    norm, rope = liger_ops().liger_rms_norm, liger_ops().liger_rope
    call, tensors = _norm_then_rope(lambda x, weight: norm(x, weight, EPS, in_place=False), rope, t)
    return lambda: call(*tensors)


def _our_norm_then_rope(t: Tensors) -> Call:
    norm, rope = our_ops().rms_norm, our_ops().rope
    call, tensors = _norm_then_rope(lambda x, weight: norm(x, weight, eps=EPS), rope, t)
    return lambda: call(*tensors)


def _our_norm_rope(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        norm_rope, names = our_ops().rms_norm_rope, ("q", "k", "q_weight", "k_weight", "cos", "sin")
        return lambda: norm_rope(*[t[name] for name in names], eps=EPS, **options)

    return build


NORM_ROPE = {
    "ds_fused": Provider(_our_norm_rope()),
    "ds_fused overwrite_grad": Provider(
        _our_norm_rope(overwrite_grad=True), ("dq", "dk"), "backward over dq and dk; both restored untimed"
    ),
    "ds_fused apart": Provider(_our_norm_then_rope, note="rms_norm twice, then rope"),
    "hf_eager": Provider(eager(_hf_norm_rope)),
    "compile": Provider(compiled(_hf_norm_rope)),
    "liger": Provider(_liger_norm_rope, ("dq", "dk"), "norms not in place; rope in place, dq and dk restored untimed"),
}


# --- rope by sections: cos and sin [3, B, T, D]; with complex angles: q, k [B, T, H, D], freqs [B, T, D/2] ---


def _sections_of(d: int) -> list[int]:
    """Of d/2 pairs a quarter turns by time, the rest half and half: 16, 24, 24 in a head of 128."""
    return [d // 8, 3 * d // 16, 3 * d // 16]


def _hf_sections(t: Tensors):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    sections = _sections_of(t["q"].shape[-1])

    def rope(q, k, cos, sin):
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(x.split(sections * 2, dim=-1))], dim=-1) for x in (cos, sin)
        )
        return apply_rotary_pos_emb(q, k, cos, sin)

    return rope, (t["q"], t["k"], t["cos"], t["sin"])


def _liger_sections(t: Tensors) -> Call:
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb as rope

    sections = _sections_of(t["q"].shape[-1])
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"], sections)


def _hf_complex(t: Tensors):
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    return apply_rotary_emb, (t["q"], t["k"], t["freqs"])


def _liger_complex(t: Tensors) -> Call:
    from liger_kernel.transformers.llama4_rope import liger_llama4_text_rotary_pos_emb as rope

    return lambda: rope(t["q"], t["k"], t["freqs"])


_COMPLEX = {"interleaved": True, "unsqueeze_dim": 2, "keep_dtype": True}


def partial_rope_providers(family: str, *, interleaved: bool) -> dict[str, Provider]:
    """cos and sin [1, T, R] of fewer columns than q and k, as ``family`` of transformers.models turns them."""

    def hf(t: Tensors):
        from importlib import import_module

        module = import_module(f"transformers.models.{family}.modeling_{family}")
        return module.apply_rotary_pos_emb, (t["q"], t["k"], t["cos"], t["sin"])

    return {
        **_our_ropes(interleaved=interleaved),
        "hf_eager": Provider(eager(hf)),
        "compile": Provider(compiled(hf)),
    }


ROPE_SECTIONS = {
    **_our_ropes(sections=True),
    "hf_eager": Provider(eager(_hf_sections), note="the sections put together each time, as remote code does"),
    "compile": Provider(compiled(_hf_sections)),
    "liger": Provider(_liger_sections, _ALL, "in place on q, k, dq, dk; all restored untimed"),
}
ROPE_COMPLEX = {
    **_our_ropes("freqs", **_COMPLEX),
    "hf_eager": Provider(eager(_hf_complex)),
    "compile": Provider(compiled(_hf_complex)),
    "liger": Provider(_liger_complex, _ALL, "may write over its arguments; all restored untimed"),
}
