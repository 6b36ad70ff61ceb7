"""slab_embedding against F.embedding, over slabs of one row and more, with ids that count up and with others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.vocab.slab_embedding import slab_embedding
from ds_fused.ops.vocab.slabs import WholeWeight


class Shuffled(WholeWeight):
    """The same slabs, whose ids don't count up: those of a shard on each rank."""

    def __init__(self, weight: Tensor, slab_rows: int) -> None:
        order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device)
        super().__init__(weight.detach()[order].requires_grad_(weight.requires_grad), slab_rows)
        self.ids, self.places = order, order.argsort()


@pytest.mark.parametrize("slab_rows", [1, 4, 13, 50])
@pytest.mark.parametrize("kind", [WholeWeight, Shuffled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# words that come several times, one row, no token at all; a padding token and none
@pytest.mark.parametrize(("shape", "padding_idx"), [((3, 40), None), ((3, 40), 5), ((1,), None), ((2, 0), 5)])
def test_slab_embedding(shape, padding_idx, dtype, kind, slab_rows, device):
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(13, 6, generator=draw).to(device, dtype).requires_grad_()
    ids = torch.randint(13, shape, generator=draw).to(device)
    dy = torch.randn(*shape, 6, generator=draw).to(device, dtype)
    wanted = F.embedding(ids, weight, padding_idx)
    (dweight,) = torch.autograd.grad(wanted, weight, dy)

    slabs = kind(weight, slab_rows)
    y = slab_embedding(ids, slabs, padding_idx)
    assert torch.equal(y, wanted)
    y.backward(dy)
    grad = torch.empty_like(slabs.grad)
    grad[slabs.ids if kind is Shuffled else slice(None)] = slabs.grad
    # the same sums by the same function
    assert torch.equal(grad, dweight)


def test_a_frozen_table_gets_no_gradient(device):
    slabs = WholeWeight(torch.randn(13, 6, device=device), 4)
    y = slab_embedding(torch.tensor([3, 1], device=device, dtype=torch.int32), slabs)
    assert not y.requires_grad
    assert torch.equal(y, slabs.weight[[3, 1]])


def test_errors_name_what_came():
    slabs = WholeWeight(torch.randn(13, 6), 4)
    with pytest.raises(ValueError, match=r"slab_embedding: ids are torch.float32"):
        slab_embedding(torch.ones(2), slabs)
    for wrong in (-1, 13):
        with pytest.raises(ValueError, match=rf"slab_embedding: id {wrong} lies outside \[0, 13\)"):
            slab_embedding(torch.tensor([0, wrong]), slabs)
