"""What users of Liger complain about: ours does it right, and Liger, where it is installed, is seen to fail still.

One test each for what can be seen on any device; the numbers are of its issue tracker. What takes ranks or a GPU
(zero-sized shards, gathered heads, hangs, memory, host syncs, other devices) has its tests in tests/zero and tests/ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ds_fused

LIGER = find_spec("liger_kernel") is not None
VOCAB, WIDTH = 31, 16

# x, weight, labels, and of ours and PyTorch's reduction="mean" -> loss
Loss = Callable[..., Tensor]


def torchs(x: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(F.linear(x, weight), labels, reduction=reduction)


def ligers(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels)
    return found[0] if isinstance(found, tuple) else found


OURS = (
    functools.partial(ds_fused.linear_cross_entropy, grad_in_forward=True),
    functools.partial(ds_fused.linear_cross_entropy, grad_in_forward=False, keep_mb=0),
)


def given(device: torch.device, trunk: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator).to(device) for n in (6, VOCAB))
    labels = torch.randint(VOCAB, (6,), generator=generator).to(device)
    return x.requires_grad_(trunk), weight.requires_grad_(), labels


def same(ours: Tensor | None, wanted: Tensor | None) -> bool:
    """Within fp32's rounding; None where there is none."""
    if ours is None or wanted is None:
        return ours is wanted
    return torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def judge(found: Callable[[Loss], Tensor | None]) -> None:
    """``found``: what to look at, by any of the losses. Ours gives what PyTorch gives, and Liger does not."""
    wanted = found(torchs)
    for ours in OURS:
        assert same(found(ours), wanted)
    if LIGER:
        assert not same(found(ligers), wanted), "Liger does it right by now: this complaint is no more"


def test_a_frozen_trunk_trains_the_head(device: torch.device) -> None:
    def found(loss: Loss) -> Tensor | None:
        x, weight, labels = given(device, trunk=False)
        loss(x, weight, labels).backward()
        return weight.grad

    assert found(torchs) is not None
    judge(found)


def test_labels_that_are_all_ignored_are_no_loss_of_zero(device: torch.device) -> None:
    def found(loss: Loss) -> Tensor:
        x, weight, labels = given(device)
        return loss(x, weight, torch.full_like(labels, -100)).detach()

    judge(found)


# as gradient accumulation by hand does, and a gradient penalty
def test_a_second_backward_gives_what_the_first_gave(device: torch.device) -> None:
    def found(loss: Loss) -> Tensor | None:
        x, weight, labels = given(device)
        value = loss(x, weight, labels)
        scale = torch.tensor(2.0, device=device)
        value.backward(scale, retain_graph=True)
        weight.grad = None
        value.backward(scale)
        return weight.grad

    wanted = found(torchs)
    # gradients made in the forward scale once: there a second backward says so
    assert same(found(OURS[1]), wanted)
    with pytest.raises(RuntimeError, match="second"):
        found(OURS[0])
    if LIGER:
        assert not same(found(ligers), wanted), "Liger does it right by now: this complaint is no more"


# Liger#968, which it does right by now
@pytest.mark.parametrize("ours", OURS)
def test_each_token_counts_as_much_as_it_is_told_to(ours: Loss, device: torch.device) -> None:
    def found(loss: Loss) -> Tensor:
        x, weight, labels = given(device)
        of_token = torch.linspace(-1.0, 2.0, len(labels), device=device)
        (of_token * loss(x, weight, labels, reduction="none")).sum().backward()
        return torch.cat([x.grad, weight.grad])

    assert same(found(ours), found(torchs))


# Liger#322, #338
@pytest.mark.parametrize("ours", OURS)
def test_micro_batches_of_different_lengths_add_up_to_the_batch(ours: Loss, device: torch.device) -> None:
    def found(parts: tuple[slice, ...]) -> Tensor:
        x, weight, labels = given(device)
        labels[1] = -100
        n_items = (labels != -100).sum()
        for part in parts:
            (ours(x[part], weight, labels[part], reduction="sum") / n_items).backward()
        return torch.cat([x.grad, weight.grad])

    assert same(found((slice(0, 2), slice(2, 5), slice(5, 6))), found((slice(0, 6),)))


# Liger#370, #376, #273, #1305: its norm writes over the gradient that goes past it, too
def test_what_goes_past_a_norm_is_as_it_was(device: torch.device) -> None:
    def found(norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x, weight, _ = given(device)
        hidden = 2 * x
        (hidden + norm(hidden, weight[0])).backward(torch.ones_like(hidden))
        return x.grad

    wanted = found(lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6))
    assert same(found(lambda x, weight: ds_fused.rms_norm(x, weight, eps=1e-6)), wanted)


# Liger#315, #242, #772, #927; Liger#70, #978, #1059
def test_other_models_of_the_process_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    names = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
    # whatever is done to them, they are as before in the end
    for name in names:
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)

    def everybodys() -> list[object]:
        return [*(getattr(modeling_llama, name) for name in names), LlamaForCausalLM.forward]

    before = everybodys()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, **sizes))
    assert {"rms_norm", "rope", "swiglu"} <= {claim.key for claim in ds_fused.apply(model).claims}
    assert everybodys() == before
    if LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        assert not any(now is then for now, then in zip(everybodys(), before, strict=True))


@pytest.mark.skipif(not LIGER, reason="needs the package liger-kernel, whose list of models it reads")
def test_models_that_liger_does_not_know_are_fused() -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    unknown = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in MODEL_TYPE_TO_APPLY_LIGER_FN]
    # 142 of 178 with 0.8.5 and transformers 5.17
    assert len(unknown) > len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) / 2
    assert "stablelm" in unknown
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("stablelm", vocab_size=VOCAB, num_key_value_heads=1, **sizes)
    report = ds_fused.apply(AutoModelForCausalLM.from_config(config))
    assert {"layer_norm", "rope", "swiglu", "fused_linear_cross_entropy"} <= {claim.key for claim in report.claims}
