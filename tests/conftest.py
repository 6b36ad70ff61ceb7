"""Where tests run: markers, the device, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HERE = Path(__file__).parent
OPS = HERE / "ops"
# folders and files that take long, the longest first: with two at a time none is then left to run alone at the end
LONG = (
    "launch", "zero", "benchmarks", "scripts", "engine", "test_warmup.py", "test_compile_targets.py", "test_trace.py",
)  # fmt: skip

# Triton decides when it is imported whether kernels are interpreted, the ops ask at every call: so one process holds
# kernels that run on CPU tensors, and only tests/ops lets them (pytest_runtest_setup).
if not HAS_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py: start pytest with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter  # imports triton while the variable is set

    interpreter.correct()

    # here and in what is started from here: sizes are tiny, and threads that wait for one another at each op cost 10 s
    # of processor time where one needs 0.2 (the judge of tests/zero, on a machine that had more to do)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the full products too (marker all)")


def turn(item: pytest.Item) -> int:
    parts = item.path.relative_to(HERE).parts
    return next((i for i, name in enumerate(LONG) if name in parts), len(LONG))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=turn)
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "gpus" in item.keywords and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        if "all" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="a long product: --all"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture, so that what a fixture starts elsewhere (ranks, scripts) never inherits the interpreter."""
    if HAS_GPU:
        return
    if OPS in item.path.parents:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU (in tests/ops: its interpreter)."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """For tests that fill a GPU: one at a time, however many workers pytest has, each handing back what it took."""
    with (Path(tempfile.gettempdir()) / f"ds_fused_whole_gpu_{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it where a worker dies
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()
