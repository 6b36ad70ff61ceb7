"""How far a model's loss and gradients in bf16 are from those in fp32: stock by each attention, Liger and ds_fused.

    python benchmarks/exactness.py --shape 8b --length 2048 --batches 8 --out benchmarks/results/h100

Writes NAME.md and .json, NAME being exactness unless --name says otherwise. One device, no engine, no step of an
optimizer: the weights are the first ones of end_to_end.py, which bf16 holds exactly, so both models are the same
function. Of the fp32 one, computed without TF32, the losses of all batches are kept and the gradients of the first;
each way then trains on the same batches. It takes 8 bytes a parameter: fp32 weights and their gradients, then these
gradients beside weights and gradients in bf16.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch import distributed as dist

import ds_fused
from benchmarks.page import Header, Results, Row, file_name, header, out_folder, positive, table, without_folders
from benchmarks.results import OK
from benchmarks.step_data import Stream
from benchmarks.step_job import attention, status_of
from benchmarks.step_page import LIGER, OTHER_STOCK, STOCK
from benchmarks.step_shapes import SHAPES, built, shape_of
from benchmarks.step_ways import WAYS, Way

# Liger's patch can't be taken back, so it comes last
DEFAULT = (*(name for name in WAYS if name == STOCK or name.startswith(OTHER_STOCK)), "ours", LIGER)
NO_ENGINE: dict[str, object] = {"zero_optimization": {"stage": 0}}


class Compared:
    """Gradients beside those of the fp32 model, each as soon as it is complete; none is kept."""

    def __init__(self, exact: dict[str, Tensor]) -> None:
        self._exact = exact
        self._squares: dict[str, tuple[Tensor, Tensor]] = {}  # of the difference, of the exact one

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [
            weight.register_post_accumulate_grad_hook(self._hook(name)) for name, weight in model.named_parameters()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> object:
        def compare(weight: Tensor) -> None:
            exact = self._exact[name]
            apart = weight.grad.float() - exact
            weight.grad = None
            self._squares[name] = (apart.square().sum(dtype=torch.float64), exact.square().sum(dtype=torch.float64))

        return compare

    def figures(self) -> Row:
        """Relative L2 errors: of all gradients together, the median weight's, the worst weight's."""
        missing = self._exact.keys() - self._squares.keys()
        if missing:
            raise RuntimeError(f"no gradient came to {', '.join(sorted(missing)[:3])}, of {len(missing)} weights")
        each = {name: (apart / of).sqrt().item() for name, (apart, of) in self._squares.items()}
        apart, of = (sum(pair[i].item() for pair in self._squares.values()) for i in (0, 1))
        worst = max(each, key=each.__getitem__)
        return {
            "all": (apart / of) ** 0.5,
            "median": statistics.median(each.values()),
            "worst": each[worst],
            "worst_of": worst,
        }


class Job:
    """One shape on one device, and what the fp32 model has to say of it."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.shape, self.device = shape_of(options.shape, options.layers), device
        data = Stream(self.shape.vocab)
        self.batches = [
            data.batch(step, 0, 1, options.batch, options.length).to(device) for step in range(options.batches)
        ]
        exact = self._model(torch.float32)
        with torch.no_grad():
            self.losses = [self._loss(exact, ids).item() for ids in self.batches]
        self._loss(exact, self.batches[0]).backward()
        self.gradients = {name: weight.grad for name, weight in exact.named_parameters()}

    def _model(self, dtype: torch.dtype) -> nn.Module:
        model = built(self.shape, NO_ENGINE, self.device, lora=False, dtype=dtype)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def row(self, way: Way) -> Row:
        way.patch(self.shape.type)
        model = self._model(torch.bfloat16)
        way.check(model, self.shape.type)
        row: Row = {}
        if way.block is not None:
            report = ds_fused.apply(model)
            row["replaced"] = {claim.key: len(claim.paths) for claim in report.claims}
        compared, losses = Compared(self.gradients), []
        with attention(way.backend):
            for ids in self.batches:
                loss = self._loss(model, ids)
                losses.append(loss.item())
                if len(losses) == 1:
                    with compared.watching(model):
                        loss.backward()
        return {**row, "losses": losses, "gradients": compared.figures()}


def page(head: Header, rows: Sequence[Row]) -> str:
    lines = ["# How far from fp32", "", *(f"- {key}: {value}" for key, value in head.items() if value)]
    lines += [
        "- loss: of a batch, less fp32's: mean with its sign, mean amount, largest amount.",
        "- gradients: of the first batch, relative L2 error against fp32's: of all weights, and of single ones.",
        "",
    ]
    names = ("way", "loss: mean", "mean amount", "largest", "gradients: all", "median weight", "worst weight", "note")
    cells = []
    for row in rows:
        if row["status"] != OK:
            cells.append([row["way"], *["-"] * 6, row["status"]])
            continue
        apart, gradients = row["apart"], row["gradients"]
        amounts = [abs(one) for one in apart]
        losses = [f"{statistics.fmean(apart):+.1e}", f"{statistics.fmean(amounts):.1e}", f"{max(amounts):.1e}"]
        of_all, median, worst = (f"{gradients[key]:.2e}" for key in ("all", "median", "worst"))
        cells.append([row["way"], *losses, of_all, median, f"{worst} ({gradients['worst_of']})", row["note"]])
    return "\n".join([*lines, *table(names, cells), ""])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_folder, default=Path(), help="folder for the results")
    parser.add_argument("--name", type=file_name, default="exactness", help="of the files in it")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b", help="the model")
    parser.add_argument("--layers", type=positive, help="so many instead of the model's own")
    parser.add_argument("--batch", type=positive, default=1, help="sequences of a batch")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a sequence")
    parser.add_argument("--batches", type=positive, default=8)
    parser.add_argument(
        "--ways", default=",".join(DEFAULT), help=f"of {', '.join(DEFAULT)}; {LIGER} has to be the last"
    )
    options = parser.parse_args(arguments)
    names = options.ways.split(",")
    if unknown := [name for name in names if name not in DEFAULT]:
        parser.error(f"there is no way {unknown[0]!r}; there are {', '.join(DEFAULT)}")
    if LIGER in names[:-1]:
        parser.error(f"{LIGER} has to be the last way: its patch can't be taken back")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    # weights are drawn by rank
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / options.name, page, lambda row: f"{row['way']}: {row['status']}")
    results.header = head = header("exactness.py", 1, [without_folders(a) for a in arguments])
    head["device"] = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    shape = f"{options.shape}, {options.layers or SHAPES[options.shape].layers} layers"
    head["job"] = f"{shape}, {options.batches} batches of {options.batch} x {options.length} tokens, random weights"
    job = Job(options, device)
    for name in names:
        row: Row = {"way": name, "note": WAYS[name].note, "status": OK}
        try:
            if WAYS[name].needs_gpu and not on_gpu:
                raise RuntimeError("needs a GPU")
            row |= job.row(WAYS[name])
            row["apart"] = [loss - exact for loss, exact in zip(row["losses"], job.losses, strict=True)]
        except Exception as error:
            # one way that can't run leaves the others
            row["status"] = without_folders(status_of(error))
        results.add(row)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    print(results.text())
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
