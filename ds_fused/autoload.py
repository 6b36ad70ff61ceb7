"""What PyTorch runs at ``import torch`` (entry point group ``torch.backends``): three import hooks, nothing else.

A process that never imports DeepSpeed pays for these hooks alone; one that imports it and has no ``ds_fused`` block in
its config runs exactly as without this package. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches the entry point off, and
``ds_fused.install()`` then does the same by hand.

Only the standard library is imported here, and little of it: this file is read while torch is half-built, in every
process that imports torch. (wrapt has such hooks too; importing it alone costs 6 ms.)
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType

# module of DeepSpeed -> module of ours whose hook(module) is called once the former is complete.
# Submodules, never `deepspeed` itself: in the `deepspeed` command the import of deepspeed starts before torch's, so
# the package is half-built when we are called.
HOOKS = {
    "deepspeed.runtime.engine": "ds_fused.engine.hooks",
    "deepspeed.launcher.runner": "ds_fused.engine.launcher",
    "deepspeed.env_report": "ds_fused.engine.builders",
}

# set by `deepspeed --config FILE` for the ranks: the config of a script that gives none
CONFIG_VARIABLE = "DS_FUSED_CONFIG"


def register() -> None:
    """Hook DeepSpeed's modules, now or when they are imported. Repeating it changes nothing; it never raises."""
    try:
        for name, home in HOOKS.items():
            watch(name, home)
        if "deepspeed.env_report" in sys.orig_argv:
            # `python -m` runs it as __main__, which is no import; the table that it prints is imported before
            watch("deepspeed.ops.op_builder.all_ops", HOOKS["deepspeed.env_report"])
        if CONFIG_VARIABLE in os.environ:
            watch("deepspeed", "ds_fused.engine.default_config")
    except Exception as e:
        _say(f"not registered, so a ds_fused block in a DeepSpeed config has no effect: {type(e).__name__}: {e}")


def watch(name: str, home: str) -> None:
    """Call ``home``'s ``hook`` on the module ``name``: at once if it is there, otherwise when its import ends."""
    if name in _Finder.homes:
        return
    _Finder.homes[name] = home
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    if name in sys.modules:
        _call(sys.modules[name])


def _call(module: ModuleType) -> None:
    try:
        import_module(_Finder.homes[module.__name__]).hook(module)
    except Exception as e:
        # whoever has no ds_fused block must be able to import DeepSpeed whatever became of us
        _say(f"{module.__name__} could not be hooked and stays as it is: {type(e).__name__}: {e}")


class _Finder:
    """Finds nothing itself: asks the finders behind it, and makes the loader they name call us when it has loaded."""

    homes: dict[str, str] = {}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in cls.homes:
            return None
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _load_then_call(spec.loader)
                return spec
        return None


def _load_then_call(loader: object) -> None:
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        # the loader stays in module.__loader__; it should be again what it was
        del loader.exec_module
        original(module)
        _call(module)

    # on the instance, not around it: a wrapped loader would no longer be the type that inspect and importlib know
    loader.exec_module = exec_module


def _say(line: str) -> None:
    # sys.stderr is None under pythonw and in some services
    if sys.stderr is not None:
        print(f"ds_fused: {line}", file=sys.stderr)
