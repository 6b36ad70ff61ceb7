"""The loss of TRL's SFTTrainer from the model's own forward, where it is fused and, under ZeRO-3, gathers no head.

TRL 1.16 puts a forward of its own on the model that it trains, which reads the weight of the head past the head's call:

    outputs = model(**inputs, fused_lm_head=True)  # under ZeRO-3 all of lm_head.weight on every rank, forward and back
    loss = -outputs.log_probs.sum() / num_items_in_batch

``fuse_sft_loss(trainer)`` takes that forward off and has the trainer compute its loss as the Trainer does from which it
derives: the model is given its labels, and says its loss. The two are one number. What TRL measures beside it, entropy,
accuracy and number of tokens, is logged no longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ds_fused.modules.swap import library_of


def fuse_sft_loss(trainer: Any) -> Callable[[], None]:
    """Leave the loss of a ``trl.SFTTrainer`` to its model. To be called before it trains; returns what undoes it.

    The model is fused by DeepSpeed or by ``ds_fused.apply`` after this call.
    """
    classes = type(trainer).__mro__
    base = next((cls for cls in classes if cls.__module__ == "transformers.trainer"), None)
    if base is None or not any(cls.__name__ == "SFTTrainer" for cls in classes):
        raise ValueError(f"fuse_sft_loss: it takes an SFTTrainer of TRL, got a {type(trainer).__name__}")
    reason = _why_not(trainer)
    if reason is not None:
        raise ValueError(f"fuse_sft_loss: {reason}")
    patched = {m: vars(m)["forward"] for m in trainer.model.modules() if _is_patched(m)}
    if not patched:
        raise ValueError("fuse_sft_loss: TRL has put no forward of its own on the trainer's model")
    had_own, before = "compute_loss" in vars(trainer), trainer.compute_loss

    def computed(model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        # as TRL's does
        inputs["use_cache"] = False
        return base.compute_loss(trainer, model, inputs, return_outputs, num_items_in_batch)

    def undo() -> None:
        for module, forward in patched.items():
            module.forward = forward
        if had_own:
            trainer.compute_loss = before
        else:
            del trainer.compute_loss

    for module, forward in patched.items():
        original = _under(forward)
        if getattr(original, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = original
    trainer.compute_loss = computed
    return undo


def _why_not(trainer: Any) -> str | None:
    """What of the trainer's loss is not the model's."""
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if loss_type != "nll":
        return f"the trainer's loss_type is {loss_type!r}; a model's own loss is 'nll'"
    if trainer.label_smoother is not None:
        return "the trainer smooths labels, for which there is fuse_label_smoother"
    if trainer.compute_loss_func is not None:
        return "the trainer has a compute_loss_func, which takes logits"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the trainer weighs the loss of a router over the accumulated steps, which a model does not"
    return None


def _is_patched(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is not None and library_of(forward) == "trl" and _under(forward) is not None


def _under(forward: Callable) -> Callable | None:
    """The forward that TRL's calls where it is not asked for its own loss."""
    function = getattr(forward, "__func__", forward)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["original_forward"].cell_contents if "original_forward" in cells else None
