"""A head's loss where no gradient is wanted: products and memory of one chunk of logits after the other, no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import randn
from allocations import Peak
from torch import Tensor

from ds_fused.ops.common import _tiles
from ds_fused.ops.vocab.linear_cosine import linear_cosine
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.vocab.linear_jsd import linear_jsd
from ds_fused.ops.vocab.linear_kl_div import linear_kl_div
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs

M, H, V = 96, 4, 256
ITEM = 2  # bytes of a logit in bf16
CHUNK = 8  # tokens
# bytes of one head's logits
ALL = M * V * ITEM


def cross_entropy(x, weight, labels, **options):
    return linear_cross_entropy(x, weight, labels, **options)


def in_forward(x, weight, labels, **options):
    return linear_cross_entropy(x, weight, labels, grad_in_forward=True, return_accuracy=True, **options)[0]


def log_probs(x, weight, labels, **options):
    return linear_log_probs(x, weight, labels, entropy=True, **options)[0]


def jsd(x, weight, labels, **options):
    return linear_jsd(x, weight, x.detach() + 1, weight.detach(), labels, **options)


def kl_div(x, weight, labels, **options):
    return linear_kl_div(x, weight, x.detach() + 1, weight.detach(), labels, **options)


def cosine(x, weight, labels, **options):
    return linear_cosine(x, weight, x.detach() + 1, weight.detach(), labels, **options)


LOSSES = {
    cross_entropy: 1,
    in_forward: 1,
    log_probs: 1,
    jsd: 2,  # heads
    kl_div: 2,
    cosine: 2,
}


def inputs(device: torch.device, h: int = H) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(1)).to(device)
    x, weight = (randn(*shape, device=device).bfloat16().requires_grad_() for shape in ((M, h), (V, h)))
    return x, weight, labels


@pytest.fixture
def small_sides(monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "LEAST_SIDE", CHUNK)
    monkeypatch.setattr(_tiles, "SIDE_STEP", 1)


@pytest.mark.usefixtures("small_sides")
@pytest.mark.parametrize("loss_of", LOSSES)
def test_memory_is_one_chunk_of_logits(loss_of: Callable[..., Tensor], device):
    x, weight, labels = inputs(device)
    chunk = CHUNK * V * ITEM
    # numbers of each token, and a divergence's own x
    rest = M * (H * ITEM + 40) + 512
    with torch.no_grad(), Peak(x, weight, labels) as peak:
        # as much as there is may be kept, for nobody
        loss_of(x, weight, labels, chunk_mb=LOSSES[loss_of] * chunk / 2**20, keep_mb=1)
    assert LOSSES[loss_of] * chunk <= peak.bytes <= LOSSES[loss_of] * chunk + rest
    assert peak.bytes < ALL / 2


@pytest.mark.usefixtures("small_sides")
@pytest.mark.parametrize("loss_of", [cross_entropy, log_probs])
def test_a_weight_that_autocast_casts_is_never_there_as_a_whole_copy(loss_of: Callable[..., Tensor], device):
    h, words = 64, 64
    x, weight, labels = inputs(device, h)
    weight = weight.float()
    chunk = M * words * ITEM
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16), Peak(x, weight, labels) as peak:
        loss_of(x, weight, labels, chunk_mb=chunk / 2**20)
    # a chunk of logits, the rows that make the next one beside those of the last, numbers of each token
    assert peak.bytes <= chunk + 2 * words * h * ITEM + M * 40 + 512 < chunk + V * h * ITEM


@pytest.mark.usefixtures("small_sides")
@pytest.mark.parametrize("loss_of", LOSSES)
def test_each_logit_is_computed_once(loss_of: Callable[..., Tensor], device, monkeypatch):
    x, weight, labels = inputs(device)
    sizes = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)

        def counted(*args, product=product, **options):
            result = product(*args, **options)
            sizes.append(tuple(result.shape))
            return result

        monkeypatch.setattr(torch, name, counted)
    with torch.no_grad():
        loss = loss_of(x, weight, labels, chunk_mb=LOSSES[loss_of] * CHUNK * V * ITEM / 2**20, keep_mb=1)
    assert sizes == [(CHUNK, V)] * (LOSSES[loss_of] * M // CHUNK)
    assert not loss.requires_grad


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("loss_of", LOSSES)
def test_memory_of_a_real_size(loss_of: Callable[..., Tensor], device):
    x = torch.randn(8192, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 128256, (8192,), device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        loss_of(x, weight, labels, chunk_mb=512 * LOSSES[loss_of])
    peak = torch.cuda.max_memory_allocated() - before
    # a chunk of each head, a divergence's own x, and a little for cuBLAS and the allocator
    assert peak < LOSSES[loss_of] * 512 * 2**20 + x.numel() * 2 + 96 * 2**20
