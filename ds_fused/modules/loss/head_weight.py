"""How a head's loss reaches its weight: what the engine tells the modules of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from ds_fused.modules.loss.late_values import WholeWeight
from ds_fused.ops.vocab.slabs import WeightSlabs
from ds_fused.ops.vocab.vocab_shard import VocabShard


def _no_slabs(head: nn.Module, n_tokens: int, inside: bool) -> None:
    return None


def _is_not_sharded(head: nn.Module) -> bool:
    return False


def _no_shard(head: nn.Module) -> Tensor | None:
    return None


def _own_bias(head: nn.Module) -> Tensor | None:
    return head.bias


@dataclass(frozen=True)
class HeadWeight:
    """How the weight of a head is reached where ZeRO-3 has sharded it; as it stands here, where nothing has.

    What it refers to is an engine's: copies and pickles of a model have none of it.
    """

    # the context of a read after the forward, in which the weight is whole
    whole: WholeWeight = nullcontext
    # for the loss over so many tokens, inside a running forward or not: the weight in slabs of its own or the rows of
    # it that stay here; None where the loss is to be computed in the head's own call
    slabs: Callable[[nn.Module, int, bool], WeightSlabs | VocabShard | None] = _no_slabs
    # whether there are those
    is_sharded: Callable[[nn.Module], bool] = _is_not_sharded
    # the bias beside them
    bias: Callable[[nn.Module], Tensor | None] = _own_bias
    # of a weight that is sharded and trained this rank's part
    shard: Callable[[nn.Module], Tensor | None] = _no_shard

    def __reduce__(self) -> tuple:
        return HeadWeight, ()
