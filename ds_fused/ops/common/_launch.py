"""``launch(kernel, grid, *args, **constants)``: what ``kernel[grid](*args, **constants)`` does, in less host time.

At small sizes a call of an op takes the host longer than the device, and much of that time is Triton's: it binds
arguments, prints options into a key, asks for allocators and hooks, and asks the driver what each pointer points to.
Here one loop over the arguments makes a key, under which lies the C function of the compiled kernel, and that is called
with addresses.

`launch_ready` does so for what `ready` has made of all but the tensors: the loop is over these alone, and most calls of
an op find it by their shapes (`Kept`).

In every call anew, the key tells apart all that Triton's specialisation does: of a tensor its dtype and whether 16
divides its address; of an integer whether it is 1, whether 16 divides it and how wide it is; None; the constants, among
them num_warps and num_stages; the device. It may be finer than Triton's own (``do_not_specialize``): two keys then lead
to one kernel.

The ordinary way is taken

- where torch.compile traces, whose graph has to hold an ordinary Triton kernel
- by versions of Triton that are not in KNOWN, by AMD's and Intel's devices, and by the interpreter
- while somebody watches: launch hooks, hooks of a kernel, debug and instrumentation modes
- where a tensor is not on the current device: that of the first one is made current, and what is wrong with others
  Triton says itself
- by the first launch of a key, since the kernel may have to be compiled; and by all from the moment on when a rehearsal
  of the ordinary way does not arrive at the C function with the very arguments that would be passed here.

Not looked at again are the globals that a kernel reads (Triton refuses to launch when one has changed): ours are
constants.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from ds_fused.ops.common._triton import TRITON, on_device

# whose specialisation the key was made after; all else that may differ between versions is rehearsed
KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))
# the C function takes the kernel's arguments in one tuple, and is told what they are. Those of 3.7 to 3.9 take the
# same; a GPU has run 3.8
IN_A_TUPLE = TRITON >= (3, 7)

_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation

T = TypeVar("T")

log = logging.getLogger("ds_fused")


class Entrance(NamedTuple):
    """How `launch` enters a compiled kernel."""

    call: Callable[..., object]  # the C function
    before: tuple[object, ...]  # what it takes between the stream and the kernel's arguments
    behind: tuple[object, ...]
    compiled: object  # it and its JITFunction stay alive, so that the id in the key stays theirs


class Taken(NamedTuple):
    """What a C function takes, in this order but for scratch, which Triton 3.6 has before the packed metadata."""

    place: tuple[int, ...]  # how many programs, in three dimensions
    stream: int
    function: int
    modes: tuple[bool, ...]
    packed: object  # warps and shared memory
    hooks: tuple[object, ...]  # facts about the launch for them, the one before it and the one behind it
    scratch: tuple[object, ...]
    described: tuple[object, ...]  # what the arguments are; nothing where they are no tuple
    arguments: tuple[object, ...]  # the kernel's, constants at the end


_entrances: dict[tuple[object, ...], Entrance] = {}
# of what `ready` has made: a number for all facts of a launch, which for rope are sixty, to be hashed in every call
_facts: dict[tuple[object, ...], int] = {}


def _nowhere() -> int:
    """The index of a device that no tensor lies on (-1 is the CPU's)."""
    return -2


def _knows_triton() -> bool:
    if _runtime.interpret or torch.version.hip is not None:
        return False
    return TRITON in KNOWN


# what torch.cuda.current_device calls, after asking whether CUDA is initialised: it is, where a tensor lies on a GPU
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _nowhere) if _knows_triton() else _nowhere
_current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Kept(Generic[T]):
    """What follows from shapes and strides, by them: most calls repeat the shapes of an earlier one.

    What else it follows from, as a file's constants, has to be in the keys. Nothing is kept under None, the key of a
    graph's calls, whose sizes may be symbols; nor is what is there looked at for it: a graph of torch.compile that saw
    a dict would hold for the dict's length alone, and be made anew after each eager call of a new shape. Lengths that
    never repeat take no memory without end: a full one begins anew.
    """

    MOST = 1024

    def __init__(self) -> None:
        self.by_key: dict[tuple[object, ...], T] = {}

    def get(self, key: tuple[object, ...] | None) -> T | None:
        return None if key is None else self.by_key.get(key)

    def keep(self, key: tuple[object, ...] | None, value: T) -> T:
        if key is not None:
            if len(self.by_key) >= self.MOST:
                self.by_key.clear()
            self.by_key[key] = value
        return value


def lie_alike(given: tuple[Tensor | None, ...], rows: tuple[Tensor | None, ...]) -> bool:
    """Whether no copy was made of what was given: kernels, which see addresses, then read it as well as its rows."""
    if torch.compiler.is_compiling():
        return False
    return all(x is None or x.data_ptr() == y.data_ptr() for x, y in zip(given, rows, strict=True))


class Ready(NamedTuple):
    """A launch but for its tensors, which come first among a kernel's arguments. `ready` makes one."""

    kernel: JITFunction
    grid: tuple[int, ...]
    numbers: tuple[float | None, ...]
    constants: dict[str, object]
    facts: int | None  # what the key has of all this; None in a graph


def ready(kernel: JITFunction, grid: tuple[int, ...], *numbers: float | None, **constants: object) -> Ready:
    """For launchers that have the same shapes over and over, and keep it (`Kept`)."""
    if torch.compiler.is_compiling():
        return Ready(kernel, grid, numbers, constants, None)
    facts = id(kernel), *constants, *constants.values(), *[_of_number(number) for number in numbers]
    return Ready(kernel, grid, numbers, constants, _facts.setdefault(facts, len(_facts)))


def launch_ready(it: Ready, *tensors: Tensor | None) -> None:
    """``launch(it.kernel, it.grid, *tensors, *it.numbers, **it.constants)``, by a key of its own."""
    kernel, grid, numbers, constants, known = it
    if torch.compiler.is_compiling():
        kernel[grid](*tensors, *numbers, **constants)
        return
    device = tensors[0].get_device()
    if device != _current_device():
        launch_elsewhere(kernel, grid, (*tensors, *numbers), constants)
        return
    facts: list[object] = [known, device]
    passed: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
            passed.append(None)
        elif tensor.get_device() != device:
            kernel[grid](*tensors, *numbers, **constants)
            return
        else:
            address = tensor.data_ptr()
            facts.append((tensor.dtype,) if address & 15 else tensor.dtype)
            passed.append(address)
    key = tuple(facts)
    entrance = _entrances.get(key)
    if entrance is None or _is_watched(kernel):
        _ordinarily(key, kernel, grid, (*tensors, *numbers), constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    entrance.call(x, y, z, _current_stream(device), *entrance.before, *passed, *numbers, *entrance.behind)


def launch(kernel: JITFunction, grid: tuple[int, ...], *args: Tensor | float | None, **constants: object) -> None:
    """``kernel[grid](*args, **constants)`` on the device of args[0], a tensor. Constants are the constexpr ones."""
    if torch.compiler.is_compiling():
        kernel[grid](*args, **constants)
        return
    device = args[0].get_device()
    if device != _current_device():
        launch_elsewhere(kernel, grid, args, constants)
        return

    facts: list[object] = [id(kernel), device, *constants, *constants.values()]
    passed: list[float | None] = []
    try:
        for arg in args:
            kind = type(arg)
            if kind is int:
                facts.append(("" if arg & 15 else "16") if 0 <= arg < 2**31 and arg != 1 else _seldom(arg))
                passed.append(arg)
            elif arg is None or kind is float or kind is bool:
                facts.append(kind)
                passed.append(arg)
            elif arg.get_device() != device:
                kernel[grid](*args, **constants)
                return
            else:
                address = arg.data_ptr()
                facts.append((arg.dtype,) if address & 15 else arg.dtype)
                passed.append(address)
    except AttributeError:
        plain = tuple(map(_plain, args))
        if all(a is b for a, b in zip(args, plain, strict=True)):
            raise
        launch(kernel, grid, *plain, **constants)
        return
    key = tuple(facts)
    entrance = _entrances.get(key)
    if entrance is None or _is_watched(kernel):
        _ordinarily(key, kernel, grid, args, constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    entrance.call(x, y, z, _current_stream(device), *entrance.before, *passed, *entrance.behind)


def _ordinarily(
    key: tuple[object, ...],
    kernel: JITFunction,
    grid: tuple[int, ...],
    args: tuple[object, ...],
    constants: dict[str, object],
) -> None:
    """The ordinary way, and a rehearsal where there is no entrance yet and nobody watches."""
    is_new = key not in _entrances and not _is_watched(kernel)
    compiled = kernel[grid](*args, **constants)
    if is_new:
        _rehearse(key, kernel, compiled, grid, args, constants)


def launch_elsewhere(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple[object, ...], constants: Mapping[str, object]
) -> None:
    """The ordinary way, on a device that is not the current one, or not known to `launch`."""
    with on_device(args[0]):
        kernel[grid](*args, **constants)


def _of_number(number: float | None) -> object:
    """What a key tells of one: as in the loop of `launch`, where a call of this would take a third of the time."""
    if type(number) is not int:
        return type(number)
    return ("" if number & 15 else "16") if 0 <= number < 2**31 and number != 1 else _seldom(number)


def _plain(arg: object) -> object:
    """A number of a class of its own, as NumPy's float64 is one, or an enum's member, as Python's; all else as it is.

    Whether something is a tensor is not asked before: of ten tensors that would take half a microsecond.
    """
    if isinstance(arg, float):
        return float(arg)
    return int(arg) if isinstance(arg, int) and not isinstance(arg, bool) else arg


def _seldom(n: int) -> tuple[object, ...]:
    """Of 1, and of an integer that is negative or takes more than 32 bits."""
    width = 32 if -(2**31) <= n < 2**31 else 64 if -(2**63) <= n < 2**63 else "unsigned"
    return n == 1, n & 15 == 0, width


def _is_watched(kernel: JITFunction) -> bool:
    """Whether a launch has to pass through Triton's own hands."""
    return bool(
        # chains of hooks, or what somebody has put in their place
        getattr(_runtime.launch_enter_hook, "calls", _runtime.launch_enter_hook)
        or getattr(_runtime.launch_exit_hook, "calls", _runtime.launch_exit_hook)
        or _runtime.debug
        or _compilation.instrumentation_mode
        or kernel.debug
        or kernel.pre_run_hooks
    )


def _rehearse(
    key: tuple[object, ...],
    kernel: JITFunction,
    compiled: object,
    grid: tuple[int, ...],
    args: tuple[object, ...],
    constants: dict[str, object],
) -> None:
    """Opens an entrance, if the ordinary way arrives at the C function with what `launch` would pass."""
    global _current_device
    try:
        _entrances[key] = _entrance(kernel, compiled, grid, args, constants)
    except Exception as error:
        _current_device = _nowhere
        log.warning("ds_fused: kernels are launched by Triton's own launcher: %s: %s", type(error).__name__, error)


def _entrance(
    kernel: JITFunction, compiled: object, grid: tuple[int, ...], args: tuple[object, ...], constants: dict[str, object]
) -> Entrance:
    device = args[0].get_device()
    it = _taken_apart(_what_c_sees(kernel, compiled, device, grid, args, constants))
    own, behind = it.arguments[: len(args)], it.arguments[len(args) :]
    as_expected = {
        "grid": it.place == (*grid, 1, 1)[:3],
        "stream": it.stream == _current_stream(device),
        "function": it.function == compiled.function,
        # memory that would have to be allocated for every launch
        "scratch": it.scratch == (None, None),
        "hooks": it.hooks[1] is _runtime.launch_enter_hook and it.hooks[2] is _runtime.launch_exit_hook,
        "arguments": len(own) == len(args) and all(a is b for a, b in zip(own, args, strict=True)),
        "constants": len(behind) == len(kernel.params) - len(args),
    }
    if not all(as_expected.values()):
        raise ValueError(f"{kernel.__name__}: {', '.join(k for k, v in as_expected.items() if not v)} not as expected")
    # nobody watches: neither facts about the launch nor hooks
    hooks = (None, None, None)
    before = (it.packed, *hooks, *it.scratch, *it.described) if IN_A_TUPLE else (*it.scratch, it.packed, *hooks)
    before = it.function, *it.modes, *before
    call = compiled.run.launch
    if IN_A_TUPLE:
        call = _with_a_tuple(call, len(it.place) + 1 + len(before))
    return Entrance(call, before, behind, compiled)


def _with_a_tuple(call: Callable[..., object], n_before: int) -> Callable[..., object]:
    """Called as the C function of Triton 3.6 is: with the kernel's arguments one by one, behind so many others."""
    return lambda *everything: call(*everything[:n_before], everything[n_before:])


def _taken_apart(seen: tuple[object, ...]) -> Taken:
    first, others = (seen[:3], *seen[3:5], seen[5:7]), seen[7:]
    if IN_A_TUPLE:
        packed, hooks, scratch, described, (arguments,) = others[0], others[1:4], others[4:6], others[6:8], others[8:]
        return Taken(*first, packed, hooks, scratch, described, arguments)
    return Taken(*first, others[2], others[3:6], others[:2], (), others[6:])


def _what_c_sees(
    kernel: JITFunction,
    compiled: object,
    device: int,
    grid: tuple[int, ...],
    args: tuple[object, ...],
    constants: dict[str, object],
) -> tuple[object, ...]:
    """All that the ordinary way passes to the C function, on copies of kernel and launcher that launch nothing."""
    seen: list[tuple[object, ...]] = []
    launcher = copy.copy(compiled.run)
    launcher.launch = lambda *everything: seen.append(everything)
    stand_in = copy.copy(compiled)
    stand_in._run = launcher
    compiled_so_far, *binder = kernel.device_caches[device]
    stage = {key: stand_in for key, other in compiled_so_far.items() if other is compiled}
    if not stage or "launch" not in vars(compiled.run):
        # the actor would launch
        raise LookupError(f"{kernel.__name__} and its C function are not where Triton keeps them")
    actor = copy.copy(kernel)
    actor.device_caches = {device: (stage, *binder)}
    try:
        actor[grid](*args, **constants)
    finally:
        # from 3.8 on a kernel that goes unloads its module, which is the real one's
        stand_in.module = None
    return seen[0]
