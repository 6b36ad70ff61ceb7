"""One training step stock and fused: what was replaced, what was left and why, and whether loss and gradients agree."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_fused.doctor.tiny import batches, build
from ds_fused.modules.loss import head as head_module
from ds_fused.modules.loss.head_call import HeadCall
from ds_fused.policies import apply
from ds_fused.policies.loss import LINEAR
from ds_fused.policies.report import Claim

# relative L2 error of a gradient in fp32: sums in another order through a few layers. What is further from stock may be
# twice as far from fp64 as stock itself
TOLERANCE = 1e-5
# a gradient that is smaller than this part of the largest is mostly rounding
LEAST = 1e-4


@dataclass
class Diagnosis:
    replaced: list[tuple[str, str, str, int]]  # key, class, replacement, count
    left: list[tuple[str, int, str]]  # what, count, reason
    loss_fused: bool
    loss_reason: str  # why not; "" where it is
    differs: str  # what differed, and by how much; "" where nothing did
    worst: float  # the largest relative error among loss and gradients
    gradients: int  # of how many parameters
    inputs: list[str]  # what the batch had
    ran: list[str]  # the keys of which some replacement ran
    silent: list[str] = field(default_factory=list)  # classes of which one never did: the batch asks nothing of them

    def __str__(self) -> str:
        rows = [f"  {count} x {what} -> {replacement} ({key})" for key, what, replacement, count in self.replaced]
        rows += [f"  left {count} x {what}: {reason}" for what, count, reason in self.left]
        rows += [f"  some {what} are replaced, but were not called for such a batch" for what in self.silent]
        rows.append("  loss: fused" if self.loss_fused else f"  loss: not fused, {self.loss_reason}")
        agree = f"DIFFERENT: {self.differs}" if self.differs else f"agree with stock, to {self.worst:.1e} in fp32"
        return "\n".join([*rows, f"  loss and {self.gradients} gradients {agree}"])


def examine(cls: type[PreTrainedModel], config: PretrainedConfig, whole: bool = False) -> Diagnosis:
    """A random model of ``config``, one step of it stock and one fused, on the richest batch that stock takes.

    ``whole``: it may be of any size.
    """
    if "labels" not in inspect.signature(cls.forward).parameters:
        raise ValueError("its forward takes no labels: no loss of words is computed in it")
    model = build(cls, config, whole)
    tries = list(batches(model))
    for inputs in tries[:-1]:
        try:
            step(model, inputs)
        except Exception:  # of the model: it takes another form
            continue
        return diagnose(model, inputs)
    return diagnose(model, tries[-1])


def diagnose(model: nn.Module, inputs: Mapping[str, Any], tolerance: float = TOLERANCE) -> Diagnosis:
    """Stock twice (a model may disagree with itself), then fused; the model is stock again at the end."""
    wanted, again = step(model, inputs), step(model, inputs)
    noise = max(errors(again, wanted).values())
    if not torch.isfinite(wanted["loss"]):
        raise ValueError(f"the stock loss is {wanted['loss'].item()}")
    if noise > tolerance:
        raise ValueError(f"two stock steps differ by {noise:.1e}")
    report = apply(model)
    try:
        with _witness() as seen:
            ours = step(model, inputs)
        silent = report.verify_live()
        ran = sorted({claim.key for claim in report.claims if claim not in silent})
    finally:
        replaced = [(row.key, row.original.rpartition(".")[2], row.replacement, row.count) for row in report.replaced]
        left = [(row.what, row.count, row.reason) for row in report.left]
        report.restore()
    worst = max(errors(ours, wanted).values())
    differs = "" if worst <= tolerance else _judged(model, inputs, ours, wanted, tolerance)
    fused, reason = _loss(replaced, left, ran, seen)
    return Diagnosis(
        replaced, left, fused, reason, differs, worst, len(wanted) - 1, sorted(inputs), ran, _names(silent)
    )


def _names(claims: Sequence[Claim]) -> list[str]:
    return sorted({claim.original.rpartition(".")[2] for claim in claims})


def step(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The loss and each parameter's gradient, by name. A model's random choices are the same in every step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    output = model(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()})
    loss = output["loss"] if isinstance(output, Mapping) else output[0]
    if loss is None:
        raise ValueError("its forward returns no loss for labels")
    loss.backward()
    found = {"loss": loss.detach().double()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.detach().double().clone()
    model.zero_grad(set_to_none=True)
    return found


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative L2 error of the loss and of each gradient."""
    if found.keys() != exact.keys():
        return dict.fromkeys(sorted(found.keys() ^ exact.keys()), math.inf)
    least = LEAST * max((float(x.norm()) for name, x in exact.items() if name != "loss"), default=0.0)
    each = {name: float((found[name] - x).norm() / max(float(x.norm()), least, 1e-30)) for name, x in exact.items()}
    # NaN is a difference
    return {name: math.inf if math.isnan(error) else error for name, error in each.items()}


def _judged(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ours: Mapping[str, Tensor],
    stock: Mapping[str, Tensor],
    tolerance: float,
) -> str:
    """What is further from the stock model in fp64 than stock's own error allows; "" where nothing is."""
    double = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    try:
        exact = step(model.double(), double)
    except RuntimeError:
        # its code says fp32 somewhere, so stock is all there is to go by
        exact = stock
    finally:
        model.float()
    theirs = errors(stock, exact)
    excess = {name: error - 2 * theirs.get(name, 0.0) for name, error in errors(ours, exact).items()}
    name = max(excess, key=excess.get)
    return "" if excess[name] <= tolerance else f"{name} by {excess[name]:.1e}"


@dataclass
class _Seen:
    fused_losses: int = 0
    computed_by: list[str] = field(default_factory=list)  # what made the logits real, where


@contextlib.contextmanager
def _witness() -> Iterator[_Seen]:
    """Who calls the fused loss, and who makes deferred logits real, within this block."""
    seen = _Seen()
    fused, base = head_module.linear_cross_entropy, HeadCall.base

    def counted(*args: Any, **named: Any) -> Tensor:
        seen.fused_losses += 1
        return fused(*args, **named)

    def watched(self: HeadCall) -> Tensor:
        seen.computed_by.append(_reader())
        return base(self)

    head_module.linear_cross_entropy, HeadCall.base = counted, watched
    try:
        yield seen
    finally:
        head_module.linear_cross_entropy, HeadCall.base = fused, base


def _reader() -> str:
    """file:line of the model's code that runs, and which method of ours it called."""
    frame, called = sys._getframe(1), ""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ds_fused", "torch"):
        # an operator of the logits is a closure over the function that it is
        operation = frame.f_locals.get("function")
        called, frame = getattr(operation, "__name__", frame.f_code.co_name), frame.f_back
    if frame is None:
        return called
    return f"{called} at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _loss(replaced: list, left: list, ran: Sequence[str], seen: _Seen) -> tuple[bool, str]:
    if seen.fused_losses:
        return True, ""
    if any(key == LINEAR for key, *_ in replaced):
        if seen.computed_by:
            return False, f"logits were computed by {seen.computed_by[0]}"
        return False, "the loss took another way" if LINEAR in ran else "its forward does not call its head"
    reasons = [reason for what, _, reason in left if what.startswith(("loss of", "head "))]
    return False, reasons[0] if reasons else "no model in it names a head as its output embedding"
