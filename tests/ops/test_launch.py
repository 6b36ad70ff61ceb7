"""`launch` does what `kernel[grid]` does: up to the C function anywhere (launch_stubbed.py), to the bit on a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accuracy import randn, same_bits
from torch import Tensor

import ds_fused
import ds_fused.ops as ops
from ds_fused.ops.common import _launch


class OnTheSecondGPU(Tensor):
    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1


class Guard:
    """Stands for torch.cuda.device; `current` is the device that kernels run on."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        Guard.current, self.before = self.index, Guard.current

    def __exit__(self, *_: object) -> None:
        Guard.current = self.before


def test_a_kernel_runs_on_its_tensors_device_and_the_current_one_stays(monkeypatch):
    ran_on = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: ran_on.append(Guard.current)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: Guard.current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    x = torch.empty(3).as_subclass(OnTheSecondGPU)
    # of a Triton that is not known, and of one that is
    for current_device in (_launch._nowhere, lambda: Guard.current):
        monkeypatch.setattr(_launch, "_current_device", current_device)
        _launch.launch(Kernel(), (1,), x, 3)
        _launch.launch_ready(_launch.ready(Kernel(), (1,), 3), x)
    assert ran_on == [1, 1, 1, 1] and Guard.current == 0


def test_kernels_are_launched_here_alone():
    folder = Path(ds_fused.__file__).parent
    # kernel[grid](...)
    launching = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        if ast.unparse(node.func).endswith("[grid]") or ast.unparse(node.func.value).endswith("kernel")
    }
    assert launching == {"ops/common/_launch.py"}


def test_both_ways_up_to_the_c_function():
    # a process of its own: this one's kernels are interpreted
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("launch_stubbed.py"))],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def test_what_is_kept_takes_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(_launch.Kept, "MOST", 3)
    kept = _launch.Kept()
    for n in range(20):
        assert kept.keep((n,), n) == n and kept.get((n,)) == n and len(kept.by_key) <= 3
    assert kept.keep(None, "of a graph") == "of a graph" and kept.get(None) is None


def calls(device: torch.device) -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Ops that keep launches, on tensors that differ from call to call in what a launch may follow from."""

    def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(*shape, device=device).to(dtype)

    labels = torch.tensor([3, -100, 1, 0], device=device)
    calls = []
    for x in (
        some(4, 6),
        some(2, 4, 6),
        some(4, 12)[:, 3:9],
        some(6, 4).T,
        some(4, 6, dtype=torch.bfloat16),
        some(1, 6),
    ):
        weight, flipped = some(6), x.flip(0)
        calls += [
            (ops.rms_norm, (x, weight)),
            (ops.rms_norm, (x, weight.bfloat16())),
            (lambda x, weight: ops.rms_norm(x.detach(), weight), (x, weight)),
            (lambda x: ops.rms_norm(x, None, cast="after_weight"), (x,)),
            (lambda x, weight: ops.rms_norm(x, weight, eps=1e-2, offset=1.0), (x, weight)),
            (lambda x, weight: ops.rms_norm(x, weight, bias=weight), (x, weight)),
            (lambda x, y, weight: torch.stack(ops.add_rms_norm(x, y, weight)), (x, flipped, weight)),
            (ops.glu, (x, flipped)),
            (lambda x, y: ops.glu(x.detach(), y), (x, flipped)),
            (lambda x, y: ops.glu(x, y, "gelu_tanh"), (x, flipped)),
            (lambda x, y: ops.glu(x, y, limit=0.5, offset=1.0), (x, flipped)),
            (ops.glu, (x,)),
            (lambda x: ops.glu(x, interleaved=True), (x,)),
            (lambda x, weight: ops.group_norm(x.movedim(-1, 1), 3, weight), (x, weight)),
            (lambda x, weight: ops.group_norm(x.movedim(-1, 1), 2, weight), (x, weight)),
            (lambda x, weight: ops.group_norm(x.detach().movedim(-1, 1), 2, weight), (x, weight)),
            (lambda x, weight: ops.group_norm(x.movedim(-1, 1), 2, weight, weight, eps=1e-2), (x, weight)),
            (lambda x: ops.group_norm(x.movedim(-1, 1), 2), (x,)),
            (ops.relu2, (x,)),
            (ops.softmax, (x,)),
            (lambda x: ops.softmax(x, 0), (x,)),
            (ops.sparsemax, (x,)),
        ]
    for x in (some(4, 6), some(4, 7), some(4, 12)[:, :6], some(4, 6, dtype=torch.bfloat16)):
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"softcap": 2.0}, {"z_loss": 0.1}):
            calls.append((lambda x, options=options: ops.cross_entropy(x, labels, **options), (x,)))
        calls.append((lambda x: ops.cross_entropy(x, labels, label_smoothing=0.2), (x,)))
        calls.append((lambda x: ops.cross_entropy(x, labels, return_accuracy=True)[0], (x,)))
    return calls


def test_what_is_kept_changes_no_launch(device, monkeypatch):
    noted: list[tuple[object, ...]] = []

    def note(kernel: object, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        args = [(x.dtype, x.numel()) if isinstance(x, Tensor) else x for x in args]
        noted.append((kernel, grid, *args, *constants.items()))

    def note_ready(it: _launch.Ready, *tensors: Tensor | None) -> None:
        note(it.kernel, it.grid, *tensors, *it.numbers, **it.constants)

    for name, module in list(sys.modules.items()):
        if name.startswith("ds_fused.ops.") and module is not _launch:
            for way, stand_in in (("launch", note), ("launch_ready", note_ready)):
                if hasattr(module, way):
                    monkeypatch.setattr(module, way, stand_in)

    # what looks at labels has not run
    monkeypatch.setattr(torch, "_assert_async", lambda legal, message: None)

    def launches() -> list[tuple[object, ...]]:
        noted.clear()
        for call, inputs in calls(device):
            leaves = [x.detach().requires_grad_() for x in inputs]
            y = call(*leaves)
            # an expanded number, as a sum's gradient is, would be copied, and what copies are launched with is not kept
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        return [*noted]

    kept = [launches() for _ in range(2)]
    monkeypatch.setattr(_launch.Kept, "get", lambda self, key: None)
    anew = launches()
    assert kept == [anew, anew] and len(anew) > 300


def moved(x: Tensor, elements: int) -> Tensor:
    """Its values so many elements behind an address that 16 divides."""
    storage = torch.empty(x.numel() + 16, dtype=x.dtype, device=x.device)
    return storage[elements : elements + x.numel()].view(x.shape).copy_(x)


def rms_norm(x: Tensor) -> Tensor:
    return ops.rms_norm(x, moved(torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype, device=x.device), 1))


def layer_norm(x: Tensor) -> Tensor:
    return ops.layer_norm(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device))


def rope(x: Tensor) -> Tensor:
    x = torch.cat((x, x), -1).view(1, 1, -1, 2 * x.shape[-1])
    return torch.cat(ops.rope(x, x * 2, x[0].detach().cos(), x[0].detach().sin()))


def cross_entropy(x: Tensor) -> Tensor:
    return ops.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))


def results(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    y = call(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


# what is 1 is a constant for triton; 16 divides no address of a row of 7, and with 1 and 4 elements not the first one
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (1, 16), (3, 7), (16, 1024)])
@pytest.mark.parametrize("call", [rms_norm, layer_norm, ops.glu, rope, cross_entropy, ops.softmax, ops.relu2])
def test_both_ways_give_the_same_bits(call, shape, device, monkeypatch):
    n, d = shape
    x = randn(n, 2 * d if call is ops.glu else d, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        for elements in (0, 1, 4, 0):
            leaf = moved(x.to(dtype), elements).requires_grad_()
            with monkeypatch.context() as patch:
                patch.setattr(_launch, "_current_device", _launch._nowhere)
                ordinary = results(call, leaf)
            for _ in range(2):
                assert all(same_bits(a, b) for a, b in zip(results(call, leaf), ordinary, strict=True))
    assert _launch._current_device is not _launch._nowhere, "this triton is not known, or its rehearsal failed"


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream(device):
    x = randn(512, 4096, device=device).float()
    wanted = ops.softmax(x)
    stream = torch.cuda.Stream()
    for _ in range(3):
        y = torch.empty_like(x)
        with torch.cuda.stream(stream):
            # what comes later on this stream only
            torch.cuda._sleep(10_000_000)
            y.copy_(x)
            y = ops.softmax(y)
        stream.synchronize()
        assert same_bits(y, wanted)


@pytest.mark.gpu
def test_launches_are_captured(device):
    x = randn(64, 257, device=device).float()
    weight = torch.ones(257, dtype=x.dtype, device=device)
    for _ in range(2):
        wanted = ops.rms_norm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.rms_norm(x, weight)
    x.mul_(3)
    graph.replay()
    assert same_bits(y, ops.rms_norm(x, weight)) and not same_bits(y, wanted)


@pytest.mark.gpus
def test_kernels_run_where_their_tensors_are():
    for _ in range(3):
        for index in (0, 1):
            x = randn(5, 64, device=torch.device("cuda", index)).float()
            assert same_bits(ops.softmax(x).cpu(), ops.softmax(x.to("cuda:0")).cpu())
