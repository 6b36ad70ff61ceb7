"""experts where tiles are copied by descriptors: both products, the order of rows, and a graph's nodes.

On a CPU the device is said to be able to, and tiles are small; a GPU that can has these kernels in test_experts.py too.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from test_experts import inputs_of
from torch import Tensor

from ds_fused.ops.common._triton import copies_tiles
from ds_fused.ops.mlp import _grouped_products, _routes
from ds_fused.ops.mlp import _grouped_products_tma as tma
from ds_fused.ops.mlp.experts import experts, experts_reference


@pytest.fixture(autouse=True)
def copies(monkeypatch, device) -> None:
    if device.type == "cuda":
        if not copies_tiles(torch.empty(0, device=device)):
            pytest.skip("this GPU has no TMA")
    else:
        monkeypatch.setattr(_grouped_products, "copies_tiles", lambda x: True)
        for name in ("ROWS", "COLS", "STEP", "BLOCK"):
            monkeypatch.setattr(tma, name, 16)
        monkeypatch.setattr(tma, "GROUP", 2)
        monkeypatch.setattr(_routes, "CHUNK", 8)
    monkeypatch.setattr(_grouped_products, "FEW_ROWS", 0)
    monkeypatch.setattr(_grouped_products, "MANY", 0)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The products that are made by these kernels."""
    found = []
    for name in ("product_of_rows_tma", "product_of_experts_tma"):
        stock = getattr(tma, name)

        def noted(*args, name=name, stock=stock, **options):
            found.append(name)
            return stock(*args, **options)

        monkeypatch.setattr(tma, name, noted)
    return found


# T, k, E, H, I: sides that are no multiples of a tile's too
@pytest.mark.parametrize("shape, dtype", [((2, 1, 1, 16, 16), torch.float16), ((13, 2, 3, 48, 32), torch.bfloat16)])
def test_experts(shape, dtype, device, launches):
    as_accurate(experts, experts_reference, inputs_of(*shape, device=device), dtype)
    assert {"product_of_rows_tma", "product_of_experts_tma"} <= set(launches)


# all to one expert; experts without tokens; choices that are nobody's, all of them
@pytest.mark.parametrize("ids", [[[0, 1]] * 18, [[4, 4]] * 9, [[5, 2], [3, 5], [5, 5]] * 3, [[5, 5]] * 3])
def test_how_tokens_are_shared_out(ids, device):
    inputs = inputs_of(len(ids), 2, 5, 16, 16, device, torch.tensor(ids))
    as_accurate(experts, experts_reference, inputs, torch.bfloat16)


def test_what_lies_behind_an_expert_is_not_read(device):
    """Infinite values of one expert's rows are nowhere but in its own gradient."""
    inputs = inputs_of(9, 1, 3, 16, 16, device)
    x, gate_up, down, _, weights = (t.bfloat16() if t.is_floating_point() else t for t in inputs)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2], device=device).view(-1, 1)
    x[3:7] = float("inf")
    leaves = [gate_up.requires_grad_(), down.requires_grad_()]
    with nan_filled():
        gradients = torch.autograd.grad(experts(x, *leaves, ids, weights).sum(), leaves)
    for gradient in gradients:
        assert gradient[0].isfinite().all() and gradient[2].isfinite().all() and not gradient[1].isfinite().any()


def test_weights_that_are_stored_the_other_way(device, launches):
    x, gate_up, down, *rest = inputs_of(13, 2, 3, 48, 32, device)
    stored = [w.transpose(1, 2).contiguous() for w in (gate_up, down)]

    def passed(op):
        return lambda x, gate_up, down, *rest: op(x, gate_up.transpose(1, 2), down.transpose(1, 2), *rest)

    as_accurate(passed(experts), passed(experts_reference), [x, *stored, *rest], torch.bfloat16)
    assert "product_of_rows_tma" in launches


def test_weights_that_no_descriptor_can_name(device, launches):
    """An address that 16 bytes do not divide, as in a buffer of several parameters."""

    def moved(weight: Tensor) -> Tensor:
        weight = weight.bfloat16()
        return torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)

    x, gate_up, down, *rest = inputs_of(13, 2, 3, 48, 32, device)
    as_accurate(experts, experts_reference, [x, moved(gate_up), moved(down), *rest], torch.bfloat16)
    assert "product_of_experts_tma" in launches and "product_of_rows_tma" not in launches


def test_rows_in_order(device):
    x = randn(7, 20, device=device).bfloat16()
    ids = torch.randint(4, (7, 2), generator=torch.Generator().manual_seed(0)).to(device)
    routes = _routes.routes_of(ids.view(-1), 2, 3, 16)
    last = int((ids < 3).sum())
    assert torch.equal(tma.in_order(x, routes)[:last], x[routes.tokens[:last].long()])


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    compiled = torch.compile(experts, fullgraph=True)
    for t in (70, 300, 301):
        inputs = [v.bfloat16() if v.is_floating_point() else v for v in inputs_of(t, 2, 4, 64, 48, device)]
        leaves = [v.requires_grad_() for v in inputs if v.is_floating_point()]
        results = [(y, *torch.autograd.grad(y.sum(), leaves)) for y in (compiled(*inputs), experts(*inputs))]
        torch.testing.assert_close(*results)


def test_nodes_know_what_they_make(device):
    x, gate_up, down, ids, _ = inputs_of(13, 2, 3, 48, 32, device)
    a, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    routes = _routes.routes_of(ids.view(-1), 2, 3, tma.ROWS)
    a = tma.in_order(a, routes)
    for node, args in (
        (_grouped_products._product_of_rows_node, (a, gate_up, list(routes), False)),
        (_grouped_products._product_of_rows_node, (a, down, list(routes), True)),
        (_grouped_products._product_of_experts_node, (a[:, :32].contiguous(), a, list(routes), down, True)),
    ):
        made = node(*args)
        faked = torch.library.opcheck(node, args, test_utils=("test_schema", "test_faketensor"))
        assert made.isfinite().any() and set(faked.values()) == {"SUCCESS"}
