"""Losses of preferences and policies: plain PyTorch's over all logits, and Liger's where that is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused import cross_entropy, nn
from ds_fused.nn import functional

GENERATOR = torch.Generator().manual_seed(5)
PAIRS, TOKENS, HIDDEN, VOCAB = 3, 7, 6, 19


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, WEIGHT, BIAS = randn(2 * PAIRS, TOKENS, HIDDEN), randn(VOCAB, HIDDEN), randn(VOCAB)
REF_X, REF_WEIGHT, REF_BIAS = randn(2 * PAIRS, TOKENS, HIDDEN + 1), randn(VOCAB, HIDDEN + 1), randn(VOCAB)
LABELS = torch.randint(VOCAB, (2 * PAIRS, TOKENS), generator=GENERATOR)
# answers of different lengths, the first tokens a prompt's
LENGTHS = torch.tensor([3, 6, 7, 4, 5, 2])
ANSWERS = LABELS.masked_fill(torch.arange(TOKENS) < TOKENS - LENGTHS[:, None], -100)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -1.2, 0.0, 0.7], dtype=torch.float64)
MASK = ANSWERS != -100
OLD = -3.0 - randn(2 * PAIRS, TOKENS).abs()

needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the package liger-kernel")


def plain(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens by all logits; 0 for ignored ones."""
    log_p = (F.linear(x, weight, bias) / temperature).log_softmax(-1)
    return log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)


def sums(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    return log_probs.sum(-1).split(PAIRS)


def means(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    return (log_probs.sum(-1) / MASK.sum(-1)).split(PAIRS)


def nll(log_probs: Tensor) -> Tensor:
    return -log_probs[:PAIRS].sum() / MASK[:PAIRS].sum()


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], rtol: float = 1e-6) -> None:
    """Loss and gradients of x, weight and bias."""
    found = []
    for loss in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (X, WEIGHT, BIAS)]
        value = loss(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), plain.double(), rtol=rtol, atol=rtol / 100)


# of how much likelier each answer has become: chosen, rejected
DPO = {
    "sigmoid": lambda c, r: -F.logsigmoid(0.3 * (c - r)),
    "hinge": lambda c, r: (1 - 0.3 * (c - r)).clamp_min(0),
    "exo_pair": lambda c, r: torch.stack(
        [
            torch.sigmoid(s * 0.3 * (c - r)) * (torch.sigmoid(s * 0.3 * (c - r)) / p).log()
            for s, p in ((1, 0.9), (-1, 0.1))
        ]
    ).sum(0),
    "nca_pair": lambda c, r: (
        -torch.sigmoid(0.3 * c).log() - torch.sigmoid(-0.3 * c).log() / 2 - torch.sigmoid(-0.3 * r).log() / 2
    ),
    "robust": lambda c, r: (
        (0.1 * torch.sigmoid(-0.3 * (c - r)).log() - 0.9 * torch.sigmoid(0.3 * (c - r)).log()) / 0.8
    ),
    "bco_pair": lambda c, r: -torch.sigmoid(0.3 * c).log() - torch.sigmoid(-0.3 * r).log(),
    "sppo_hard": lambda c, r: (c - 0.5 / 0.3) ** 2 + (r + 0.5 / 0.3) ** 2,
    "apo_zero": lambda c, r: 1 - torch.sigmoid(0.3 * c) + torch.sigmoid(0.3 * r),
    "apo_down": lambda c, r: torch.sigmoid(0.3 * c) + 1 - torch.sigmoid(0.3 * (c - r)),
    "discopop": lambda c, r: torch.lerp(
        -F.logsigmoid(0.3 * (c - r)), (-0.3 * (c - r)).exp(), torch.sigmoid(0.3 * (c - r) / 0.05)
    ),
    "ipo": lambda c, r: (c - r - 1 / 0.6) ** 2,
}
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}


@pytest.mark.parametrize("loss_type", DPO)
def test_dpo(loss_type):
    assert {*DPO} == {*functional.DPO_LOSSES}
    loss = nn.LinearDPOLoss(beta=0.3, loss_type=loss_type, label_smoothing=SMOOTHED.get(loss_type, 0.0))
    reference = {"ref_x": REF_X, "ref_weight": REF_WEIGHT, "ref_bias": REF_BIAS}

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        of = means if loss_type == "ipo" else sums
        pairs = zip(of(plain(x, weight, ANSWERS, bias)), of(plain(REF_X, REF_WEIGHT, ANSWERS, REF_BIAS)), strict=True)
        return DPO[loss_type](*(policy - before for policy, before in pairs)).mean()

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias, **reference), theirs)
    if loss_type == "sigmoid":
        before = plain(REF_X, REF_WEIGHT, ANSWERS, REF_BIAS).sum(-1)
        assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias, ref_log_probs=before), theirs)


def test_dpo_without_a_reference_and_with_a_likelihood():
    loss = nn.LinearDPOLoss(nll_weight=0.5, average=True)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_probs = plain(x, weight, ANSWERS, bias)
        chosen, rejected = means(log_probs)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean() + 0.5 * nll(log_probs)

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias), theirs)


def test_cpo():
    loss = nn.LinearCPOLoss(beta=0.2, label_smoothing=0.1, nll_weight=0.7)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_probs = plain(x, weight, ANSWERS, bias)
        chosen, rejected = sums(log_probs)
        better, worse = (torch.sigmoid(s * 0.2 * (chosen - rejected)).log() for s in (1, -1))
        return -(0.9 * better + 0.1 * worse).mean() + 0.7 * nll(log_probs)

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias), theirs)


def test_simpo():
    loss = nn.LinearSimPOLoss(beta=2.0, gamma=0.3)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        chosen, rejected = means(plain(x, weight, ANSWERS, bias))
        return -torch.sigmoid(2 * (chosen - rejected) - 0.3).log().mean()

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias), theirs)


# the likelihood of prompts and answers, or of answers alone
@pytest.mark.parametrize("nll_labels", [None, LABELS, LABELS[:PAIRS]])
def test_orpo(nll_labels):
    loss = nn.LinearORPOLoss(beta=0.4, temperature=1.3)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_probs = plain(x, weight, ANSWERS, bias, 1.3)
        chosen, rejected = (p / (1 - p) for p in (mean.exp() for mean in means(log_probs)))
        likelihood = nll(log_probs)
        if nll_labels is not None:
            likelihood = -plain(x, weight, LABELS, bias, 1.3)[:PAIRS].mean()
        return likelihood - 0.4 * torch.sigmoid((chosen / rejected).log()).log().mean()

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, bias=bias, nll_labels=nll_labels), theirs)


def test_orpo_of_answers_that_are_nearly_certain():
    # 1 - p of the first has 6 bits left in fp32
    mean = torch.tensor([-1e-6, -3.0, -1e-3], requires_grad=True)
    wide = mean.detach().double().requires_grad_()
    for x in (mean, wide):
        functional.orpo_loss(x, torch.full_like(x, -0.7)).backward()
    torch.testing.assert_close(mean.grad, wide.grad.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kl", [None, 0.2, torch.tensor(0.2)])
@pytest.mark.parametrize("average", [False, True])
def test_kto(average, kl):
    loss, is_chosen = nn.LinearKTOLoss(beta=0.3, average=average), torch.tensor([True, False, True, True, False, False])
    reference = {"ref_x": REF_X, "ref_weight": REF_WEIGHT}

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ratio = (plain(x, weight, ANSWERS, bias) - plain(REF_X, REF_WEIGHT, ANSWERS)).sum(-1)
        ratio = (ratio / MASK.sum(-1) if average else ratio) - (0 if kl is None else kl)
        return (1 - torch.sigmoid(0.3 * torch.where(is_chosen, ratio, -ratio))).mean()

    assert_same(lambda x, weight, bias: loss(x, weight, ANSWERS, is_chosen, bias=bias, kl=kl, **reference), theirs)


def grpo_by_token(log_probs: Tensor, loss_type: str, level: str) -> Tensor:
    """Before the divergence, [B, T]; clipped at 0.9 and 1.15, cispo at 1.15."""
    ratio = (log_probs - OLD) * MASK
    if level == "sequence":
        ratio = (ratio.sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True)).expand_as(ratio)
    ratio, gain = ratio.exp(), ADVANTAGES[:, None].expand_as(ratio)
    if loss_type == "cispo":
        return -torch.minimum(ratio, torch.tensor(1.15)).detach() * gain * log_probs
    if loss_type == "sapo":
        steep = torch.where(gain > 0, 1.0, 1.05)
        return -gain * torch.sigmoid(steep * (ratio - 1)) * 4 / steep
    if loss_type == "vespo":
        w = ((log_probs - OLD) * MASK).sum(-1, keepdim=True).clamp(math.log(1e-8), 20).exp()
        k, rate = torch.where(gain >= 0, 2.0, 3.0), torch.where(gain >= 0, 3.0, 2.0)
        return -(rate.exp() * w**k * (-rate * w).exp()).detach() * gain * log_probs
    return -torch.where(gain > 0, ratio.clamp(max=1.15), ratio.clamp(min=0.9)) * gain


def grpo_total(loss: Tensor, loss_type: str) -> Tensor:
    if loss_type in ("grpo", "sapo"):
        return (loss.sum(-1) / MASK.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return loss.sum() / (2 * PAIRS * 11)
    if loss_type == "luspo":
        return loss.sum(-1).mean()
    return loss.sum() / MASK.sum()


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", functional.LEVELS)
@pytest.mark.parametrize("loss_type", functional.GRPO_LOSSES)
def test_grpo(loss_type, level, beta):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match=f"grpo_loss: {loss_type} weights tokens"):
            nn.LinearGRPOLoss(loss_type=loss_type, importance_sampling_level=level)
        return
    options = {"epsilon_low": 0.1, "epsilon_high": 1.15 if loss_type == "cispo" else 0.15, "beta": beta}
    loss = nn.LinearGRPOLoss(
        loss_type=loss_type, importance_sampling_level=level, max_completion_length=11, temperature=0.9, **options
    )
    inputs = {"old_log_probs": OLD, "ref_x": REF_X, "ref_weight": REF_WEIGHT, "ref_bias": REF_BIAS}

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        log_probs = plain(x, weight, ANSWERS, bias, 0.9)
        behind = plain(REF_X, REF_WEIGHT, ANSWERS, REF_BIAS, 0.9) - log_probs
        by_token = grpo_by_token(log_probs, loss_type, level) + beta * (behind.exp() - 1 - behind)
        return grpo_total(by_token * MASK, loss_type)

    assert_same(lambda x, weight, bias: loss(x, weight, LABELS, ADVANTAGES, MASK, bias=bias, **inputs), theirs)


def test_grpo_of_the_policy_that_sampled():
    loss = nn.LinearGRPOLoss(loss_type="bnpo")
    assert_same(
        lambda x, weight, bias: loss(x, weight, LABELS, ADVANTAGES, bias=bias),
        lambda x, weight, bias: (
            # the ratio is 1, its gradient that of the log-probability
            -(
                ADVANTAGES[:, None] * (plain(x, weight, LABELS, bias) - plain(x, weight, LABELS, bias).detach() + 1)
            ).mean()
        ),
    )


def test_grpo_with_all_its_corrections():
    log_probs, ratios = randn(2 * PAIRS, TOKENS).requires_grad_(), randn(2 * PAIRS).exp()
    gains, before = randn(2 * PAIRS, TOKENS), randn(2 * PAIRS, TOKENS)
    loss, metrics = functional.grpo_loss(
        log_probs, gains, MASK, OLD, before, ratios, 13.0,
        beta=0.1, delta=1.5, use_bias_correction_kl=True, return_metrics=True,
    )  # fmt: skip
    r, apart = (log_probs - OLD).exp(), before - log_probs
    kl = (apart.exp() - apart - 1) * r
    by_token = -torch.minimum(r.clamp(max=1.5) * gains, r.clamp(0.8, 1.2) * gains) * ratios[:, None] + 0.1 * kl
    expected = by_token[MASK].sum() / 13.0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, log_probs)[0] for y in (loss, expected)))
    clipped = ((r > 1.2) & (gains > 0)) | ((r < 0.8) & (gains < 0))
    torch.testing.assert_close(metrics.kl, kl[MASK].mean().detach())
    torch.testing.assert_close(metrics.clipped.double(), clipped[MASK].double().mean())
    assert 0 < metrics.clipped < 1 and not metrics.kl.requires_grad


def test_what_counts_nothing_may_be_anything():
    log_probs = randn(2, 3).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    rubbish = torch.where(mask, -1.0, torch.tensor(float("-inf"), dtype=torch.float64))
    for loss_type in functional.GRPO_LOSSES:
        loss = functional.grpo_loss(
            log_probs, torch.tensor([1.0, 2.0]), mask, rubbish, rubbish, beta=0.1, loss_type=loss_type
        )
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].any()


def test_logits_do_without_a_head():
    logits = randn(2 * PAIRS, TOKENS, VOCAB).float().requires_grad_()
    of_op = -cross_entropy(logits, LABELS, reduction="none", logit_scale=1 / 0.9)
    wanted = (logits / 0.9).log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    losses = [functional.grpo_loss(x, ADVANTAGES.float(), MASK, OLD.float()) for x in (of_op, wanted)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_metrics():
    loss = nn.LinearDPOLoss(beta=0.3, return_metrics=True, nll_weight=0.1)
    _, metrics = loss(X, WEIGHT, ANSWERS, ref_x=REF_X, ref_weight=REF_WEIGHT)
    log_probs, before = plain(X, WEIGHT, ANSWERS), plain(REF_X, REF_WEIGHT, ANSWERS)
    torch.testing.assert_close(torch.cat(metrics[:2]), log_probs.sum(-1))
    torch.testing.assert_close(torch.cat(metrics[2:4]), 0.3 * (log_probs - before).sum(-1))
    torch.testing.assert_close(metrics.nll, nll(log_probs))
    _, metrics = nn.LinearSimPOLoss(return_metrics=True)(X, WEIGHT, ANSWERS)
    torch.testing.assert_close(metrics.chosen_rewards, 0.1 * metrics.chosen_log_probs)
    assert metrics.nll is None


def test_errors():
    for make, message in (
        (lambda: nn.LinearDPOLoss(loss_type="best"), "dpo_loss: loss_type is 'best'; known are sigmoid, hinge"),
        (lambda: nn.LinearDPOLoss(loss_type="ipo", beta=0.0), "dpo_loss: beta is 0; ipo divides by it"),
        (lambda: nn.LinearDPOLoss(loss_type="exo_pair"), "label_smoothing is 0.0; for exo_pair it must be above 0"),
        (lambda: nn.LinearDPOLoss(loss_type="robust", label_smoothing=0.5), "for robust .* below 0.5"),
        (lambda: functional.cpo_loss(OLD, OLD, label_smoothing=1.5), "cpo_loss: label_smoothing is 1.5"),
        (lambda: functional.simpo_loss(OLD, OLD, label_smoothing=-0.1), "simpo_loss: label_smoothing is -0.1"),
        (lambda: nn.LinearGRPOLoss(loss_type="ppo"), "grpo_loss: loss_type is 'ppo'; known are grpo, bnpo"),
        (lambda: nn.LinearGRPOLoss(importance_sampling_level="word"), "importance_sampling_level is 'word'"),
        (lambda: nn.LinearGRPOLoss(delta=0.0), "grpo_loss: delta is 0.0; it must be positive"),
        (lambda: nn.LinearGRPOLoss(beta=0.1)(X, WEIGHT, LABELS, ADVANTAGES), "beta is 0.1, but there are no ref_log"),
        (lambda: nn.LinearCPOLoss()(X[1:], WEIGHT, ANSWERS[1:]), r"LinearCPOLoss: labels \(5, 7\) must be \[2B, T\]"),
        (lambda: nn.LinearORPOLoss()(X, WEIGHT, ANSWERS, nll_labels=LABELS[:, :6]), r"nll_labels \(6, 6\) must be"),
        (lambda: nn.LinearDPOLoss()(X, WEIGHT, ANSWERS, ref_x=REF_X), "LinearDPOLoss: a reference needs both"),
        (lambda: nn.LinearDPOLoss()(X, WEIGHT, ANSWERS, ref_bias=BIAS), "LinearDPOLoss: a reference needs both"),
        (
            lambda: nn.LinearDPOLoss()(X, WEIGHT, ANSWERS, ref_x=X, ref_weight=WEIGHT, ref_log_probs=OLD.sum(-1)),
            "LinearDPOLoss: ref_log_probs and a reference's head both came",
        ),
        (
            lambda: nn.LinearGRPOLoss(beta=0.1)(X, WEIGHT, LABELS, ADVANTAGES, ref_weight=WEIGHT, ref_log_probs=OLD),
            "LinearGRPOLoss: ref_log_probs and a reference's head both came",
        ),
        (lambda: nn.LinearDPOLoss()(X, WEIGHT, ANSWERS, ref_log_probs=OLD), r"ref_log_probs \(6, 7\) must be one for"),
        (lambda: nn.LinearKTOLoss()(X, WEIGHT, ANSWERS, MASK), r"is_chosen \(6, 7\) \[B\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for wrong in ({"betas": 1.0}, {"entropy": True}, {"bias": BIAS}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            nn.LinearDPOLoss(**wrong)
    with pytest.raises(RuntimeError, match="LinearORPOLoss: labels and nll_labels differ"):
        nn.LinearORPOLoss()(X, WEIGHT, ANSWERS, nll_labels=(LABELS + 1) % VOCAB)


B = torch.zeros(4)
B_T = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("loss", "inputs", "message"),
    [
        ("dpo_loss", {"rejected": B[:, None]}, r"rejected \(4, 1\) must have the shape of chosen, \(4,\)"),
        ("dpo_loss", {"rejected": B, "ref_chosen": B}, "ref_rejected is missing"),
        ("dpo_loss", {"rejected": B, "ref_rejected": B}, "ref_chosen is missing"),
        ("dpo_loss", {"rejected": B, "ref_chosen": B, "ref_rejected": B[:1]}, r"ref_rejected \(1,\)"),
        ("cpo_loss", {"rejected": B[:1]}, r"rejected \(1,\)"),
        ("simpo_loss", {"rejected": B[0]}, r"rejected \(\)"),
        ("orpo_loss", {"rejected": B[:, None]}, r"rejected \(4, 1\)"),
        ("kto_loss", {"is_chosen": B[:2, None] > 0}, r"is_chosen \(2, 1\) must have the shape of log_probs, \(4,\)"),
        ("kto_loss", {"is_chosen": B.long()}, "is_chosen is torch.int64; it must be torch.bool"),
        ("kto_loss", {"is_chosen": B > 0, "ref_log_probs": B[:, None]}, r"ref_log_probs \(4, 1\)"),
        ("kto_loss", {"is_chosen": B > 0, "kl": B[:, None]}, r"kl \(4, 1\)"),
        ("grpo_loss", {"log_probs": B, "advantages": B}, r"log_probs \(4,\) must be \[B, T\]"),
        ("grpo_loss", {"advantages": B, "old_log_probs": B[:3]}, r"old_log_probs \(3,\) must have the shape of log_pr"),
        ("grpo_loss", {"advantages": B, "mask": B[:, None]}, r"mask \(4, 1\)"),
        ("grpo_loss", {"advantages": B, "ref_log_probs": B_T.T, "beta": 0.1}, r"ref_log_probs \(3, 4\)"),
        ("grpo_loss", {"advantages": B[:3]}, r"advantages \(3,\) must be \[B\], \[B, 1\] or \[B, T\]"),
        ("grpo_loss", {"advantages": B, "importance_ratio": B_T[:1]}, r"importance_ratio \(1, 3\)"),
        ("grpo_loss", {"advantages": B, "epsilon_low": -0.1}, "epsilon_low is -0.1; it must not be negative"),
    ],
)
def test_what_would_be_broadcast_is_an_error(loss, inputs, message):
    first = {"log_probs": B_T} if loss == "grpo_loss" else {"log_probs" if loss == "kto_loss" else "chosen": B}
    with pytest.raises(ValueError, match=f"{loss}: {message}"):
        getattr(functional, loss)(**{**first, **inputs})


def liger(name: str, *inputs: object, **options: object) -> Tensor:
    """A loss of Liger's by its name, uncompiled, which gives a tuple."""
    import liger_kernel.chunked_loss as chunked

    return getattr(chunked, f"LigerFusedLinear{name}Loss")(compiled=False, **options)(*inputs)[0]


def in_fp32(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> None:
    def narrow(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *leaves: loss(*(t.float() for t in leaves))

    assert_same(narrow(ours), narrow(theirs), rtol=2e-4)


@needs_liger
@pytest.mark.parametrize("loss_type", [name for name in DPO if name != "ipo"])
def test_dpo_as_ligers(loss_type):
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": SMOOTHED.get(loss_type, 0.0)}
    ref = REF_X.float(), REF_WEIGHT.float(), REF_BIAS.float()
    loss = nn.LinearDPOLoss(**options)
    in_fp32(
        lambda x, w, b: loss(x, w, ANSWERS, bias=b, ref_x=ref[0], ref_weight=ref[1], ref_bias=ref[2]),
        lambda x, w, b: liger("DPO", w, x, ANSWERS, b, *ref, **options),
    )


@needs_liger
def test_pairs_as_ligers():
    in_fp32(
        lambda x, w, b: nn.LinearCPOLoss(beta=0.3, nll_weight=0.7)(x, w, ANSWERS, bias=b),
        lambda x, w, b: liger("CPO", w, x, ANSWERS, b, beta=0.3, alpha=0.7),
    )
    in_fp32(
        lambda x, w, b: nn.LinearSimPOLoss(beta=0.3, gamma=0.2, nll_weight=1.0)(x, w, ANSWERS, bias=b),
        lambda x, w, b: liger("SimPO", w, x, ANSWERS, b, beta=0.3, gamma=0.2),
    )
    in_fp32(
        lambda x, w, b: nn.LinearORPOLoss(beta=0.3)(x, w, ANSWERS, bias=b, nll_labels=LABELS),
        lambda x, w, b: liger("ORPO", w, x, ANSWERS, b, LABELS, beta=0.3),
    )


@needs_liger
def test_kto_as_ligers():
    is_chosen, kl = torch.tensor([True, False, True, True, False, False]), torch.tensor(0.2)
    ref = REF_X.float(), REF_WEIGHT.float(), REF_BIAS.float()
    loss = nn.LinearKTOLoss(beta=0.3)
    in_fp32(
        lambda x, w, b: loss(x, w, ANSWERS, is_chosen, bias=b, ref_x=ref[0], ref_weight=ref[1], ref_bias=ref[2], kl=kl),
        lambda x, w, b: liger("KTO", x, w, ANSWERS, b, is_chosen, *ref, kl, beta=0.3, use_ref_model=True),
    )


@needs_liger
@pytest.mark.parametrize("level", functional.LEVELS)
@pytest.mark.parametrize("loss_type", functional.GRPO_LOSSES)
def test_grpo_as_ligers(loss_type, level):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        return
    # of luspo without a mask, since theirs counts what is masked
    mask = torch.ones_like(MASK) if loss_type == "luspo" else MASK
    beta = 0.0 if loss_type == "luspo" else 0.04
    options = {"loss_type": loss_type, "importance_sampling_level": level, "temperature": 0.9, "beta": beta}
    options |= {"epsilon_low": 0.1, "epsilon_high": 1.15 if loss_type == "cispo" else 0.15, "max_completion_length": 11}
    gains, old, before = ADVANTAGES.float(), OLD.float(), (OLD + 0.3).float()
    in_fp32(
        lambda x, w, b: nn.LinearGRPOLoss(**options)(
            x, w, LABELS, gains, mask, bias=b, old_log_probs=old, ref_log_probs=before
        ),
        lambda x, w, b: liger("GRPO", x, w, LABELS, mask, gains, b, before, old, **options),
    )
