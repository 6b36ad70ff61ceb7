"""Traces every op of ds_fused.ops with torch.compile's dynamo, forward and backward, as on a GPU; none is needed.

    python tests/ops/trace_all.py [all]

Needs a process of its own, without TRITON_INTERPRET. Tensors lie on the CPU, the kernels are traced and nothing is run.
Prints as JSON what stopped a trace: of every other case of each op, or of all. Each op is called with one shape after
the other, for that makes dynamo take the sizes that change for symbols; where a launcher then needs such a size as a
number, it is a symbol with a known value, in which dynamo 2.11 to 2.13 has a bug (see row_stride in
ds_fused/ops/common/_triton.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

import torch
import torch.utils._triton
import triton
from compile_all import EXAMPLES
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    get_mutated_tensors,
    kernel_side_table,
    triton_kernel_wrapper_mutation,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ds_fused.ops.common import _meet
from ds_fused.ops.common._launch import Kept
from ds_fused.ops.common._warmup import Absent

MULTIPROCESSORS = 132


KEPT = [
    kept
    for name, module in [*sys.modules.items()]
    if name.startswith("ds_fused.ops.")
    for kept in vars(module).values()
    if isinstance(kept, Kept)
]


class Traced(Exception):
    """Dynamo has its graph, which is all that was to be seen."""


def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., None]:
    """What Inductor would do otherwise than a launch does is a problem, too: it gives each tensor that a kernel writes
    memory of its own, so one that goes in twice would be two; and it passes floats in fp64.
    """
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if node.target is triton_kernel_wrapper_mutation:
                kernel = kernel_of(node)
                tensors = [x for x in node.kwargs["kwargs"].values() if isinstance(x, torch.fx.Node)]
                # asked only where it matters: the answer takes Inductor a compilation's first steps
                names = names_written(node) if len(set(tensors)) < len(tensors) else []
                if len({node.kwargs["kwargs"][name] for name in names}) < len(names):
                    raise ValueError(f"{kernel.__name__} writes one tensor by two of {', '.join(names)}")
                if wide := floats_that_stay_wide(kernel, node):
                    raise ValueError(f"{kernel.__name__} does not make {', '.join(wide)} fp32 by tl.cast")

    def run(*_: object) -> None:
        raise Traced

    return run


def kernel_of(node: torch.fx.Node) -> JITFunction:
    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return kernel if isinstance(kernel, JITFunction) else kernel.fn  # in an autotuner, which holds num_warps


def floats_that_stay_wide(kernel: JITFunction, node: torch.fx.Node) -> list[str]:
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    fixed = {param.name for param in kernel.params if param.is_constexpr}
    floats = [name for name, x in {**node.kwargs["kwargs"], **constants}.items() if isinstance(x, float)]
    return [name for name in floats if name not in fixed and f"{name} = tl.cast({name}, tl.float32)" not in kernel.src]


def names_written(node: torch.fx.Node) -> list[str]:
    """The pointers by which a launch in a graph writes, as Inductor finds them."""
    kwargs = {
        name: arg.meta["example_value"] if isinstance(arg, torch.fx.Node) else arg
        for name, arg in node.kwargs["kwargs"].items()
    }
    where = [node.kwargs[key] for key in ("kernel_idx", "constant_args_idx")]
    return get_mutated_tensors(*where, kwargs, node.kwargs["tma_descriptor_metadata"])


def problem(call: Callable[..., object], inputs: list[tuple[Tensor, ...]]) -> str | None:
    """What kept dynamo from making one graph of a call, or has it make one again for the same call."""
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, more: list[Tensor]) -> Callable[..., None]:
        graphs.append(graph)
        return backend(graph, more)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for tensors in inputs:
        try:
            compiled(*tensors)
        except Traced:
            pass
        except Exception as error:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            return f"{shapes}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    made = len(graphs)
    # as eager calls of other shapes do
    for kept in KEPT:
        kept.keep(("eager",), None)
    with suppress(Traced):
        compiled(*inputs[-1])
    for kept in KEPT:
        kept.by_key.clear()
    return "what eager calls keep makes the graph anew" if len(graphs) > made else None


def pretend_to_have_a_gpu() -> None:
    triton.runtime.driver.set_active(Absent(GPUTarget("cuda", 90, 32), 0))
    # dynamo asks before it looks whether a function is a kernel
    torch.utils._triton.has_triton = lambda: True
    _meet.DEVICES = ("cpu",)
    answers = {
        "runs_kernels": lambda *_: True,
        "multiprocessors": lambda _: MULTIPROCESSORS,
        "copies_tiles": lambda _: True,
        # on a CPU it reads them
        "flat_ids": lambda _op, ids, _n_vocab, **_: ids.reshape(-1),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("ds_fused.ops.")]:
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)


def main(every: int) -> None:
    pretend_to_have_a_gpu()
    problems = {}
    for example in EXAMPLES:
        found = [p for case in islice(example.traced(), 0, None, every) if (p := problem(*case)) is not None]
        if found:
            problems[example.__name__.removeprefix("examples.")] = found
    print(json.dumps({"problems": problems}))


if __name__ == "__main__":
    main(every=1 if sys.argv[1:] == ["all"] else 2)
