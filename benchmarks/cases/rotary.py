"""Rotary embeddings, with and without the norms before them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases.case import DTYPE, SIZE, Case, Inputs, randn
from benchmarks.rivals import rotary as rivals


def rope_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    # as in a HuggingFace model: [B, H, T, D] as a view of [B, T, H, D], and so are their gradients
    q, k, dq, dk = (randn(generator, b, t, h, d).transpose(1, 2) for h in (n_q, n_k, n_q, n_k))
    frequency = 500000.0 ** (-torch.arange(0, d, 2, device=generator.device) / d)
    angle = torch.arange(t, device=generator.device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[None]  # [1, T, D]
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_(), "cos": cos, "sin": sin, "dq": dq, "dk": dk}
    return Inputs(tensors, ("dq", "dk"))


def partial_rope_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int, *, part: int) -> Inputs:
    """Of each head one column in ``part`` turns."""
    inputs = rope_inputs(generator, b, t, n_q, n_k, d)
    narrow = rope_inputs(generator, 1, t, 1, 1, d // part).tensors
    return _with_angles(inputs, cos=narrow["cos"], sin=narrow["sin"])


def norm_rope_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    turned = rope_inputs(generator, b, t, n_q, n_k, d)
    weights = {name: nn.Parameter(randn(generator, d)) for name in ("q_weight", "k_weight")}
    return Inputs(turned.tensors | weights, turned.upstream)


def sections_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    # a quarter of the pairs turn by time, as Qwen2-VL's; positions as of an image 64 patches wide
    t_ = torch.arange(t, device=generator.device)
    frequency = 1000000.0 ** (-torch.arange(0, d, 2, device=generator.device) / d)
    angle = torch.stack([t_, t_ // 64, t_ % 64])[:, None, :, None] * frequency
    angle = torch.cat([angle, angle], dim=-1).expand(-1, b, -1, -1)  # [3, B, T, D]
    return _with_angles(rope_inputs(generator, b, t, n_q, n_k, d), cos=angle.cos().to(DTYPE), sin=angle.sin().to(DTYPE))


def complex_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    # Llama-4 turns [B, T, H, D]
    frequency = 500000.0 ** (-torch.arange(0, d, 2, device=generator.device) / d)
    angle = torch.arange(t, device=generator.device)[:, None] * frequency
    freqs = torch.polar(torch.ones_like(angle), angle).expand(b, -1, -1).contiguous()  # [B, T, D/2]
    inputs = _with_angles(rope_inputs(generator, b, t, n_q, n_k, d), freqs=freqs)
    for name in ("q", "k", "dq", "dk"):
        x = inputs.tensors[name]
        inputs.tensors[name] = x.detach().transpose(1, 2).requires_grad_(x.requires_grad)
    return inputs


def _with_angles(inputs: Inputs, **angles: Tensor) -> Inputs:
    tensors = {name: x for name, x in inputs.tensors.items() if name not in ("cos", "sin")}
    return Inputs(tensors | angles, inputs.upstream)


def _sections_bytes(b: int, t: int, n_q: int, n_k: int, d: int) -> tuple[int, int]:
    # q, k -> q', k' and the same back; of cos and sin, which every batch entry has for itself, what each pair takes
    once = SIZE * (2 * b * t * (n_q + n_k) * d + 2 * b * t * d)
    return once, 2 * once


def _complex_bytes(b: int, t: int, n_q: int, n_k: int, d: int) -> tuple[int, int]:
    # q, k -> q', k' and the same back; a complex number of 8 bytes for each pair of a token
    once = SIZE * 2 * b * t * (n_q + n_k) * d + 8 * b * t * d // 2
    return once, 2 * once


def _rope_bytes(b: int, t: int, n_q: int, n_k: int, d: int, *, part: int = 1) -> tuple[int, int]:
    # q, k -> q', k' and the same back; cos and sin once each way
    once = SIZE * (2 * b * t * (n_q + n_k) * d + 2 * t * d // part)
    return once, 2 * once


def _norm_rope_bytes(b: int, t: int, n_q: int, n_k: int, d: int) -> tuple[int, int]:
    # q, k -> q', k'; q, k, dq', dk' -> dq, dk; cos, sin and the weights once each way, the weights' gradients
    n = b * t * (n_q + n_k) * d
    return SIZE * (2 * n + 2 * t * d + 2 * d), SIZE * (5 * n + 4 * t * d + 6 * d)


# heads of q and of k in use, from the fewest on: SmolLM2, Qwen2.5-0.5B and -1.5B, Gemma's, Llama-3's, Llama-4's
WIDTHS = (
    (1, 32768, 9, 3, 64), (1, 32768, 14, 2, 64), (1, 32768, 32, 8, 64), (1, 32768, 12, 2, 128), (1, 32768, 16, 8, 128),
    (1, 32768, 28, 4, 128), (1, 32768, 32, 8, 128), (1, 32768, 40, 8, 128), (1, 16384, 64, 8, 128),
    (1, 32768, 4, 1, 256), (1, 32768, 8, 4, 256),
)  # fmt: skip

CASES = (
    Case(
        "rope", "", rope_inputs, rivals.ROPE,
        sweep=((1, 32768, 64, 8, 128), (4, 4096, 32, 8, 128)), widths=WIDTHS,
        launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_rope_bytes,
    ),
    # Pythia-6.9B, a quarter of whose columns turn; GLM-4-9B, half of them
    Case(
        "rope", "partial", partial(partial_rope_inputs, part=4),
        rivals.partial_rope_providers("gpt_neox", interleaved=False),
        sweep=((4, 8192, 32, 32, 128),), launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16),
        bytes=partial(_rope_bytes, part=4),
    ),
    Case(
        "rope", "interleaved", partial(partial_rope_inputs, part=2),
        rivals.partial_rope_providers("glm", interleaved=True),
        sweep=((4, 8192, 32, 2, 128),), launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16),
        bytes=partial(_rope_bytes, part=2),
    ),
    # Qwen2-VL-7B; Llama-4-Scout
    Case(
        "rope", "sections", sections_inputs, rivals.ROPE_SECTIONS,
        sweep=((4, 16384, 28, 4, 128), (4, 4096, 28, 4, 128)),
        launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_sections_bytes,
    ),
    Case(
        "rope", "complex", complex_inputs, rivals.ROPE_COMPLEX,
        sweep=((4, 8192, 40, 8, 128),), launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_complex_bytes,
    ),
    # Qwen3-8B, Qwen3-0.6B
    Case(
        "rms_norm_rope", "", norm_rope_inputs, rivals.NORM_ROPE,
        sweep=((1, 32768, 32, 8, 128), (1, 8192, 32, 8, 128), (1, 8192, 16, 8, 128)), widths=WIDTHS,
        launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_norm_rope_bytes,
    ),
)  # fmt: skip
