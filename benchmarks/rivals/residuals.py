"""What stands in for the residual stream: attention over earlier blocks, and hyper-connections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.provider import EPS, Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- attention_residual: stack [N, T, D] or N blocks [T, D], query, weight [D]; no model of transformers has one ---


def _attention_residual(stack, query, weight):
    wide = stack.float()
    keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight
    shares = (keys * query).sum(-1, keepdim=True).softmax(0)
    return (shares * wide).sum(0).to(stack.dtype)


def _blocks(t: Tensors) -> list[Tensor]:
    return [x for name, x in t.items() if name.startswith("block")]


def _eager_attention_residual(t: Tensors):
    return _attention_residual, (t["stack"], t["query"], t["weight"])


def _eager_listed_attention_residual(t: Tensors):
    def stacked(query, weight, *blocks):
        return _attention_residual(torch.stack(blocks), query, weight)

    return stacked, (t["query"], t["weight"], *_blocks(t))


def _liger_attention_residual(t: Tensors) -> Call:
    op = liger_ops().liger_attn_res
    return lambda: op(t["stack"], t["query"], t["weight"], EPS)


def _liger_listed_attention_residual(t: Tensors) -> Call:
    op, blocks = liger_ops().liger_attn_res, _blocks(t)
    return lambda: op(torch.stack(blocks), t["query"], t["weight"], EPS)


def _our_attention_residual(t: Tensors) -> Call:
    op, blocks = our_ops().attention_residual, t["stack"] if "stack" in t else _blocks(t)
    return lambda: op(blocks, t["query"], t["weight"], eps=EPS)


ATTENTION_RESIDUAL = {
    "ds_fused": Provider(_our_attention_residual),
    "hf_eager": Provider(eager(_eager_attention_residual), note="the formula in fp32"),
    "compile": Provider(compiled(_eager_attention_residual)),
    "liger": Provider(_liger_attention_residual),
}
LISTED_ATTENTION_RESIDUAL = {
    "ds_fused": Provider(_our_attention_residual),
    "hf_eager": Provider(eager(_eager_listed_attention_residual), note="torch.stack and the formula in fp32"),
    "compile": Provider(compiled(_eager_listed_attention_residual)),
    "liger": Provider(_liger_listed_attention_residual, note="of torch.stack: a list itself is an error"),
}


# --- hyper-connections: x [T, N, C], phi [N C, M], bias [M], scale [3]; pre, post [T, N], res [T, N, N], y [T, C] ---


def _deepseek_v4(x, phi, bias, scale):
    """The coefficients by the steps of transformers' DeepSeek-V4, whose class returns no pre."""
    n = x.shape[1]
    flat = x.flatten(1).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    mixes = F.linear(flat, phi.T.float()).split([n, n, n * n], dim=-1)
    pre, post, res = (s * part + b for s, part, b in zip(scale, mixes, bias.split([n, n, n * n]), strict=True))
    res = torch.softmax(res.view(-1, n, n), dim=-1) + EPS
    res = res / (res.sum(dim=-2, keepdim=True) + EPS)
    for _ in range(19):
        res = res / (res.sum(dim=-1, keepdim=True) + EPS)
        res = res / (res.sum(dim=-2, keepdim=True) + EPS)
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res


def _stock_pre(x, pre):
    return (pre.unsqueeze(-1) * x).sum(dim=1).to(x.dtype)


def _stock_post_res(x, y, post, res):
    return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(res.to(x.dtype), x)


def _stock_connection(x, phi, bias, scale):
    pre, post, res = _deepseek_v4(x, phi, bias, scale)
    return _stock_post_res(x, _stock_pre(x, pre), post, res)


def _arguments(function: Callable, *names: str) -> Callable[[Tensors], tuple[Callable, tuple]]:
    return lambda t: (function, tuple(t[name] for name in names))


def _liger_coefficients(t: Tensors) -> Callable:
    op = liger_ops().liger_mhc_coeffs
    fp32 = t["x"].dtype == torch.float32
    return lambda: op(t["x"], t["phi"], t["bias"], *t["scale"].unbind(), allow_fp32=fp32)


def _liger_pre(t: Tensors) -> Call:
    op = liger_ops().liger_mhc_pre
    return lambda: op(t["x"], t["pre"])


def _liger_post_res(t: Tensors) -> Call:
    op = liger_ops().liger_mhc_post_res
    return lambda: op(t["x"], t["y"], t["post"], t["res"])


def _liger_connection(t: Tensors) -> Call:
    coefficients, liger = _liger_coefficients(t), liger_ops()

    def call():
        pre, post, res = coefficients()
        return liger.liger_mhc_post_res(t["x"], liger.liger_mhc_pre(t["x"], pre), post, res)

    return call


def _our_coefficients(t: Tensors) -> Call:
    op = our_ops().mhc_coefficients
    return lambda: op(t["x"], t["phi"].T, t["bias"], t["scale"], eps=EPS)


def _our_pre(t: Tensors) -> Call:
    op = our_ops().mhc_pre
    return lambda: op(t["x"], t["pre"])


def _our_post_res(t: Tensors) -> Call:
    op = our_ops().mhc_post_res
    return lambda: op(t["x"], t["y"], t["post"], t["res"])


def _our_connection(t: Tensors) -> Call:
    ops = our_ops()

    def call():
        y, post, res, x = ops.mhc_in(t["x"], t["phi"].T, t["bias"], t["scale"], eps=EPS)
        return ops.mhc_post_res(x, y, post, res)

    return call


_COEFFICIENTS = _arguments(_deepseek_v4, "x", "phi", "bias", "scale")
_PRE, _POST_RES = _arguments(_stock_pre, "x", "pre"), _arguments(_stock_post_res, "x", "y", "post", "res")
_CONNECTION = _arguments(_stock_connection, "x", "phi", "bias", "scale")
_V4 = "DeepSeek-V4's steps"
COEFFICIENTS = {
    "ds_fused": Provider(_our_coefficients, note="with a copy of the transposed phi"),
    "hf_eager": Provider(eager(_COEFFICIENTS), note=_V4),
    "compile": Provider(compiled(_COEFFICIENTS)),
    "liger": Provider(_liger_coefficients),
}
STREAMS_PRE = {
    "ds_fused": Provider(_our_pre),
    "hf_eager": Provider(eager(_PRE), note=_V4),
    "compile": Provider(compiled(_PRE)),
    "liger": Provider(_liger_pre),
}
STREAMS_POST_RES = {
    "ds_fused": Provider(_our_post_res),
    "hf_eager": Provider(eager(_POST_RES), note=_V4 + ", weights in bf16"),
    "compile": Provider(compiled(_POST_RES)),
    "liger": Provider(_liger_post_res),
}
CONNECTION = {
    "ds_fused": Provider(_our_connection, note="with a copy of the transposed phi"),
    "hf_eager": Provider(eager(_CONNECTION), note=_V4),
    "compile": Provider(compiled(_CONNECTION)),
    "liger": Provider(_liger_connection),
}
