"""Both ways of a launch up to the C function, which here takes note of what it is called with: no GPU is needed.

    python -m pytest --noconftest tests/ops/launch_stubbed.py

Needs a process of its own, without TRITON_INTERPRET (which conftest.py sets). Tensors lie on the CPU; nothing is
compiled: a kernel's handle stands for all that Triton would have compiled it for.
"""

from __future__ import annotations

import enum
import gc
import itertools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))
from compile_all import EXAMPLES, kernels  # noqa: E402

from ds_fused.ops.common import _launch  # noqa: E402
from ds_fused.ops.common._launch import Ready, launch, launch_ready, ready  # noqa: E402
from ds_fused.ops.common._warmup import Absent  # noqa: E402

CPU = -1  # index of its device
# of what C takes: facts about the launch, and hooks
HOOKS = slice(8, 11) if _launch.IN_A_TUPLE else slice(10, 13)

seen: list[tuple[object, ...]] = []


def note(*everything: object) -> None:
    # a kernel's arguments one by one, in a tuple or not
    seen.append((*everything[:-1], *everything[-1]) if _launch.IN_A_TUPLE else everything)


class Noting(CudaLauncher):
    """Triton's own, with another C function."""

    def __init__(self, src: object, metadata: object) -> None:
        self.num_ctas = 1
        self.launch_cooperative_grid, self.launch_pdl = False, True
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.gsan_enabled, self.arg_annotations, self.kernel_signature = False, ("annotations",), b"signature"
        self.launch = note


class Uncompiled(CompiledKernel):
    handles: dict[str, int] = {}
    unloaded: list[int] = []

    def __init__(self, src: object, target: object, options: dict[str, object]) -> None:
        self.src, self.name = src, src.fn.__name__
        self.packed_metadata = (options["num_warps"], options["num_ctas"], 0)
        what = (src.fn.__name__, src.signature, src.constants, src.attrs, options)
        self.module, self.function = 0, self.handles.setdefault(str(what), len(self.handles) + 1)
        self._run = Noting(src, None)

    def __del__(self) -> None:
        # as Triton's from 3.8 on
        if self.module is not None:
            self.unloaded.append(self.function)


class Stubbed(Absent):
    stream = 7

    def get_current_stream(self, device: int) -> int:
        return self.stream


@triton.jit(do_not_specialize=["rows"])
def _some_kernel(x_ptr, y_ptr, rows, cols, eps, flag, A: tl.constexpr, B: tl.constexpr = 3):
    pass


@pytest.fixture(autouse=True)
def stubs(monkeypatch) -> None:
    driver = Stubbed(GPUTarget("cuda", 90, 32), CPU)
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr("triton.compiler.compile", Uncompiled)
    monkeypatch.setattr(_launch, "_current_device", lambda: CPU)
    monkeypatch.setattr(_launch, "_current_stream", driver.get_current_stream)
    monkeypatch.setattr(_launch, "_entrances", {})
    _some_kernel.device_caches.clear()
    seen.clear()


def addresses(call: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in call)


def assert_same_both_ways(kernel: JITFunction, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """What C takes from Triton's launcher, and from ours when it has an entrance."""
    assert_as_triton(lambda: launch(kernel, grid, *args, **constants), kernel, grid, *args, **constants)


def assert_same_when_ready(it: Ready, *tensors: Tensor | None) -> None:
    kernel, grid, numbers, constants, _ = it
    assert_as_triton(lambda: launch_ready(it, *tensors), kernel, grid, *tensors, *numbers, **constants)


def assert_as_triton(
    ours: Callable[[], None], kernel: JITFunction, grid: tuple[int, ...], *args: object, **constants: object
) -> None:
    ordinary = _taken(lambda: kernel[grid](*args, **constants))
    ours()
    direct = _taken(ours)
    assert direct[HOOKS] == (None, None, None) != ordinary[HOOKS], "the ordinary way was taken"
    assert not any(isinstance(arg, Tensor) for arg in direct)
    ordinary = addresses(ordinary)
    direct, ordinary = ((*call[: HOOKS.start], *call[HOOKS.stop :]) for call in (direct, ordinary))
    assert [type(arg) for arg in direct] == [type(arg) for arg in ordinary]
    assert direct == ordinary


def _taken(call: object) -> tuple[object, ...]:
    before = len(seen)
    call()
    (new,) = seen[before:]
    return new


def aligned(offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """4 elements that begin so many elements behind an address that 16 divides."""
    storage = torch.empty(16, dtype=dtype)
    assert storage.data_ptr() % 16 == 0
    return storage[offset : offset + 4]


TENSORS = (
    aligned(0),
    aligned(1),
    aligned(4),
    aligned(0, torch.bfloat16),
    aligned(1, torch.int64),
    aligned(2, torch.int64),
)
INTEGERS = (
    0,
    1,
    2,
    15,
    16,
    17,
    -1,
    -16,
    2**31 - 1,
    2**31 - 16,
    2**31,
    2**31 + 1,
    -(2**31),
    -(2**31) - 16,
    2**63 - 1,
    2**63,
)
OTHERS = (0.0, 1.0, 1e-6, True, False, None)


def test_what_triton_tells_apart_the_key_tells_apart():
    # each way of calling meets the entrances that all others have made
    for x, n in itertools.product(TENSORS, INTEGERS):
        assert_same_both_ways(_some_kernel, (3,), x, None, n, n, 1e-6, True, A=1)
    for x, y in itertools.product(TENSORS, (*TENSORS, None)):
        assert_same_both_ways(_some_kernel, (3, 2), x, y, 5, 7, 0.0, False, A="silu")
    for n, other in itertools.product(INTEGERS, OTHERS):
        assert_same_both_ways(_some_kernel, (3, 2, 1), aligned(0), None, n, 4, other, n, A=None)
    x = aligned(0)
    constants = [{"A": 1}, {"A": 2}, {"A": 1, "B": 2}, {"B": 1, "A": 2}, {"A": 1, "B": 3}, {"A": 3, "B": None}]
    for given, warps, stages in itertools.product(constants, (4, 8), (2, 3)):
        assert_same_both_ways(_some_kernel, (1,), x, x, 2, 2, 0.5, True, **given, num_warps=warps, num_stages=stages)


class Five(enum.IntEnum):
    FIVE = 5


@pytest.mark.parametrize(("number", "plain"), [(np.float64(1e-6), 1e-6), (Five.FIVE, 5)])
def test_numbers_of_other_classes_are_numbers(number, plain):
    """As those are that an option may be."""
    x = aligned(0)
    for _ in range(2):
        launch(_some_kernel, (3,), x, None, 4, 4, number, True, A=1)
        launch_ready(ready(_some_kernel, (3,), 4, 4, number, True, A=1), x, None)
    assert_same_both_ways(_some_kernel, (3,), x, None, 4, 4, plain, True, A=1)
    assert all(plain in addresses(call) for call in seen)


def test_what_is_no_argument_of_a_kernel_is_an_error():
    with pytest.raises(AttributeError, match="'str' object has no attribute 'get_device'"):
        launch(_some_kernel, (3,), aligned(0), None, 4, 4, "1", True, A=1)


def test_numbers_that_are_ready_are_told_apart_too():
    for x, n in itertools.product(TENSORS, INTEGERS):
        assert_same_when_ready(ready(_some_kernel, (3,), n, n, 1e-6, True, A=1), x, None)
    for n, other in itertools.product(INTEGERS, OTHERS):
        assert_same_when_ready(ready(_some_kernel, (3, 2, 1), n, 4, other, n, A=None), aligned(0), None)
    for x, y in itertools.product(TENSORS, (*TENSORS, None)):
        assert_same_when_ready(ready(_some_kernel, (3, 2), 5, 7, 0.0, False, A="silu", num_warps=8), x, y)


def test_one_call_site_sees_its_tensors_move():
    storage = torch.empty(64, dtype=torch.float32)
    for first in (0, 1, 4, 2, 0, 3):
        assert_same_both_ways(_some_kernel, (1,), storage[first:], storage, 4, 4, 0.0, True, A=1)


def test_every_launch_of_every_op(monkeypatch):
    launched = set()

    def both(kernel: JITFunction, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        launched.add(kernel.__name__)
        assert_same_both_ways(kernel, grid, *args, **constants)

    def both_ready(it: Ready, *tensors: Tensor | None) -> None:
        launched.add(it.kernel.__name__)
        assert_same_when_ready(it, *tensors)

    for name, module in list(sys.modules.items()):
        if name.startswith("ds_fused.ops.") and module is not _launch:
            for way, stand_in in (("launch", both), ("launch_ready", both_ready)):
                if hasattr(module, way):
                    monkeypatch.setattr(module, way, stand_in)
    # so that ops take CPU tensors to their kernels, which were made without it
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    for example in EXAMPLES:
        example.compiled()
    # what stands for a device here copies no tiles
    assert launched == kernels(GPUTarget("cuda", 80, 32))


def some(**changes: object) -> tuple[object, ...]:
    """Launches it once."""
    x = aligned(0)
    return _taken(lambda: launch(_some_kernel, (2,), x, x, 5, 5, 0.5, True, **{"A": 1, **changes}))


def is_direct(call: tuple[object, ...]) -> bool:
    return call[HOOKS] == (None, None, None)


def test_a_rehearsal_unloads_nothing():
    Uncompiled.unloaded.clear()
    some()
    assert is_direct(some())
    gc.collect()
    assert not Uncompiled.unloaded


def test_the_stream_is_the_current_one():
    some()
    for stream in (7, 9, 7):
        triton.runtime.driver.active.stream = stream
        assert is_direct(some()) and some()[3] == stream


def test_hooks_are_called():
    some()
    assert is_direct(some())
    entered, left = [], []
    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(entered.append)
    runtime.launch_exit_hook.add(left.append)
    try:
        for _ in range(2):
            *_, facts, enter, exit = some()[: HOOKS.stop]
            assert (enter, exit) == (runtime.launch_enter_hook, runtime.launch_exit_hook)
            assert facts is not None
    finally:
        runtime.launch_enter_hook.remove(entered.append)
        runtime.launch_exit_hook.remove(left.append)
    assert is_direct(some())


@pytest.mark.parametrize(
    "where, name, value",
    [
        ("triton.knobs.runtime", "debug", True),
        ("triton.knobs.compilation", "instrumentation_mode", "consan"),
        ("triton.knobs.runtime", "launch_enter_hook", print),
        ("launch_stubbed._some_kernel", "pre_run_hooks", [lambda *_, **__: None]),
        ("torch.compiler", "is_compiling", lambda: True),
        ("ds_fused.ops.common._launch", "_current_device", _launch._nowhere),
    ],
)
def test_who_watches_sees_the_ordinary_way(where, name, value, monkeypatch):
    some()
    assert is_direct(some())
    monkeypatch.setattr(f"{where}.{name}", value)
    assert not is_direct(some()) and not is_direct(some(A=2)) and not is_direct(some(A=2))
    assert len(_launch._entrances) == 1


def test_a_ready_launch_is_watched_and_elsewhere_like_any_other(monkeypatch):
    x = aligned(0)
    it = ready(_some_kernel, (2,), 5, 5, 0.5, True, A=1)
    for _ in range(2):
        assert not is_direct(_taken(lambda: launch_ready(it, x, OnAnotherGPU(x))))
    launch_ready(it, x, x)
    assert is_direct(_taken(lambda: launch_ready(it, x, x)))
    for where, name, value in (
        (triton.knobs.runtime, "debug", True),
        (torch.compiler, "is_compiling", lambda: True),
        (_launch, "_current_device", _launch._nowhere),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert not is_direct(_taken(lambda: launch_ready(it, x, x)))
    assert is_direct(_taken(lambda: launch_ready(it, x, x)))


class OnAnotherGPU(Tensor):
    def get_device(self) -> int:
        return 1


def test_a_tensor_elsewhere_is_left_to_triton():
    x = aligned(0)
    for _ in range(2):
        call = _taken(lambda: launch(_some_kernel, (1,), x, OnAnotherGPU(x), 5, 5, 0.5, True, A=1))
        assert not is_direct(call)
    assert not _launch._entrances


@pytest.mark.parametrize("change", ["order", "more", "names"])
def test_other_internals_mean_the_ordinary_way(change, monkeypatch, caplog):
    stock = Noting.__call__

    def run(self, x, y, z, stream, function, *rest):
        if change == "order":
            stock(self, x, y, z, function, stream, *rest)
        else:
            stock(self, x, y, z, stream, function, *rest, "more")

    if change == "names":
        monkeypatch.setattr(
            Noting,
            "launch",
            property(lambda self: note, lambda self, _: None),
            raising=False,
        )
    else:
        monkeypatch.setattr(Noting, "__call__", run)
    with caplog.at_level(logging.WARNING, "ds_fused"):
        for a in (1, 1, 2, 2):
            assert not is_direct(some(A=a))
    assert not _launch._entrances
    assert len(caplog.records) == 1 and "Triton's own launcher" in caplog.text


@pytest.mark.parametrize(
    "where, value, known",
    [
        ("ds_fused.ops.common._launch.TRITON", (3, 6), True),
        ("ds_fused.ops.common._launch.TRITON", (3, 5), False),
        ("ds_fused.ops.common._launch.TRITON", (3, 9), True),
        ("ds_fused.ops.common._launch.TRITON", (3, 10), False),
        ("ds_fused.ops.common._launch.TRITON", (3, 60), False),
        ("torch.version.hip", "6.4", False),
        ("triton.knobs.runtime.interpret", True, False),
    ],
)
def test_which_triton_is_known(where, value, known, monkeypatch):
    monkeypatch.setattr(where, value)
    assert _launch._knows_triton() == known
