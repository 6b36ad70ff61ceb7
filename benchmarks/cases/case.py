"""What a case is, and what the families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rivals.provider import Provider

DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize
# bf16 operands give 1e-3 to 1e-2; more than this is another function, not another rounding
LARGEST_ERROR = 2e-2
# every IGNORED_EVERY-th label is -100: seen by the correctness check, under 1 % of the work
IGNORED_EVERY = 128


@dataclass(frozen=True)
class Inputs:
    """Fresh random tensors. Those that require a gradient are differentiated."""

    tensors: dict[str, Tensor]
    # names of the outputs' gradients; none: a scalar loss, whose upstream gradient is 1
    upstream: tuple[str, ...] = ()
    # gradients are asked of backward(), which a tiled layer wants, not of torch.autograd.grad
    by_backward: bool = False


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    inputs: Callable[..., Inputs]  # (generator, *shape)
    providers: Mapping[str, Provider]
    sweep: tuple[tuple[int, ...], ...]
    launch_bound: tuple[int, ...]  # so small that only launches and Python count
    tiny: tuple[int, ...]  # for a machine without a GPU
    bytes: Callable[..., tuple[int, int]] | None = None  # (*shape) -> moved by forward, by forward + backward
    flops: Callable[..., tuple[int, int]] | None = None  # (*shape) -> of forward, of forward + backward
    is_head: bool = True  # with flops: whether they are those of an lm head
    largest_error: float = LARGEST_ERROR  # relative, of any output or gradient
    widths: tuple[tuple[int, ...], ...] = ()  # of run.py --widths: from a head's to the widest layer's

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE) * scale


def random_labels(generator: torch.Generator, n: int, n_vocab: int) -> Tensor:
    labels = torch.randint(n_vocab, (n,), generator=generator, device=generator.device)
    labels[::IGNORED_EVERY] = -100
    return labels


def pointwise_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx
    return SIZE * 2 * n * d, SIZE * 5 * n * d


# first of each op a shape whose largest tensor has 256 MiB or more: smaller ones say less of the memory's rate.
# A 70B's width at 16k tokens, Llama-3-8B's at 8k, and a q-norm over 128-wide heads (8192 tokens x 32 heads, or x 128)
NORM_SWEEP = ((16384, 8192), (8192, 4096), (1048576, 128), (262144, 128))
# 256 MiB of each: powers of two, and those of layers between them
WIDTHS = (
    *(64, 128, 256, 512, 576, 768, 896, 1024, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192),
    12288,
)
ROWS_OF_WIDTHS = tuple((2**27 // width, width) for width in WIDTHS)
# 256 MiB of widths that are no power of two: Qwen2-7B's, Mistral-Nemo's, Gemma-3-27B's
ODD_WIDTHS = ((37448, 3584), (26208, 5120), (24960, 5376))
