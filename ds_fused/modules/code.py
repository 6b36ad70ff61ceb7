"""What code a function or class leads to, as a value that is another one as soon as somebody has patched any of it.

    before = Code(modeling_llama.apply_rotary_pos_emb)
    modeling_llama.rotate_half = mine                         # which it calls
    Code(modeling_llama.apply_rotary_pos_emb) == before       # False

What was found out about a function, or made from it, holds for an equal ``Code`` only. Names are followed through
globals, modules, closures, defaults and classes into functions. Those of this package, PyTorch and Python are known by
identity, as all other objects are, but where they are a root, and the forwards of PyTorch's layers, which call what
others like to patch. What an object holds inside is not looked at.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType

from torch import Tensor

_NOT_FOLLOWED = sys.stdlib_module_names | {"torch", "triton", "numpy", "ds_fused"}
# what is called of a class without being named
_CALLED = ("forward", "backward", "setup_context", "__call__", "__torch_function__")


class Code:
    """Of all ``roots`` together; ``names`` are those in it. It keeps what it found alive, so that an id stays one."""

    def __init__(self, *roots: object) -> None:
        self.names: set[str] = set(_CALLED)
        self._found: dict[int, object] = {}
        # no code says that what it calls is a method of a tensor
        self._classes: dict[type, None] = dict.fromkeys(Tensor.__mro__)
        waiting: list[object] = []
        for root in roots:
            self._found[id(root)] = root
            waiting.extend(self._under(root, is_root=True))
        while waiting:
            thing = waiting.pop()
            if id(thing) not in self._found:
                self._found[id(thing)] = thing
                waiting.extend(self._under(thing))
        self._ids = tuple(self._found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and self._ids == other._ids

    def __iter__(self) -> Iterator[object]:
        return iter(self._found.values())

    def __hash__(self) -> int:
        return hash(self._ids)

    def _under(self, thing: object, is_root: bool = False) -> Iterable[object]:
        """What it leads to at once."""
        if isinstance(thing, FunctionType):
            return self._under_function(thing) if is_root or _is_followed(thing) else ()
        if isinstance(thing, type):
            return self._under_class(thing)
        if isinstance(thing, MethodType):
            return thing.__func__, thing.__self__
        if isinstance(thing, functools.partial):
            return thing.func, *thing.args, *thing.keywords.values()
        if isinstance(thing, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            return (thing.__wrapped__,)
        if isinstance(thing, property):
            return thing.fget, thing.fset
        return ()

    def _under_function(self, function: FunctionType) -> Iterator[object]:
        yield function.__code__
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from _contents(function)
        names = _names_in(function.__code__)
        spaces, seen = [function.__globals__], set()
        for space in spaces:
            for value in (space[name] for name in names if name in space):
                # F.silu; and of modules in it, nn.functional.silu
                if isinstance(value, ModuleType) and id(value) not in seen:
                    seen.add(id(value))
                    spaces.append(vars(value))
                yield value
        new = names - self.names
        self.names |= new
        yield from _members(self._classes, new)

    def _under_class(self, cls: type) -> Iterator[object]:
        new = [each for each in cls.__mro__ if each not in self._classes]
        self._classes.update(dict.fromkeys(new))
        yield from new
        yield from _members(new, self.names)


def _is_followed(function: FunctionType) -> bool:
    home = function.__globals__.get("__name__") or ""
    if home.startswith("torch.nn.modules."):
        return home != "torch.nn.modules.module"
    return home.partition(".")[0] not in _NOT_FOLLOWED


def _members(classes: Iterable[type], names: Iterable[str]) -> Iterator[object]:
    for cls in classes:
        yield from (vars(cls)[name] for name in names if name in vars(cls))


def _contents(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


@functools.cache
def _names_in(code: CodeType) -> frozenset[str]:
    """Also in the functions within it; and what it says in words, as ``getattr(layer, "eps")`` does."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    words = {each for each in code.co_consts if isinstance(each, str)}
    return frozenset(words.union(code.co_names, *map(_names_in, inner)))
