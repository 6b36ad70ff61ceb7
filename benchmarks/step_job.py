"""One rank of end_to_end.py: builds a way's model and engine once, then trains some steps at each size.

    deepspeed --num_gpus 2 --no_local_rank benchmarks/step_job.py SPEC.json

Sizes come smallest first. The first that fails ends the launch, since its collectives may still be under way: what was
measured until then has been told.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# started as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.measure import Instruments
from benchmarks.ranks import exchanged, said, say
from benchmarks.results import OK
from benchmarks.step_data import Data, Stream, Text
from benchmarks.step_shapes import Shape, built, load, shape_of
from benchmarks.step_timeline import recorded, split
from benchmarks.step_ways import WAYS, Way, layer_class, ours
from ds_fused.engine.zero3.sizes import elements, sizes_of

BEGUN, STEP, RESULT, FAILED = "BEGUN ", "STEP ", "RESULT ", "FAILED "
OUT_OF_MEMORY = "out of memory"
# what libraries say where PyTorch's allocator is not the one that was asked
MEMORY_ERRORS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "Failed to CUDA calloc")
# a rank that is done with a size waits so long for the others
PATIENCE = timedelta(seconds=120)
TIMEOUT = timedelta(seconds=600)


@dataclass(frozen=True)
class Spec:
    """What one launch is to do."""

    way: str
    block: Mapping[str, object] | None  # of a way of ours
    shape: str
    layers: int | None  # None: the shape's own
    stage: int
    checkpointing: bool
    lora: bool
    offload: bool
    points: Sequence[tuple[int, int]]  # micro batch, sequence length; smallest first
    warm_up: Sequence[int]  # steps before those that are measured: at the first point, and at each other one
    steps: int
    further_step: bool  # after those that are measured
    profile: bool  # whether that one is taken apart
    ceiling: bool  # whether this card's rate of a matrix product is measured first
    room: float | None = None  # GiB that PyTorch may have of the card; None: all
    data: str | None = None
    tokenizer: str | None = None
    weights: str | None = None  # folder of a saved model; None: random ones


def ds_config(spec: Spec, way: Way) -> dict[str, object]:
    """DeepSpeed's defaults but for what the job is asked for."""
    zero: dict[str, object] = {"stage": spec.stage, **way.zero}
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    # fused: a foreach AdamW needs as much again as the weights it updates at a time, and that would be the step's peak
    optimizer = {"lr": 1e-5, "torch_adam": True, "fused": True}
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": spec.points[0][0],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": way.dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": zero,
        # DeepSpeed's own has to be compiled by nvcc
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
    if way.block is not None:
        config["ds_fused"] = dict(way.block)
    return config


def status_of(error: BaseException) -> str:
    """How a way that raised is recorded."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in MEMORY_ERRORS):
        return OUT_OF_MEMORY
    return f"failed: {said(error)}"


class Memory:
    """Of this rank's GPU, in MiB; None on a CPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def allocated(self) -> float | None:
        return torch.cuda.memory_allocated() / 2**20 if self.on_gpu else None

    def reset(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def forget_peaks(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def room(self) -> float | None:
        """What PyTorch could have: what it has and what nobody has, or what it is given."""
        if not self.on_gpu:
            return None
        free, total = torch.cuda.mem_get_info()
        given = torch.cuda.get_per_process_memory_fraction() * total
        return min(free + torch.cuda.memory_reserved(), given) / 2**20

    def peaks(self) -> tuple[float | None, float | None]:
        """Allocated, reserved."""
        if not self.on_gpu:
            return None, None
        return torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20


class Job:
    """A way's engine on this rank, and the steps that it has done."""

    def __init__(self, spec: Spec, way: Way, device: torch.device) -> None:
        import deepspeed

        # seconds from the start of this process to the end of each stage
        self.started = {"ranks met": age()}
        self.spec, self.way, self.device = spec, way, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.memory = Memory(device.type == "cuda")
        self.shape: Shape = shape_of(spec.shape, spec.layers)
        self.data: Data = Stream(self.shape.vocab)
        if spec.data:
            self.data = Text(Path(spec.data), Path(spec.tokenizer), self.shape.vocab)
        config = ds_config(spec, way)
        way.patch(self.shape.type)
        model = built(self.shape, config, device, spec.lora, way.dtype)
        if spec.weights:
            load(model, Path(spec.weights))
        self.started["model"] = age()
        way.check(model, self.shape.type)
        if spec.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if way.leaf:
            _make_leaves(model, self.shape.type, spec.stage)
        if way.sizes is not None:
            config["zero_optimization"].update(_sizes(model, self.shape.type, way.sizes, spec))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
        self.started["engine"] = age()
        self.replaced = _replaced(self.engine) if way.block is not None else None
        if way.compiled:
            self.engine.compile()
        self.steps = 0  # of all sizes
        self.states: float | None = None  # MiB allocated between two steps

    def step(self, batch: int, length: int, marked: bool = False) -> tuple[float, float, float]:
        """Milliseconds, loss, norm of the gradient."""
        mark = torch.cuda._sleep if marked else lambda cycles: None
        ids = self.data.batch(self.steps, self.rank, self.ranks, batch, length).to(self.device)
        self.memory.wait()
        began = time.perf_counter()
        mark(1)
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        if marked:
            self.memory.wait()
            mark(1)
        self.engine.step()
        self.memory.wait()
        if marked:
            mark(1)
            self.memory.wait()
        ms = 1e3 * (time.perf_counter() - began)
        self.steps += 1
        found = ms, loss.item(), float(self.engine.get_global_grad_norm())
        if self.steps == 1:
            del loss, ids
            gc.collect()
            self.states = self.memory.allocated()
        if self.rank == 0:
            # the launcher hears that the ranks are alive
            say(STEP, [batch, length, self.steps])
        return found

    def point(self, batch: int, length: int, warm_up: int) -> dict[str, object]:
        """What this rank measured at one size."""
        spec, memory = self.spec, self.memory
        memory.reset()
        warm = [self.step(batch, length) for _ in range(warm_up)]
        memory.forget_peaks()
        measured = [self.step(batch, length) for _ in range(spec.steps)]
        allocated, reserved = memory.peaks()
        ms = [took for took, _, _ in measured]
        return {
            "warm_up_ms": [round(took, 3) for took, _, _ in warm],
            "steps_ms": [round(took, 3) for took in ms],
            "ms": statistics.median(ms),
            "losses": [loss for _, loss, _ in warm + measured],
            "grad_norms": [norm for _, _, norm in warm + measured],
            "peak_mib": allocated,
            "reserved_mib": reserved,
            "states_mib": self.states,
            "room_mib": memory.room(),
        }

    def timeline(self, batch: int, length: int) -> dict[str, float] | str | None:
        """The parts of one further step on this GPU, in ms, or why there are none; all ranks take that step."""
        if not (self.spec.profile and self.memory.on_gpu):
            self.step(batch, length)
            return None
        if self.rank != 0:
            self.step(batch, length, marked=True)
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.step(batch, length, marked=True)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            try:
                return split(recorded(trace))
            except ValueError as error:
                # the machine may not let a profiler look
                return str(error)

    def row(self, place: int, batch: int, length: int) -> dict[str, object] | None:
        """On rank 0: what it measured, beside what the others did."""
        with attention(self.way.backend):
            mine = self.point(batch, length, self.spec.warm_up[min(place, len(self.spec.warm_up) - 1)])
            parts = self.timeline(batch, length) if self.spec.further_step else None
        store = dist.PrefixStore("end_to_end", dist.distributed_c10d._get_default_store())
        told = {key: mine[key] for key in ("ms", "peak_mib", "reserved_mib")}
        everyones = exchanged(store, f"{place}", told, self.rank, self.ranks, PATIENCE)
        if self.rank != 0:
            return None
        ms = mine["ms"]
        # a wrong answer is no answer, however fast
        status = OK if all(map(math.isfinite, mine["losses"])) else "wrong: a loss is not finite"
        row = {"micro_batch": batch, "length": length, "status": status, **mine}
        # of the process: what is compiled, or only loaded, at its first launch is in it
        row["first_ms"] = next(iter(mine["warm_up_ms"]), None) if place == 0 else None
        row["tokens_s"] = batch * length / ms * 1e3
        row["tflop_s"] = self.shape.step_flops(batch, length, self.spec.lora) / ms / 1e9
        if mine["peak_mib"] is not None:
            row["dynamic_mib"] = mine["peak_mib"] - mine["states_mib"]
        row["ranks"] = {key: [theirs[key] for theirs in everyones] for key in told}
        row["parts_ms"], row["replaced"] = parts, self.replaced
        row["started_s"] = self.started
        return row


def age() -> float:
    """Seconds since this process began, its imports among them."""
    return round(time.time() - psutil.Process().create_time(), 1)


def attention(backend: str | None) -> object:
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))


def _make_leaves(model: nn.Module, type_: str, stage: int) -> None:
    from deepspeed.utils import set_z3_leaf_modules

    if stage != 3:
        raise ValueError(f"leaf modules are ZeRO-3's, and this is stage {stage}")
    set_z3_leaf_modules(model, [layer_class(type_)])


def _sizes(model: nn.Module, type_: str, choice: str, spec: Spec) -> dict[str, int]:
    """What ds_fused sets for its own ways, so that a rival has it too."""
    if spec.stage != 3:
        raise ValueError(f"the sizes are ZeRO-3's, and this is stage {spec.stage}")
    kind = layer_class(type_)
    layer = max(elements(m.parameters()) for m in model.modules() if isinstance(m, kind))
    trained = elements(p for p in model.parameters() if p.requires_grad)
    return sizes_of(choice, layer, trained, offloaded=spec.offload)


def _replaced(engine: object) -> dict[str, int]:
    """How many layers of each kind ds_fused took; a run without any would be stock under our name."""
    found: Counter[str] = Counter()
    for claim in engine.ds_fused_report.claims:
        found[claim.key] += len(claim.paths)
    if not found:
        raise RuntimeError(f"ds_fused replaced nothing: {engine.ds_fused_report}")
    return dict(found)


def main(path: str) -> None:
    import deepspeed

    values = json.loads(Path(path).read_text())
    spec = Spec(**{**values, "points": [tuple(point) for point in values["points"]]})
    way = WAYS[spec.way] if spec.way in WAYS else ours(spec.block)
    if way.block is not None:
        import ds_fused

        # where it is not installed, there is no entry point that does
        ds_fused.install()
    on_gpu = deepspeed.accelerator.get_accelerator().device_name() == "cuda"
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        # Triton's interpreter runs kernels on a CPU
        if way.needs_gpu and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            if rank == 0:
                say(FAILED, "not run: needs a GPU")
            return
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=TIMEOUT, verbose=False)
        if spec.room is not None and on_gpu:
            torch.cuda.set_per_process_memory_fraction(spec.room * 2**30 / torch.cuda.mem_get_info()[1])
        ceiling = matmul_rate(device) if spec.ceiling and on_gpu else None
        if rank == 0:
            name = torch.cuda.get_device_name(device) if on_gpu else "CPU (no timing here means anything)"
            say(BEGUN, {"device": name, "matmul_tflop_s": ceiling})
        job = Job(spec, way, device)
        for place, (batch, length) in enumerate(spec.points):
            row = job.row(place, batch, length)
            if rank == 0:
                # in a file: a pipe takes no line of any length in one piece
                told = Path(path).with_name(f"row{place}.json")
                told.write_text(json.dumps(row))
                say(RESULT, str(told))
    except Exception as error:
        say(FAILED, status_of(error))
        traceback.print_exc()
        sys.stderr.flush()
        # nothing is waited for: the others may be in a collective, and the launcher ends them
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def matmul_rate(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product, on all ranks at once as in the job."""
    instruments = Instruments(str(device), rep_ms=50)
    rate = instruments.matmul_tflop_s()
    del instruments
    torch.cuda.empty_cache()
    return rate


if __name__ == "__main__":
    main(sys.argv[1])
