"""Ways to the loss of a head and its gradients under ZeRO-3, each as its users run it: what zero3_head.py compares.

    stock              HuggingFace: all logits, in fp32; ZeRO-3's hooks gather the whole weight
    gather             ds_fused, mode "gather": the fused loss in the head's own forward, so the same hooks
    stream             ds_fused, mode "stream": the weight comes slab by slab, and its gradient goes so
    stationary         ds_fused, mode "stationary": the tokens travel instead
    auto               ds_fused, mode "auto": one of those three
    liger              liger_kernel on ``lm_head.weight``, read in the model's forward: ZeRO-3 gathers it there
    deepspeed tiled    DeepSpeed's own TiledFusedLogitsLoss
    whole gather       the weight gathered by hand around a loss over tiles of tokens, each checkpointed
    replicated         the op of ds_fused on a weight that is whole on every rank: no ZeRO, no communication
    bare GEMMs         the three products of head and gradients and nothing else: what no way can do without

A way imports its library itself, before any rank starts a collective: one that is missing costs its own row.

Sizes: M tokens a rank, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
# of fp32 logits in a tile, for the ways that leave the number of tiles to the user; DeepSpeed's documentation has it so
TILE_BYTES = 2**30
LEAST_TILES = 2
# of bf16 logits that bare GEMMs write at a time: all of 8192 tokens at a vocabulary of 128256
ROOM_BYTES = 2 * 2**30
# MiB: more than the logits of any shape
ALL = 1 << 20


@dataclass(frozen=True)
class Shape:
    """M x H x V, the first for each rank."""

    tokens: int
    hidden: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        sizes = text.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"a shape is TOKENSxHIDDENxVOCABULARY, such as 8192x4096x128256, got {text!r}")
        return cls(*map(int, sizes))

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocab}"


class Case:
    """The inputs of one shape: tokens and labels of this rank, the weight of all."""

    def __init__(self, shape: Shape, device: torch.device, rank: int, ranks: int) -> None:
        self.shape, self.device, self.rank, self.ranks = shape, device, rank, ranks
        draw = torch.Generator(device).manual_seed(1 + rank)
        size = (shape.tokens, shape.hidden)
        self.x = torch.randn(size, generator=draw, device=device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(shape.vocab, (shape.tokens,), generator=draw, device=device)
        # on each rank another number counts, so a mean over the wrong tokens shows
        self.labels = labels.masked_fill(
            torch.rand(shape.tokens, generator=draw, device=device) < 0.1 * (1 + rank), IGNORED
        )
        # every way calls it where the layers of a model have been: before the head, within a forward
        self.before: Callable[[], None] = lambda: None

    def weight(self) -> Tensor:
        """[V, H], made anew at each call: no way finds a whole weight in memory that it didn't ask for."""
        draw = torch.Generator(self.device).manual_seed(0)
        size = (self.shape.vocab, self.shape.hidden)
        weight = torch.randn(size, generator=draw, device=self.device, dtype=torch.bfloat16)
        return weight.mul_(self.shape.hidden**-0.5)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's shard of a tensor [V, H], flat, as ZeRO-3 cuts it; the last one is shorter."""
        size = -(-whole.numel() // self.ranks)
        return whole.view(-1)[self.rank * size : (self.rank + 1) * size]


class Run(Protocol):
    """One way, ready to be timed."""

    def __call__(self) -> Tensor | None:
        """Forward and backward. The loss; the gradient of x is in ``case.x.grad``. None where there is no loss."""
        ...

    def gradient(self) -> Tensor | None:
        """After a call: this rank's part of the weight's gradient, the mean over ranks, flat; None: it is frozen."""
        ...

    def settle(self) -> None:
        """What comes between two calls and belongs to neither."""
        ...

    def uncounted(self) -> int:
        """Bytes of the way's own that stay from call to call and that PyTorch's allocator does not count."""
        ...

    def close(self) -> None: ...


class Way(Protocol):
    note: str
    needs_gpu: bool

    def load(self) -> None:
        """Imports what the way needs; whatever it raises is why the way is not run."""
        ...

    def start(self, case: Case) -> Run: ...


# the loss of a model's head: model, x [M, H], labels [M]; called within the model's forward
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sharded:
    """In a ZeRO-3 engine. ``loss`` takes the place of the model's own; ``fused``: the head in the ds_fused block."""

    note: str = ""
    loss: Callable[[], Loss] | None = None
    fused: Mapping[str, object] | None = None
    needs_gpu: bool = False
    frozen: bool = False  # the weight is not trained

    def load(self) -> None:
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401

        if self.loss is not None:
            self.loss()

    def start(self, case: Case) -> Run:
        from benchmarks.head_engine import EngineRun

        return EngineRun(case, None if self.loss is None else self.loss(), self.fused, self.frozen)


@dataclass(frozen=True)
class Replicated:
    """The weight whole on every rank, its gradient too."""

    keep_mb: int
    note: str = ""
    needs_gpu: bool = False

    def load(self) -> None:
        import ds_fused.ops  # noqa: F401

    def start(self, case: Case) -> Run:
        return ReplicatedRun(case, self.keep_mb)


class ReplicatedRun:
    def __init__(self, case: Case, keep_mb: int) -> None:
        self._case, self._keep_mb = case, keep_mb
        self._weight = case.weight().requires_grad_()

    def __call__(self) -> Tensor:
        from ds_fused.ops import linear_cross_entropy

        self._case.before()
        loss = linear_cross_entropy(
            self._case.x, self._weight, self._case.labels, keep_mb=self._keep_mb, grad_in_forward=False
        )
        loss.backward()
        return loss.detach()

    def gradient(self) -> Tensor:
        mean = self._weight.grad / self._case.ranks
        torch.distributed.all_reduce(mean)
        return self._case.part(mean)

    def settle(self) -> None:
        self._weight.grad = None

    def uncounted(self) -> int:
        return 0

    def close(self) -> None:
        self._weight = None


@dataclass(frozen=True)
class BareGemms:
    note: str = "the floor: logits, dx and dW as bf16 products, outputs made beforehand"
    needs_gpu: bool = False

    def load(self) -> None: ...

    def start(self, case: Case) -> Run:
        return BareGemmsRun(case)


class BareGemmsRun:
    def __init__(self, case: Case) -> None:
        shape, self._case = case.shape, case
        self._x, self._weight = case.x.detach(), case.weight()
        tokens = min(shape.tokens, max(1, ROOM_BYTES // (2 * shape.vocab)))
        self._chunks = [slice(start, start + tokens) for start in range(0, shape.tokens, tokens)]
        self._room = self._x.new_empty(tokens, shape.vocab)
        self._dx, self._dw = torch.empty_like(self._x), torch.empty_like(self._weight)

    def __call__(self) -> None:
        self._case.before()
        for i, chunk in enumerate(self._chunks):
            x = self._x[chunk]
            z = torch.mm(x, self._weight.t(), out=self._room[: x.shape[0]])
            torch.mm(z, self._weight, out=self._dx[chunk])
            if i == 0:
                torch.mm(z.t(), x, out=self._dw)
            else:
                self._dw.addmm_(z.t(), x)

    def gradient(self) -> Tensor:
        raise NotImplementedError("bare GEMMs have no loss, so no gradient of one")

    def settle(self) -> None: ...

    def uncounted(self) -> int:
        return 0

    def close(self) -> None:
        self._weight = self._room = self._dx = self._dw = None


def _liger(**options: int) -> Callable[[], Loss]:
    def build() -> Loss:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            # as Liger's own forwards do: to read the weight makes ZeRO-3 gather it as a parameter of the model
            return liger_fused_linear_cross_entropy(x, model.lm_head.weight, labels, **options)

        return loss

    return build


def _tiles(x: Tensor, vocab: int) -> int:
    return max(LEAST_TILES, -(-x.shape[0] * vocab * 4 // TILE_BYTES))


def deepspeed_tiled() -> Loss:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        # Divided tile by tile: a mean of the tiles' means weighs tokens unequally where labels are ignored, and a sum
        # that is divided at the end hands that factor to x alone, since the weight's gradient is made in forward.
        count = (labels != IGNORED).sum()

        def tile(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(model.lm_head(x).float(), labels, reduction="sum") / count

        tiles = _tiles(x, model.config.vocab_size)
        weights = [model.lm_head.weight]
        return TiledFusedLogitsLoss.apply(tile, model, x[None], labels[None], None, tiles, weights, "sum")

    return loss


def _whole_gather() -> Loss:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from torch.utils.checkpoint import checkpoint

    def tile(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        # not as an attribute: that would gather it by ZeRO-3's own means already
        (weight,) = model.lm_head.parameters()
        tiles = _tiles(x, model.config.vocab_size)
        # Checkpoints read the weight again in backward, where this context is long left: fwd_module has ZeRO-3 gather
        # it there. From the second call on it does so in forward too, and by hand it would be given up too early; TRL
        # asks the same question.
        here = weight.ds_status == ZeroParamStatus.AVAILABLE
        with nullcontext() if here else deepspeed.zero.GatheredParameters(weight, fwd_module=model):
            parts = [
                checkpoint(tile, some, weight, theirs, use_reentrant=False)
                for some, theirs in zip(x.chunk(tiles), labels.chunk(tiles), strict=True)
            ]
            return torch.stack(parts).sum() / (labels != IGNORED).sum()

    return loss


def _fused(mode: str, **options: int) -> Mapping[str, object]:
    return {"mode": mode, **options}


BARE = "bare GEMMs"
WAYS: Mapping[str, Way] = {
    "stock": Sharded("all logits, in fp32"),
    "gather": Sharded("6 MHV: gradients made in forward", fused=_fused("gather")),
    "gather keep": Sharded(
        "6 MHV for the logits that fit keep_mb=2048, 8 for the others", fused=_fused("gather", grad_in_forward=False)
    ),
    "gather keep_mb=0": Sharded("8 MHV", fused=_fused("gather", grad_in_forward=False, keep_mb=0)),
    "stream": Sharded("8 MHV, slab_mb=132", fused=_fused("stream", keep_mb=0)),
    "stream slab_mb=64": Sharded("8 MHV", fused=_fused("stream", slab_mb=64, keep_mb=0)),
    "stream keep all": Sharded("6 MHV: all logits kept, in bf16", fused=_fused("stream", keep_mb=ALL)),
    "stream copy_engines": Sharded(
        "8 MHV, slabs moved by copy engines", fused=_fused("stream", keep_mb=0, copy_engines=True), needs_gpu=True
    ),
    "stream copy_engines slab_mb=120": Sharded(
        "8 MHV, the same", fused=_fused("stream", slab_mb=120, keep_mb=0, copy_engines=True), needs_gpu=True
    ),
    "stream copy_engines keep all": Sharded(
        "6 MHV, the same", fused=_fused("stream", keep_mb=ALL, copy_engines=True), needs_gpu=True
    ),
    "stream copy_engines keep all slab_mb=168": Sharded(
        "6 MHV, the same", fused=_fused("stream", slab_mb=168, keep_mb=ALL, copy_engines=True), needs_gpu=True
    ),
    "stream frozen": Sharded("4 MHV: the weight is not trained", fused=_fused("stream"), frozen=True),
    "stock frozen": Sharded("all logits, in fp32; the weight is not trained", frozen=True),
    "stationary": Sharded("6 MHV, chunk_mb=512", fused=_fused("stationary")),
    "stationary copy_engines": Sharded(
        "6 MHV, tokens moved by copy engines", fused=_fused("stationary", copy_engines=True), needs_gpu=True
    ),
    "stationary copy_engines chunk_mb=352": Sharded(
        "6 MHV, the same", fused=_fused("stationary", chunk_mb=352, copy_engines=True), needs_gpu=True
    ),
    "stationary copy_engines chunk_mb=280": Sharded(
        "6 MHV, the same", fused=_fused("stationary", chunk_mb=280, copy_engines=True), needs_gpu=True
    ),
    "stationary chunk_mb=320": Sharded("6 MHV", fused=_fused("stationary", chunk_mb=320)),
    "stationary chunk_mb=256": Sharded("6 MHV", fused=_fused("stationary", chunk_mb=256)),
    "auto": Sharded("the choice that ds_fused makes", fused=_fused("auto")),
    "liger": Sharded("gradients made in forward", _liger(), needs_gpu=True),
    "liger chunk_mem_const=16": Sharded("gradients made in forward", _liger(chunk_mem_const=16), needs_gpu=True),
    "deepspeed tiled": Sharded("gradients made in forward; 1 GiB of fp32 logits a tile", deepspeed_tiled),
    "whole gather": Sharded("8 MHV; 1 GiB of fp32 logits a tile, each checkpointed", _whole_gather),
    "replicated keep_mb=0": Replicated(0, "no ZeRO, 8 MHV; its extra has the whole gradient of the weight"),
    "replicated keep all": Replicated(ALL, "no ZeRO, 6 MHV; its extra has the whole gradient of the weight"),
    BARE: BareGemms(),
}
DEFAULT = tuple(WAYS)
# nothing kept: what differs is how the weight comes
SWEEP = ("stream", "stationary", "gather keep_mb=0")
