"""What can be asked of ``rope``, and what can't: its form, and the checks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# 8 + 4 heads of 256 are few, 16 + 8 of 128 are not (results/h200/tune.csv)
FEW_HEADS, FEW_ELEMENTS = 16, 3072


class RopeForm(NamedTuple):
    """How columns pair and where a pair finds its angle."""

    interleaved: bool = False
    sections: tuple[int, int, int] | None = None  # pairs that turn by time, height, width
    alternating: bool = False  # sections mix: pairs 0, 1, 2 turn by time, height, width, and so on
    complex: bool = False  # cos and sin of a pair side by side in one tensor
    heads_dim: int = 1  # of q and k: 1 in [B, H, T, D], 2 in [B, T, H, D]


def are_few(q_heads: int, k_heads: int, d: int) -> bool:
    """Whether a token's heads are so few that one warp or two turn them sooner than the number for a large model's."""
    heads = q_heads + k_heads
    return heads <= FEW_HEADS and heads * d <= FEW_ELEMENTS


def check_rope(
    op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, unsqueeze_dim: int, form: RopeForm
) -> None:
    """Raises where the arguments of ``rope``, or of an op that turns as it does, do not fit each other."""
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"{op}: unsqueeze_dim is {unsqueeze_dim}; 1 is for [B, H, T, D], 2 for [B, T, H, D]")
    if sin is None and not form.complex:
        raise ValueError(f"{op}: sin is missing, and cos is {cos.dtype}; only complex angles come as one tensor")
    if sin is not None and form.complex:
        raise ValueError(f"{op}: cos is {cos.dtype}, which holds the sine too; pass sin=None")
    if form.alternating and form.sections is None:
        raise ValueError(f"{op}: alternating is how sections mix; pass sections as well")

    axes = 0 if form.sections is None else 1
    # a tensor makes its shape anew each time
    q_shape, k_shape, shape = q.shape, k.shape, cos.shape
    n_dims, batched = len(q_shape), len(shape) == axes + 3
    if (
        n_dims not in (3, 4)
        or len(k_shape) != n_dims
        or not (len(shape) == axes + 2 or (batched and n_dims == 4))
        or (axes and shape[0] != 3)
        or (sin is not None and shape != sin.shape)
    ):
        raise ValueError(
            f"{op}: q and k must have 4 dimensions (3 without a batch), {_angles(form)}; got {_shapes(q, k, cos, sin)}"
        )
    heads_dim = unsqueeze_dim + n_dims - 4
    n_tokens, d = q_shape[n_dims - 1 - unsqueeze_dim], q_shape[-1]
    behind = heads_dim + 1
    if q_shape[:heads_dim] != k_shape[:heads_dim] or q_shape[behind:] != k_shape[behind:]:
        raise ValueError(
            f"{op}: q and k may differ in their heads only (dimension {heads_dim}); got {_shapes(q, k, cos, sin)}"
        )
    if shape[-2] != n_tokens or (batched and shape[-3] not in (1, q_shape[0])):
        batch = f"{q_shape[0]} or 1" if n_dims == 4 else None
        raise ValueError(f"{op}: {_angles(form, batch, n_tokens)}; got {_shapes(q, k, cos, sin)}")
    r = shape[-1] * (2 if form.complex else 1)
    if not 0 < r <= d or r % 2:
        wide = f"{d // 2} (half a head)" if form.complex else f"{d} (a head)"
        even = "" if form.complex else "an even number of columns wide, "
        raise ValueError(f"{op}: cos must be {even}at least 1 and at most {wide}; got {_shapes(q, k, cos, sin)}")
    if axes and (len(form.sections) != 3 or min(form.sections) < 0 or sum(form.sections) != r // 2):
        raise ValueError(
            f"{op}: sections is {form.sections}; it must be the pairs that turn by time, height and width, "
            f"{r // 2} together"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or (sin is not None and sin.requires_grad)):
        raise ValueError(f"{op}: cos and sin get no gradient, and one of them requires it; detach them")


def _angles(form: RopeForm, batch: str | None = "B or 1", n_tokens: int | str = "T") -> str:
    sizes = [*(["3"] if form.sections is not None else []), *([batch] if batch else []), str(n_tokens)]
    shape = ", ".join([*sizes, "R/2" if form.complex else "R"])
    return f"cos must be [{shape}]" + ("" if form.complex else ", and so must sin")


def _shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None) -> str:
    named = {"q": q, "k": k, "cos": cos, "sin": sin}
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items() if x is not None)


def check_inplace(q: Tensor, k: Tensor) -> None:
    """Raises where q and k themselves can't be written over."""
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k)):
            base = x._base
            if (x.is_leaf and x.requires_grad) or (base is not None and base.requires_grad and base.is_leaf):
                raise ValueError(
                    f"rope: inplace=True would overwrite {name}, a leaf that requires a gradient or its view"
                )
    if q.data_ptr() == k.data_ptr() and q.numel():
        raise ValueError("rope: inplace=True, but q and k share memory")


def check_inplace_strides(q: Tensor, k: Tensor) -> None:
    """Raises where tensors that lie as q and k do can't take the results."""
    for name, x in (("q", q), ("k", k)):
        if any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"rope: inplace=True, but elements of {name} share memory (it is expanded)")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"rope: inplace=True, but the columns of {name} do not lie side by side")
