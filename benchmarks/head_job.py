"""One rank of zero3_head.py: judges each way against fp32, measures it, and tells the launching process.

    PYTHONPATH=. torchrun --nproc_per_node 2 benchmarks/head_job.py '[["8192x4096x128256", "stock"], ...]'

A way that can't be loaded is passed over. One that fails while it runs may have left a collective under way that no
later one can be told from; so this job ends there, and zero3_head.py starts another for the rest.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.head_ways import IGNORED, WAYS, Case, Run, Shape
from benchmarks.measure import relative_error
from benchmarks.ranks import exchanged, said, say
from benchmarks.results import OK

WARM_UP, ITERATIONS = 3, 10
# products before the head: its launches lie ready, and the device is as hot, as behind the layers of a model
LEAD, LEAD_SIDE = 40, 8192
# relative, against fp32. gradients are rounded to bf16, twice where tiles or ranks are summed; a loss is not
ALLOWED = {"loss": 2e-3, "dx": 2e-2, "dw": 2e-2}
# fp32 logits that the judge has at a time
JUDGE_BYTES = 2**29
# a rank that has failed waits so long for the others, which may hang in a collective for its sake
PATIENCE = timedelta(seconds=30)
TIMEOUT = timedelta(seconds=120)
BEGUN, RESULT, FAILED = "BEGUN ", "RESULT ", "FAILED "


def main(cases: list[tuple[str, str]]) -> None:
    import deepspeed

    import ds_fused

    # where it is not installed, there is no entry point that does
    ds_fused.install()
    on_gpu = torch.cuda.is_available() and deepspeed.accelerator.get_accelerator().device_name() == "cuda"
    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=TIMEOUT, verbose=False)
    if rank == 0:
        say(BEGUN, torch.cuda.get_device_name(device) if on_gpu else "CPU (no timing here means anything)")
    store = dist.PrefixStore("zero3_head", dist.distributed_c10d._get_default_store())

    case, judge = None, None
    for place, (shape, name) in enumerate(cases):
        row, failed = not_run(name, on_gpu), False
        if row is None:
            try:
                if case is None or str(case.shape) != shape:
                    case, judge = None, None
                    case = Case(Shape.parse(shape), device, rank, ranks)
                    judge = Judge(case)
                row = measured(name, case, judge)
            except Exception as error:
                row, failed = {"status": f"failed: {said(error)}"}, True
                say(FAILED, row["status"])
        # what has failed is still held by its traceback's frames until here
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        try:
            everyones = exchanged(store, f"{place}", [row, failed], rank, ranks, PATIENCE)
        except dist.DistStoreError:
            # not in good order: that would wait for the collective which the others are in
            os._exit(1)
        bad = [theirs for theirs, _ in everyones if theirs["status"] != OK]
        if rank == 0:
            say(RESULT, {"shape": shape, "way": name, **(bad[0] if bad else row)})
        if any(has_failed for _, has_failed in everyones):
            # nothing is waited for: a collective may be under way
            os._exit(0)
    dist.barrier()
    dist.destroy_process_group()


def not_run(name: str, on_gpu: bool) -> dict[str, object] | None:
    """The row of a way that can't be started here, found out without any collective."""
    way = WAYS[name]
    try:
        if way.needs_gpu and not on_gpu:
            return {"status": "not run: needs a GPU"}
        way.load()
    except Exception as error:
        return {"status": f"not run: {said(error)}"}
    return None


class Judge:
    """Loss, dx and this rank's part of dW (the mean over ranks) in fp32, from the same bf16 inputs."""

    def __init__(self, case: Case) -> None:
        shape, self._case = case.shape, case
        weight = case.weight().float()
        dw, self._dx = torch.zeros_like(weight), torch.empty_like(case.x, dtype=torch.float32)
        total, count = torch.zeros((), device=case.device), (case.labels != IGNORED).sum()
        tokens = max(1, JUDGE_BYTES // (4 * shape.vocab))
        with torch.no_grad():
            for start in range(0, shape.tokens, tokens):
                chunk = slice(start, start + tokens)
                x, labels = case.x[chunk].float(), case.labels[chunk]
                counts = (labels != IGNORED)[:, None]
                logits = x @ weight.t()
                column = labels.clamp(min=0)[:, None]
                lse = logits.logsumexp(-1, keepdim=True)
                total += ((lse - logits.gather(1, column)) * counts).sum()
                dz = logits.sub_(lse).exp_()
                dz.scatter_add_(1, column, torch.full_like(column, -1.0, dtype=dz.dtype))
                dz.mul_(counts / count)
                torch.mm(dz, weight, out=self._dx[chunk])
                dw.addmm_(dz.t(), x)
        self._loss = (total / count).item()
        dw /= case.ranks
        dist.all_reduce(dw)
        self._dw = case.part(dw).clone()

    def errors(self, loss: Tensor, run: Run) -> dict[str, float]:
        """Relative, the largest of all ranks."""
        errors = {"loss": abs(loss.item() / self._loss - 1), "dx": relative_error(self._case.x.grad, self._dx)}
        gradient = run.gradient()
        if gradient is not None:
            errors["dw"] = relative_error(gradient[: self._dw.numel()].view(-1), self._dw)
        # NaN may get lost in a maximum
        worst = torch.tensor(list(errors.values()), device=self._case.device).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return dict(zip(errors, worst.tolist(), strict=True))


def measured(name: str, case: Case, judge: Judge) -> dict[str, object]:
    """One way's row. A wrong answer gets no time."""
    run = WAYS[name].start(case)
    errors: dict[str, float] | None = None
    ms, idle_ms, peaks = [], [], []
    lead = Lead(case.device)
    for iteration in range(WARM_UP + 2 * ITERATIONS):
        case.x.grad = None
        has_lead = iteration >= WARM_UP + ITERATIONS
        loss, took, peak = once(run, case, lead if has_lead else None)
        if iteration == 0 and loss is not None:
            errors = judge.errors(loss, run)
            wrong = [f"{what} is off by {error:.1e}" for what, error in errors.items() if not error <= ALLOWED[what]]
            if wrong:
                run.close()
                return {"status": f"wrong: {', '.join(wrong)}", "errors": errors}
        del loss
        run.settle()
        if iteration >= WARM_UP:
            (ms if has_lead else idle_ms).append(took)
            peaks.append(peak)
    uncounted = run.uncounted()
    run.close()
    case.x.grad = None

    # a step is as slow as its slowest rank
    slowest = torch.tensor([*ms, *idle_ms, *peaks], dtype=torch.float64, device=case.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ms, idle_ms, peaks = slowest.tensor_split((ITERATIONS, 2 * ITERATIONS))
    row = {"status": OK, "ms": statistics.median(ms.tolist()), "errors": errors}
    row["idle_ms"] = statistics.median(idle_ms.tolist())
    row["iterations_ms"] = [round(took, 3) for took in ms.tolist()]
    # bare GEMMs write into outputs made beforehand
    if case.device.type == "cuda" and errors is not None:
        row["extra_mib"] = (peaks.max().item() + uncounted - case.x.numel() * case.x.element_size()) / 2**20
    return row


class Lead:
    """Work for every rank's device, which all of them end at the same time."""

    def __init__(self, device: torch.device) -> None:
        side = LEAD_SIDE if device.type == "cuda" else 1
        self._x = torch.randn(side, side, dtype=torch.bfloat16, device=device)
        self._out = torch.empty_like(self._x)

    def __call__(self) -> None:
        for _ in range(LEAD):
            torch.mm(self._x, self._x, out=self._out)
        dist.all_reduce(self._out[0])


def once(run: Run, case: Case, lead: Lead | None) -> tuple[Tensor | None, float, float]:
    """Loss, ms and bytes at the peak beyond those before, of one forward and backward that all ranks start together."""
    dist.barrier()
    if case.device.type != "cuda":
        begin = time.perf_counter()
        loss = run()
        return loss, (time.perf_counter() - begin) * 1e3, 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if lead is None:
        begin.record()
    else:
        # DeepSpeed's forward begins with a wait for the device, so it is within
        case.before = lambda: (lead(), begin.record())
    loss = run()
    case.before = lambda: None
    # what DeepSpeed's own streams still have to do belongs to it
    torch.cuda.synchronize()
    end.record()
    torch.cuda.synchronize()
    return loss, begin.elapsed_time(end), torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main([tuple(case) for case in json.loads(sys.argv[1])])
