"""Other norms: of layers, of a sum, of groups, and what stands in for one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.rivals.provider import EPS, Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- layer_norm, add_layer_norm: x, residual [N, D], weight, bias [D] ---


def _layer_norm(t: Tensors):
    # what HuggingFace models hold is PyTorch's layer
    return lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS), (t["x"], t["weight"], t["bias"])


def _liger_layer_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_layer_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], EPS)


def _our_layer_norm(t: Tensors) -> Call:
    norm = our_ops().layer_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], eps=EPS)


LAYER_NORM = {
    "ds_fused": Provider(_our_layer_norm),
    "hf_eager": Provider(eager(_layer_norm), note="PyTorch's own kernel"),
    "compile": Provider(compiled(_layer_norm)),
    "liger": Provider(_liger_layer_norm),
}


def _add_layer_norm(t: Tensors):
    def add_norm(x, residual, weight, bias):
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias, EPS), total

    return add_norm, (t["x"], t["residual"], t["weight"], t["bias"])


def _liger_add_layer_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_layer_norm

    def add_norm():
        total = t["x"] + t["residual"]
        return norm(total, t["weight"], t["bias"], EPS), total

    return add_norm


def _our_add_layer_norm(t: Tensors) -> Call:
    norm = our_ops().add_layer_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], t["bias"], eps=EPS)


ADD_LAYER_NORM = {
    "ds_fused": Provider(_our_add_layer_norm),
    "hf_eager": Provider(eager(_add_layer_norm), note="PyTorch's own kernels"),
    "compile": Provider(compiled(_add_layer_norm)),
    "liger": Provider(_liger_add_layer_norm, note="its layer norm after PyTorch's add: it has no such op"),
}


# --- group_norm: x [N, C, H, W], weight, bias [C] ---

N_GROUPS = 32


def _group_norm(t: Tensors):
    arguments = t["x"], t["weight"], t["bias"]
    return lambda x, weight, bias: F.group_norm(x, N_GROUPS, weight, bias, EPS), arguments


def _liger_group_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_group_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], t["weight"].numel(), N_GROUPS, EPS)


def _our_group_norm(t: Tensors) -> Call:
    norm = our_ops().group_norm
    return lambda: norm(t["x"], N_GROUPS, t["weight"], t["bias"], eps=EPS)


GROUP_NORM = {
    "ds_fused": Provider(_our_group_norm),
    "hf_eager": Provider(eager(_group_norm), note="PyTorch's own kernels"),
    "compile": Provider(compiled(_group_norm)),
    "liger": Provider(_liger_group_norm),
}


# --- dyt: x [N, D], alpha [1], weight, bias [D] ---


def _dyt(t: Tensors):
    arguments = t["x"], t["alpha"], t["weight"], t["bias"]
    return lambda x, alpha, weight, bias: weight * torch.tanh(alpha * x) + bias, arguments


def _liger_dyt(t: Tensors) -> Call:
    dyt = liger_ops().liger_dyt
    return lambda: dyt(t["x"], t["alpha"], t["weight"], t["bias"])


def _our_dyt(t: Tensors) -> Call:
    dyt = our_ops().dyt
    return lambda: dyt(t["x"], t["alpha"], t["weight"], t["bias"])


DYT = {
    "ds_fused": Provider(_our_dyt),
    "hf_eager": Provider(eager(_dyt)),
    "compile": Provider(compiled(_dyt)),
    "liger": Provider(_liger_dyt),
}


# --- poly_norm: x [N, D], weight [3], bias [1] ---


def _poly_norm(t: Tensors):
    def normed(v):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)

    def poly_norm(x, weight, bias):
        wide = x.float()
        y = weight[0] * normed(wide**3) + weight[1] * normed(wide**2) + weight[2] * normed(wide) + bias
        return y.to(x.dtype)

    return poly_norm, (t["x"], t["weight"], t["bias"])


def _liger_poly_norm(t: Tensors) -> Call:
    poly_norm = liger_ops().liger_poly_norm
    return lambda: poly_norm(t["x"], t["weight"], t["bias"], EPS, in_place=False)


def _our_poly_norm(t: Tensors) -> Call:
    poly_norm = our_ops().poly_norm
    return lambda: poly_norm(t["x"], t["weight"], t["bias"], eps=EPS)


POLY_NORM = {
    "ds_fused": Provider(_our_poly_norm),
    "hf_eager": Provider(eager(_poly_norm), note="the formula in fp32"),
    "compile": Provider(compiled(_poly_norm)),
    "liger": Provider(_liger_poly_norm, note="in_place=False; powers of the forward in bf16"),
}
