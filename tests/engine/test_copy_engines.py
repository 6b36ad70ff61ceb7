"""Why slabs can't be moved by copy engines, where they can't; and how memory for them is made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from ds_fused.engine.zero3 import copy_engines, nccl


def accelerator(name: str) -> Callable[[], SimpleNamespace]:
    """Of the first of four ranks."""
    return lambda: SimpleNamespace(device_name=lambda: name, current_device=lambda: 0)


def tell(monkeypatch, everyones: Callable[[str], list[str | None]]) -> list[str]:
    """What ranks say of themselves. This one's part grows, call by call."""

    def gather(told: list, mine: tuple[str, int], group: object) -> None:
        told[:] = [(boot, rank) for rank, boot in enumerate(everyones(mine[0]))]
        asked.append(mine[0])

    asked: list[str] = []
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return asked


@pytest.fixture
def able(monkeypatch, tmp_path):
    """Four ranks of an NVIDIA host whose PyTorch and NCCL have all that is needed."""
    monkeypatch.setattr(copy_engines, "get_accelerator", accelerator("cuda"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda gpu, other: gpu != other)
    has = SimpleNamespace(NCCL_CTA_POLICY_ZERO=2, _comm_ptr=None)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", has, raising=False)
    monkeypatch.setattr(nccl, "library", lambda: "NCCL")
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    tell(monkeypatch, lambda mine: [mine] * 4)
    monkeypatch.setattr(symmetric_memory, "set_backend", lambda name: None)
    for name in copy_engines.WITHOUT_WINDOWS:
        monkeypatch.delenv(name, raising=False)
    boot = tmp_path / "boot_id"
    boot.write_text("one")
    monkeypatch.setattr(copy_engines, "BOOT_ID", boot)
    return boot


def test_nothing_is_in_the_way(able):
    assert copy_engines.why_no_engines(None) is None


def test_another_accelerator(able, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert copy_engines.why_no_engines(None) == "they are NCCL's, for NVIDIA's GPUs"
    monkeypatch.setattr(copy_engines, "get_accelerator", accelerator("cpu"))
    assert copy_engines.why_no_engines(None) == "they are NCCL's, for NVIDIA's GPUs"


def test_an_older_nccl(able, monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(), raising=False)
    reason = f"PyTorch {torch.__version__} has no zero-CTA policy of NCCL (2.28 and later)"
    assert copy_engines.why_no_engines(None) == reason


@pytest.mark.parametrize("lacks", ["communicators", "its library"])
def test_an_nccl_out_of_reach(able, monkeypatch, lacks):
    if lacks == "communicators":
        monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(NCCL_CTA_POLICY_ZERO=2), raising=False)
    else:
        monkeypatch.setattr(nccl, "library", lambda: None)
    reason = f"PyTorch {torch.__version__} does not say where its NCCL and its communicators are"
    assert copy_engines.why_no_engines(None) == reason


@pytest.mark.parametrize(
    ("group", "world", "reason"), [(1, 1, "there is one rank"), (2, 4, "the weights lie on 2 of 4 ranks")]
)
def test_other_ranks(able, monkeypatch, group, world, reason):
    monkeypatch.setattr(dist, "get_world_size", lambda of=None: world if of is None else group)
    assert copy_engines.why_no_engines("the group") == reason


@pytest.mark.parametrize("reason", ["an older NCCL", "another accelerator"])
def test_a_reason_of_its_own_leaves_no_other_rank_waiting(able, monkeypatch, reason):
    asked = tell(monkeypatch, lambda mine: [mine] * 4)
    if reason == "an older NCCL":
        monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(), raising=False)
    else:
        monkeypatch.setattr(copy_engines, "get_accelerator", accelerator("cpu"))
    assert copy_engines.why_no_engines(None) is not None and asked == ["one"]


@pytest.mark.parametrize("boots", [["one", "two"], ["one", None]])
def test_several_hosts(able, monkeypatch, boots):
    tell(monkeypatch, lambda mine: boots * 2)
    assert copy_engines.why_no_engines(None) == "the ranks are on several hosts"


def test_memory_out_of_reach(able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda gpu, other: other != 2)
    assert copy_engines.why_no_engines(None) == "GPU 0 has no access to the memory of GPU 2"
    # where a rank sees its own alone, nothing is known of others
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert copy_engines.why_no_engines(None) is None


@pytest.mark.parametrize(("name", "value"), copy_engines.WITHOUT_WINDOWS.items())
def test_an_environment_without_windows(able, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert copy_engines.why_no_engines(None) == f"{name}={value} leaves NCCL no windows"


def test_memory_of_another_kind(able, monkeypatch):
    def taken(name: str) -> None:
        raise RuntimeError("Allocator already in use for CUDA\nbelow: C++")

    monkeypatch.setattr(symmetric_memory, "set_backend", taken)
    assert copy_engines.why_no_engines(None) == "symmetric memory is not NCCL's: Allocator already in use for CUDA"


class Ours:
    """A group of ranks."""

    group_name = "ours"

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(_comm_ptr=lambda: 77)


class Library:
    """NCCL: writes down what it is asked for."""

    def __init__(self, did: list[str], status: int = 0) -> None:
        self._did, self._status = did, status

    def ncclCommWindowRegister(self, comm, pointer, n_bytes, window, flags) -> int:
        window.value = len(self._did) + 1
        self._did.append(f"{comm} has {n_bytes} bytes, {flags}")
        return self._status

    def ncclCommWindowDeregister(self, comm, window) -> int:
        self._did.append(f"{comm} gives window {window} up")
        return self._status

    def ncclGetErrorString(self, status) -> bytes:
        return f"error {status}".encode()


@pytest.fixture
def owned(monkeypatch) -> tuple[copy_engines.CopyEngines, list[str]]:
    """The owner of one of the job's communicators, and what is done with it."""
    engines, did = object.__new__(copy_engines.CopyEngines), []
    engines._device, engines._group, engines._windows = torch.device("cpu"), Ours(), []
    accelerator = SimpleNamespace(
        synchronize=lambda: did.append("all has landed"),
        empty_cache=lambda: did.append("store is emptied"),
        current_device_name=lambda: "cpu",
    )
    monkeypatch.setattr(copy_engines, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=[engines._group]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: did.append(f"{group.group_name} ends"))
    monkeypatch.setattr(nccl, "library", lambda: Library(did))
    monkeypatch.setattr(copy_engines, "_left", [])
    return engines, did


def test_a_communicator_ends_once(owned):
    engines, did = owned
    engines.end()
    engines.end()
    engines.leave()
    assert did == ["all has landed", "ours ends"] and not copy_engines._left


def test_windows_are_given_up_before_their_communicator_ends(owned):
    engines, did = owned
    engines._windows += [5, None, 6]
    engines.end()
    assert did == ["all has landed", "77 gives window 5 up", "77 gives window 6 up", "ours ends"]


def test_a_communicator_that_ended_with_the_job(owned, monkeypatch):
    engines, did = owned
    engines._windows.append(5)
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=[]))
    engines.end()
    assert did == ["all has landed"]


@pytest.mark.parametrize(
    ("everyones", "ended"),
    [([["ours"], []], []), ([["another", "ours"], ["ours"]], ["ours ends"])],
)
def test_a_communicator_that_was_left(owned, monkeypatch, everyones, ended):
    engines, did = owned
    engines._windows.append(5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(told: list, mine: list[str]) -> None:
        assert mine == ["ours"]
        told[:] = everyones

    monkeypatch.setattr(dist, "all_gather_object", gather)
    engines.leave()
    copy_engines._end_left()
    assert did == ended and len(copy_engines._left) == (not ended)


def test_a_window_finds_what_the_allocator_has_in_store(owned, monkeypatch):
    engines, did = owned
    monkeypatch.setattr(symmetric_memory, "empty", lambda n, **more: did.append("window is made") or torch.empty(n))
    assert engines.window(3, torch.float32).shape == (3,)
    assert did == ["store is emptied", "window is made", f"77 has 12 bytes, {nccl.SYMMETRIC}"]
    assert engines._windows == [3]


def test_nccl_says_what_went_wrong(owned, monkeypatch):
    monkeypatch.setattr(nccl, "library", lambda: Library([], status=3))
    with pytest.raises(RuntimeError, match="^ds_fused: NCCL: error 3$"):
        nccl.register(77, torch.empty(3))
    with pytest.raises(RuntimeError, match="^ds_fused: NCCL: error 3$"):
        nccl.deregister(77, 5)


def test_no_library_of_nccl_is_loaded_by_asking_for_it():
    assert (nccl.library() is None) == (not dist.is_nccl_available())
