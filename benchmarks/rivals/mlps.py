"""Whole MLPs, of experts too, and the activation that has no gate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, our_ops

# --- tiled_mlp: x [1, T, H], gate_weight, up_weight [I, H], down_weight [H, I] ---

N_TILES = 8


def _mlp_config(t: Tensors):
    from transformers import LlamaConfig

    intermediate_size, hidden_size = t["gate_weight"].shape
    return LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, num_attention_heads=1)


def _with_weights(mlp: torch.nn.Module, t: Tensors) -> torch.nn.Module:
    for name in ("gate", "up", "down"):
        getattr(mlp, f"{name}_proj").weight = t[f"{name}_weight"]
    return mlp


def _llama_mlp(t: Tensors) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP

    with torch.device("meta"):
        mlp = LlamaMLP(_mlp_config(t))
    return _with_weights(mlp, t)


def _hf_mlp(t: Tensors):
    return _llama_mlp(t), (t["x"],)


def _our_mlp(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        import ds_fused

        model = torch.nn.Sequential(_llama_mlp(t))
        if not ds_fused.apply(model, {"swiglu": True}, **options).replaced:
            raise RuntimeError("the MLP was left as it is")
        return lambda: model(t["x"])

    return build


def _liger_mlp(t: Tensors) -> Call:
    from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

    with torch.device("meta"):
        mlp = LigerTiledSwiGLUMLP(_mlp_config(t), num_shards=N_TILES)
    _with_weights(mlp, t)
    return lambda: mlp(t["x"])


TILED_MLP = {
    "ds_fused": Provider(_our_mlp(tiles=N_TILES), note=f"{N_TILES} tiles"),
    "ds_fused whole": Provider(_our_mlp(), note="not tiled"),
    "hf_eager": Provider(eager(_hf_mlp), note="not tiled"),
    "compile": Provider(compiled(_hf_mlp), note="not tiled"),
    "liger": Provider(_liger_mlp, note=f"{N_TILES} tiles"),
}


# --- experts: x [T, H], gate_up [E, 2I, H], down [E, H, I], ids and weights [T, k] ---


def _hf_experts(implementation: str) -> Callable[[Tensors], tuple[Callable, tuple]]:
    def build(t: Tensors):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        n_experts, hidden, intermediate = t["down"].shape
        sizes = {"hidden_size": hidden, "moe_intermediate_size": intermediate, "num_experts": n_experts}
        config = Qwen3MoeConfig(**sizes)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = t["gate_up"], t["down"]
        return experts, (t["x"], t["ids"], t["weights"])

    return build


def _liger_experts(t: Tensors) -> Call:
    from liger_kernel.ops import LigerFusedMoEFunction

    # as its LigerExperts calls it
    return lambda: LigerFusedMoEFunction.apply(t["x"], t["gate_up"], t["down"], t["ids"].to(torch.int32), t["weights"])


def _our_experts(t: Tensors) -> Call:
    experts = our_ops().experts
    return lambda: experts(t["x"], t["gate_up"], t["down"], t["ids"], t["weights"])


EXPERTS = {
    "ds_fused": Provider(_our_experts),
    "hf_eager": Provider(eager(_hf_experts("eager"))),
    "torch": Provider(eager(_hf_experts("grouped_mm")), note="transformers' experts by PyTorch's grouped_mm"),
    "compile": Provider(compiled(_hf_experts("grouped_mm")), note="by grouped_mm"),
    "liger": Provider(_liger_experts),
}


# --- relu2: x [N, D] ---


def _hf_relu2(t: Tensors):
    from transformers.activations import ACT2FN

    return ACT2FN["relu2"], (t["x"],)


def _liger_relu2(t: Tensors) -> Call:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return lambda: LigerReLUSquaredFunction.apply(t["x"])


def _our_relu2(t: Tensors) -> Call:
    relu2 = our_ops().relu2
    return lambda: relu2(t["x"])


RELU2 = {
    "ds_fused": Provider(_our_relu2),
    "hf_eager": Provider(eager(_hf_relu2)),
    "compile": Provider(compiled(_hf_relu2)),
    "liger": Provider(_liger_relu2, ("x", "dy"), "may write over its arguments; both restored untimed"),
}
