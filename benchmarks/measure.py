"""The instruments: device time, host time, memory, distance from the truth, and the machine's ceilings."""

from __future__ import annotations

import gc
import os
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]

# larger than any L2, so that no call finds its inputs there
FLUSH_BYTES = 256 * 2**20
SLEEP_CYCLES_PER_MS = 2_000_000  # the clock of no GPU is far above; a slower one sleeps longer
POISON_BYTES = 8 * 2**30
LEAST_CALLS, MOST_CALLS = 5, 300
LEAD_MS = 1.0
# rounds, and calls of each batch: few enough that their launches fit the queue of the device, and that one batch in ten
# meets no other process
HOST_ROUNDS, HOST_CALLS = 10, 50
# on a CPU, which shows that it runs: a table of all ops would take minutes with as many as on a GPU
ROUNDS_ON_CPU, CALLS_ON_CPU = 2, 5
INTERPRETER = Path(__file__).resolve().parents[1] / "tests" / "interpreter.py"


class Instruments:
    """What depends on the device. On a CPU everything runs, the wall clock replaces events and peaks are unknown."""

    def __init__(self, device: str, rep_ms: float) -> None:
        self.device = torch.device(device)
        self.rep_ms = rep_ms
        self.on_gpu = self.device.type == "cuda"
        self.host_rounds, self.host_calls = (HOST_ROUNDS, HOST_CALLS) if self.on_gpu else (ROUNDS_ON_CPU, CALLS_ON_CPU)
        if not self.on_gpu and os.environ.get("TRITON_INTERPRET") == "1":
            # kernels run, as they do in tests
            runpy.run_path(str(INTERPRETER))["correct"]()
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.int8, device=self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def alive(self) -> bool:
        """False after an illegal access: from then on every call of this process fails."""
        try:
            self.wait()
            return torch.zeros(1, device=self.device).item() == 0.0
        except RuntimeError:
            return False

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU (no timing here means anything)"

    def _one_ms(self, call: Call, prepare: Call) -> Callable[[], float]:
        """Starts one timed call; the returned function reads its time, after wait()."""
        prepare()
        self._flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            ms = (time.perf_counter() - start) * 1e3
            return lambda: ms
        # The device idles first, so that the call's launches lie ready for it: without this lead a call whose launches
        # take longer than its kernels reads as its host time, and one kernel as 0.24 or 0.39 ms from call to call.
        torch.cuda._sleep(int(LEAD_MS * SLEEP_CYCLES_PER_MS))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return lambda: begin.elapsed_time(end)

    def median_ms(self, call: Call, prepare: Call = lambda: None) -> float:
        """Median time of one call on the device.

        The method of triton.testing.do_bench (events around each call, L2 flushed before it), with one step more:
        ``prepare`` runs before each call, outside the timed region. It restores what an in-place kernel destroyed,
        so that such a kernel is timed on real data and is not charged for a copy.
        """

        def run(n: int) -> float:
            readings = [self._one_ms(call, prepare) for _ in range(n)]
            self.wait()
            return statistics.median(reading() for reading in readings)

        estimate = run(3)
        return run(min(max(int(self.rep_ms / max(estimate, 1e-3)), LEAST_CALLS), MOST_CALLS))

    def host_us(self, call: Call) -> float:
        """Wall-clock time of Python and launches per call of one batch, with the device left to run behind."""
        # what the calls before it have put out of the caches
        call()
        self.wait()
        start = time.perf_counter()
        for _ in range(self.host_calls):
            call()
        us = (time.perf_counter() - start) / self.host_calls * 1e6
        self.wait()
        return us

    def peak_mib(self, call: Call, prepare: Call = lambda: None) -> float | None:
        """Memory that one call needs beyond what is there before it, its results included."""
        if not self.on_gpu:
            return None
        prepare()
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def poison(self) -> None:
        """NaN in the memory that the next call will be given: an element that it doesn't write is found out."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
            # left in the allocator's cache, from which the next blocks are cut
            torch.full((min(POISON_BYTES, free // 2) // 4,), torch.nan, device=self.device)

    def release(self) -> None:
        if self.on_gpu:
            # what failed is still held by its traceback's frames
            gc.collect()
            torch.cuda.empty_cache()

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def _tflop_s(self, m: int, k: int, n: int) -> float:
        generator = self._generator()
        a = torch.randn(m, k, generator=generator, device=self.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, generator=generator, device=self.device, dtype=torch.bfloat16)
        return 2 * m * k * n / self.median_ms(lambda: a @ b.T) / 1e9

    def matmul_tflop_s(self) -> float:
        """Of a large square product in bf16."""
        side = 8192 if self.on_gpu else 64
        return self._tflop_s(side, side, side)

    def ceilings(self) -> dict[str, float]:
        """This very card's limits: TB/s read and written by a copy, bf16 TFLOP/s of two matrix products."""
        n_bytes, head = (2**30, (8192, 4096, 128256)) if self.on_gpu else (2**20, (64, 32, 256))
        source = torch.randint(0, 100, (n_bytes,), dtype=torch.int8, generator=self._generator(), device=self.device)
        target = torch.empty_like(source)
        return {
            "copy_tb_s": 2 * n_bytes / self.median_ms(lambda: target.copy_(source)) / 1e9,
            "matmul_tflop_s": self.matmul_tflop_s(),
            "lm_head_tflop_s": self._tflop_s(*head),
        }


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||; NaN anywhere gives NaN."""
    if got.shape != wanted.shape:
        raise ValueError(f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
    distance = torch.linalg.vector_norm(got.detach().float() - wanted.float()).item()
    size = torch.linalg.vector_norm(wanted.float()).item()
    return distance / size if size else distance


def worst_error(got: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> tuple[float, str]:
    """The largest relative error and the tensor it belongs to; NaN counts as largest."""
    if len(got) != len(wanted):
        raise ValueError(f"{len(got)} tensors, wanted {len(wanted)}")
    errors = [(relative_error(g, w), name) for g, w, name in zip(got, wanted, names, strict=True)]
    return max(errors, key=lambda error: (error[0] != error[0], error[0]))
