"""What run.py's providers compile, compiled before anything is timed, by several processes beside one another.

Triton and Inductor keep it in their caches on disk, where the process that measures finds it. Nothing is judged or
timed here: what fails, for the memory that the others hold or for itself, is left to that process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Sequence
from functools import partial

import torch

# (place of the case in CASES, shape, names of providers)
Item = tuple[int, tuple[int, ...], tuple[str, ...]]


def _begin() -> None:
    # one process a core: none needs helpers of its own
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    # which of Inductor's own few launch choices is fastest can't be told on a device that others use: it is asked again
    inductor.autotune_local_cache = False


def _compile(device: str, seed: int, item: Item) -> str:
    """Forward and backward of each provider, once. Says what did not run."""
    from benchmarks.cases import CASES
    from benchmarks.run import full_call

    place, shape, names = item
    case, failed = CASES[place], []
    torch.compiler.reset()
    for name in names:
        try:
            inputs = case.inputs(torch.Generator(device).manual_seed(seed), *shape)
            full_call(case.providers[name].build(inputs.tensors), inputs)()
        except Exception as error:  # it is run.py that says what can't run
            failed.append(f"{case.name} {name}: {type(error).__name__}")
        inputs = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return "; ".join(failed)


def compile_ahead(items: Sequence[Item], processes: int, seconds: float, device: str, seed: int) -> str:
    """Compiles what the items need, for so many seconds at most, and says how far it came."""
    start, done, failed = time.monotonic(), 0, []
    with multiprocessing.get_context("spawn").Pool(processes, _begin) as pool:
        reports = pool.imap_unordered(partial(_compile, device, seed), items)
        try:
            for _ in items:
                report = reports.next(timeout=max(start + seconds - time.monotonic(), 0.0))
                done += 1
                failed += [report] if report else []
        except multiprocessing.TimeoutError:
            failed.append(f"no more after {seconds:.0f} s")
    # its processes hold memory of the device until they have ended
    pool.join()
    took = f"{done} of {len(items)} shapes compiled ahead in {time.monotonic() - start:.0f} s, {processes} at a time"
    return "; ".join([took, *dict.fromkeys(failed)])
