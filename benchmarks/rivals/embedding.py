"""The embedding of a vocabulary."""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, our_ops

# --- embedding: ids [N], weight [V, H] ---


def _hf_embedding(t: Tensors):
    # what nn.Embedding does
    return F.embedding, (t["ids"], t["weight"])


def _our_embedding(t: Tensors) -> Call:
    embedding = our_ops().embedding
    return lambda: embedding(t["ids"], t["weight"])


EMBEDDING = {
    "ds_fused": Provider(_our_embedding),
    "hf_eager": Provider(eager(_hf_embedding)),
    "compile": Provider(compiled(_hf_embedding)),
}
