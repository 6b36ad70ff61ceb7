"""The transforms of torch.func: an op computes its reference under them, or says that it can't be passed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import ds_fused
from ds_fused import ops


def rows(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "glu", "relu2", "softmax", "cross_entropy"])
def test_they_pass(name, device):
    op, x, weight = getattr(ds_fused, name), rows(3, 5, 8, device=device), rows(8, device=device)
    labels = torch.arange(5, device=device)
    arguments = {"rms_norm": (weight,), "layer_norm": (weight,), "glu": (rows(3, 5, 8, device=device).neg(),)}

    def run(x: Tensor, *more: Tensor) -> Tensor:
        return op(x, labels) if name == "cross_entropy" else op(x, *more).square().sum()

    given = (x, *arguments.get(name, ()))
    if name == "cross_entropy":
        given = (x[0],)
    else:
        # of each row by itself
        dims = tuple(0 if a.ndim == 3 else None for a in given)
        together = torch.func.vmap(lambda *a: op(*a), in_dims=dims)(*given)
        torch.testing.assert_close(together, op(*given))
    gradient = torch.func.grad(run)(*given)
    leaf = given[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(run(leaf, *given[1:]), leaf)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", ["cross_entropy", "embedding", "experts"])
def test_labels_and_ids_of_each_sample(name, device):
    """Nobody can ask whether they are legal, and how many rows an expert has."""
    ids = torch.tensor([[0, 3, 1, 4], [2, 2, -100, 0]], device=device)
    table, x, weights = rows(5, 8, device=device), rows(2, 4, 5, device=device), rows(2, 2, device=device).softmax(-1)
    up, down = rows(5, 6, 5, device=device), rows(5, 5, 3, device=device)
    call, given = {
        "cross_entropy": (ds_fused.cross_entropy, (x, ids)),
        "embedding": (lambda ids: ds_fused.embedding(ids, table), (ids.clamp_min(0),)),
        "experts": (
            lambda x, ids: ds_fused.experts(x, up, down, ids.view(2, 2), weights), (x[:, :2], ids.clamp_min(0)),
        ),
    }[name]  # fmt: skip
    one_by_one = torch.stack([call(*each) for each in zip(*given, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(*given), one_by_one)
    if name != "embedding":
        gradients = torch.func.vmap(torch.func.grad(lambda *given: call(*given).sum()))(*given)
        for i, gradient in enumerate(gradients):
            wanted = torch.func.grad(lambda *given: call(*given).sum())(*(each[i] for each in given))
            torch.testing.assert_close(gradient, wanted)


def test_heads_say_that_they_do_not(device):
    x, weight, labels = rows(4, 8, device=device), rows(11, 8, device=device), torch.arange(4, device=device)
    for name, run in (
        ("linear_cross_entropy", lambda x: ops.linear_cross_entropy(x, weight, labels)),
        ("linear_log_probs", lambda x: ops.linear_log_probs(x, weight, labels).sum()),
        ("linear_jsd", lambda x: ops.linear_jsd(x, weight, x.detach(), weight)),
        ("linear_kl_div", lambda x: ops.linear_kl_div(x, weight, x.detach(), weight)),
        ("linear_cosine", lambda x: ops.linear_cosine(x, weight, x.detach(), weight)),
    ):
        with pytest.raises(RuntimeError, match=rf"{name}: torch.func's transforms .*op\('{name}'\).reference"):
            torch.func.grad(run)(x)
        run(x.requires_grad_()).backward()


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "glu", "softmax"])
def test_derivatives_go_forward(name, device):
    x, direction = rows(3, 8, device=device), rows(3, 8, device=device).flip(0)
    arguments = {"rms_norm": (rows(8, device=device),), "layer_norm": (rows(8, device=device),), "glu": (x.neg(),)}
    more = arguments.get(name, ())
    op = getattr(ds_fused, name)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, direction), *more))
    _, wanted = torch.func.jvp(lambda x: op(x, *more), (x,), (direction,))
    torch.testing.assert_close(value, op(x, *more))
    torch.testing.assert_close(tangent, wanted)
