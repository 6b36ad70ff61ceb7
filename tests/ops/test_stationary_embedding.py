"""stationary_embedding against F.embedding over the tokens of all ranks, which are threads.

On a CPU: autograd runs the backwards of one GPU one after the other, and these wait for one another.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shards import Round, Shard, on_ranks
from torch import Tensor

from ds_fused.ops.vocab.stationary_embedding import stationary_embedding

V, H = 29, 6
ROWS = [(0, 10), (10, 12), (12, V)]
# one token and one column at a time; a few of each, with a rest; all at once
BLOCK_BYTES = [0, 500, 2**20]


def looked_up(
    weight: Tensor, ids: list[Tensor], padding_idx: int | None, block_bytes: int, dy: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Shard]]:
    """What each rank finds, and its shard; with dy the gradient is in weight.grad."""
    all_ranks = Round(len(ids))
    rows = ROWS if len(ids) == 3 else [(0, V)]
    shards = [Shard(weight, *rows[rank], rank, all_ranks) for rank in range(len(ids))]
    found: list = [None] * len(ids)

    def run(rank: int) -> None:
        y = found[rank] = stationary_embedding(ids[rank], shards[rank], padding_idx, block_bytes=block_bytes)
        if dy is not None:
            y.backward(dy[rank])

    # the threads write into it, so none may be the one that makes it
    weight.grad = None if dy is None else torch.full_like(weight, float("nan"))
    on_ranks(all_ranks, run)
    return found, shards


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=draw).to(dtype).requires_grad_()
    ids = [torch.randint(V, shape, generator=draw) for shape in shapes]
    return weight, ids, [torch.randn(*shape, H, generator=draw).to(dtype) for shape in shapes]


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# words that come several times, on one rank and on several; ragged ranks, one without tokens, all of them; one rank
@pytest.mark.parametrize("shapes", [[(2, 20)] * 3, [(3, 4), (0,), (5,)], [(2, 0), (0,), (0,)], [(40,)]])
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_stationary_embedding(shapes, padding_idx, dtype, block_bytes):
    weight, ids, dy = drawn(shapes, dtype)
    if ids[0].numel():
        ids[0].view(-1)[:2] = 5
    found, _ = looked_up(weight, ids, padding_idx, block_bytes, dy)
    exact = weight.detach().double().requires_grad_()
    for mine, y, upstream in zip(ids, found, dy, strict=True):
        assert torch.equal(y, F.embedding(mine, weight, padding_idx))
        F.embedding(mine, exact, padding_idx).backward(upstream.double())
    # one rounding of a sum of fp32
    assert torch.allclose(weight.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-5)
    if padding_idx is not None:
        assert not weight.grad[padding_idx].any()


def test_a_sum_over_ranks_may_be_too_large_for_fp16():
    """60000 on each of three ranks: the mean fits, which the shard makes of the sum."""
    weight, ids, dy = drawn([(1,)] * 3, torch.float16)
    for mine, upstream in zip(ids, dy, strict=True):
        mine.fill_(0), upstream.fill_(60000.0)
    _, (shard, *_) = looked_up(weight, ids, None, 2**20, dy)
    assert shard.room.rows[0].tolist() == [180000.0] * H


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_a_frozen_table_gets_no_gradient(block_bytes):
    weight, ids, _ = drawn([(4,), (2,), (0,)], torch.float32)
    found, shards = looked_up(weight.requires_grad_(False), [mine.int() for mine in ids], None, block_bytes)
    for mine, y in zip(ids, found, strict=True):
        assert not y.requires_grad
        assert torch.equal(y, weight[mine])
    # the ids, then block after block
    assert [kind for kind, _ in shards[0].collectives] == ["gather", *["reduce_scatter"] * (1 if block_bytes else 4)]


@pytest.mark.parametrize(("block_bytes", "there", "back"), [(0, 20, H), (500, 4, 3), (2**20, 1, 1)])
def test_collectives_depend_on_the_most_tokens_alone(block_bytes, there, back):
    """500 bytes hold 6 tokens of each rank, so 20 are in 4 even parts, and 2 of the 6 columns of all tokens."""
    seen = []
    for shapes in ([(20,)] * 3, [(3,), (20,), (0,)]):
        weight, ids, dy = drawn(shapes, torch.float32)
        _, shards = looked_up(weight, ids, 5, block_bytes, dy)
        seen += [shard.collectives for shard in shards]
    assert all(each == seen[0] for each in seen)
    kinds = [kind for kind, _ in seen[0]]
    assert kinds == ["gather", *["reduce_scatter"] * there, *["gather"] * back]
    if block_bytes:
        assert all(torch.Size(shape).numel() * 4 <= block_bytes for kind, shape in seen[0][1:])


def test_a_second_backward_is_right():
    weight, (ids,), (dy,) = drawn([(7,)], torch.float32)
    y = stationary_embedding(ids, Shard(weight, 0, V))
    (wanted,) = torch.autograd.grad(F.embedding(ids, weight), weight, dy)
    for _ in range(2):
        weight.grad = None
        y.backward(dy, retain_graph=True)
        assert torch.equal(weight.grad, wanted)


def test_errors_name_what_came():
    shard = Shard(torch.randn(13, 6), 0, 13)
    with pytest.raises(ValueError, match=r"stationary_embedding: ids are torch.float32"):
        stationary_embedding(torch.ones(2), shard)
    for wrong in (-1, 13):
        with pytest.raises(ValueError, match=rf"stationary_embedding: id {wrong} lies outside \[0, 13\)"):
            stationary_embedding(torch.tensor([0, wrong]), shard)
    assert not shard.collectives
