"""How an embedding's table is reached under ZeRO-3: it comes in slabs, or it stays and the tokens travel.

Chosen call by call, by what travels: W ranks of at most M tokens send W * M rows, the table has V. Where somebody has
gathered it, nothing has to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ds_fused.engine.zero3.slabs import ZeroSlabs
from ds_fused.engine.zero3.stationary import ZeroShard
from ds_fused.ops.common._ids import flat_ids
from ds_fused.ops.vocab.slab_embedding import slab_embedding
from ds_fused.ops.vocab.stationary_embedding import stationary_embedding


class Lookup:
    """One embedding's table. Every rank calls it at the same place, with as many ids as it has, unless it is whole."""

    def __init__(
        self, slabs: ZeroSlabs, shard: ZeroShard | None, block_bytes: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """``shard``: the same table where it lies; without it, it always comes in slabs. ``check``: before each use."""
        self._slabs, self._shard, self._block_bytes, self._check = slabs, shard, block_bytes, check

    def __deepcopy__(self, memo: dict) -> None:
        # an engine's; a copied embedding has a table of its own
        return None

    def __str__(self) -> str:
        if self._shard is None:
            return str(self._slabs)
        ranks, most = self._slabs.ranks, self.turning_point
        return f"its rows stay on {ranks} ranks up to {most} tokens a rank, {self._slabs} above"

    @property
    def turning_point(self) -> int:
        """The largest number of tokens a rank for which fewer rows travel than the table has."""
        return (self._slabs.shape[0] - 1) // self._slabs.ranks

    def __call__(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """ids [...] -> [..., H]"""
        whole = self._slabs.whole
        if whole is not None:
            return F.embedding(ids, whole)
        self._check()
        if self._shard is None:
            return slab_embedding(ids, self._slabs, padding_idx)
        if ids.device.type == "cpu":
            # a rank that has an illegal one raises before the others count on it
            flat_ids("embedding", ids, self._slabs.shape[0])
        most = self._shard.most(ids.numel())
        if most > self.turning_point:
            return slab_embedding(ids, self._slabs, padding_idx)
        return stationary_embedding(ids, self._shard, padding_idx, block_bytes=self._block_bytes, most=most)
