"""An embedding over slabs: hooks of others fire as before, those of the library that would gather are left out."""

from __future__ import annotations

import torch
from torch import nn

from ds_fused.modules.embedding import SlabEmbedding
from ds_fused.modules.swap import swap, unswap
from ds_fused.ops.slabs import WholeWeight


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
    swap(embedding, SlabEmbedding, _ds_fused_slabs=WholeWeight(embedding.weight, 4))
    assert torch.equal(embedding(ids), wanted * 2)
    assert seen == ["mine"]

    # they are still there, and can still be removed
    unswap(embedding)
    assert torch.equal(embedding(ids), wanted * 2)
    assert seen == ["mine", "theirs", "mine"]
    handle.remove()
    embedding(ids)
    assert seen[3:] == ["mine"]
