"""Finds the launch constants of an op on this device: ``python benchmarks/tune.py``.

A search names an op's constants and the values to try; every combination is put in place, checked against the answer
of the constants in the file, and timed. Prints the best per shape and direction, and what the file's constants give.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

# run as a script: find this folder's modules and the package beside it, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.cases.case import Inputs
from benchmarks.measure import Instruments, relative_error
from benchmarks.page import duration, out_folder
from benchmarks.rivals.norms import N_GROUPS
from benchmarks.rivals.provider import Provider
from benchmarks.run import SEED, full_call, restorer
from ds_fused.ops import registry

LARGEST_ERROR = 1e-2
SHOWN = 4
REP_MS = 10

# one combination: constant -> value; options are an op's arguments, the others attributes of its module
Choice = dict[str, object]
Restore = Callable[[], None]


@dataclass(frozen=True)
class Search:
    op: str
    variant: str
    direction: str  # "forward", "backward" or "both"
    shapes: tuple[tuple[int, ...], ...]
    constants: Mapping[str, tuple]  # attribute of the module -> values
    options: Mapping[str, tuple] | None = None  # argument of the op -> values
    file: str = ""  # of the op's room, where the constants stand elsewhere than in the op's own
    provider: str = "ds_fused"  # the one of ours that uses them

    @property
    def module(self) -> ModuleType:
        """Where the constants stand."""
        return importlib.import_module(f".{self.file or self.op}", registry.op(self.op).module.__package__)

    def choices(self) -> list[Choice]:
        axes = {**self.constants, **(self.options or {})}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


# widths where a tile is one row, and one where it is many
ROW_SHAPES, NARROW_SHAPES = ((8192, 4096), (16384, 8192)), ((1048576, 128),)
# and between powers of two, where a row may be three or five blocks (ops/common/_row_tiles.py)
BETWEEN_SHAPES = ((262144, 576), (49152, 2560), (24576, 5120), (10240, 12288))
IN_BLOCKS = {
    ("rms_norm", "before_weight"): BETWEEN_SHAPES,
    ("layer_norm", ""): BETWEEN_SHAPES,
    ("gated_rms_norm", "norm_first"): BETWEEN_SHAPES,
    ("modulated_rms_norm", ""): ((12, 4096, 3072), (5, 4096, 5120)),
    ("poly_norm", ""): BETWEEN_SHAPES,
}
LOSS_SHAPES = ((8192, 128256), (8192, 32000))
# Qwen3-8B, Qwen3-0.6B
NORM_ROPE_SHAPES = ((1, 8192, 32, 8, 128), (1, 8192, 16, 8, 128))
PAIR_SHAPES = ((4096, 128256), (8192, 32000))
PAIR_FORWARD = {"FWD_BLOCK": (2048, 4096, 8192), "FWD_STAGES": (1, 2, 3, 4), "FWD_PER_THREAD": (4, 8, 16)}

SEARCHES = (
    Search(
        "rms_norm", "before_weight", "backward", NARROW_SHAPES,
        {
            "TILE_BWD": (1024, 2048, 4096), "PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3),
            "WARPS_PER_MULTIPROCESSOR": (32, 64),
        },
    ),
    Search(
        "rms_norm", "before_weight", "backward", ROW_SHAPES,
        {"PER_THREAD_BWD": (8, 16, 32), "STAGES_BWD": (1, 2, 3), "WARPS_PER_MULTIPROCESSOR": (16, 32, 64)},
    ),
    Search(
        "gated_rms_norm", "norm_first", "forward", NARROW_SHAPES,
        {"TILE_FWD": (1024, 2048, 4096), "PER_THREAD_FWD": (8, 16, 32)},
    ),
    Search(
        "gated_rms_norm", "gate_first", "backward", ((8192, 8192),),
        {"PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2), "WARPS_PER_MULTIPROCESSOR": (16, 32, 64)},
    ),
    Search("gated_rms_norm", "gate_first", "forward", ((8192, 8192),), {"PER_THREAD_FWD": (8, 16, 32)}),
    Search(
        "gated_rms_norm", "norm_first", "backward", NARROW_SHAPES,
        {"TILE_BWD": (1024, 2048, 4096), "PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2)},
    ),
    Search(
        "modulated_rms_norm", "", "backward", ((12, 4096, 3072),),
        {"PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3), "WARPS_PER_MULTIPROCESSOR": (16, 32, 64)},
    ),
    # the second: no row is blocks
    *(
        Search(*kind, direction, shapes, {"LEAST_BLOCK": (128, 2**20)}, file=".common._row_tiles")
        for kind, shapes in IN_BLOCKS.items() for direction in ("forward", "backward")
    ),
    *(
        Search(*kind, direction, shapes, {name: (10, 12, 20, 24, 40)})
        for kind, shapes in IN_BLOCKS.items()
        for direction, name in (("forward", "OF_BLOCKS_FWD"), ("backward", "OF_BLOCKS_BWD"))
    ),
    Search(
        "attention_residual", "", "forward", ((8, 16384, 4096),),
        {"MOST_GROUP_FWD": (1, 2, 4), "STAGES_FWD": (2, 3, 4), "WARPS_PER_MULTIPROCESSOR_FWD": (16, 24)},
    ),
    Search(
        # none are held
        "attention_residual", "", "backward", ((8, 16384, 4096), (16, 4096, 7168)),
        {
            "MOST_HELD": (0,), "MOST_GROUP_BWD": (2, 4, 8), "UNROLL_BWD": (1, 2, 4),
            "WARPS_PER_MULTIPROCESSOR_BWD": (8, 16, 24),
        },
    ),
    Search(
        # 9: none are held
        "attention_residual", "", "backward", tuple((n, 16384, 4096) for n in (3, 5, 6, 7, 8)),
        {"LEAST_HELD": (3, 9), "STAGES_HELD": (2, 3)},
    ),
    Search(
        "attention_residual", "blocks", "backward", ((8, 16384, 4096),),
        {"LEAST_HELD": (3, 9), "STAGES_HELD": (2, 3)},
    ),
    Search(
        "mhc_coefficients", "", "forward", ((16384, 4096),),
        {"MOST_ROWS_FWD": (64, 128), "COLS_FWD": (64, 128), "WARPS_FWD": (4, 8), "STAGES_FWD": (3, 4)},
    ),
    Search(
        "mhc_coefficients", "", "backward", ((16384, 4096),),
        {
            "MOST_ROWS_BWD": (32, 64, 128), "WARPS_BWD": (4, 8), "STAGES_BWD": (3, 4),
            "PROGRAMS_PER_MULTIPROCESSOR_BWD": (1, 2),
        },
    ),
    Search(
        "mhc_pre", "", "both", ((16384, 4096),),
        {"BLOCK": (512, 1024, 2048), "WARPS": (2, 4, 8)},
    ),
    Search(
        "mhc_post_res", "", "both", ((16384, 4096),),
        {"ELEMENTS": (4096, 8192), "WARPS": (1, 2, 4), "STAGES_FWD": (1, 3), "STAGES_BWD": (1, 3)},
    ),
    Search("softmax", "", "forward", ((131072, 4096),), {"PER_THREAD": (8, 16, 32)}, file=".common._along_rows"),
    Search("softmax", "", "backward", ((131072, 4096),), {"PER_THREAD": (8, 16, 32)}, file=".common._along_rows"),
    Search(
        "softmax", "", "forward", ((8192, 128256),),
        {"PART_FWD": (4096, 8192, 16384), "PART_PER_THREAD_FWD": (16, 32, 64)}, file=".common._along_rows",
    ),
    Search(
        "softmax", "", "backward", ((8192, 128256),),
        {"PART_BWD": (4096, 8192, 16384), "PART_PER_THREAD_BWD": (16, 32, 64)}, file=".common._along_rows",
    ),
    Search("sparsemax", "", "forward", ((32768, 4096),), {"PER_THREAD_FWD": (8, 16, 32)}),
    Search("sparsemax", "", "forward", ((2048, 128256),), {"WALK_COLS": (4096, 8192, 16384)}),
    Search(
        "multi_token_attention", "5x11 a head", "forward", ((2, 16, 2048),),
        {"ROWS": (64, 128, 256), "COLS": (16, 32, 64), "K": (32, 64), "STAGES": (1, 3), "WARPS": (4, 8)},
        file="_causal_conv",
    ),
    Search(
        "multi_token_attention", "5x11 a head", "backward", ((2, 16, 2048),),
        {"TAP_ROWS": (16, 32, 64), "TAP_STAGES": (2, 3, 4), "TAP_WARPS": (4, 8), "WARPS_PER_MULTIPROCESSOR": (8, 16)},
        file="_causal_conv",
    ),
    Search(
        "multi_token_attention", "3x3 of 4 heads", "forward", ((8, 4, 2048),),
        {"ROWS": (64, 128), "COLS": (16, 32, 64), "STAGES": (1, 3), "WARPS": (4, 8), "MOST_OUTS": (1, 2, 4)},
        file="_causal_conv",
    ),
    Search(
        "neighborhood_attention", "window 7", "both", ((64, 16, 1024, 128), (4, 16, 4096, 64)),
        {"FWD_BLOCKS": (((8, 32),), ((8, 64),)), "BWD_BLOCKS": (((8, 32),), ((8, 64),))},
    ),
    Search(
        "neighborhood_attention", "window 255", "both", ((16, 16, 2048, 128),),
        {
            "FWD_TILE": ((64, 64, 2), (64, 64, 3), (64, 32, 3)), "DQ_TILE": ((64, 64, 2), (64, 32, 3)),
            "DKV_TILE": ((64, 64, 1), (64, 32, 2), (64, 32, 3)),
        },
    ),
    Search(
        "embedding", "", "backward", ((16384, 4096, 128256), (32768, 576, 49152)),
        {"BLOCK_COLS": (512, 1024, 2048), "ROWS": (2, 4), "WORDS": (4, 8, 16)},
    ),
    Search(
        "embedding", "", "backward", ((16384, 4096, 128256), (32768, 576, 49152)),
        {"PER_THREAD": (4, 8, 16), "CHUNK": (128, 256, 512)},
    ),
    Search(
        "layer_norm", "", "backward", ROW_SHAPES,
        {"PER_THREAD_BWD": (8, 16, 32), "STAGES_BWD": (1, 2, 3), "WARPS_PER_MULTIPROCESSOR": (16, 32, 64)},
    ),
    Search(
        "layer_norm", "", "backward", NARROW_SHAPES,
        {
            "TILE_BWD": (1024, 2048, 4096), "PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3),
            "WARPS_PER_MULTIPROCESSOR": (16, 32, 64),
        },
    ),
    Search("dyt", "", "forward", ROW_SHAPES, {"TILE_FWD": (1024, 2048, 4096), "PER_THREAD_FWD": (8, 16)}),
    Search(
        "dyt", "", "backward", ROW_SHAPES,
        {
            "TILE_BWD": (1024, 2048, 4096), "PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3),
            "WARPS_PER_MULTIPROCESSOR": (16, 32, 64),
        },
    ),
    Search(
        "dyt", "", "backward", NARROW_SHAPES,
        {
            "TILE_BWD": (1024, 2048, 4096), "PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3),
            "WARPS_PER_MULTIPROCESSOR": (16, 32),
        },
    ),
    Search("poly_norm", "", "forward", ((16384, 14336),), {"PER_THREAD_FWD": (8, 16, 32)}),
    Search(
        "poly_norm", "", "backward", ((16384, 14336), (16384, 8192)),
        {"PER_THREAD_BWD": (8, 16), "STAGES_BWD": (1, 2, 3), "WARPS_PER_MULTIPROCESSOR": (16, 32, 64)},
    ),
    Search(
        "group_norm", f"{N_GROUPS} groups", "forward", ((16, 512, 128, 128), (16, 320, 64, 64)),
        {"PART_TILE_FWD": (4096, 8192, 16384), "PART_PER_THREAD_FWD": (16, 32, 64)},
    ),
    Search(
        "group_norm", f"{N_GROUPS} groups", "backward", ((16, 512, 128, 128), (16, 320, 64, 64)),
        {"PART_TILE_BWD": (4096, 8192), "PART_PER_THREAD_BWD": (16, 32, 64)},
    ),
    Search(
        "glu", "silu", "forward", ((8192, 14336),),
        {"BLOCK": (1024, 2048, 4096, 8192), "NUM_WARPS": (2, 4, 8, 16)},
    ),
    # these shapes are multiplied by tiles that are copied; the one below is not
    Search(
        "experts", "", "both", ((8192, 8, 128, 2048, 768), (4096, 2, 8, 4096, 14336)),
        {"COLS": (128, 256), "STAGES": (3, 4), "GROUP": (4, 8, 16)}, file="_grouped_products_tma",
    ),
    Search(
        "experts", "", "both", ((1024, 2, 8, 1024, 768),),
        {"COLS": (128, 256), "STEP": (32, 64), "NUM_WARPS": (4, 8), "STAGES": (3, 4)}, file="_grouped_products",
    ),
    Search(
        "rope", "", "both", ((4, 4096, 32, 8, 128), (1, 32768, 64, 8, 128)),
        {"TILE_PAIRS": (512, 1024, 2048, 4096), "NUM_WARPS": (1, 2, 4, 8)},
    ),
    Search(
        "rms_norm_rope", "", "forward", NORM_ROPE_SHAPES,
        {"TILE_FWD": (2048, 4096, 8192), "NUM_WARPS_FWD": (2, 4, 8)},
    ),
    Search(
        "rms_norm_rope", "", "backward", NORM_ROPE_SHAPES,
        {
            "TILE_BWD": (1024, 2048, 4096), "NUM_WARPS_BWD": (4, 8), "WARPS_PER_MULTIPROCESSOR": (16, 32),
            "STAGES_BWD": (1, 2, 3),
        },
    ),
    Search(
        "cross_entropy", "", "forward", LOSS_SHAPES,
        {"FWD_BLOCK": (2048, 4096, 8192), "FWD_STAGES": (1, 2, 3, 4), "FWD_PER_THREAD": (8, 16, 32)},
        file="_cross_entropy_kernels",
    ),
    Search(
        "cross_entropy", "", "both", LOSS_SHAPES,
        {
            "HELD_BYTES": (16384, 32768, 65536), "WALK_BYTES": (8192, 16384), "STAGES": (2, 3, 4, 6),
            "PER_THREAD": (16, 32, 64),
        },
        file="_lent_logits", provider="ds_fused grad_in_forward", options={"label_smoothing": (0.1,)},
    ),
    Search(
        "cross_entropy", "", "both", LOSS_SHAPES,
        {"PART": (2048, 4096, 8192), "PER_THREAD": (32, 64), "REGISTERS": (None, 56, 72, 80)},
        file="_lent_logits_parts", provider="ds_fused grad_in_forward",
    ),
    Search(
        "linear_cross_entropy", "", "both", ((8192, 4096, 128256),),
        {}, options={"chunk_mb": (256, 512, 1024), "keep_mb": (0, 1024, 2048)},
    ),
    # up to how many chunks dweight is added up in bf16, and the fewest tokens of one
    Search(
        "linear_cross_entropy", "", "both", ((16384, 2048, 151936),), {"MOST_ROUNDINGS": (4, 8, 16)}, file="one_pass"
    ),
    Search(
        "linear_cross_entropy", "", "both", ((8192, 4096, 128256),), {"LEAST_TOKENS": (256, 512, 1024, 2048)},
        options={"chunk_mb": (64, 128, 256)}, file="one_pass",
    ),
    Search("kl_div", "", "both", PAIR_SHAPES, {"BLOCK": (1024, 2048, 4096, 8192), "NUM_WARPS": (4, 8, 16)}),
    Search("jsd", "beta=0.5", "forward", PAIR_SHAPES, PAIR_FORWARD, file="_divergence_kernels"),
    Search("jsd", "beta=0", "forward", PAIR_SHAPES, PAIR_FORWARD, file="_divergence_kernels"),
    Search(
        "jsd", "beta=0.5", "backward", PAIR_SHAPES,
        {"BWD_BLOCK": (1024, 2048, 4096, 8192), "BWD_PER_THREAD": (8, 16, 32)}, file="_divergence_kernels",
    ),
)  # fmt: skip


@contextlib.contextmanager
def in_place(module: ModuleType, choice: Choice) -> Iterator[None]:
    """An op's module with these constants, and as it was afterwards."""
    before = {name: getattr(module, name) for name in choice}
    try:
        for name, value in choice.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def provider_of(search: Search) -> Provider:
    case = next(case for case in CASES if (case.op, case.variant) == (search.op, search.variant))
    return case.providers[search.provider]


def calls(search: Search, inputs: Inputs, options: Choice) -> Callable[[], object]:
    """Our forward on these inputs with these options."""
    import ds_fused.ops

    t = inputs.tensors
    if search.op == "linear_cross_entropy":
        return partial(ds_fused.ops.linear_cross_entropy, t["x"], t["weight"], t["labels"], **options)
    return provider_of(search).build(t)


def timed(
    search: Search, inputs: Inputs, choice: Choice, wanted: tuple[Tensor, ...], on: Instruments, restore: Restore
) -> float:
    """Milliseconds of the direction; ValueError where the answer is another one."""
    options = {name: choice[name] for name in search.options or {}}
    with in_place(search.module, {name: choice[name] for name in search.constants}):
        forward = calls(search, inputs, options)
        full = full_call(forward, inputs)
        restore()
        error = max(relative_error(got, want) for got, want in zip(full(), wanted, strict=True))
        if not error <= LARGEST_ERROR:
            raise ValueError(f"answer is off by {error:.2g}")
        if search.direction == "forward":
            return on.median_ms(forward, restore)
        if search.direction == "both":
            return on.median_ms(full, restore)
        outputs = forward()
        leaves = [t for t in inputs.tensors.values() if t.requires_grad]
        upstream = [inputs.tensors[name] for name in inputs.upstream] or None
        return on.median_ms(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))


def current(search: Search) -> Choice:
    """What the files say now: constants from the module, options left to the op's own defaults."""
    return {name: getattr(search.module, name) for name in search.constants}


def explore(search: Search, shape: tuple[int, ...], seconds: float, on: Instruments) -> list[tuple[float, str]]:
    """(ms, constants) of every combination that there was time for, fastest first; failures come last with inf."""
    start = time.monotonic()
    case = next(case for case in CASES if (case.op, case.variant) == (search.op, search.variant))
    inputs = case.inputs(torch.Generator(on.device).manual_seed(SEED), *shape)
    restore = restorer(provider_of(search), inputs)
    # copies, of what the next call writes over
    wanted = tuple(t.detach().clone() for t in full_call(calls(search, inputs, {}), inputs)())
    now = timed(replace(search, constants={}, options=None), inputs, {}, wanted, on, restore)
    file_says = ", ".join(f"{name}={_name(value)}" for name, value in current(search).items()) or "defaults"
    found = [(now, f"as in the file: {file_says}")]
    choices = search.choices()
    random.Random(SEED).shuffle(choices)  # what a short time leaves out is spread evenly
    for tried, choice in enumerate(choices):
        if time.monotonic() - start > seconds:
            found.append((float("inf"), f"{len(choices) - tried} combinations not tried: out of time"))
            break
        label = ", ".join(f"{name}={_name(value)}" for name, value in choice.items())
        try:
            found.append((timed(search, inputs, choice, wanted, on, restore), label))
        except Exception as error:  # a combination that can't run is a result
            found.append(
                (float("inf"), f"{label}: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:100]}")
            )
    return sorted(found)


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=sorted({search.op for search in SEARCHES}))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="searches in whose line or constants one of these is")
    parser.add_argument("--seconds", type=duration, default=170.0, help="for all searches together")
    parser.add_argument("--out", type=out_folder, help="folder of tune.csv, every combination with its time")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: shows that everything runs")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny shows that everything runs")

    on = Instruments("cpu", 1) if args.tiny else Instruments("cuda", REP_MS)
    end = time.monotonic() + args.seconds
    tiny = {(case.op, case.variant): case.tiny for case in CASES}
    work = [
        (search, shape, title)
        for search in SEARCHES
        if not args.ops or search.op in args.ops
        for shape in ((tiny[search.op, search.variant],) if args.tiny else search.shapes)
        for title in [f"{search.op} {search.variant} {search.direction} {'x'.join(map(str, shape))}".replace("  ", " ")]
        if not args.only or any(text in f"{title} {' '.join(search.constants)}" for text in args.only)
    ]
    if not work:
        parser.error("no such search")
    rows = []
    for done, (search, shape, title) in enumerate(work):
        # what a search doesn't need goes to those after it
        share = (end - time.monotonic()) / (len(work) - done)
        print(f"\n{title}", flush=True)
        try:
            found = explore(search, shape, share, on)
        except Exception as error:  # the other ops are still worth their time
            print(f"  failed: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}", flush=True)
            continue
        finally:
            on.release()
        best = [line for line in found if line[0] < float("inf")]
        for ms, label in best[:SHOWN] + [line for line in best[SHOWN:] if line[1].startswith("as in")]:
            print(f"  {ms:9.4f} ms  {label}")
        for ms, label in found[len(best) :]:
            print(f"  {ms:9} ms  {label}")
        rows += [(title, f"{ms:.5g}", label) for ms, label in found]
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "tune.csv").open("w", newline="") as file:
                file.write(f"# device: {on.name()}\n# torch {torch.__version__}\n")
                csv.writer(file).writerows([("search", "ms", "constants"), *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
