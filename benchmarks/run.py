"""Times every op against its rivals, on one device and in one run: ``python benchmarks/run.py``.

Per case and provider: is the answer right (against the HuggingFace code in fp32 on the same inputs), then time of
forward and of forward + backward, and memory; for short calls then the host's time, of all providers of a shape in
turn. A wrong answer gets no time, and with ``--tests`` an op none whose tests have failed. ``--base`` times an earlier
version of ours beside it.
Results are written after every provider; ``--resume`` goes on where a run ended.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

# run as a script: find this folder's modules and the package beside it, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.ahead import compile_ahead
from benchmarks.base import Base, check
from benchmarks.cases import CASES
from benchmarks.cases.case import Case, Inputs
from benchmarks.measure import Instruments, worst_error
from benchmarks.page import amount, duration, out_folder, positive
from benchmarks.red_tests import red_tests
from benchmarks.results import BASE, CEILING, OK, OURS, Row, compare, markdown, read_csv, write_csv
from benchmarks.rivals.provider import Provider

REFERENCE = "hf_eager"
BARE = "bare GEMMs"
# of the card, in the header
CEILINGS = ("copy_tb_s", "matmul_tflop_s", "lm_head_tflop_s")
LEFT_OUT = "left out"
REFUSED = "refused"
RESUMED = "resumed by"
TESTS = "tests"
SEED = 1234
# a call on 8192 x 4096 takes 0.1 to 0.3 ms of the device, about as long as the host takes to launch it
SHORT_MS = 1.0


def differentiated(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.tensors.items() if t.requires_grad}


def full_call(forward: Callable[[], object], inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward. Nothing accumulates and nothing is copied into .grad, where backward() finds none."""
    leaves = list(differentiated(inputs).values())
    upstream = [inputs.tensors[name] for name in inputs.upstream] or None

    def full() -> tuple[Tensor, ...]:
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not inputs.by_backward:
            return *outputs, *torch.autograd.grad(outputs, leaves, upstream)
        torch.autograd.backward(outputs, upstream)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return *outputs, *gradients

    return full


def restorer(provider: Provider, inputs: Inputs) -> Callable[[], None]:
    """Puts back, as they are now, the tensors that a provider writes into."""
    saved = {name: inputs.tensors[name].detach().clone() for name in provider.overwrites}

    def restore() -> None:
        with torch.no_grad():
            for name, value in saved.items():
                inputs.tensors[name].copy_(value)

    return restore


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Outputs and gradients of the HuggingFace code on the same inputs in fp32."""

    def upcast(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        if isinstance(t, nn.Parameter):
            return nn.Parameter(t.detach().float())
        return t.detach().float().requires_grad_(t.requires_grad)

    exact = replace(inputs, tensors={name: upcast(t) for name, t in inputs.tensors.items()})
    results = full_call(case.providers[REFERENCE].build(exact.tensors), exact)()
    return tuple(t.detach() for t in results)


def floors_ms(case: Case, shape: tuple[int, ...], ceilings: dict[str, float]) -> tuple[float, float]:
    """The least time that forward, and forward + backward, can take on this card."""
    work, rate = (
        (case.bytes(*shape), ceilings["copy_tb_s"]) if case.bytes else (case.flops(*shape), ceilings["lm_head_tflop_s"])
    )
    return work[0] / rate / 1e9, work[1] / rate / 1e9


class Calls(NamedTuple):
    """What is timed of a provider."""

    forward: Callable[[], object]
    full: Callable[[], tuple[Tensor, ...]]
    restore: Callable[[], None]


def calls_of(provider: Provider, inputs: Inputs) -> Calls:
    restore = restorer(provider, inputs)
    forward = provider.build(inputs.tensors)
    return Calls(forward, full_call(forward, inputs), restore)


def measure(
    row: Row,
    calls: Calls,
    inputs: Inputs,
    wanted: tuple[Tensor, ...],
    floors: tuple[float, float],
    largest_error: float,
    on: Instruments,
) -> None:
    """Fills the row but for the host's time, or its status with the reason why not."""
    forward, full, restore = calls
    try:
        on.poison()
        outputs = [f"output {i}" for i in range(len(wanted) - len(differentiated(inputs)))]
        names = outputs + [f"d{name}" for name in differentiated(inputs)]
        row.worst_error, row.worst_of = worst_error(full(), wanted, names)
        if not row.worst_error <= largest_error:
            row.status = f"wrong: {row.worst_of} is off by {row.worst_error:.2g}, allowed {largest_error:g}"
            return
        on.release()
        row.peak_mib = on.peak_mib(full, restore)
        row.forward_ms = on.median_ms(forward, restore)
        row.full_ms = on.median_ms(full, restore)
        if not row.launch_bound:
            row.forward_share = floors[0] / row.forward_ms
            row.full_share = floors[1] / row.full_ms
    finally:
        restore()


def wants_host(row: Row) -> bool:
    return row.status == OK and (row.launch_bound or row.full_ms < SHORT_MS)


def reason(error: Exception) -> str:
    message = (str(error).strip() or "no message").splitlines()[0][:160]
    return f"failed: {type(error).__name__}: {message}"


def measure_bare(row: Row, inputs: Inputs, floors: tuple[float, float], on: Instruments) -> None:
    """The GEMMs of a head's loss with nothing between them: what its time can be compared with."""
    x, weight = (inputs.tensors[name].detach() for name in ("x", "weight"))
    teacher = [inputs.tensors[name] for name in ("teacher_x", "teacher_weight") if name in inputs.tensors]
    dz = torch.randn(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    trains = inputs.tensors["weight"].requires_grad
    row.status = CEILING
    row.note = "x @ W.T, dz @ W" + (", dz.T @ x" if trains else "") + (", the teacher's x @ W.T" if teacher else "")

    def forward() -> None:
        x @ weight.T
        if teacher:
            teacher[0] @ teacher[1].T

    row.forward_ms = on.median_ms(forward)
    row.full_ms = on.median_ms(lambda: (forward(), dz @ weight, dz.T @ x if trains else None))
    row.forward_share, row.full_share = floors[0] / row.forward_ms, floors[1] / row.full_ms


class Bench:
    """A case at one shape, with inputs and answers that are made when the first row wants them."""

    def __init__(self, place: int, shape: tuple[int, ...], ceilings: dict[str, float], on: Instruments) -> None:
        self.place, self.case, self.shape, self.on = place, CASES[place], shape, on
        self.floors = floors_ms(self.case, shape, ceilings)
        # those of short calls, whose hosts are still to be measured
        self._calls: dict[str, Calls] = {}

    @cached_property
    def inputs(self) -> Inputs:
        torch.compiler.reset()
        return self.case.inputs(torch.Generator(self.on.device).manual_seed(SEED), *self.shape)

    @cached_property
    def wanted(self) -> tuple[Tensor, ...]:
        return reference(self.case, self.inputs)

    def fill(self, row: Row, name: str) -> None:
        """The row of this provider. One that can't run is a result; the run goes on."""
        try:
            if name == BARE:
                measure_bare(row, self.inputs, self.floors, self.on)
                return
            # before a provider writes into the inputs
            wanted, provider = self.wanted, self.case.providers[name]
            row.note = provider.note
            calls = calls_of(provider, self.inputs)
            measure(row, calls, self.inputs, wanted, self.floors, self.case.largest_error, self.on)
            if wants_host(row):
                self._calls[name] = calls
        except Exception as error:
            row.status = reason(error)

    def host_us(self, name: str) -> tuple[float, float]:
        """One batch of this provider's forward, and one of its forward + backward."""
        if name not in self._calls:
            self._calls[name] = calls_of(self.case.providers[name], self.inputs)
        forward, full, restore = self._calls[name]
        try:
            return self.on.host_us(forward), self.on.host_us(full)
        finally:
            restore()

    def fill_hosts(self, rows: Sequence[Row], base: Base | None) -> None:
        """The host's time of this shape's rows that want it: in rounds, a batch of each in turn, the least of each.

        What else the machine does comes and goes, by a factor of two: figures that were taken one after another differ
        by that. So all are taken anew together, and the base's rows have none where it isn't run.
        """
        rows = [row for row in rows if wants_host(row)]
        for row in rows:
            row.host_forward_us = row.host_full_us = None
        rows = [row for row in rows if base or not row.of_base]
        batches: dict[str, list[tuple[float, float]]] = {row.provider: [] for row in rows}
        for _ in range(self.on.host_rounds):
            for row in rows:
                if row.status != OK:
                    continue
                try:
                    us = base.host_us(self.place, self.shape, row) if row.of_base else self.host_us(row.provider)
                    batches[row.provider].append(us)
                except Exception as error:
                    row.status = reason(error)
                    if not self.on.alive():
                        # no other row's fault: they are measured by the process that resumes
                        return
        for row in rows:
            if row.status == OK:
                row.host_forward_us, row.host_full_us = map(min, zip(*batches[row.provider], strict=True))


class Work(NamedTuple):
    """A shape of a case, and what is to be measured of it: these rows, and the hosts of all rows of their case."""

    place: int  # of the case in CASES
    shape: tuple[int, ...]
    case: tuple[str, str, str]  # as rows have it
    rows: list[Row]

    def compiled(self) -> tuple[str, ...]:
        """Providers of this process that may have something to compile."""
        providers = CASES[self.place].providers.keys() - {REFERENCE}
        return tuple(row.provider for row in self.rows if row.provider in providers)


def plan(args: argparse.Namespace) -> Iterator[tuple[Case, tuple[int, ...], bool]]:
    """(case, shape, launch-bound): every op's first shape and its smallest; the others, which --seconds leaves out."""
    chosen = [case for case in CASES if not args.ops or case.op in args.ops]
    if args.widths:
        yield from ((case, shape, False) for case in chosen for shape in case.widths)
        return
    yield from ((case, case.tiny if args.tiny else case.sweep[0], False) for case in chosen)
    yield from ((case, case.tiny if args.tiny else case.launch_bound, True) for case in chosen)
    if not (args.tiny or args.quick):
        yield from ((case, shape, False) for case in chosen for shape in case.sweep[1:])


def providers_of(case: Case, launch_bound: bool, args: argparse.Namespace) -> list[str]:
    """Names of rows, the base's first: its process is given the whole device."""
    ours = [name for name in case.providers if name.split()[0] == OURS]
    names = [name.replace(OURS, BASE, 1) for name in ours] if args.base else []
    names += [*case.providers, *([BARE] if case.flops and case.is_head and not launch_bound else [])]
    return [name for name in names if not args.providers or name.split()[0] in args.providers]


def lacks_host(row: Row, args: argparse.Namespace) -> bool:
    return wants_host(row) and row.host_full_us is None and (not row.of_base or bool(args.base))


def work_of(args: argparse.Namespace, done: Sequence[Row]) -> Iterator[Work]:
    """What is left of the plan."""
    for case, shape, launch_bound in plan(args):
        label = "x".join(map(str, shape)) + (" launch" if launch_bound else "")
        there = {row.provider: row for row in done if row.case == (case.op, case.variant, label)}
        rows = [
            Row(case.op, case.variant, label, launch_bound, name)
            for name in providers_of(case, launch_bound, args)
            if name not in there
        ]
        if rows or any(lacks_host(row, args) for row in there.values()):
            yield Work(CASES.index(case), shape, (case.op, case.variant, label), rows)


def without(argv: list[str], *options: str) -> list[str]:
    """The arguments without these options and their values."""
    taken = [i for i, a in enumerate(argv) if a.split("=")[0] in options]
    values = [i + 1 for i in taken if "=" not in argv[i] and argv[i] != "--resume"]
    return [a for i, a in enumerate(argv) if i not in taken + values]


def environment(on: Instruments) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "device": on.name(),
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "triton", "transformers", "liger-kernel")
        ),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "benchmarks/run.py", *without(sys.argv[1:], "--resume", "--out")]),
        "method": method(on),
    }


def method(on: Instruments) -> str:
    return (
        f"bf16, median over {on.rep_ms:g} ms of calls, L2 flushed before each, launches queued ahead; of the host, the "
        f"least of {on.host_rounds} batches of {on.host_calls} calls, all providers of a shape in turn"
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", "--op", nargs="+", choices=sorted({case.op for case in CASES}), help="only these")
    providers = {name.split()[0] for case in CASES for name in (*case.providers, BARE, BASE)}
    parser.add_argument(
        "--providers", nargs="+", choices=sorted(providers), help="only these (the first word of a provider's name)"
    )
    parser.add_argument(
        "--out", type=out_folder, help="folder of ops.csv and ops.md; default benchmarks/results/DEVICE[/widths]"
    )
    parser.add_argument(
        "--widths", action="store_true", help="in place of the listed shapes many widths, of ops for which they count"
    )
    parser.add_argument("--quick", action="store_true", help="one shape per op and shorter measurements")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes: shows that everything runs, times nothing real"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=duration, default=float("inf"), help="start no provider after this long")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, measure the rest")
    parser.add_argument("--base", help="a git ref, or a folder that holds ds_fused/: ours as it was there, as rival")
    parser.add_argument("--tests", nargs="+", type=Path, help="reports of pytest --junit-xml: no op that is red there")
    parser.add_argument("--ahead", type=positive, default=0, metavar="N", help="compile before, by N processes")
    parser.add_argument("--rep-ms", type=amount, help="of calls for one median; default 100, with --quick 30")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --tiny shows that everything runs")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu wants --tiny: a CPU's times say nothing about a kernel")
    if args.widths and (args.tiny or args.quick):
        parser.error("--widths are shapes of a GPU, all of them: not with --tiny or --quick")
    if args.widths and args.ops and (none := set(args.ops) - {case.op for case in CASES if case.widths}):
        parser.error(f"--widths: no widths are listed for {', '.join(sorted(none))}")
    for report in args.tests or ():
        if not report.is_file():
            parser.error(f"--tests {report}: no such file")
    try:
        args.red = red_tests(args.tests, {case.op for case in CASES}) if args.tests else {}
    except ValueError as error:
        parser.error(f"--tests {error}")
    if args.base:
        try:
            check(args.base)
        except ValueError as error:
            parser.error(str(error))
    return args


def restart(args: argparse.Namespace, argv: list[str], seconds: float) -> None:
    """Replaces this process, whose device context is dead, by one that resumes."""
    kept = without(argv, "--resume", "--seconds", "--ahead")
    limit = [] if args.seconds == float("inf") else ["--seconds", str(max(0.0, seconds))]
    sys.stdout.flush()
    # the dead context's memory stays taken while a descriptor of the driver is open
    os.closerange(3, 4096)
    os.execv(sys.executable, [sys.executable, __file__, *kept, *limit, "--resume"])


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    args = arguments(argv)
    on = Instruments(args.device, rep_ms=args.rep_ms or (1 if args.tiny else 30 if args.quick else 100))
    folder = re.sub(r"[^a-z0-9]+", "-", on.name().lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / folder / ("widths" if args.widths else "")
    out.mkdir(parents=True, exist_ok=True)

    try:
        header, rows = read_csv(out / "ops.csv") if args.resume else ({}, [])
    except ValueError as error:
        raise SystemExit(f"run: {error}") from None
    header.pop(LEFT_OUT, None)
    if not header:
        ceilings = on.ceilings()
        header = environment(on) | {key: f"{value:.4g}" for key, value in ceilings.items()}
    if header.get("method") != method(on):
        header[RESUMED] = method(on)
    if absent := [key for key in CEILINGS if key not in header]:
        raise SystemExit(f"run: {out / 'ops.csv'} can't be gone on with: its header has no {', '.join(absent)}")
    ceilings = {key: float(header[key]) for key in CEILINGS}
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    red = args.red
    header[TESTS] = "not looked at"
    if args.tests:
        header[TESTS] = f"{', '.join(path.name for path in args.tests)}: {', '.join(sorted(red)) or 'no op'} refused"
    rows = [row for row in rows if row.op not in red and not row.status.startswith(REFUSED)]
    work = list(work_of(args, rows))
    if args.ahead:
        # the rest of the time is for measuring
        limit = min(args.seconds / 3, 300.0)
        items = [(w.place, w.shape, w.compiled()) for w in work if w.rows]
        print(compile_ahead(items, args.ahead, limit, args.device, SEED), flush=True)
    base = Base(args.base, args.device, on.rep_ms, ceilings) if args.base else None
    left = []

    def write() -> None:
        compare(rows)
        write_csv(out / "ops.csv", header, rows)
        (out / "ops.md").write_text(markdown(header, rows))

    def say(row: Row, figures: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {' '.join(row.case):45} {row.provider:25} {figures}", flush=True)

    def written() -> None:
        write()
        if not on.alive():
            if base:
                base.close()
            restart(args, list(sys.argv[1:] if argv is None else argv), args.seconds - (time.monotonic() - start))

    for place, shape, case, planned in work:
        bench = Bench(place, shape, ceilings, on)
        for row in planned:
            if row.op in red:
                row.status = f"{REFUSED}: {red[row.op]}"
            elif time.monotonic() - start > args.seconds:
                left.append(" ".join((*row.case, row.provider)))
                continue
            elif row.of_base:
                row = base.measured(place, shape, row)
            else:
                bench.fill(row, row.provider)
            rows.append(row)
            say(row, f"{row.forward_ms:9.3f} {row.full_ms:9.3f} ms" if row.full_ms else row.status)
            written()
        of_shape = [row for row in rows if row.case == case]
        if any(lacks_host(row, args) for row in of_shape):
            if time.monotonic() - start > args.seconds:
                left.append(" ".join((*case, "host")))
            else:
                bench.fill_hosts(of_shape, base)
                for row in of_shape:
                    if row.host_full_us:
                        say(row, f"{row.host_forward_us:9.1f} {row.host_full_us:9.1f} us of the host")
                if base:
                    base.release()
                written()
        del bench
        on.release()
    if base:
        base.close()
    if left:
        header[LEFT_OUT] = f"{len(left)} after {args.seconds:g} s: " + "; ".join(left)
        write()
        print(f"left out: {header[LEFT_OUT]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
