"""Why slabs can't be moved by copy engines, where they can't; and how memory for them is made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from ds_fused.engine import copy_engines


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
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(NCCL_CTA_POLICY_ZERO=2), raising=False)
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


@pytest.fixture
def owned(monkeypatch) -> tuple[copy_engines.CopyEngines, list[str]]:
    """The owner of one of the job's communicators, and what is done with it."""
    engines, did = object.__new__(copy_engines.CopyEngines), []
    engines._group = group = SimpleNamespace(group_name="ours")
    monkeypatch.setattr(
        copy_engines, "get_accelerator", lambda: SimpleNamespace(synchronize=lambda: did.append("all has landed"))
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=[group]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: did.append(f"{group.group_name} ends"))
    monkeypatch.setattr(copy_engines, "_left", [])
    return engines, did


def test_a_communicator_ends_once(owned):
    engines, did = owned
    engines.end()
    engines.end()
    engines.leave()
    assert did == ["all has landed", "ours ends"] and not copy_engines._left


def test_a_communicator_that_ended_with_the_job(owned, monkeypatch):
    engines, did = owned
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=[]))
    engines.end()
    assert did == ["all has landed"]


@pytest.mark.parametrize(
    ("everyones", "ended"), [([["ours"], []], []), ([["another", "ours"], ["ours"]], ["ours ends"])]
)
def test_a_communicator_that_was_left(owned, monkeypatch, everyones, ended):
    engines, did = owned
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(told: list, mine: list[str]) -> None:
        assert mine == ["ours"]
        told[:] = everyones

    monkeypatch.setattr(dist, "all_gather_object", gather)
    engines.leave()
    copy_engines._end_left()
    assert did == ended and len(copy_engines._left) == 1 - len(ended)


def test_a_window_finds_what_the_allocator_has_in_store(monkeypatch):
    did: list[str] = []
    monkeypatch.setattr(
        copy_engines, "get_accelerator", lambda: SimpleNamespace(empty_cache=lambda: did.append("store is emptied"))
    )
    monkeypatch.setattr(symmetric_memory, "empty", lambda n, **more: did.append("window is made") or torch.empty(n))
    monkeypatch.setattr(symmetric_memory, "rendezvous", lambda window, group: did.append(f"{group} has it"))
    engines = object.__new__(copy_engines.CopyEngines)
    engines._device, engines._group = torch.device("cpu"), SimpleNamespace(group_name="everyone")
    assert engines.window(3, torch.float32).shape == (3,)
    assert did == ["store is emptied", "window is made", "everyone has it"]
