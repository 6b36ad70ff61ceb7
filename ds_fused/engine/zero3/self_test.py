"""What slabs count on inside DeepSpeed's ZeRO-3, tried once at the start: another version may do otherwise.

Names alone would not tell. The layout of shards is held against a parameter that DeepSpeed itself gathers, the
smallest that it has sharded; a gradient is handed in and looked for where the optimizer keeps it. The optimizer is left
as it was found.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_fused.engine.zero3.delivery import KEPT_GRADIENTS, NEEDED

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def what_differs(engine: DeepSpeedEngine, param: nn.Parameter) -> str | None:
    """What of it this DeepSpeed does otherwise; None where nothing. Called on all ranks of the parameter's group."""
    from deepspeed import __version__

    found = _names(engine.optimizer) or _layout(engine.module, param) or _keeping(engine.optimizer, param)
    return None if found is None else f"DeepSpeed {__version__} is none that slabs know: {found}"


def _names(optimizer: DeepSpeedZeroOptimizer_Stage3) -> str | None:
    missing = [name for name in NEEDED if not hasattr(optimizer, name)]
    if missing:
        return f"its ZeRO-3 optimizer has no {missing[0]}"
    try:
        inspect.signature(optimizer.partition_grads).bind([], [])
    except TypeError:
        return "partition_grads takes something else than parameters and their parts of gradients"
    return None


def _layout(model: nn.Module, param: nn.Parameter) -> str | None:
    """Rank r has elements [r * P, (r + 1) * P) of the flat parameter."""
    from deepspeed import comm as dist
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    group = param.ds_process_group
    alike = (p for p in model.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
    probe = min((p for p in alike if p.ds_process_group is group), key=lambda p: p.ds_numel, default=param)
    rank, size = dist.get_rank(group), -(-probe.ds_numel // dist.get_world_size(group))
    with GatheredParameters([probe]):
        whole = probe.detach().flatten().cpu()
    mine = probe.ds_tensor.detach().flatten().cpu()
    expected = whole[rank * size : (rank + 1) * size]
    if mine.numel() != size or not torch.equal(mine[: expected.numel()], expected):
        return "a shard is not the rank's part of the flat weight"
    return None


def _keeping(optimizer: DeepSpeedZeroOptimizer_Stage3, param: nn.Parameter) -> str | None:
    """``partition_grads`` copies a gradient in the first micro step and adds it in later ones."""
    if not param.requires_grad:
        return None
    kept = getattr(optimizer, KEPT_GRADIENTS)
    size = param.ds_tensor.ds_numel
    if not isinstance(kept, dict) or getattr(kept.get(param.ds_id), "shape", None) != (size,):
        return "its optimizer keeps gradients in another form"

    def hand_in(value: float, micro_step: int) -> Tensor:
        optimizer.micro_step_id = micro_step
        part = torch.full((size,), value, dtype=optimizer.gradient_accumulation_dtype, device=device)
        optimizer.partition_grads([param], [part])
        # an offloaded one is copied to the host, beside which nobody waits for a busy device
        get_accelerator().synchronize()
        return kept[param.ds_id]

    device = get_accelerator().current_device_name()
    at, boundary = optimizer.micro_step_id, _boundary(optimizer)
    # at a boundary an offloaded optimizer would be given them at once
    _set_boundary(optimizer, False)
    try:
        copied, added = (bool((hand_in(1.0, step) == 1 + step).all()) for step in (0, 1))
        cleared = not hand_in(0.0, 0).any()
    finally:
        optimizer.micro_step_id = at
        _set_boundary(optimizer, boundary)
        # where the caller says when an accumulation ends, the offloaded optimizer steps what is noted there
        getattr(optimizer, "_offload_boundary_param_ids", set()).discard(param.ds_id)
    if not (copied and added and cleared):
        return "partition_grads does not keep what it is given"
    return None


def _boundary(optimizer: DeepSpeedZeroOptimizer_Stage3) -> bool:
    """Whether an accumulation ends with what is handed in: a method since 0.19.7, before that an attribute."""
    found = optimizer.is_gradient_accumulation_boundary
    return found() if callable(found) else found


def _set_boundary(optimizer: DeepSpeedZeroOptimizer_Stage3, is_boundary: bool) -> None:
    if callable(optimizer.is_gradient_accumulation_boundary):
        optimizer.set_gradient_accumulation_boundary(is_boundary)
    else:
        optimizer.is_gradient_accumulation_boundary = is_boundary
