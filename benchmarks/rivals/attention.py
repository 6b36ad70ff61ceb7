"""Attention, whole and by its rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- softmax and sparsemax: x [N, D] ---


def _eager_softmax(t: Tensors):
    # as the attention of transformers calls it
    return lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype), (t["x"],)


def _torch_softmax(t: Tensors) -> Call:
    return lambda: torch.softmax(t["x"], -1)


def _liger_softmax(t: Tensors) -> Call:
    softmax = liger_ops().liger_softmax
    return lambda: softmax(t["x"])


def _our_softmax(t: Tensors) -> Call:
    softmax = our_ops().softmax
    return lambda: softmax(t["x"])


def _eager_sparsemax(t: Tensors):
    # no model of transformers has one: the sort of the paper
    from ds_fused.ops.attention.sparsemax import sparsemax_reference

    return sparsemax_reference, (t["x"],)


def _liger_sparsemax(t: Tensors) -> Call:
    sparsemax = liger_ops().liger_sparsemax
    return lambda: sparsemax(t["x"])


def _our_sparsemax(t: Tensors) -> Call:
    sparsemax = our_ops().sparsemax
    return lambda: sparsemax(t["x"])


SOFTMAX = {
    "ds_fused": Provider(_our_softmax),
    "hf_eager": Provider(eager(_eager_softmax)),
    "torch": Provider(_torch_softmax),
    "compile": Provider(compiled(_eager_softmax)),
    "liger": Provider(_liger_softmax),
}
SPARSEMAX = {
    "ds_fused": Provider(_our_sparsemax),
    "hf_eager": Provider(eager(_eager_sparsemax), note="our reference: sort and cumsum in fp32"),
    "compile": Provider(compiled(_eager_sparsemax)),
    "liger": Provider(_liger_sparsemax, note="torch.sort in fp32, then a kernel"),
}


# --- neighborhood_attention: q, k, v [B, H, T, D] ---


def neighborhood_providers(kernel_size: int) -> dict[str, Provider]:
    half = kernel_size // 2

    def arguments(t: Tensors):
        return t["q"], t["k"], t["v"]

    def plain(t: Tensors):
        # no model of transformers has it: the definition
        from ds_fused.ops.attention.neighborhood_attention import neighborhood_attention_reference

        return lambda q, k, v: neighborhood_attention_reference(q, k, v, kernel_size=kernel_size), arguments(t)

    def torchs(t: Tensors) -> Call:
        place = torch.arange(t["q"].shape[2], device=t["q"].device)
        near = (place[:, None] - place).abs() <= half
        return lambda: F.scaled_dot_product_attention(*arguments(t), attn_mask=near)

    def flex(t: Tensors) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n = t["q"].shape[2]
        near = create_block_mask(lambda b, h, i, j: (i - j).abs() <= half, None, None, n, n, device=t["q"].device.type)
        attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        return lambda: attention(*arguments(t), block_mask=near)

    def ligers(t: Tensors) -> Call:
        attention = liger_ops().liger_fused_neighborhood_attention
        return lambda: attention(*arguments(t), kernel_size)

    def ours(t: Tensors) -> Call:
        attention = our_ops().neighborhood_attention
        return lambda: attention(*arguments(t), kernel_size=kernel_size)

    return {
        "ds_fused": Provider(ours),
        "hf_eager": Provider(eager(plain), note="the definition in PyTorch"),
        "torch": Provider(torchs, note="scaled_dot_product_attention with a mask made before"),
        "compile": Provider(flex, note="flex_attention, compiled, with a block mask made before"),
        "liger": Provider(ligers),
    }


# --- multi_token_attention: scores [B, C, L, L], weight [C, C / groups, height, width], bias [C] ---


def multi_token_providers(padding: tuple[int, int]) -> dict[str, Provider]:
    def parts(t: Tensors):
        return t["scores"], t["weight"], t["bias"]

    def groups_of(t: Tensors) -> int:
        return t["scores"].shape[1] // t["weight"].shape[1]

    def plain(t: Tensors):
        # no model of transformers has it: the definition
        from ds_fused.ops.attention.multi_token_attention import multi_token_attention_reference

        groups = groups_of(t)
        return lambda *inputs: multi_token_attention_reference(*inputs, padding=padding, groups=groups), parts(t)

    def ligers(t: Tensors) -> Call:
        attention = liger_ops().liger_multi_token_attention
        return lambda: attention(*parts(t), padding=padding, groups=groups_of(t))

    def ours(t: Tensors) -> Call:
        attention = our_ops().multi_token_attention
        return lambda: attention(*parts(t), padding=padding, groups=groups_of(t))

    def library(t: Tensors) -> Call:
        # the Function has no way but kernels
        if not t["scores"].is_cuda:
            return ours(t)
        from ds_fused.ops.attention.multi_token_attention import MultiTokenAttentionFunction

        options = (1, 1), padding, (1, 1), groups_of(t)
        shape = t["scores"].shape

        def call():
            scores, *parameters = parts(t)
            return MultiTokenAttentionFunction.apply(scores.flatten(0, 2), *parameters, shape, options, None, False)

        return call

    return {
        "ds_fused": Provider(ours),
        "ds_fused library": Provider(library, note="with PyTorch's convolution, as in fp32"),
        "hf_eager": Provider(eager(plain), note="the definition in PyTorch"),
        "compile": Provider(compiled(plain)),
        "liger": Provider(ligers, note="its kernels for 2048 tokens and more do not compile with Triton 3.6"),
    }
