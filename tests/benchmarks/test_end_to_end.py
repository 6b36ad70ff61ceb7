"""end_to_end.py: all ways train alike, what fails costs its own rows, and the parts of a step add up. On a CPU."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from launching import free_port, start

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import end_to_end, plot_step, step_job, step_timeline, step_ways
from benchmarks.end_to_end import Launch, Search
from benchmarks.page import Results, without_folders
from benchmarks.ranks import Ended, listen
from benchmarks.step_data import COPIED, Stream, Text
from benchmarks.step_page import RATE, longest_page, steps_page
from benchmarks.step_shapes import SHAPES, STD, built, load, shape_of
from benchmarks.step_timeline import COMMUNICATION, COPY, IDLE, MARK, OPTIMIZER, PARTS, Event, length, split, union
from ds_fused.engine.zero3.sizes import sizes_of

HERE = Path(__file__).parent
LENGTH = 40  # no multiple of a stretch of copied tokens


def measured(out: Path, *more: str) -> dict:
    """The JSON of a run on two ranks."""
    command = [sys.executable, HERE / "broken_steps.py", "--gpus", "2", "--out", str(out), "--shape", "tiny"]
    command += ["--length", str(LENGTH), "--steps", "2", "--warm-up", "1", "--master_port", str(free_port()), *more]
    done = start(command, timeout=900)
    assert done.status == 0, done.output
    (found,) = out.glob("*.json")
    return json.loads(found.read_text())


def alike(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """The finished rows by way and micro batch, of which each has trained as stock has."""
    done = {(row["way"], row["micro_batch"]): row for row in rows if row["status"] == "ok"}
    for (way, batch), row in done.items():
        stock = done["hf", batch]
        assert len(row["losses"]) == 3 and all(map(math.isfinite, row["losses"]))
        assert row["losses"] == pytest.approx(stock["losses"], abs=2e-3), way
        assert row["grad_norms"] == pytest.approx(stock["grad_norms"], rel=2e-2), way
        assert row["tokens_s"] == pytest.approx(batch * LENGTH / row["ms"] * 1e3)
        assert len(row["ranks"]["ms"]) == 2 and row["peak_mib"] is None
    return done


def test_stock_and_ours_train_alike(tmp_path):
    found = measured(tmp_path, "--ways", "hf,ours,full", "--rounds", "1", "--micro-batches", "2,1")
    head, rows = found["header"], found["rows"]
    assert "CPU" in head["device"] and "torch" in head["versions"] and "ZeRO 3" in head["job"]
    assert "end_to_end.py" in head["command"] and str(tmp_path.parent) not in head["command"]
    assert [row["way"] for row in rows] == [way for way in ("hf", "ours", "full") for _ in range(2)]
    done = alike(rows)
    assert set(done) == {("hf", 1), ("hf", 2), ("ours", 1), ("ours", 2), ("full", 1)}
    # two RMS norms a layer, and the last one
    assert done["ours", 1]["replaced"]["rms_norm"] == 5 and done["hf", 1]["replaced"] is None
    assert [row["status"] for row in rows if row["status"] != "ok"] == ["out of memory"]

    text = (tmp_path / "end_to_end.md").read_text()
    assert "The first step of a process" in text and "- ours: " in text
    assert f"## micro batch 2, {LENGTH} tokens" in text and "| full |" in text and "rms_norm" in text
    lines = [line for line in (tmp_path / "end_to_end.csv").read_text().splitlines() if not line.startswith("# ")]
    table = list(csv.DictReader(lines))
    assert len(table) == len(rows) and float(table[0]["last_loss"]) == rows[0]["losses"][-1]
    with (tmp_path / "end_to_end_losses.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if (line["way"], line["micro_batch"]) == ("ours", "2")]
    curve = [float(line["loss"]) for line in lines]
    assert curve == done["ours", 2]["losses"]
    pytest.importorskip("matplotlib")
    (tmp_path / "end_to_end.png").unlink()
    assert plot_step.draw(tmp_path, "end_to_end") is None
    assert (tmp_path / "end_to_end.png").stat().st_size > 10000


@pytest.mark.all
def test_all_ways_train_alike(tmp_path):
    ways = [way for way in step_ways.WAYS if not way.startswith("ours-")]
    rows = measured(tmp_path, "--ways", ",".join(ways), "--rounds", "1")["rows"]
    done = alike(rows)
    for row in rows:
        if step_ways.WAYS[row["way"]].needs_gpu:
            assert row["status"] == "not run: needs a GPU"
        else:
            assert (row["way"], 1) in done, row


OTHERS = {
    "lora": ["--lora", "--stage", "0"],
    "zero 2": ["--stage", "2"],
    "offload": ["--offload", "--ways", "hf,alst+sizes,ours-fast,ours-small"],
    "all kept": ["--no-checkpointing"],
    "experts": ["--shape", "tiny-moe"],
    "256k": ["--shape", "tiny-gemma-256k", "--stage", "2"],
}


@pytest.mark.all
@pytest.mark.parametrize("job", OTHERS)
def test_other_jobs_train_alike(tmp_path, job):
    """Ours do as stock does, and replace something, whatever is trained, sharded and kept."""
    found = measured(tmp_path, "--ways", "hf,ours-fast,ours-small", "--rounds", "1", *OTHERS[job])
    done = alike(found["rows"])
    ways = [name for name, _ in done]
    assert len(done) == len(found["rows"]) and ways[0] == "hf"
    assert all(done[name, 1]["replaced"] for name in ways if name.startswith("ours"))


def test_what_is_run_when_no_way_is_named():
    def named(*arguments: str) -> list[str]:
        return list(end_to_end.parsed(arguments).ways)

    leaves = [name for name in named() if step_ways.WAYS[name].leaf and not name.startswith("ours")]
    assert leaves == ["hf+sizes", "liger+sizes", "alst+sizes"]
    assert named("--stage", "2") == [name for name in named() if name not in leaves]
    assert named()[:4] == ["hf", "liger", "compile", "alst"] and named()[-3:] == ["ours", "ours-fast", "ours-small"]
    assert named("--longest") == ["hf", "liger", "ours", "ours-small"]


def test_a_rival_s_sizes_are_those_of_fast(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    model = built(SHAPES["tiny"], {"zero_optimization": {"stage": 0}}, torch.device("cpu"), lora=False)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    options = end_to_end.parsed(["--shape", "tiny"])
    spec = end_to_end.spec_of(options, "hf+sizes", step_ways.WAYS["hf+sizes"], [(1, 8)])
    sizes = step_job._sizes(model, "llama", "large", spec)
    assert sizes == sizes_of("large", layer, sum(p.numel() for p in model.parameters()))
    assert "sub_group_size" not in step_job._sizes(model, "llama", "large", replace(spec, offload=True))
    with pytest.raises(ValueError, match="the sizes are ZeRO-3's, and this is stage 2"):
        step_job._sizes(model, "llama", "large", replace(spec, stage=2))


@pytest.mark.all
def test_what_fails_costs_its_own_rows(tmp_path):
    # the tiny model has no layer norm
    more = ["--micro-batches", "1,2,3", "--patience", "90"]
    more += ["--block", 'strict={"enabled": true, "strict": true, "layer_norm": true}']
    found = measured(tmp_path, "--ways", "full,hung,odd,strict", "--rounds", "2", *more)
    status = [(row["way"], row["round"], row["micro_batch"], row["status"]) for row in found["rows"]]
    strict = [row for row in status if row[0] == "strict"]
    status = [row for row in status if row not in strict]
    assert [row[1:3] for row in strict] == [(1, 1), (1, 2), (1, 3)] and "layer_norm" in strict[0][3]
    assert all(said.startswith("not run: 1 x 40 failed") for *_, said in strict[1:])
    wrong = "wrong: a loss is not finite"
    hung = "failed: nothing was heard for 90 s"
    assert status == [
        ("full", 1, 1, "ok"),
        ("full", 1, 2, "out of memory"),
        ("full", 1, 3, "not run: 2 x 40 out of memory"),
        ("hung", 1, 1, hung),
        ("hung", 1, 2, f"not run: 1 x 40 {hung}"),
        ("hung", 1, 3, f"not run: 1 x 40 {hung}"),
        *(("odd", 1, batch, wrong) for batch in (1, 2, 3)),
        # what can't work is not tried again
        ("full", 2, 1, "ok"),
        *(("odd", 2, batch, wrong) for batch in (1, 2, 3)),
    ]


@pytest.mark.all
def test_the_longest_sequence(tmp_path):
    found = measured(tmp_path, "--ways", "long", "--longest", "--length", "8")
    (row,) = found["rows"]
    # 8, 16, 32, 64; then in steps of 4 tokens
    assert row["longest"] == 40 and row["status"] == "44: out of memory"
    assert [t["length"] for t in row["tries"]] == [8, 16, 32, 64, 48, 40, 44]
    assert "| long | 40 |" in (tmp_path / "end_to_end_longest.md").read_text()


def searched(most: int, first: int, last: int = 1 << 20) -> tuple[Search, int]:
    """The search where `most` tokens train, and how many launches ran out of memory."""
    search, failed = Search(first, last), 0
    while path := search.path():
        for tokens in path:
            if tokens > most:
                search.high = tokens
                failed += 1
                break
            search.low = tokens
    return search, failed


@pytest.mark.parametrize("most", [4096, 5000, 8191, 70000, 131071, 3000, 1])
def test_search_ends_within_an_eighth(most):
    search, failed = searched(most, first=4096)
    assert search.low <= most < search.high
    assert search.high - search.low <= max(1, search.low / 8)
    assert failed <= 4 or most < 4096


def test_search_ends_where_it_is_told_to():
    search, failed = searched(10**9, first=4096, last=20000)
    assert (search.low, search.high, failed) == (16384, None, 0)
    assert searched(0, first=4)[0].low == 0


@pytest.mark.parametrize("room", [40e3, 41e3, 77e3, 100e3])
@pytest.mark.parametrize("lost", [0.0, 0.02, 0.09, 0.5])
def test_search_goes_where_memory_ends(room, lost):
    """32 GiB beside 0.3 MiB a token; of the room a share is lost to fragments."""
    search, launches = Search(4096, 1 << 20), 0
    while path := search.path():
        launches += 1
        for tokens in path:
            peak = 32e3 + 0.3 * tokens
            if peak > room - lost * (room - 32e3):
                search.missed(tokens)
                break
            search.trained(tokens, peak, room)
    most = (room - 32e3) * (1 - lost) / 0.3
    # one to see how it grows, two around its end, one more where that was a sixteenth off
    assert launches <= 4 if lost < 0.1 else launches <= 7
    assert search.low <= most < search.high
    assert search.high - search.low <= max(search.unit, search.low / 8)


def test_search_does_not_go_by_peaks_that_do_not_grow():
    search = Search(4096, 1 << 20)
    for tokens in (4096, 8192):
        search.trained(tokens, 1000.0, 9000.0)
    assert search.aim() is None and search.path() == [16384, 32768]
    search.trained(16384, 2000.0, 9000.0)
    assert search.aim() == 16384 + 7000 * 8192 // 1000


class Said:
    """Stands for a launcher: ranks that measure a size in no time, of a way that has room for so many sequences."""

    def __init__(self, room: dict[str, int]) -> None:
        self.room, self.launches, self.most = room, [], 100

    def late(self) -> bool:
        return len(self.launches) >= self.most

    def run(self, spec: step_job.Spec, hear_row) -> tuple[Launch, str]:
        self.launches.append((spec.way, [batch for batch, _ in spec.points], spec.profile))
        launch = Launch()
        for batch, tokens in spec.points:
            if batch > self.room[spec.way]:
                return launch, "out of memory"
            launch.rows.append({"micro_batch": batch, "length": tokens, "status": "ok"})
            hear_row(launch.rows[-1])
        return launch, "ok"


def test_what_is_missing_is_measured_by_the_next_run(tmp_path):
    def run(*more: str, most: int = 100, cut_off: int | None = None) -> tuple[list, list[tuple]]:
        arguments = ["--ways", "hf,ours", "--micro-batches", "1,2,4", "--warm-up", "4,2", "--resume", *more]
        options, results = end_to_end.parsed(arguments), Results(tmp_path / "end_to_end", lambda head, rows: "")
        results.take_up({"date": "today", "command": " ".join(arguments), "job": "a job"})
        launcher = Said({"hf": 2, "ours": 4})
        launcher.most = most
        end_to_end.compare(options, options.ways, launcher, results)
        # as if it had been killed
        results.rows = results.rows[:cut_off]
        results.write()
        return launcher.launches, [(r["way"], r["round"], r["micro_batch"], r["status"]) for r in results.rows]

    launches, rows = run("--rounds", "1", cut_off=5)
    assert launches == [("hf", [1, 2, 4], True), ("ours", [1, 2, 4], True)]
    first = [("hf", 1, 1, "ok"), ("hf", 1, 2, "ok"), ("hf", 1, 4, "out of memory")]
    assert rows == [*first, ("ours", 1, 1, "ok"), ("ours", 1, 2, "ok")]
    # ours anew, since it was cut off; what has no room is not tried again
    launches, rows = run("--rounds", "2", most=2)
    assert launches == [("ours", [1, 2, 4], True), ("hf", [1, 2], False)]
    ours = [("ours", 1, batch, "ok") for batch in (1, 2, 4)]
    assert rows == [*first, *ours, ("hf", 2, 1, "ok"), ("hf", 2, 2, "ok")]
    launches, rows = run("--rounds", "2")
    assert launches == [("ours", [1, 2, 4], False)] and rows[-1] == ("ours", 2, 4, "ok")
    assert run("--rounds", "2")[0] == []
    header = json.loads((tmp_path / "end_to_end.json").read_text())["header"]
    assert header["command"].endswith("--rounds 1") and header["resumed"].count("--rounds 2") == 3
    with pytest.raises(ValueError, match="its job was a job, and is another now"):
        Results(tmp_path / "end_to_end", str).take_up({"job": "another"})


def test_how_a_launch_ended_is_told_by_what_was_said():
    quiet = Ended(1, "", silent=False)
    lost = "failed: DistBackendError: a rank is gone"
    assert Launch(failures=[lost, "out of memory"]).status(quiet, 60) == "out of memory"
    assert Launch(failures=["failed: OSError: no /a/b/c.json"]).status(quiet, 60) == "failed: OSError: no c.json"
    assert Launch().status(Ended(-9, "torch.OutOfMemoryError: CUDA out of memory.", False), 60) == "out of memory"
    assert Launch().status(Ended(-9, "", silent=True), 60) == "failed: nothing was heard for 60 s"
    died = Ended(1, "[rank1]: ImportError: a\n[rank1]: ValueError: b\nend", silent=False)
    assert Launch().status(died, 60) == "failed: the ranks died: ValueError: b"
    assert Launch().status(quiet, 60) == "failed: the ranks died: exit 1"
    # Triton's word for a kernel that wants too much shared memory
    assert "failed" in Launch().status(Ended(1, "OutOfResources: out of resource: shared memory", False), 60)


def test_a_silent_launch_is_ended_with_all_it_started():
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
    heard = []
    ended = listen([sys.executable, "-c", script], heard.append, patience=5)
    assert ended.silent and ended.status == -9 and heard == [ended.tail]
    child = int(heard[0].split()[1])
    # what is killed may run for a moment yet where all cores are taken
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """What init has not yet taken away is a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


NAMES = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off": "GEMM",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_32x1_tn_align8>(...)": "GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)": "GEMM",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>(pytorch_flash::Flash_fwd_params)": (
        "attention"
    ),
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128_4x1x1_kernel0_0": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)": "attention",
    "_rms_norm_fwd_kernel": "fused kernels",
    "_glu_bwd_kernel": "fused kernels",
    "_triton_rope": "fused kernels",
    "liger_cross_entropy_kernel": "fused kernels",
    "element_mul_kernel": "fused kernels",
    "triton_poi_fused_add_mul_silu_3": "fused kernels",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COMMUNICATION,
    "Memcpy HtoD (Pinned -> Device)": COPY,
    "Memset (Device)": COPY,
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<direct_copy_kernel_cuda(...)>>": (COPY),
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>(...)": COPY,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, ...>(...)": (
        "other element-wise"
    ),
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float>(...)": "other element-wise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor<...>>(...)": (
        "other element-wise"  # it is the time that makes it the optimizer's
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_known_by_their_names(name):
    assert step_timeline.part_of(name) == NAMES[name]


def ours() -> list[str]:
    """Names of the Triton kernels of this package."""
    sources = (Path(__file__).parents[2] / "ds_fused" / "ops").rglob("*.py")
    lines = [line for source in sources for line in source.read_text().splitlines()]
    return [
        line.removeprefix("def ").partition("(")[0] for line in lines if line.startswith("def _") and "_kernel(" in line
    ]


def test_kernels_of_this_package_are_fused_kernels():
    names = ours()
    assert len(names) > 20
    assert {name: step_timeline.part_of(name) for name in names} == dict.fromkeys(names, "fused kernels")


def test_intervals():
    assert union([(5, 6), (1, 2), (2, 3), (1.5, 2.5), (4, 4), (9, 8)]) == [(1, 3), (5, 6)]
    assert length([(1, 3), (5, 6)]) == 3 and union([]) == []


def test_parts_of_a_step_add_up_to_it():
    mark = f"void at::cuda::(anonymous namespace)::{MARK}(long)"
    events = [
        Event("Memset (Device)", 0, 90),  # before the step
        Event(mark, 90, 100),
        Event("nvjet_tst_128x64", 1100, 3100),
        Event("ncclDevKernel_AllGather_RING_LL", 2100, 5100),  # 1 ms of it beside the GEMM, 0.5 beside a norm
        Event("_rms_norm_fwd_kernel", 3100, 3600),
        Event("void at::native::vectorized_elementwise_kernel<4, ...>", 3500, 3700),
        Event(mark, 6100, 6110),
        Event("void at::native::multi_tensor_apply_kernel<...>", 6110, 8110),
        Event("Memcpy DtoH (Device -> Pinned)", 8000, 8210),
        Event("ncclDevKernel_AllGather_RING_LL", 8210, 8310),
        Event(mark, 8410, 8420),
        Event("Memset (Device)", 8420, 9000),  # after it
    ]
    parts = split(list(reversed(events)))
    wanted = dict.fromkeys(PARTS, 0.0)
    wanted |= {"GEMM": 2.0, "fused kernels": 0.5, "other element-wise": 0.1, OPTIMIZER: 2.0, COPY: 0.1}
    wanted |= {COMMUNICATION: 1.4 + 0.1, IDLE: 8.31 - 2.0 - 0.5 - 0.1 - 2.0 - 0.1 - 1.5}
    assert parts == pytest.approx(wanted) and sum(parts.values()) == pytest.approx(8.31)
    with pytest.raises(ValueError, match="2 kernels named spin_kernel, but a step is marked by 3"):
        split(events[:8])


def test_only_what_ran_on_the_gpu_is_taken_from_a_trace(tmp_path):
    trace = tmp_path / "trace.json"
    some = {"name": "_glu_fwd_kernel", "cat": "kernel", "ts": 5.5, "dur": 2.0}
    others = [{**some, "cat": "gpu_user_annotation"}, {"name": "process_name", "ph": "M"}, {**some, "cat": "cpu_op"}]
    trace.write_text(json.dumps({"traceEvents": [*others, some]}))
    assert step_timeline.recorded(trace) == [Event("_glu_fwd_kernel", 5.5, 7.5)]


def test_table_of_numbers():
    def row(way: str, round_: int, ms: float, loss: float, **more: object) -> dict:
        ranks = {"ms": [ms, ms + 2], "peak_mib": [2048.0, 1024.0], "reserved_mib": [4096.0, 4096.0]}
        return {
            "way": way, "round": round_, "note": "a note", "micro_batch": 1, "length": 64, "status": "ok", "ms": ms,
            "tokens_s": 64e3 / ms, "tflop_s": 100.0, "losses": [5.0, loss], "grad_norms": [1.0, 2.0],
            "peak_mib": 2048.0, "states_mib": 512.0, "dynamic_mib": 1536.0, "reserved_mib": 4096.0, "ranks": ranks,
            **more,
        }  # fmt: skip

    head = {"device": "a GPU", RATE: "400.0"}
    parts = {part: 1.0 for part in PARTS}
    rows = [
        row("hf", 1, 100.0, 4.0, parts_ms=parts),
        row("ours", 1, 50.0, 4.5, replaced={"rope": 2}),
        {"way": "liger", "round": 1, "note": "", "micro_batch": 1, "length": 64, "status": "failed: a | b"},
        row("hf", 2, 110.0, 4.001),
    ]
    text = steps_page(head, rows)
    apart = "5.0e-01 | 0.0e+00 |"
    assert f"| ours | 50.0 | 50.0 to 52.0 | 1280 | 2.10x | - | 25% | 2.00 | 1.50 | - | 0.50 | 4.00 | {apart}" in text
    assert "| hf | 105.0 | 100.0 to 112.0 | 611 | 1.00x | - | 25% | 2.00 | 1.50 | - | 0.50 | 4.00 | 1.0e-03 |" in text
    assert "another attention" not in text and "**failed: a / b**" in text
    rows[2] = row("liger", 1, 80.0, 4.002, dynamic_mib=2000.0)
    rows.append(row("hf-math", 1, 120.0, 4.003))
    text = steps_page(head, rows)
    assert f"| 2.10x | 1.60x | 25% | 2.00 | 1.50 | 0.77x | 0.50 | 4.00 | {apart}" in text
    assert "another attention is up to 3.0e-03 (loss) and 0.0e+00 (gradient's norm) from stock, in 2 pairs" in text
    assert "- liger: 2.0e-03 and 0.0e+00, within that" in text
    assert "- ours: 5.0e-01 and 0.0e+00, **beyond that**" in text
    assert "From the run in fp32" not in text
    text = steps_page(head, [*rows, row("fp32", 1, 300.0, 4.1)])
    assert "in 2 pairs" in text and "- fp32: " not in text
    assert "- ours: 4.0e-01, 2.0e-01\n" in text, text[-900:]
    assert "- hf: 1.0e-01, 5.0e-02\n- hf: 9.9e-02, 4.9e-02\n" in text, text[-900:]
    assert "- ours: 2 x rope" in text and "| hf | 8.0 | 1.0 |" in text
    tries = [{"length": 64, "ms": 10.0, "peak_mib": 1024.0}]
    rows = [{"way": way, "longest": 64 * n, "status": "found", "tries": tries} for n, way in ((1, "hf"), (3, "ours"))]
    assert "| ours | 192 | 3.00x | - | - | - | found |" in longest_page(head, rows)
    rows.append({"way": "liger", "longest": 96, "status": "found", "tries": []})
    assert "| ours | 192 | 3.00x | 2.00x | - | - | found |" in longest_page(head, rows)
    assert "| hf | 64 | 1.00x | 0.67x | 10 | 1.00 | found |" in longest_page(head, rows)


def pages() -> list[Path]:
    """JSON of whole steps among the results."""
    files = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*/*.json"))
    return [file for file in files if "end_to_end.py" in json.loads(file.read_text())["header"].get("command", "")]


@pytest.mark.parametrize("file", pages(), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_page_of_results_is_its_numbers(file):
    measured = json.loads(file.read_text())
    head, page = measured["header"], file.with_suffix(".md")
    render = longest_page if "--longest" in head["command"] else steps_page
    assert page.read_text() == render(head, measured["rows"])


@pytest.mark.parametrize("name", ["gemma-256k", "8b", "moe"])
def test_a_model_is_its_shape(name, monkeypatch):
    """Tied where it says so, random but for norms, and the same in every build."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    sizes = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 259}
    shape = replace(shape_of(name, 2), **sizes)
    given = shape, {"zero_optimization": {"stage": 0}}, torch.device("cpu"), False
    models = [built(*given) for _ in range(2)]
    for first, second in zip(*(model.named_parameters() for model in models), strict=True):
        assert first[0] == second[0] and torch.equal(first[1], second[1])
        assert first[1].dim() == 1 or first[1].float().std().item() == pytest.approx(STD, rel=0.1), first[0]
    model = models[0]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tied
    assert model.model.norm.weight.unique().tolist() == [0.0 if shape.type == "gemma" else 1.0]
    assert len(model.model.layers) == 2 and model.dtype == torch.bfloat16 and model.training
    for first, second in zip(model.parameters(), built(*given, torch.float32).parameters(), strict=True):
        assert second.dtype == torch.float32 and torch.equal(first.float(), second)


def test_under_zero_3_a_model_in_fp32_turns_as_one_in_bf16():
    """Whose frequencies zero.Init has rounded."""
    code = """
import deepspeed, torch
from benchmarks.step_shapes import SHAPES, built
deepspeed.init_distributed("gloo", verbose=False)
for dtype in (torch.bfloat16, torch.float32):
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    config["zero_optimization"] = {"stage": 3}
    model = built(SHAPES["tiny"], config, torch.device("cpu"), False, dtype)
    rotary, weight = model.model.rotary_emb.inv_freq, model.lm_head.weight
    print("FOUND", weight.ds_tensor.dtype, rotary.float().tolist())
"""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    done = start([sys.executable, "-c", code], timeout=100, **place, MASTER_PORT=str(free_port()))
    assert done.status == 0, done.output
    bf16, fp32 = (line.split(maxsplit=2) for line in done.output.splitlines() if line.startswith("FOUND"))
    assert (bf16[1], fp32[1]) == ("torch.bfloat16", "torch.float32") and bf16[2] == fp32[2]
    # 10000 to the power of an eighth
    assert json.loads(fp32[2])[1] == 0.31640625


def test_weights_of_a_saved_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    tiny, stage = SHAPES["tiny"], {"zero_optimization": {"stage": 0}}
    saved, drawn = (built(tiny, stage, torch.device("cpu"), lora=False) for _ in range(2))
    with torch.no_grad():
        for weight in saved.parameters():
            weight.add_(1.0)
    saved.save_pretrained(tmp_path)
    load(drawn, tmp_path)
    for first, second in zip(saved.parameters(), drawn.parameters(), strict=True):
        assert torch.equal(first, second)
    other = built(replace(tiny, intermediate=96), stage, torch.device("cpu"), lora=False)
    with pytest.raises(ValueError, match=r"gate_proj.weight of the shape is \[96, 64\], but the file's is \[128, 64\]"):
        load(other, tmp_path)
    with pytest.raises(ValueError, match="layers.2.* but the file's is not there"):
        load(built(replace(tiny, layers=3), stage, torch.device("cpu"), lora=False), tmp_path)


def test_flops_of_a_step():
    """Against a count by hand: projections, MLP and head, then scores and values."""
    tiny = SHAPES["tiny"]
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    weights = 2 * layer + 64 * 259
    # of each layer: two products, two FLOPs, half the pairs of tokens, 4 heads of 16
    attention = 2 * (2 * 2 * (40 * 40 / 2) * 64)
    # forward, and twice as much backward
    assert tiny.step_flops(5, 40, lora=False) == 5 * 3 * (2 * weights * 40 + attention)
    assert tiny.step_flops(1, 40, lora=False) > tiny.step_flops(1, 40, lora=True)
    assert shape_of("8b", 16) == SHAPES["8b-16layers"]


def test_a_stream_repeats_what_it_says_and_itself():
    stream = Stream(1000)
    ids = stream.batch(3, 1, 2, 4, 70)
    assert ids.shape == (4, 70) and int(ids.min()) >= 0 and int(ids.max()) < 1000
    assert torch.equal(ids[:, :COPIED], ids[:, COPIED : 2 * COPIED])
    assert torch.equal(ids, stream.batch(3, 1, 2, 4, 70))
    assert not torch.equal(ids, stream.batch(3, 0, 2, 4, 70))


def test_text_goes_on_where_it_ended(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(7)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"--data .*: no \*.txt in it"):
        Text(tmp_path, tmp_path / "tokenizer", 7)
    (tmp_path / "b.txt").write_text("w5 w6")
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4")
    text = Text(tmp_path, tmp_path / "tokenizer", 7)
    # 1 to 6 without end; of each rank its own
    assert text.batch(0, 0, 2, 1, 4).tolist() == [[1, 2, 3, 4]] and text.batch(0, 1, 2, 1, 4).tolist() == [[5, 6, 1, 2]]
    assert text.batch(1, 0, 2, 2, 2).tolist() == [[3, 4], [5, 6]]
    with pytest.raises(ValueError, match="token 6, but the model's vocabulary is 6"):
        Text(tmp_path, tmp_path / "tokenizer", 6)


def test_a_profiler_that_sees_no_gpu_is_an_answer(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.zeros(3).add_(1)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    assert step_timeline.recorded(tmp_path / "trace.json") == []


@pytest.mark.parametrize("way", step_ways.WAYS)
def test_every_type_has_what_a_way_looks_for(way):
    with step_job.attention(step_ways.WAYS[way].backend):
        pass
    for shape in SHAPES.values():
        assert issubclass(step_ways.causal_lm(shape.type), torch.nn.Module)
        assert step_ways.layer_class(shape.type).__name__.endswith("DecoderLayer")


def test_no_folder_of_the_machine_is_in_results():
    assert without_folders("python a.py --out /tmp/x-1/h100 --data ~/text") == "python a.py --out h100 --data text"
    assert without_folders("a /usr/lib/python3/site.py:3: no 1/8 and/or benchmarks/results/h100 https://a.org/b") == (
        "a site.py:3: no 1/8 and/or benchmarks/results/h100 https://a.org/b"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways", "hf,huggingface"], "there is no way 'huggingface'; there are hf, hf-flash"),
        (["--block", "ours-small={}"], "a new name and an object, got 'ours-small={}'"),
        (["--block", "x={"], "--block is NAME=JSON, got 'x={'"),
        (["--block", "x={}"], "--block x: ds_fused.enabled is missing"),
        (
            ["--block", 'x={"enabled": true, "ropes": true}'],
            "--block x: ds_fused: unknown key 'ropes' (did you mean 'rope'?); known keys: enabled, ",
        ),
        (["--micro-batches", "1,0"], "'0' is not a positive number"),
        (["--data", str(HERE)], "--data and --tokenizer go together"),
        (["--data", str(HERE), "--tokenizer", str(HERE)], f"--data {HERE}: no *.txt in it"),
        (["--data", "/no/texts"], "--data: /no/texts is no folder"),
        (["--weights", "/no/weights"], "--weights: /no/weights is no folder"),
        (["--out", f"{__file__}/x"], f"--out: {__file__} is no folder"),
        (["--name", "a/b"], "--name: 'a/b' is no name of a file"),
        (["--room", "-1"], "--room: '-1' is no finite number above 0"),
        (["--patience", "inf"], "--patience: 'inf' is no finite number above 0"),
        (["--master_port", "65536"], "--master_port: '65536' is no port; the largest is 65535"),
        (["--weights", str(HERE), "--lora"], "--weights has no adapters, so not with --lora"),
        (["--longest", "--resume"], "--resume is not for --longest"),
        (["--warm-up", "4,2,1"], "--warm-up has one number or two"),
        (["--plot", "nowhere"], "end_to_end.json is not there"),
    ],
)
def test_what_is_mistyped_is_said_before_anything_starts(arguments, said, capsys):
    with pytest.raises(SystemExit):
        end_to_end.main(arguments)
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_page_of_results_is_named(tmp_path):
    (tmp_path / "end_to_end.json").write_text("[]")
    with pytest.raises(SystemExit, match="end_to_end.json has no header and rows"):
        end_to_end.main(["--plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="end_to_end.json has no header and rows"):
        end_to_end.main(["--resume", "--out", str(tmp_path)])


def test_a_file_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "end_to_end.json").write_text("{")
    with pytest.raises(SystemExit, match="end_to_end.json is no JSON: "):
        end_to_end.main(["--plot", str(tmp_path)])
