"""What is measured: one row per op and variant, each with its shapes, its rivals and its floor.

The floor's numerator is what any implementation must do: every input read once and every output written once (bytes),
or the products that no algebra avoids (FLOPs). It doesn't know how ours works. Sizes in elements, bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import rivals
from benchmarks.rivals import Provider

DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize
# every IGNORED_EVERY-th label is -100: seen by the correctness check, under 1 % of the work
IGNORED_EVERY = 128


@dataclass(frozen=True)
class Inputs:
    """Fresh random tensors. Those that require a gradient are differentiated."""

    tensors: dict[str, Tensor]
    # names of the outputs' gradients; none: a scalar loss, whose upstream gradient is 1
    upstream: tuple[str, ...] = ()


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

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}".strip()


def _randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE) * scale


def _labels(generator: torch.Generator, n: int, n_vocab: int) -> Tensor:
    labels = torch.randint(n_vocab, (n,), generator=generator, device=generator.device)
    labels[::IGNORED_EVERY] = -100
    return labels


def norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = _randn(generator, n, d).requires_grad_()
    weight = nn.Parameter(_randn(generator, d))
    return Inputs({"x": x, "weight": weight, "dy": _randn(generator, n, d)}, ("dy",))


def glu_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    gate, up, dy = (_randn(generator, n, d) for _ in range(3))
    return Inputs({"gate": gate.requires_grad_(), "up": up.requires_grad_(), "dy": dy}, ("dy",))


def rope_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    # as in a HuggingFace model: [B, H, T, D] as a view of [B, T, H, D], and so are their gradients
    q, k, dq, dk = (_randn(generator, b, t, h, d).transpose(1, 2) for h in (n_q, n_k, n_q, n_k))
    frequency = 500000.0 ** (-torch.arange(0, d, 2, device=generator.device) / d)
    angle = torch.arange(t, device=generator.device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[None]  # [1, T, D]
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_(), "cos": cos, "sin": sin, "dq": dq, "dk": dk}
    return Inputs(tensors, ("dq", "dk"))


# logits of standard deviation 3: with 1 the gradient would be the label's -1 and little else, and a wrong softmax
# would pass the check
LOGITS_SCALE = 3.0


def loss_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    logits = _randn(generator, n, n_vocab, scale=LOGITS_SCALE)
    return Inputs({"logits": logits.requires_grad_(), "labels": _labels(generator, n, n_vocab)})


def linear_loss_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    x = _randn(generator, m, h).requires_grad_()
    weight = nn.Parameter(_randn(generator, n_vocab, h, scale=LOGITS_SCALE * h**-0.5))
    return Inputs({"x": x, "weight": weight, "labels": _labels(generator, m, n_vocab)})


def log_probs_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int, outputs: int = 1) -> Inputs:
    tensors = linear_loss_inputs(generator, m, h, n_vocab).tensors
    # a gradient of each token, as a policy's advantages give it
    upstream = {
        name: torch.randn(m, generator=generator, device=generator.device)
        for name in ("dlog_probs", "dentropy")[:outputs]
    }
    return Inputs(tensors | upstream, tuple(upstream))


def distillation_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    tensors = linear_loss_inputs(generator, m, h, n_vocab).tensors
    # a teacher that agrees with the student to some extent, and is as wide
    teacher_x = tensors["x"].detach() + _randn(generator, m, h, scale=0.5)
    teacher_weight = tensors["weight"].detach() + _randn(generator, n_vocab, h, scale=h**-0.5)
    return Inputs(tensors | {"teacher_x": teacher_x, "teacher_weight": teacher_weight})


def _norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; the weight and its gradient, once each
    return SIZE * (2 * n * d + d), SIZE * (5 * n * d + 3 * d)


def _glu_bytes(n: int, d: int) -> tuple[int, int]:
    # gate, up -> y; gate, up, dy -> dgate, dup
    return SIZE * 3 * n * d, SIZE * 8 * n * d


def _rope_bytes(b: int, t: int, n_q: int, n_k: int, d: int) -> tuple[int, int]:
    # q, k -> q', k' and the same back; cos and sin once each way
    once = SIZE * (2 * b * t * (n_q + n_k) * d + 2 * t * d)
    return once, 2 * once


def _loss_bytes(n: int, n_vocab: int) -> tuple[int, int]:
    # logits once, dlogits once; labels and losses are nothing beside them
    return SIZE * n * n_vocab, SIZE * 2 * n * n_vocab


def _linear_loss_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits; logits, dx and dweight
    return 2 * m * h * n_vocab, 6 * m * h * n_vocab


def _distillation_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits of both; of both, dx and dweight
    return 4 * m * h * n_vocab, 8 * m * h * n_vocab


# Llama-3-8B's width at 8k tokens, a 70B's at 16k, and a q-norm over 128-wide heads (8192 tokens x 32 heads)
NORM_SWEEP = ((8192, 4096), (16384, 8192), (262144, 128))
# plain PyTorch in fp32, against which all are judged, needs about 30 GiB for them
DISTILLED = ((4096, 4096, 128256), (4096, 2048, 151936))

CASES = (
    Case(
        "rms_norm", "before_weight", norm_inputs, rivals.LLAMA_NORM,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "rms_norm", "after_weight", norm_inputs, rivals.GEMMA_NORM,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "glu", "silu", glu_inputs, rivals.glu_providers("silu"),
        sweep=((8192, 14336), (16384, 28672)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gelu_tanh", glu_inputs, rivals.glu_providers("gelu_tanh"),
        sweep=((8192, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "rope", "", rope_inputs, rivals.ROPE,
        sweep=((4, 4096, 32, 8, 128), (1, 32768, 64, 8, 128)),
        launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_rope_bytes,
    ),
    Case(
        "cross_entropy", "", loss_inputs, rivals.CROSS_ENTROPY,
        sweep=((8192, 128256), (8192, 32000)), launch_bound=(16, 1024), tiny=(140, 96), bytes=_loss_bytes,
    ),
    Case(
        "linear_cross_entropy", "", linear_loss_inputs, rivals.LINEAR_CROSS_ENTROPY,
        sweep=((8192, 4096, 128256), (16384, 2048, 151936), (4096, 4096, 128256)),
        launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_linear_loss_flops,
    ),
    Case(
        "linear_log_probs", "", log_probs_inputs, rivals.log_probs_providers(entropy=False),
        sweep=((8192, 4096, 128256), (16384, 2048, 151936)),
        launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_linear_loss_flops,
    ),
    Case(
        "linear_log_probs", "entropy", partial(log_probs_inputs, outputs=2), rivals.log_probs_providers(entropy=True),
        sweep=(DISTILLED[0],), launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_linear_loss_flops,
    ),
    Case(
        "linear_jsd", "", distillation_inputs, rivals.divergence_providers("linear_jsd", beta=0.5),
        sweep=DISTILLED, launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_distillation_flops,
    ),
    Case(
        "linear_kl_div", "", distillation_inputs, rivals.divergence_providers("linear_kl_div", beta=0.0),
        sweep=DISTILLED[:1], launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_distillation_flops,
    ),
)  # fmt: skip
