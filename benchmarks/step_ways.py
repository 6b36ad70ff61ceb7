"""Ways to run one training step: HuggingFace's own, its rivals' and ours. What end_to_end.py compares, as data.

A way imports its library itself and patches classes before the model is built, in a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor, nn

from benchmarks.head_ways import deepspeed_tiled

Patch = Callable[[str], None]
Check = Callable[[nn.Module, str], None]

NOTHING: Mapping[str, object] = MappingProxyType({})
# ZeRO-3's sizes, in elements, beside whole layers as leaves
LARGE = {
    "stage3_prefetch_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 2_000_000_000,
    "stage3_max_reuse_distance": 2_000_000_000,
}
IGNORED = -100


def unpatched(type_: str) -> None:
    """Stock."""


def unchecked(model: nn.Module, type_: str) -> None:
    """Nothing was asked for that might be missing."""


@dataclass(frozen=True)
class Way:
    note: str
    block: Mapping[str, object] | None = None  # ds_fused's, in the JSON
    patch: Patch = unpatched  # before the model of this type is built
    check: Check = unchecked  # raises where the model that was built is not what the way says
    leaf: bool = False  # decoder layers are leaf modules of ZeRO-3
    zero: Mapping[str, object] = field(default_factory=lambda: NOTHING)  # more keys of zero_optimization
    sizes: str | None = None  # "small" or "large": ZeRO-3's sizes are those that ds_fused's zero_sizes would set
    backend: str | None = None  # of scaled_dot_product_attention; None: PyTorch's choice
    dtype: torch.dtype = torch.bfloat16  # of the model, and of all that is computed
    compiled: bool = False
    needs_gpu: bool = False


def modeling(type_: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{type_}.modeling_{type_}")


def causal_lm(type_: str) -> type[nn.Module]:
    return getattr(modeling(type_), f"{type_.capitalize()}ForCausalLM")


def layer_class(type_: str) -> type[nn.Module]:
    return getattr(modeling(type_), f"{type_.capitalize()}DecoderLayer")


def patch_liger(type_: str) -> None:
    from liger_kernel.transformers import monkey_patch

    getattr(monkey_patch, f"apply_liger_kernel_to_{type_}")()


def check_liger(model: nn.Module, type_: str) -> None:
    """A patch that a version of transformers does not look at would measure stock under Liger's name."""
    # LoRA may stand around it
    causal = next(m for m in model.modules() if isinstance(m, causal_lm(type_)))
    mlp = causal.model.layers[0].mlp
    parts = {
        "forward": type(causal).forward,
        "norm": type(causal.model.norm),
        "MLP": type(getattr(mlp, "experts", mlp)),
    }
    stock = [name for name, part in parts.items() if not part.__module__.startswith("liger_kernel")]
    if stock:
        raise RuntimeError(f"liger: {', '.join(stock)} of {type(causal).__name__} stayed stock")


def patch_tiled(type_: str) -> None:
    """DeepSpeed's tiles, as its documentation has them: MLPs in hidden-sized tiles, the loss in tiles of 1 GiB."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def whole(mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    def tiled(mlp: nn.Module, x: Tensor) -> Tensor:
        # all ranks have the same number of tokens, so of tiles
        tiles = -(-x.shape[1] // x.shape[2])
        return TiledMLP.apply(whole, mlp, x, tiles, list(mlp.parameters()))

    def forward(model: nn.Module, input_ids: Tensor, labels: Tensor, **more: object) -> object:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = model.model(input_ids=input_ids, **more).last_hidden_state
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return CausalLMOutput(loss=deepspeed_tiled()(model, hidden.flatten(0, 1), shifted.flatten()))

    # experts have no tiles in DeepSpeed's
    mlp = getattr(modeling(type_), f"{type_.capitalize()}MLP", None)
    if mlp is not None:
        mlp.forward = tiled
    causal_lm(type_).forward = forward


_LIGER = {"patch": patch_liger, "check": check_liger, "needs_gpu": True}
_LEAF = {"leaf": True, "zero": LARGE}
_SIZES = {"leaf": True, "sizes": "large"}
_BY_MODULES = {"enabled": True, "profile": "small", "leaf_modules": False}
_IN_TILES = {"tiled_mlp": {"tiles": 4, "least_tokens": 1}}
WAYS: Mapping[str, Way] = {
    "hf": Way("stock"),
    "hf-flash": Way("stock, flash attention whatever PyTorch would take", backend="FLASH_ATTENTION"),
    "hf-cudnn": Way("stock, cuDNN's attention", backend="CUDNN_ATTENTION", needs_gpu=True),
    "hf-math": Way("stock, attention as plain products and softmax", backend="MATH"),
    "fp32": Way("stock, all in fp32: what 16 bits differ from", dtype=torch.float32),
    "liger": Way("Liger's kernels and its fused linear cross entropy, by its defaults", **_LIGER),
    "compile": Way("engine.compile(): torch.compile of the stock model", compiled=True),
    "alst": Way("DeepSpeed's TiledMLP and TiledFusedLogitsLoss", patch=patch_tiled),
    "hf+leaf": Way("stock; ZeRO-3 gathers whole layers, larger buckets", **_LEAF),
    "liger+leaf": Way("Liger; ZeRO-3 gathers whole layers, larger buckets", **_LIGER, **_LEAF),
    "hf+sizes": Way('stock; ZeRO-3 gathers whole layers, sizes as in "fast"', **_SIZES),
    "liger+sizes": Way('Liger; ZeRO-3 gathers whole layers, sizes as in "fast"', **_LIGER, **_SIZES),
    "alst+sizes": Way(
        'DeepSpeed\'s tiles; ZeRO-3 gathers whole layers, sizes as in "fast"', patch=patch_tiled, **_SIZES
    ),
    "ours": Way("ds_fused by its defaults", block={"enabled": True}),
    "ours-fast": Way('ds_fused, "profile": "fast"', block={"enabled": True, "profile": "fast"}),
    "ours-fast-host": Way(
        "the same with inputs and attention on the host, where the device has no room for everything",
        block={"enabled": True, "profile": "fast", "recompute": {"level": "fit", "offload": "fit"}},
    ),
    "ours-small": Way('ds_fused, "profile": "small"', block={"enabled": True, "profile": "small"}),
    "ours-small-modules": Way("the same, gathered module by module", block=_BY_MODULES),
    "ours-small-tiled": Way("that with every MLP in tiles", block=_BY_MODULES | _IN_TILES),
    "ours-small-device": Way(
        "that with nothing on the host, so that no attention is kept",
        block=_BY_MODULES | _IN_TILES | {"recompute": {"level": "fit", "keep_mb": 0}},
    ),
}
# what is run when none are named; a leaf module is ZeRO-3's
RIVALS, WITH_LEAVES = ("hf", "liger", "compile", "alst"), ("hf+sizes", "liger+sizes", "alst+sizes")
OURS = ("ours", "ours-fast", "ours-small")
# whose longest sequence is looked for
LONGEST = ("hf", "liger", "ours", "ours-small")


def default_ways(stage: int) -> tuple[str, ...]:
    """All that a step of this ZeRO stage is compared with, and ours."""
    return (*RIVALS, *(WITH_LEAVES if stage == 3 else ()), *OURS)


def ours(block: Mapping[str, object]) -> Way:
    """A further way of ours, by its block of the JSON."""
    return Way(f"ds_fused {dict(block)}", block=block)
