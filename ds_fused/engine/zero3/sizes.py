"""Sizes of DeepSpeed's ZeRO-3 (in elements) by the size of the model's layers, where the JSON does not give them.

Set when the model is about to be handed to DeepSpeed: the optimizer, which takes these sizes for its coordinator of
gathers, its buckets and its groups, is built after that. Whatever a user, or HuggingFace for a user's "auto", has
written stays.

None changes what is computed; only where a gradient norm is added up group by group (``sub_group_size``) may its last
bit differ. ``stage3_param_persistence_threshold`` is no matter of speed or memory here: at DeepSpeed's 1e5 every norm
and bias stays whole, and no matrix of a model of a billion parameters does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

# DeepSpeed's own, in elements
PREFETCH, LIVE, REUSE, BUCKET = int(5e7), int(1e9), int(1e9), int(5e8)
# no smaller groups of the optimizer: each costs a few launches
LEAST_GROUP = int(1e7)


def sizes_of(choice: str, layer: int, trained: int, offloaded: bool = False, whole: bool = False) -> dict[str, int]:
    """Name in the JSON -> elements, for "small" and "large" sizes. ``layer``: of the largest repeated layer;
    ``trained``: of all parameters that are trained. ``offloaded``: the optimizer is, so groups travel, and their size
    is the user's matter. ``whole``: layers come as one (`leaf_modules`), so the next one is on its way as a whole: a
    part of it would have it come in two pieces, of which nothing hides the second.

    A checkpointed layer is computed again right before its backward. Between the two of its first parameter lie less
    than two layers; it is gathered once for both where that is within ``stage3_max_reuse_distance``. A bucket of
    gradients is there as long as the training lasts, and what is in it a second time when it is sent. What the sizes
    come to is in benchmarks/notes.md.
    """
    # a step has a group's gradients as they came and in fp32. One size for both choices: DeepSpeed loads no checkpoint
    # that was saved under another, and "auto" must be free to choose
    group = {} if offloaded else {"sub_group_size": max(LEAST_GROUP, layer)}
    if choice == "large":
        prefetch = max(PREFETCH, 2 * layer)
        reuse = max(REUSE, 2 * layer)
        return {
            "stage3_prefetch_bucket_size": prefetch,
            "stage3_max_reuse_distance": reuse,
            # what is kept for later, what is in use and what is on its way
            "stage3_max_live_parameters": reuse + layer + prefetch,
            "reduce_bucket_size": max(1, min(BUCKET, layer, trained)),
            **group,
        }
    # gathers go on until so much is on its way: with less than all of a layer the one after it stays where it is
    prefetch = layer - layer // 16 if whole else min(PREFETCH, layer)
    return {
        "stage3_prefetch_bucket_size": prefetch,
        # never more than DeepSpeed's, with which layers of half a billion parameters and more are gathered a third time
        "stage3_max_reuse_distance": min(REUSE, 2 * layer),
        "stage3_max_live_parameters": min(LIVE, 2 * layer + prefetch),
        # smaller than the matrices of an MLP: a gradient that fills no bucket is sent from where it is
        "reduce_bucket_size": max(1, min(BUCKET, layer // 8, trained)),
        **group,
    }


def elements(parameters: Iterable[nn.Parameter]) -> int:
    """Also of parameters that zero.Init has split."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def given(engine: DeepSpeedEngine) -> set[str]:
    """The names under which the JSON's ``zero_optimization`` gives something, "auto" included."""
    block = engine._config._param_dict.get("zero_optimization")
    return set(block) if isinstance(block, dict) else set()


def set_sizes(
    engine: DeepSpeedEngine, choice: str, model: nn.Module, layers: Iterable[nn.Module], most_whole: int
) -> str:
    """Before the optimizer is built; what came of it, in a line. Layers of up to ``most_whole`` elements come whole."""
    what = f'zero_sizes "{choice}"'
    if not engine.zero_optimization_partition_weights():
        return f"{what}: nothing to set, ZeRO stage {engine.zero_optimization_stage()} shards no weights"
    layer = max((elements(layer.parameters()) for layer in layers), default=0)
    if not layer:
        return f"{what}: nothing is set, the model has no repeated layers whose size could choose it"
    trained = elements(p for p in model.parameters() if p.requires_grad)
    offloaded = engine.zero_offload_optimizer() is not None
    sizes = sizes_of(choice, layer, trained, offloaded, whole=layer <= most_whole)
    zero, said = engine._config.zero_config, given(engine)
    # its gradients lie transposed, which DeepSpeed can send from a bucket alone
    if zero.zenflow is not None:
        del sizes["reduce_bucket_size"]
    fields = {field.alias or name: name for name, field in type(zero).model_fields.items()}
    kept = [name for name in sizes if name in said or fields[name] in said]
    fresh = {name: size for name, size in sizes.items() if name not in kept}
    for name, size in fresh.items():
        setattr(zero, fields[name], size)
    line = ", ".join(f"{name} = {size:,}" for name, size in fresh.items()) or "nothing is set"
    return f"{what}: {line}" + (f"; as the JSON gives them: {', '.join(kept)}" if kept else "")
