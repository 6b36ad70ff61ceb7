"""`launch` does what `kernel[grid]` does: up to the C function anywhere (launch_stubbed.py), to the bit on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accuracy import randn, same_bits
from torch import Tensor

import ds_fused.ops as ops
from ds_fused.ops import _launch


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
        assert kept.keep((n,), n) == n and kept[n,] == n and len(kept) <= 3
    assert kept.keep(None, "of a graph") == "of a graph" and None not in kept


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
@pytest.mark.parametrize("call", [rms_norm, layer_norm, ops.glu, rope, cross_entropy, ops.softmax])
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
