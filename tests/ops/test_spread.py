"""Tensors that are spread over ranks: DTensors go to PyTorch, and a head's weight that is not here is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from accuracy import randn, same_bits
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ds_fused
from ds_fused.ops.common import _triton
from ds_fused.ops.common._say import say_once


@pytest.fixture
def mesh(device) -> Iterator[DeviceMesh]:
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        dist.destroy_process_group()


# as sequence parallelism has them: tokens spread, weights on every rank
OPS = {
    "rms_norm": (ds_fused.rms_norm, [(2, 6, 8), (8,)]),
    "layer_norm": (ds_fused.layer_norm, [(2, 6, 8), (8,), (8,)]),
    "add_rms_norm": (lambda *given: ds_fused.add_rms_norm(*given)[0], [(2, 6, 8), (2, 6, 8), (8,)]),
    "glu": (ds_fused.glu, [(2, 6, 8), (2, 6, 8)]),
    "relu2": (ds_fused.relu2, [(2, 6, 8)]),
    "softmax": (ds_fused.softmax, [(2, 6, 8)]),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_of_dtensors_is_pytorchs(name, mesh, device, caplog):
    op, shapes = OPS[name]
    plain = [randn(*shape, device=device, seed=i).float().requires_grad_() for i, shape in enumerate(shapes)]
    spread = [
        distribute_tensor(t.detach(), mesh, [Shard(1) if t.ndim == 3 else Replicate()]).requires_grad_() for t in plain
    ]
    wanted = op(*plain)
    wanted.square().sum().backward()

    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "ds_fused"):
        found = [op(*spread) for _ in range(2)]
    assert caplog.text.count("an op was given a DTensor") == 1
    found[1].square().sum().backward()
    assert isinstance(found[1], DTensor)
    torch.testing.assert_close(found[1].full_tensor(), wanted)
    for ours, theirs in zip(spread, plain, strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


@pytest.mark.parametrize("name", OPS)
def test_what_a_collective_has_yet_to_bring_is_waited_for(name, device, caplog):
    """As layers that are split over ranks hand on their outputs, and the gradients of their inputs: no address."""
    op, shapes = OPS[name]
    given = [randn(*shape, device=device, seed=i).float() for i, shape in enumerate(shapes)]
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "ds_fused"):
        found = op(*[AsyncCollectiveTensor(t) if t.ndim == 3 else t for t in given])
    assert caplog.text.count("an op was given a tensor (AsyncCollectiveTensor)") == 1
    leaves = [t.requires_grad_() for t in given]
    y = op(*leaves)
    torch.testing.assert_close(found, y.detach())
    dy = randn(*y.shape, device=device, seed=7).float()
    wanted = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for got, exact in zip(torch.autograd.grad(y, leaves, AsyncCollectiveTensor(dy)), wanted, strict=True):
        assert same_bits(got, exact)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_labels_and_ids_that_a_collective_has_yet_to_bring(shape, device):
    ids = torch.arange(6, device=device).view(shape)
    x, table, choices = (randn(*s, device=device).float() for s in ((*shape, 8), (8, 8), (*shape, 2)))
    up, down = randn(8, 10, 8, device=device).float(), randn(8, 8, 5, device=device).float()
    of_each = torch.stack([ids, ids.flip(0)], -1)
    for op, given in (
        (lambda ids: ds_fused.cross_entropy(x, ids), ids),
        (lambda ids: ds_fused.linear_cross_entropy(x, table, ids), ids),
        (lambda ids: ds_fused.jsd(x, x.flip(0), ids, ignore_index=2), ids),
        (lambda ids: ds_fused.embedding(ids, table), ids),
        (lambda ids: ds_fused.experts(x, up, down, ids, choices), of_each),
    ):
        assert same_bits(op(AsyncCollectiveTensor(given)), op(given))


@pytest.mark.parametrize("name", OPS)
def test_rows_of_nested_tensors(name, device):
    op, shapes = OPS[name]
    many = torch.nested.nested_tensor([randn(n, 8, device=device).float() for n in (3, 2)], layout=torch.jagged)
    vectors = [randn(8, device=device, seed=i).float() for i, shape in enumerate(shapes) if len(shape) == 1]
    found = op(*[many] * (len(shapes) - len(vectors)), *vectors)
    for got, rows in zip(found.unbind(), many.unbind(), strict=True):
        torch.testing.assert_close(got, op(*[rows] * (len(shapes) - len(vectors)), *vectors))


def test_a_parameter_and_a_subclass_are_no_dtensors(device):
    class Own(Tensor):
        pass

    x = torch.empty(3, device=device)
    assert _triton.runs_kernels(x, torch.nn.Parameter(x), x.as_subclass(Own), None)


def of_two(op: Callable) -> Callable:
    """Over a student and a teacher whose head is here."""
    return lambda x, weight, labels: op(x, weight, x, torch.ones(11, 8, device=x.device), labels)


HEADS = {
    "linear_cross_entropy": ds_fused.linear_cross_entropy,
    "linear_log_probs": ds_fused.linear_log_probs,
    "linear_jsd": of_two(ds_fused.linear_jsd),
    "linear_kl_div": of_two(ds_fused.linear_kl_div),
    "linear_cosine": of_two(ds_fused.linear_cosine),
    "LinearDPOLoss": ds_fused.nn.LinearDPOLoss(),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_weight_that_is_not_here_is_an_error(head, mesh, device):
    x, labels = torch.ones(2, 3, 8, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    # what ZeRO-3 leaves of a parameter between its layer's calls
    shard = torch.nn.Parameter(torch.empty(0, device=device))
    with pytest.raises(ValueError, match="weight has no elements, as one that ZeRO-3 has sharded"):
        HEADS[head](x, shard, labels)
    rows = distribute_tensor(torch.ones(11, 8, device=device), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"weight is a DTensor, .*full_tensor\(\)"):
        HEADS[head](x, rows, labels)
