"""An embedding over slabs: hooks of others fire as before, those of the library that would gather are left out."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from ds_fused.engine.zero3.lookup import Lookup
from ds_fused.modules.layers.embedding import SlabEmbedding, slab_embedding_of
from ds_fused.modules.swap import swap, unswap
from ds_fused.ops.vocab.slab_embedding import slab_embedding
from ds_fused.ops.vocab.slabs import WholeWeight


def test_the_hooks_of_one_library_are_left_out():
    embedding = nn.Embedding(13, 6, padding_idx=2)
    ids = torch.tensor([[1, 2, 1]])
    wanted = embedding(ids)
    seen = []

    def mine(module, args, output):
        seen.append("mine")
        return output * 2

    def theirs(module, args):
        seen.append("theirs")

    theirs.__module__ = "deepspeed.runtime.zero.parameter_offload"
    embedding.register_forward_hook(mine)
    handle = embedding.register_forward_pre_hook(theirs)
    swap(embedding, SlabEmbedding, _ds_fused_lookup=partial(slab_embedding, slabs=WholeWeight(embedding.weight, 4)))
    assert torch.equal(embedding(ids), wanted * 2)
    assert seen == ["mine"]

    # they are still there, and can still be removed
    unswap(embedding)
    assert torch.equal(embedding(ids), wanted * 2)
    assert seen == ["mine", "theirs", "mine"]
    handle.remove()
    embedding(ids)
    assert seen[3:] == ["mine"]


def test_a_forward_around_the_lookup_runs_on():
    embedding = Gemma3TextScaledWordEmbedding(13, 6, padding_idx=0, embed_scale=2.5)
    other = Gemma3TextScaledWordEmbedding(13, 6, padding_idx=0, embed_scale=0.5)
    ids = torch.tensor([[1, 2, 1, 0]])
    wanted, of_other = embedding(ids), other(ids)
    slabs = WholeWeight(embedding.weight, 4)
    swap(embedding, slab_embedding_of(type(embedding)), _ds_fused_lookup=partial(slab_embedding, slabs=slabs))
    assert torch.equal(embedding(ids), wanted)
    assert slab_embedding_of(type(other)) is slab_embedding_of(Gemma3TextScaledWordEmbedding)
    dy = torch.randn_like(wanted)
    (dweight,) = torch.autograd.grad(wanted, embedding.weight, dy)
    embedding(ids).backward(dy)
    assert torch.equal(slabs.grad, dweight)
    # the class itself, and what is made of it elsewhere, are as they were
    assert torch.equal(other(ids), of_other)


@pytest.mark.parametrize("cls", [nn.Embedding, Gemma3TextScaledWordEmbedding])
def test_a_copy_looks_up_in_its_own_table(cls):
    embedding = cls(13, 6, padding_idx=0, **({} if cls is nn.Embedding else {"embed_scale": 2.5}))
    ids = torch.tensor([[1, 2, 1, 0]])
    swap(embedding, slab_embedding_of(cls), _ds_fused_lookup=Lookup(slabs=None, shard=None, block_bytes=0))
    twin = copy.deepcopy(embedding)
    rows = twin(ids)
    unswap(embedding)
    assert torch.equal(rows, embedding(ids))
    rows.sum().backward()
    assert twin.weight.grad is not None and embedding.weight.grad is None
    unswap(twin)
    assert type(twin) is cls


class Renamed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight) + 1


class Deeper(Gemma3TextScaledWordEmbedding):
    pass


@pytest.mark.parametrize("cls", [Renamed, Deeper])
def test_what_may_do_more_is_left(cls):
    assert slab_embedding_of(cls) is None
