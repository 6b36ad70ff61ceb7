"""The judge of tests/zero: the same Llama, loss and update, in fp64 on one process, in plain PyTorch.

Nothing here is taken from transformers, DeepSpeed or ds_fused. A HuggingFace model turned to double still rounds to
fp32 inside (norms, rotary angles, loss), so it can't be the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [B, heads, T, D]: pairs (i, i + D/2) turned by t * theta^(-2i/D)."""
    length, width = x.shape[-2:]
    speed = theta ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * speed
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def loss_of(weights: Weights, sizes: dict, eps: float, theta: float, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that have a label; token t predicts the label at t + 1."""
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    batch, length = ids.shape
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids]
    for i in range(sizes["num_hidden_layers"]):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f"model.layers.{i}." in k}
        h = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            (h @ layer[f"self_attn.{name}_proj.weight"].T).view(batch, length, n, -1).transpose(1, 2)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + mixed @ layer["self_attn.o_proj.weight"].T
        h = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gated = F.silu(h @ layer["mlp.gate_proj.weight"].T) * (h @ layer["mlp.up_proj.weight"].T)
        x = x + gated @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, weights["model.norm.weight"], eps)
    logits = x @ weights.get("lm_head.weight", embedding).T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(
    weights: Weights,
    sizes: dict,
    eps: float,
    theta: float,
    steps: list,
    update_of: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    clip: float,
    skipped: Collection[int] = (),
) -> tuple[list[list[float]], list[float], Weights, dict[str, dict[str, Tensor]]]:
    """steps: per update the list of (ids, labels) of every rank and micro batch; skipped: after which there is none.

    -> losses, gradient norms, weights, and by weight what the optimizer keeps of it.

    The joined loss is the mean over those batches of each one's own mean: what data parallelism computes.
    """
    weights = {name: w.double().requires_grad_() for name, w in weights.items()}
    update = update_of(weights.values())
    losses, norms = [], []
    for step, batches in enumerate(steps):
        each = [loss_of(weights, sizes, eps, theta, ids, labels) for ids, labels in batches]
        torch.stack(each).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), clip).item())
        if step not in skipped:
            update.step()
        update.zero_grad()
        losses.append([loss.item() for loss in each])
    states = {name: dict(update.state[w]) for name, w in weights.items()}
    return losses, norms, {name: w.detach() for name, w in weights.items()}, states
