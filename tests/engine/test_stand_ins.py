"""What a warm-up shows to the head's op has the shapes that ZeRO-3 would give it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_fused.engine.zero3.stand_ins import Shard, Slabs, ways_of
from ds_fused.ops import linear_cross_entropy, rms_norm
from ds_fused.ops.common import _launch
from ds_fused.ops.common._warmup import noted, target_of


def weight(n_vocab: int, hidden: int) -> Tensor:
    return torch.empty(n_vocab, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)


# one that its ranks split evenly, and two with rows on two ranks
@pytest.mark.parametrize("n_vocab, ranks", [(1024, 2), (50257, 8), (1001, 3)])
def test_slabs_are_the_whole_weight(n_vocab, ranks):
    (slabs,) = ways_of(weight(n_vocab, 64), ranks, "stream", 2**16)
    sizes = [slabs.span(k).stop - slabs.span(k).start for k in range(len(slabs))]
    assert sum(sizes) == n_vocab and max(sizes) == slabs.slab_rows
    # the seam comes first, and may be larger than a slab
    plain = sizes[1:] if n_vocab % ranks else sizes
    assert all(size % ranks == 0 and size * 64 * 2 <= 2**16 for size in plain)


def test_modes():
    kinds = {mode: [type(way) for way in ways_of(weight(1001, 64), 3, mode, 2**20)] for mode in MODES}
    assert kinds == {"auto": [Slabs, Shard, Shard, Shard], "stream": [Slabs], "stationary": [Shard] * 3, "gather": []}
    assert sum(shard.n_rows for shard in ways_of(weight(1001, 64), 3, "stationary", 1)) == 1001
    # one rank's ZeRO-3 has slabs too
    assert [type(way) for way in ways_of(weight(1001, 64), 1, "auto", 2**20)] == [Slabs, Shard]
    # fewer rows than ranks
    assert ways_of(weight(3, 64), 8, "auto", 2**20) == []


MODES = ("auto", "stream", "stationary", "gather")


def test_no_driver_is_asked_for(monkeypatch):
    """As where PyTorch is built for CUDA and has no GPU: on the node where jobs are submitted."""

    def current_device() -> int:
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(_launch, "_current_device", current_device)
    launches: list[object] = []
    with noted(target_of("sm90")), monkeypatch.context() as within:
        # as below
        within.setattr(_launch, "launch_elsewhere", lambda kernel, *_: launches.append(kernel))
        rms_norm(torch.empty(4, 64, device="meta"), torch.empty(64, device="meta"))
    assert len(launches) == 1 and _launch._current_device is current_device


@pytest.mark.parametrize("mode", ["stream", "copied", "stationary"])
def test_what_arrives_is_added_to_what_is_kept(mode, monkeypatch):
    launches: list[tuple[torch.dtype, bool, bool]] = []

    def note(kernel: object, grid: object, args: tuple, constants: dict[str, object]) -> None:
        if "ADDS" in constants:
            launches.append((args[1].dtype, constants["ADDS"], constants.get("num_warps") == 1))

    is_copied = mode == "copied"
    with noted(target_of("sm90")):
        monkeypatch.setattr(_launch, "launch_elsewhere", note)
        way = ways_of(weight(1024, 64), 2, "stream" if is_copied else mode, 2**15, is_copied)[0]
        if mode == "stationary":
            way.gradient().give(0.5)
        else:
            way.scatter(1, way.gradient(1))
        monkeypatch.undo()
    assert launches == [(dtype, adds, is_copied) for dtype in (torch.bfloat16, torch.float32) for adds in (False, True)]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    "mode, kernels", [("stream", {(True, False), (False, False), (False, True)}), ("stationary", {(True, False)})]
)
def test_the_op_goes_through_them(mode, kernels, copied, monkeypatch):
    launches: list[tuple[str, dict[str, object]]] = []

    # this process may hold kernels that are interpreted, about which triton tells less
    def note(kernel: object, grid: object, args: object, constants: dict[str, object]) -> None:
        launches.append((kernel.fn.__name__, constants))

    with noted(target_of("sm90")):
        monkeypatch.setattr(_launch, "launch_elsewhere", note)
        for way in ways_of(weight(1024, 64), 2, mode, 2**15, copied):
            x = torch.empty(32, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
            labels = torch.zeros(32, dtype=torch.int64, device="meta")
            linear_cross_entropy(x, way, labels).backward()
            assert x.grad.shape == x.shape
        monkeypatch.undo()
    names = {name for name, _ in launches}
    assert "_cross_entropy_bwd_kernel" in names and ("_merge_kernel" in names) == (mode == "stationary")
    parts = {(constants["IS_FIRST"], constants["IS_LAST"]) for _, constants in launches if "IS_LAST" in constants}
    assert parts == kernels
    # sums of what copy engines have brought: parts of slabs, or of the tokens' gradients
    beside = any("ADDS" in constants and constants.get("num_warps") == 1 for _, constants in launches)
    assert beside == copied
