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

from benchmarks import attention_rivals, rivals
from benchmarks.rivals import Provider

DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize
# bf16 operands give 1e-3 to 1e-2; more than this is another function, not another rounding
LARGEST_ERROR = 2e-2
# a divergence is what is left where student and teacher agree, and both have their logits rounded to bf16: on an H100
# eager code is off by 2.1e-2 (linear_jsd) and 2.5e-2 (linear_kl_div). Allowed is twice the worse
DIVERGENCE_ERROR = 5e-2
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


def bias_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    norm = norm_inputs(generator, n, d)
    return Inputs(norm.tensors | {"bias": nn.Parameter(_randn(generator, d))}, norm.upstream)


def layer_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = _randn(generator, n, d).requires_grad_()
    weight, bias = (nn.Parameter(_randn(generator, d)) for _ in range(2))
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": _randn(generator, n, d)}, ("dy",))


def add_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x, residual = (_randn(generator, n, d).requires_grad_() for _ in range(2))
    weight, bias = (nn.Parameter(_randn(generator, d)) for _ in range(2))
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return Inputs(tensors | {"dy": _randn(generator, n, d), "dsum": _randn(generator, n, d)}, ("dy", "dsum"))


def add_rms_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x, residual = (_randn(generator, n, d).requires_grad_() for _ in range(2))
    weight = nn.Parameter(_randn(generator, d))
    dy, dsum = (_randn(generator, n, d) for _ in range(2))
    return Inputs({"x": x, "residual": residual, "weight": weight, "dy": dy, "dsum": dsum}, ("dy", "dsum"))


def gated_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    norm = norm_inputs(generator, n, d)
    return Inputs(norm.tensors | {"gate": _randn(generator, n, d).requires_grad_()}, norm.upstream)


def modulated_norm_inputs(generator: torch.Generator, b: int, t: int, d: int) -> Inputs:
    x, dy = (_randn(generator, b, t, d) for _ in range(2))
    weight = nn.Parameter(_randn(generator, d))
    scale, shift = (_randn(generator, b, 1, d).requires_grad_() for _ in range(2))
    return Inputs({"x": x.requires_grad_(), "weight": weight, "scale": scale, "shift": shift, "dy": dy}, ("dy",))


def attention_residual_inputs(generator: torch.Generator, n: int, t: int, d: int) -> Inputs:
    stack, dy = _randn(generator, n, t, d).requires_grad_(), _randn(generator, t, d)
    # scores of about one: no block is alone
    query = nn.Parameter(_randn(generator, d, scale=d**-0.5))
    return Inputs({"stack": stack, "query": query, "weight": nn.Parameter(_randn(generator, d)), "dy": dy}, ("dy",))


def listed_blocks_inputs(generator: torch.Generator, n: int, t: int, d: int) -> Inputs:
    tensors = attention_residual_inputs(generator, n, t, d).tensors
    stack = tensors.pop("stack").detach()
    return Inputs({f"block{i}": stack[i].clone().requires_grad_() for i in range(n)} | tensors, ("dy",))


# four, as DeepSeek-V4 has
N_STREAMS = 4
N_COEFFICIENTS = N_STREAMS * (N_STREAMS + 2)


def coefficients_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    n, m = N_STREAMS, N_COEFFICIENTS
    x = _randn(generator, t, n, c).requires_grad_()
    # as Liger has it; ours copies it
    phi = nn.Parameter(_randn(generator, n * c, m, scale=(n * c) ** -0.5))
    bias, scale = nn.Parameter(_randn(generator, m).float()), nn.Parameter(torch.ones(3, device=generator.device))
    # gradients lean on what is projected, for dyt_inputs' reason: each of dscale is a number
    mix = (x.flatten(1) @ phi).detach().float()
    upstream = {
        name: _randn(generator, t, part.shape[1]).float() + part
        for name, part in zip(("dpre", "dpost", "dres"), mix.split([n, n, n * n], 1), strict=True)
    }
    upstream["dres"] = upstream["dres"].view(t, n, n)
    return Inputs({"x": x, "phi": phi, "bias": bias, "scale": scale, **upstream}, tuple(upstream))


def streams_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    n = N_STREAMS
    tensors = {
        "x": _randn(generator, t, n, c).requires_grad_(),
        "y": _randn(generator, t, c).requires_grad_(),
        "post": torch.rand(t, n, generator=generator, device=generator.device).requires_grad_(),
        "res": torch.rand(t, n, n, generator=generator, device=generator.device).softmax(-1).requires_grad_(),
    }
    return Inputs(tensors | {"dout": _randn(generator, t, n, c)}, ("dout",))


def pre_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    tensors = streams_inputs(generator, t, c).tensors
    x, pre = tensors["x"], tensors["post"]
    return Inputs({"x": x, "pre": pre, "dy": _randn(generator, t, c)}, ("dy",))


def connection_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    tensors = coefficients_inputs(generator, t, c).tensors
    tensors = {name: x for name, x in tensors.items() if not name.startswith("d")}
    return Inputs(tensors | {"dout": _randn(generator, t, N_STREAMS, c)}, ("dout",))


def embedding_inputs(generator: torch.Generator, n: int, h: int, n_vocab: int) -> Inputs:
    # words are not equally frequent: the cube of a uniform number has one in ten tokens among a thousandth of the words
    ids = torch.rand(n, generator=generator, device=generator.device).pow(3).mul(n_vocab).long().clamp_max(n_vocab - 1)
    weight = nn.Parameter(_randn(generator, n_vocab, h))
    return Inputs({"ids": ids, "weight": weight, "dy": _randn(generator, n, h)}, ("dy",))


def row_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    return Inputs({"x": _randn(generator, n, d).requires_grad_(), "dy": _randn(generator, n, d)}, ("dy",))


def attention_inputs(generator: torch.Generator, b: int, h: int, t: int, d: int) -> Inputs:
    # as projections hand them over: [B, H, T, D] as a view of [B, T, H, D]
    q, k, v, dy = (_randn(generator, b, t, h, d).transpose(1, 2) for _ in range(4))
    tensors = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    return Inputs(tensors | {"dy": dy}, ("dy",))


def multi_token_inputs(
    generator: torch.Generator, b: int, c: int, n: int, *, of_group: int, taps: tuple[int, int]
) -> Inputs:
    scores, dy = (_randn(generator, b, c, n, n) for _ in range(2))
    weight = nn.Parameter(_randn(generator, c, of_group, *taps, scale=(of_group * taps[0] * taps[1]) ** -0.5))
    bias = nn.Parameter(_randn(generator, c))
    # dy leans on a constant and on the weights: dbias and dweight would be sums that cancel otherwise
    dy = dy + 1 + scores.softmax(-1)
    return Inputs({"scores": scores.requires_grad_(), "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def group_norm_inputs(generator: torch.Generator, n: int, c: int, h: int, w: int) -> Inputs:
    x = _randn(generator, n, c, h, w).requires_grad_()
    weight, bias = (nn.Parameter(_randn(generator, c)) for _ in range(2))
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": _randn(generator, n, c, h, w)}, ("dy",))


def dyt_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = _randn(generator, n, d).requires_grad_()
    weight, bias = (nn.Parameter(_randn(generator, d)) for _ in range(2))
    alpha = nn.Parameter(torch.full((1,), 0.5, device=generator.device, dtype=DTYPE))
    # dy leans on weight * x: dalpha would be a sum that cancels otherwise, whose rounding can't be told from an error
    dy = _randn(generator, n, d) + (weight * x).detach()
    return Inputs({"x": x, "alpha": alpha, "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def poly_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = _randn(generator, n, d).requires_grad_()
    weight = nn.Parameter(torch.tensor([0.5, -0.25, 1.0], device=generator.device, dtype=DTYPE))
    # without a dimension, as Liger's; the gradient that it returns fits no other
    bias = nn.Parameter(torch.tensor(0.5, device=generator.device, dtype=DTYPE))
    # dy leans on x and its square, for dyt_inputs' reason: dbias and each of dweight is a number
    dy = _randn(generator, n, d) + (x + x * x).detach()
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def glu_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    gate, up, dy = (_randn(generator, n, d) for _ in range(3))
    return Inputs({"gate": gate.requires_grad_(), "up": up.requires_grad_(), "dy": dy}, ("dy",))


def packed_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    # of GPT-OSS's size of values, of which the clamp takes some
    gate_up, dy = _randn(generator, n, 2 * d, scale=3.0), _randn(generator, n, d)
    return Inputs({"gate_up": gate_up.requires_grad_(), "dy": dy}, ("dy",))


def mlp_inputs(generator: torch.Generator, n: int, h: int, i: int) -> Inputs:
    weights = {
        f"{name}_weight": nn.Parameter(_randn(generator, *shape, scale=shape[1] ** -0.5))
        for name, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i)))
    }
    x, dy = (_randn(generator, 1, n, h) for _ in range(2))
    return Inputs({"x": x.requires_grad_(), **weights, "dy": dy}, ("dy",), by_backward=True)


def experts_inputs(generator: torch.Generator, t: int, k: int, e: int, h: int, i: int) -> Inputs:
    x, dy = (_randn(generator, t, h) for _ in range(2))
    gate_up = nn.Parameter(_randn(generator, e, 2 * i, h, scale=h**-0.5))
    down = nn.Parameter(_randn(generator, e, h, i, scale=i**-0.5))
    # as a router's: different experts, nearly as many tokens for each
    weights, ids = _randn(generator, t, e).softmax(-1).topk(k)
    tensors = {"x": x.requires_grad_(), "gate_up": gate_up, "down": down, "weights": weights.requires_grad_()}
    return Inputs(tensors | {"ids": ids, "dy": dy}, ("dy",))


def pointwise_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    return Inputs({"x": _randn(generator, n, d).requires_grad_(), "dy": _randn(generator, n, d)}, ("dy",))


def rope_inputs(generator: torch.Generator, b: int, t: int, n_q: int, n_k: int, d: int) -> Inputs:
    # as in a HuggingFace model: [B, H, T, D] as a view of [B, T, H, D], and so are their gradients
    q, k, dq, dk = (_randn(generator, b, t, h, d).transpose(1, 2) for h in (n_q, n_k, n_q, n_k))
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
    weights = {name: nn.Parameter(_randn(generator, d)) for name in ("q_weight", "k_weight")}
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


# logits of standard deviation 3: with 1 the gradient would be the label's -1 and little else, and a wrong softmax
# would pass the check
LOGITS_SCALE = 3.0
QUARTER = 0.25


def loss_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    logits = _randn(generator, n, n_vocab, scale=LOGITS_SCALE)
    return Inputs({"logits": logits.requires_grad_(), "labels": _labels(generator, n, n_vocab)})


def quarter_loss_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    # as under four steps of gradient accumulation
    dloss = torch.tensor(QUARTER, device=generator.device)
    return Inputs(loss_inputs(generator, n, n_vocab).tensors | {"dloss": dloss}, ("dloss",))


def linear_loss_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    x = _randn(generator, m, h).requires_grad_()
    weight = nn.Parameter(_randn(generator, n_vocab, h, scale=LOGITS_SCALE * h**-0.5))
    return Inputs({"x": x, "weight": weight, "labels": _labels(generator, m, n_vocab)})


def frozen_loss_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    tensors = linear_loss_inputs(generator, m, h, n_vocab).tensors
    return Inputs(tensors | {"weight": tensors["weight"].detach()})


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


def dpo_inputs(generator: torch.Generator, a: int, t: int, h: int, n_vocab: int) -> Inputs:
    tensors = distillation_inputs(generator, a * t, h, n_vocab).tensors
    return Inputs(tensors | _as_answers(tensors, a, "x", "teacher_x", "labels"))


def grpo_inputs(generator: torch.Generator, a: int, t: int, h: int, n_vocab: int) -> Inputs:
    tensors = linear_loss_inputs(generator, a * t, h, n_vocab).tensors
    advantages = torch.randn(a, generator=generator, device=generator.device)
    return Inputs(tensors | _as_answers(tensors, a, "x", "labels") | {"advantages": advantages})


def _as_answers(tensors: dict[str, Tensor], a: int, *names: str) -> dict[str, Tensor]:
    """[A T, ...] as [A, T, ...]."""
    return {name: tensors[name].detach().unflatten(0, (a, -1)).requires_grad_(name == "x") for name in names}


def kl_div_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    x, target = (_randn(generator, n, n_vocab, scale=LOGITS_SCALE) for _ in range(2))
    return Inputs({"x": x.log_softmax(-1).requires_grad_(), "target": target.softmax(-1)})


def pair_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    student, teacher = (_randn(generator, n, n_vocab, scale=LOGITS_SCALE) for _ in range(2))
    labels = _labels(generator, n, n_vocab)
    return Inputs({"student": student.requires_grad_(), "teacher": teacher, "labels": labels})


def _norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; the weight and its gradient, once each
    return SIZE * (2 * n * d + d), SIZE * (5 * n * d + 3 * d)


def _layer_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; weight and bias, once forward, weight again backward, and the gradients of both
    return SIZE * (2 * n * d + 2 * d), SIZE * (5 * n * d + 5 * d)


def _add_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, residual -> y, sum; sum, dy, dsum -> one gradient for x and residual
    return SIZE * (4 * n * d + 2 * d), SIZE * (8 * n * d + 5 * d)


def _add_rms_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, residual -> y, sum; dy, dsum, sum -> dx, which is both summands' gradient; the weight and its gradient
    return SIZE * (4 * n * d + d), SIZE * (8 * n * d + 3 * d)


def _gated_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, gate -> y; x, gate, dy -> dx, dgate; the weight and its gradient
    return SIZE * (3 * n * d + d), SIZE * (8 * n * d + 3 * d)


def _modulated_norm_bytes(b: int, t: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; scale and shift, scale again, and the gradients of both; the weight and its gradient
    return SIZE * (2 * b * t * d + 2 * b * d + d), SIZE * (5 * b * t * d + 5 * b * d + 3 * d)


def _attention_residual_bytes(n: int, t: int, d: int) -> tuple[int, int]:
    # blocks -> y; blocks, dy -> their gradients; query and weight each way, and their gradients
    return SIZE * ((n + 1) * t * d + 2 * d), SIZE * ((3 * n + 2) * t * d + 6 * d)


def _coefficients_bytes(t: int, c: int) -> tuple[int, int]:
    # x; x -> dx; phi each way and its gradient. Coefficients in fp32 and their gradients
    n, m = N_STREAMS, N_COEFFICIENTS
    small = 4 * t * m
    return SIZE * (t * n * c + n * c * m) + small, SIZE * 3 * (t * n * c + n * c * m) + 2 * small


def _pre_bytes(t: int, c: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; pre each way and its gradient, in fp32
    n = N_STREAMS
    return SIZE * (n + 1) * t * c + 4 * t * n, SIZE * (3 * n + 2) * t * c + 12 * t * n


def _post_res_bytes(t: int, c: int) -> tuple[int, int]:
    # x, y -> out; x, y, dout -> dx, dy; post and res each way and their gradients, in fp32
    n = N_STREAMS
    small = 4 * t * n * (n + 1)
    return SIZE * (2 * n + 1) * t * c + small, SIZE * (5 * n + 3) * t * c + 3 * small


def _connection_bytes(t: int, c: int) -> tuple[int, int]:
    # x -> out; x, dout -> dx; phi each way and its gradient. No algorithm is known that takes a token's streams once:
    # what the layer reads hangs on all of them
    n, m = N_STREAMS, N_COEFFICIENTS
    return SIZE * (2 * t * n * c + n * c * m), SIZE * (5 * t * n * c + 3 * n * c * m)


def _embedding_bytes(n: int, h: int, n_vocab: int) -> tuple[int, int]:
    # rows of the weight -> y; dy -> dweight, which is whole
    return SIZE * 2 * n * h, SIZE * (3 * n * h + n_vocab * h)


def _row_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; y, dy -> dx
    return SIZE * 2 * n * d, SIZE * 5 * n * d


def _sparse_row_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; y -> dx, with dy on the support alone, which is nothing beside them
    return SIZE * 2 * n * d, SIZE * 4 * n * d


def _attention_bytes(b: int, h: int, t: int, d: int) -> tuple[int, int]:
    # q, k, v -> y; q, k, v, y, dy -> dq, dk, dv
    return SIZE * 4 * b * h * t * d, SIZE * 12 * b * h * t * d


def _multi_token_bytes(b: int, c: int, n: int) -> tuple[int, int]:
    # half of the scores -> y; half of the scores and of dy -> dscores
    return SIZE * b * c * n * (3 * n) // 2, SIZE * b * c * n * (7 * n) // 2


def _group_norm_bytes(n: int, c: int, h: int, w: int) -> tuple[int, int]:
    return SIZE * (2 * n * c * h * w + 2 * c), SIZE * (5 * n * c * h * w + 5 * c)


def _glu_bytes(n: int, d: int) -> tuple[int, int]:
    # gate, up -> y; gate, up, dy -> dgate, dup
    return SIZE * 3 * n * d, SIZE * 8 * n * d


def _pointwise_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx
    return SIZE * 2 * n * d, SIZE * 5 * n * d


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


def _loss_bytes(n: int, n_vocab: int) -> tuple[int, int]:
    # logits once, dlogits once; labels and losses are nothing beside them
    return SIZE * n * n_vocab, SIZE * 2 * n * n_vocab


def _pair_bytes(n: int, n_vocab: int) -> tuple[int, int]:
    # student and teacher once, the student's gradient once
    return SIZE * 2 * n * n_vocab, SIZE * 3 * n * n_vocab


def _mlp_flops(n: int, h: int, i: int) -> tuple[int, int]:
    # three products, and two more of each backward
    return 6 * n * h * i, 18 * n * h * i


def _experts_flops(t: int, k: int, e: int, h: int, i: int) -> tuple[int, int]:
    return _mlp_flops(t * k, h, i)


def _linear_loss_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits; logits, dx and dweight
    return 2 * m * h * n_vocab, 6 * m * h * n_vocab


def _frozen_loss_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits; logits and dx
    return 2 * m * h * n_vocab, 4 * m * h * n_vocab


def _dpo_flops(a: int, t: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits of both models; of both, dx and dweight
    return _distillation_flops(a * t, h, n_vocab)


def _grpo_flops(a: int, t: int, h: int, n_vocab: int) -> tuple[int, int]:
    return _linear_loss_flops(a * t, h, n_vocab)


def _distillation_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits of both; of both, dx and dweight
    return 4 * m * h * n_vocab, 8 * m * h * n_vocab


# Llama-3's vocabulary and Llama-2's; half the tokens of the cross entropies, since eager code keeps 18 GiB of the first
PAIR_SWEEP = ((4096, 128256), (8192, 32000))
# first of each op a shape whose largest tensor has 256 MiB or more: smaller ones say less of the memory's rate.
# A 70B's width at 16k tokens, Llama-3-8B's at 8k, and a q-norm over 128-wide heads (8192 tokens x 32 heads, or x 128)
NORM_SWEEP = ((16384, 8192), (8192, 4096), (1048576, 128), (262144, 128))
# 256 MiB of widths that are no power of two: Qwen2-7B's, Mistral-Nemo's, Gemma-3-27B's
ODD_WIDTHS = ((37448, 3584), (26208, 5120), (24960, 5376))
# plain PyTorch in fp32, against which all are judged, needs about 30 GiB for them
DISTILLED = ((4096, 4096, 128256), (4096, 2048, 151936))
# 4096 queries of 32 heads, each over 4096 keys; a vocabulary
ROW_SWEEP = ((131072, 4096), (8192, 128256))
# fewer rows: the sort of the reference takes 40 bytes an element
SPARSE_ROW_SWEEP = ((32768, 4096), (2048, 128256))
# groups of 512 KiB, larger than any tile; an inner and the outer level of a UNet, 20 and 80 KiB
GROUP_NORM_SWEEP = ((16, 512, 128, 128), (16, 1280, 16, 16), (16, 320, 64, 64))

CASES = (
    Case(
        "rms_norm", "before_weight", norm_inputs, rivals.LLAMA_NORM,
        sweep=(*NORM_SWEEP, *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "rms_norm", "after_weight", norm_inputs, rivals.GEMMA_NORM,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "rms_norm", "bias", bias_norm_inputs, rivals.BIAS_NORM,
        sweep=NORM_SWEEP[:2], launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "add_rms_norm", "", add_rms_norm_inputs, rivals.ADD_NORM,
        sweep=(*NORM_SWEEP[:2], *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_add_rms_norm_bytes,
    ),
    # Qwen3-Next: 8192 tokens x 32 heads; Mamba-Codestral-7B
    Case(
        "gated_rms_norm", "norm_first", gated_norm_inputs, rivals.gated_norm_providers("norm_first"),
        sweep=((1048576, 128), (262144, 128)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_gated_norm_bytes,
    ),
    Case(
        "gated_rms_norm", "gate_first", gated_norm_inputs, rivals.gated_norm_providers("gate_first"),
        sweep=((16384, 8192), (8192, 8192)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_gated_norm_bytes,
    ),
    # FLUX at 4096 tokens, DiT-XL at 256
    Case(
        "modulated_rms_norm", "", modulated_norm_inputs, rivals.MODULATED_NORM,
        sweep=((12, 4096, 3072), (64, 256, 1152)), launch_bound=(2, 8, 1024), tiny=(2, 5, 48),
        bytes=_modulated_norm_bytes,
    ),
    # eight blocks at Llama-3-8B's width, sixteen at DeepSeek-V3's
    Case(
        "attention_residual", "", attention_residual_inputs, rivals.ATTENTION_RESIDUAL,
        sweep=((8, 16384, 4096), (16, 4096, 7168)), launch_bound=(4, 16, 1024), tiny=(3, 5, 48),
        bytes=_attention_residual_bytes,
    ),
    Case(
        "attention_residual", "blocks", listed_blocks_inputs, rivals.LISTED_ATTENTION_RESIDUAL,
        sweep=((8, 16384, 4096),), launch_bound=(4, 16, 1024), tiny=(3, 5, 48), bytes=_attention_residual_bytes,
    ),
    # DeepSeek-V4-Flash
    Case(
        "mhc_coefficients", "", coefficients_inputs, rivals.COEFFICIENTS,
        sweep=((16384, 4096), (8192, 4096)), launch_bound=(16, 256), tiny=(5, 12), bytes=_coefficients_bytes,
    ),
    Case(
        "mhc_pre", "", pre_inputs, rivals.STREAMS_PRE,
        sweep=((16384, 4096),), launch_bound=(16, 256), tiny=(5, 12), bytes=_pre_bytes,
    ),
    Case(
        "mhc_post_res", "", streams_inputs, rivals.STREAMS_POST_RES,
        sweep=((16384, 4096),), launch_bound=(16, 256), tiny=(5, 12), bytes=_post_res_bytes,
    ),
    # in front of a layer that does nothing, and behind it
    Case(
        "mhc_in", "connection", connection_inputs, rivals.CONNECTION,
        sweep=((16384, 4096), (8192, 4096)), launch_bound=(16, 256), tiny=(5, 12), bytes=_connection_bytes,
    ),
    Case(
        "embedding", "", embedding_inputs, rivals.EMBEDDING,
        sweep=((16384, 4096, 128256), (32768, 576, 49152)),
        launch_bound=(16, 1024, 1000), tiny=(300, 48, 96), bytes=_embedding_bytes,
    ),
    Case(
        "softmax", "", row_inputs, rivals.SOFTMAX,
        sweep=ROW_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_row_bytes,
    ),
    Case(
        "sparsemax", "", row_inputs, rivals.SPARSEMAX,
        sweep=SPARSE_ROW_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_sparse_row_bytes,
    ),
    # nearly the paper's taps, for each head its own (with its 6x11 Liger's planes would not be square); Liger's example
    Case(
        "multi_token_attention", "5x11 a head", partial(multi_token_inputs, of_group=1, taps=(5, 11)),
        attention_rivals.multi_token_providers((2, 5)),
        sweep=((2, 16, 2048), (1, 16, 4096)), launch_bound=(1, 4, 64), tiny=(2, 4, 20), bytes=_multi_token_bytes,
    ),
    Case(
        "multi_token_attention", "3x3 of 4 heads", partial(multi_token_inputs, of_group=4, taps=(3, 3)),
        attention_rivals.multi_token_providers((1, 1)),
        sweep=((8, 4, 2048),), launch_bound=(1, 4, 64), tiny=(2, 4, 20), bytes=_multi_token_bytes,
    ),
    # as long as a score for each pair of tokens allows, which plain PyTorch and Liger hold
    Case(
        "neighborhood_attention", "window 7", attention_inputs, attention_rivals.neighborhood_providers(7),
        sweep=((64, 16, 1024, 128), (4, 16, 4096, 64)), launch_bound=(1, 4, 64, 32), tiny=(2, 2, 20, 8),
        bytes=_attention_bytes,
    ),
    Case(
        "neighborhood_attention", "window 255", attention_inputs, attention_rivals.neighborhood_providers(255),
        sweep=((16, 16, 2048, 128),), launch_bound=(1, 4, 64, 32), tiny=(2, 2, 20, 8), bytes=_attention_bytes,
    ),
    Case(
        "layer_norm", "", layer_norm_inputs, rivals.LAYER_NORM,
        sweep=(*NORM_SWEEP, *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_layer_norm_bytes,
    ),
    Case(
        "add_layer_norm", "", add_norm_inputs, rivals.ADD_LAYER_NORM,
        sweep=((16384, 8192), (8192, 4096), (8192, 768)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_add_norm_bytes,
    ),
    Case(
        "group_norm", f"{rivals.N_GROUPS} groups", group_norm_inputs, rivals.GROUP_NORM,
        sweep=GROUP_NORM_SWEEP, launch_bound=(2, 64, 8, 8), tiny=(2, 64, 3, 5), bytes=_group_norm_bytes,
    ),
    Case(
        "dyt", "", dyt_inputs, rivals.DYT,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_layer_norm_bytes,
    ),
    # Llama-3-8B's MLPs, and PolyCom's dense model's
    Case(
        "poly_norm", "", poly_norm_inputs, rivals.POLY_NORM,
        sweep=((16384, 14336), (16384, 8192)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_pointwise_bytes,
    ),
    Case(
        "glu", "silu", glu_inputs, rivals.glu_providers("silu"),
        sweep=((16384, 28672), (8192, 14336)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gelu_tanh", glu_inputs, rivals.glu_providers("gelu_tanh"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gelu", glu_inputs, rivals.glu_providers("gelu"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "relu", glu_inputs, rivals.glu_providers("relu"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "relu2", glu_inputs, rivals.glu_providers("relu2"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    # Phi-3-mini and GLM-4-9B; GPT-OSS, four of whose 2880-wide experts a token meets
    Case(
        "glu", "packed", packed_inputs, rivals.PACKED_GLU,
        sweep=((8192, 8192), (8192, 13696)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gpt_oss", packed_inputs, rivals.GPT_OSS_GLU,
        sweep=((32768, 2880),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "rope", "", rope_inputs, rivals.ROPE,
        sweep=((1, 32768, 64, 8, 128), (4, 4096, 32, 8, 128)),
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
        sweep=((1, 32768, 32, 8, 128), (1, 8192, 32, 8, 128), (1, 8192, 16, 8, 128)),
        launch_bound=(1, 16, 8, 2, 128), tiny=(2, 6, 4, 2, 16), bytes=_norm_rope_bytes,
    ),
    # Llama-3-8B, at 8k and 32k tokens
    Case(
        "tiled_mlp", "", mlp_inputs, rivals.TILED_MLP,
        sweep=((8192, 4096, 14336), (32768, 4096, 14336)), launch_bound=(128, 64, 128), tiny=(20, 16, 24),
        flops=_mlp_flops, is_head=False,
    ),
    # Qwen3-30B-A3B at 8k and 2k tokens, Mixtral-8x7B at 4k
    Case(
        "experts", "", experts_inputs, rivals.EXPERTS,
        sweep=((8192, 8, 128, 2048, 768), (4096, 2, 8, 4096, 14336), (2048, 8, 128, 2048, 768)),
        launch_bound=(16, 2, 4, 256, 128), tiny=(5, 2, 3, 16, 24), flops=_experts_flops, is_head=False,
    ),
    # Nemotron-4-15B
    Case(
        "relu2", "", pointwise_inputs, rivals.RELU2,
        sweep=((8192, 24576),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_pointwise_bytes,
    ),
    Case(
        "cross_entropy", "", loss_inputs, rivals.loss_providers(1.0),
        sweep=((8192, 128256), (8192, 32000)), launch_bound=(16, 1024), tiny=(140, 96), bytes=_loss_bytes,
    ),
    Case(
        "cross_entropy", "upstream 1/4", quarter_loss_inputs, rivals.loss_providers(QUARTER),
        sweep=((8192, 128256),), launch_bound=(16, 1024), tiny=(140, 96), bytes=_loss_bytes,
    ),
    Case(
        "linear_cross_entropy", "", linear_loss_inputs, rivals.LINEAR_CROSS_ENTROPY,
        sweep=((8192, 4096, 128256), (16384, 2048, 151936), (4096, 4096, 128256)),
        launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_linear_loss_flops,
    ),
    # LoRA
    Case(
        "linear_cross_entropy", "frozen", frozen_loss_inputs, rivals.LINEAR_CROSS_ENTROPY,
        sweep=((8192, 4096, 128256),), launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_frozen_loss_flops,
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
    # two pairs of answers, and four answers
    Case(
        "linear_log_probs", "DPO", dpo_inputs, rivals.DPO,
        sweep=((4, 2048, 4096, 128256),), launch_bound=(2, 64, 256, 1024), tiny=(2, 70, 16, 96),
        flops=_dpo_flops, is_head=False,
    ),
    Case(
        "linear_log_probs", "GRPO", grpo_inputs, rivals.GRPO,
        sweep=((4, 2048, 4096, 128256),), launch_bound=(2, 64, 256, 1024), tiny=(2, 70, 16, 96),
        flops=_grpo_flops, is_head=False,
    ),
    Case(
        "linear_jsd", "", distillation_inputs, rivals.divergence_providers("linear_jsd", beta=0.5),
        sweep=DISTILLED, launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_distillation_flops,
        largest_error=DIVERGENCE_ERROR,
    ),
    Case(
        "linear_kl_div", "", distillation_inputs, rivals.divergence_providers("linear_kl_div", beta=0.0),
        sweep=DISTILLED[:1], launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_distillation_flops,
        largest_error=DIVERGENCE_ERROR,
    ),
    Case(
        "linear_cosine", "", distillation_inputs, rivals.COSINE,
        sweep=DISTILLED[:1], launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_distillation_flops,
        largest_error=DIVERGENCE_ERROR,
    ),
    Case(
        "kl_div", "", kl_div_inputs, rivals.KL_DIV,
        sweep=PAIR_SWEEP, launch_bound=(16, 1024), tiny=(140, 96), bytes=_pair_bytes,
    ),
    Case(
        "jsd", "beta=0.5", pair_inputs, rivals.jsd_providers(0.5),
        sweep=PAIR_SWEEP, launch_bound=(16, 1024), tiny=(140, 96), bytes=_pair_bytes,
    ),
    Case(
        "jsd", "beta=0", pair_inputs, rivals.jsd_providers(0.0),
        sweep=PAIR_SWEEP, launch_bound=(16, 1024), tiny=(140, 96), bytes=_pair_bytes,
    ),
    Case(
        "tvd", "", pair_inputs, rivals.TVD,
        sweep=PAIR_SWEEP, launch_bound=(16, 1024), tiny=(140, 96), bytes=_pair_bytes,
    ),
)  # fmt: skip
