"""One DeepSpeed op builder per row of the registry, so that ``ds_report`` lists our ops and says why one can't run.

Nothing is compiled ahead (Triton compiles at the first launch): a builder knows whether the op can run here, and
``load()`` returns the op's module. The engine asks them before it replaces anything.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder

# the oldest NVIDIA GPUs that Triton compiles for
LEAST_CAPABILITY = (8, 0)


class FusedBuilder(OpBuilder):
    """What the builders of all ops share."""

    OP = ""  # the op's name in the registry
    HOME = ""  # the module that it is in

    def __init__(self) -> None:
        super().__init__(name=self.OP)

    def absolute_name(self) -> str:
        return self.HOME

    def sources(self) -> list[str]:
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        reason = why_not_built()
        if reason is None:
            return True
        self.error_log = f"{self.OP}: {reason}"
        if verbose:
            self.warning(self.error_log)
        return False

    def load(self, verbose: bool = False) -> ModuleType:
        if not self.is_compatible(verbose):
            raise RuntimeError(f"Unable to load the op {self.error_log}")
        return import_module(self.absolute_name())


def why_not_built() -> str | None:
    """Why no op of ours can run in this process; None when they can."""
    reason = no_triton()
    if reason is not None:
        return reason
    if get_accelerator().device_name() == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            have, least = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
            return f"this GPU has compute capability {have}; Triton compiles for {least} and newer"
    return None


def no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as e:
        return f"Triton can't be imported ({type(e).__name__}: {e}); pip install triton"
    return None


def builders() -> dict[str, type[FusedBuilder]]:
    """Op name -> its builder class, made from the registry; one that speaks for all where Triton is missing."""
    try:
        from ds_fused.ops.registry import OPS
    except ImportError:
        return {"ds_fused": _builder("ds_fused", "ds_fused.ops")}
    return {op.name: _builder(op.name, op.module.__name__) for op in OPS}


_classes: dict[str, type[FusedBuilder]] = {}


def _builder(name: str, home: str) -> type[FusedBuilder]:
    if name not in _classes:
        class_name = "".join(word.capitalize() for word in name.split("_")) + "Builder"
        _classes[name] = type(class_name, (FusedBuilder,), {"OP": name, "HOME": home, "__module__": __name__})
    return _classes[name]


def enlist() -> None:
    """Make DeepSpeed know the builders: its table of ops, and the accelerator's where it keeps one (CUDA does)."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    accelerator = get_accelerator()
    if hasattr(accelerator, "_lazy_init_class_dict"):
        accelerator._lazy_init_class_dict()
    by_class = getattr(accelerator, "class_dict", None)
    for name, builder in builders().items():
        ALL_OPS.setdefault(name, builder())
        if by_class is not None:
            by_class.setdefault(builder.__name__, builder)


def hook(_: ModuleType) -> None:
    """Called when ``ds_report`` is imported; importing DeepSpeed alone must not bring us here, as it loads Triton."""
    enlist()
