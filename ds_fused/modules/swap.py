"""Exchange the behaviour of one live layer: ``module.__class__ = Fused<Original>``.

Nothing that the layer holds changes. Parameters keep their identity and so do hooks, tied weights, optimizer groups,
``ds_id``, adapters and state-dict keys; only the class, and with it ``forward``, is another one. The built class keeps
the original's ``__name__``, ``__qualname__`` and ``__module__``, so whoever recognises layers by class name (leaf
modules and policies of DeepSpeed, ``architectures`` in a saved config, a sharding plan) recognises them still; ``repr``
says Fused.

A mix-in is a class with a ``forward`` and no state of its own. One that needs the original's code to build its forward
offers ``_ds_fused_members(original, *how) -> dict``, which becomes part of the built class; ``how`` is what else it has
to know, hashable and picklable.

A class holds for the forward that the original's had when it was built. Where somebody patches that one later, it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from ds_fused.modules.code import Code
from ds_fused.ops.common._say import say_once

# one class per (mix-in, original, how), for each forward that the original was ever given: all layers share it, and
# `type(a) is type(b)` holds between them as before. Where it is made from that forward, for what this led to
_BUILT: dict[tuple[type, type, tuple, Callable | Code], type] = {}


def fused_class(mixin: type, cls: type[nn.Module], how: tuple = ()) -> type[nn.Module]:
    """The class that is ``cls`` with the behaviour of ``mixin``; built once."""
    stock = Code(cls.forward) if hasattr(mixin, "_ds_fused_members") else cls.forward
    built = _BUILT.get((mixin, cls, how, stock))
    if built is None:
        members = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce,
            "_get_name": _fused_name,
            "_ds_fused_mixin": mixin,
            "_ds_fused_original": cls,
            "_ds_fused_how": how,
            "_ds_fused_stock": cls.forward,
        }
        if isinstance(stock, Code):
            members.update(mixin._ds_fused_members(cls, *how))
        forward = members.get("forward", getattr(mixin, "forward", None))
        if forward is not None:
            members["forward"] = _unless_patched(forward, cls)
        built = type(cls)(cls.__name__, (mixin, cls), members)
        _BUILT[mixin, cls, how, stock] = built
    return built


def _unless_patched(fused: Callable, cls: type[nn.Module]) -> Callable:
    """``fused``, for as long as the class has the forward that it has now."""
    stock = cls.forward

    @functools.wraps(fused)
    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        if cls.forward is stock:
            return fused(self, *args, **named)
        if not torch.compiler.is_compiling():
            say_once(f"ds_fused: the forward of {qualified_name(cls)} was patched since, and runs as it is now")
        return cls.forward(self, *args, **named)

    return forward


def swap(module: nn.Module, mixin: type, how: tuple = (), **state: object) -> None:
    """Give ``module`` the behaviour of ``mixin``; ``state`` becomes attributes that ``unswap`` removes again."""
    reason = why_not_swapped(module)
    if reason is not None:
        raise ValueError(f"swap: {type(module).__name__} can't be swapped: {reason}")
    taken = [name for name in state if hasattr(module, name)]
    if taken:
        raise ValueError(f"swap: {type(module).__name__} already has an attribute {taken[0]!r}")
    module.__class__ = fused_class(mixin, type(module), how)
    for name, value in state.items():
        # past nn.Module.__setattr__: this is a plain attribute, never a parameter or a child
        module.__dict__[name] = value
    module.__dict__["_ds_fused_state"] = tuple(state)


def unswap(module: nn.Module) -> None:
    """Undo ``swap``: the exact original class, and none of our attributes."""
    cls = type(module)
    if "_ds_fused_original" not in cls.__dict__:
        if is_fused(module):
            # e.g. FSDP2 or parametrize built their class over ours; taking ours out from below would break theirs
            raise ValueError(f"unswap: {cls.__name__} was given another class after the swap; undo that first")
        raise ValueError(f"unswap: {cls.__name__} is not a swapped layer")
    for name in module.__dict__.pop("_ds_fused_state", ()):
        module.__dict__.pop(name, None)
    module.__class__ = cls._ds_fused_original


def unswap_all(modules: Iterable[nn.Module]) -> None:
    """Undo ``swap`` where it was done; what can't be undone is raised when all else is."""
    errors = []
    for module in modules:
        try:
            if is_fused(module):
                unswap(module)
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def as_originals(model: nn.Module) -> Iterator[None]:
    """Within it swapped layers have their originals' classes, for code that looks a layer's class up in a list."""
    swapped = [(module, type(module)) for module in model.modules() if "_ds_fused_original" in vars(type(module))]
    try:
        for module, cls in swapped:
            module.__class__ = cls._ds_fused_original
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls


def is_fused(module: nn.Module) -> bool:
    """Whether the layer's behaviour is ours, also where another class was built over it since."""
    return hasattr(type(module), "_ds_fused_original")


def is_class_patched(module: nn.Module) -> bool:
    """Whether the class that a layer had before a swap was given another forward since."""
    cls = type(module)
    return is_fused(module) and cls._ds_fused_original.forward is not cls._ds_fused_stock


def is_live(module: nn.Module) -> bool:
    """Whether the swapped layer's own forward is the one that runs."""
    return is_fused(module) and not is_class_patched(module) and "forward" not in vars(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the layer had before any swap."""
    return getattr(type(module), "_ds_fused_original", type(module))


def qualified_name(cls: type | Callable) -> str:
    """Of a class or a function, as reports name it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def why_not_swapped(module: nn.Module) -> str | None:
    """Why a swap of this layer would do nothing, or undo what somebody else did; None when it may be swapped."""
    if is_fused(module):
        return "ds_fused has swapped it already"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule, whose forward is compiled"
    # by name: importing torch._dynamo costs seconds, and a model that holds such a module has imported it
    if any(cls.__name__ == "OptimizedModule" and cls.__module__.startswith("torch.") for cls in type(module).__mro__):
        return "it is a torch.compile wrapper (compile after the swap instead)"
    owner = patched_by(module)
    if owner is not None:
        return f"{owner} has patched its forward"
    if "forward" in vars(module):
        return f"its instance has a forward of its own, from {home_of(vars(module)['forward'])}"
    return None


_OTHERS = {"liger_kernel": "Liger", "deepspeed": "DeepSpeed"}


def patched_by(module: nn.Module) -> str | None:
    """The library, of those that also replace layers, which the forward that would run comes from."""
    forward = vars(module).get("forward", type(module).forward)
    return owner_of(forward) or owner_of(type(module))


def owner_of(thing: object) -> str | None:
    """Liger or DeepSpeed where a function or class is theirs."""
    return _OTHERS.get(library_of(thing))


def home_of(thing: object) -> str:
    """The module that a function or class was written in; functools.wraps gives a wrapper the wrapped one's name."""
    thing = getattr(thing, "__func__", thing)  # a bound method
    thing = thing.func if isinstance(thing, functools.partial) else thing
    return getattr(thing, "__globals__", {}).get("__name__") or getattr(thing, "__module__", None) or ""


def library_of(thing: object) -> str:
    """The package that a function or class was written in."""
    return home_of(thing).partition(".")[0]


# whose hooks act on any layer's call alike, to gather weights
GATHERING = ("deepspeed", "torch")


def is_gathering(hook: Callable) -> bool:
    """Whether a hook is one of these: not somebody else's under a decorator of PyTorch's, as ``torch.no_grad()`` is."""
    while True:
        hook = hook.func if isinstance(hook, functools.partial) else hook
        if library_of(hook) not in GATHERING:
            return False
        inner = getattr(hook, "__wrapped__", None)
        if inner is None:
            return True
        hook = inner


# where PyTorch keeps the hooks of all modules, as register_module_forward_hook hangs them on
_OF_ALL = {
    kind: getattr(_module, f"_global{kind}")
    for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
}


def hooks_of_all(*kinds: str) -> list[Callable]:
    """Hooks of anybody else, of these kinds (all where none is named), on each call of any module."""
    # asked at each call of a layer, and most often there are none
    if not any(_OF_ALL.values()):
        return []
    return [hook for kind in kinds or _OF_ALL for hook in _OF_ALL[kind].values() if not is_gathering(hook)]


def is_observed(module: nn.Module, *kinds: str) -> bool:
    """Whether hooks of anybody else, of these kinds, see a layer's calls, or somebody has put a forward before its
    own."""
    state = vars(module)
    hooks = (hook for kind in kinds for hook in state[kind].values())
    return "forward" in state or not all(map(is_gathering, hooks)) or bool(hooks_of_all(*kinds))


def _fused_name(self: nn.Module) -> str:
    """What ``repr(model)`` shows."""
    return f"Fused{type(self)._ds_fused_original.__name__}"


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Copy and pickle by what built the class: it shares the original's name and can't be found by it."""
    cls = type(self)
    if "_ds_fused_original" not in cls.__dict__:
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _Renewing(cls), (), state


class _Renewing:
    """Makes bare layers of a built class: in a copy of that very class, from a pickle of one that is built there."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls

    def __call__(self) -> nn.Module:
        return self.cls.__new__(self.cls)

    def __reduce__(self) -> tuple:
        return _renewing, (self.cls._ds_fused_mixin, self.cls._ds_fused_original, self.cls._ds_fused_how)


def _renewing(mixin: type, cls: type[nn.Module], how: tuple) -> _Renewing:
    return _Renewing(fused_class(mixin, cls, how))
