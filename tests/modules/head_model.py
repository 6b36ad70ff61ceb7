"""A causal LM reduced to its head, stock and fused."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.loss.head import CausalLMLoss, Head
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.modules.loss.scope import Scope
from ds_fused.modules.swap import swap

VOCAB, WIDTH = 23, 8


def cross_entropy_of_logits(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    """Stands for transformers' ForCausalLMLoss."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits = logits.float().view(-1, vocab_size)
    loss = F.cross_entropy(logits, shift_labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class Model(nn.Module):
    """A causal LM reduced to its head; ``between`` is what it does to its logits."""

    def __init__(self, between=lambda logits: logits, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        self.between = between
        self.loss_function = cross_entropy_of_logits
        self.to(dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs):
        logits = self.between(self.head(self.body(x)))
        loss = None if labels is None else self.loss_function(logits, labels, VOCAB, **kwargs)
        return {"loss": loss, "logits": logits}

    def fuse(self, **options) -> Model:
        scope = Scope(1, **options)
        swap(self.head, Head, _ds_fused_scope=scope)
        scope.attach(self)
        self.loss_function = CausalLMLoss(cross_entropy_of_logits, scope)
        scope.linear = {}
        return self


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(VOCAB, (2, 5), generator=generator)
    labels[0, 2] = -100
    return torch.randn(2, 5, WIDTH, generator=generator), labels


def pair(between=lambda logits: logits, bias: bool = False, **options) -> tuple[Model, Model]:
    return Model(between, bias), Model(between, bias).fuse(**options)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(stock: Model, fused: Model, of) -> None:
    x, labels = batch()
    wanted, got = gradients(stock, of(stock(x, labels))), gradients(fused, of(fused(x, labels)))
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)


RECORDED = {
    "nothing": lambda z: z,
    "float": lambda z: z.float(),
    "granite": lambda z: z / 3.0,
    "cohere": lambda z: 0.5 * z,
    "gemma2": lambda z: torch.tanh(z / 2.0) * 2.0,
    "method tanh, nothing after": lambda z: (z * 1.5).tanh(),
    "scale, cap, scale": lambda z: torch.mul((z / 4).contiguous().tanh(), 3).to(torch.float32),
    "a number of numpy's": lambda z: np.float64(0.5) * z,
    "a second bias": lambda z: (z + torch.arange(VOCAB) / VOCAB) / 2.0,
    "a second bias, in two dimensions": lambda z: torch.add(z, torch.ones(1, VOCAB)),
    "log_softmax": lambda z: F.log_softmax(z / 2.0, dim=-1),
}


class OwnLoss(Model):
    """Computes its loss itself, by torch's cross entropy of some of the logits."""

    def __init__(self, loss) -> None:
        super().__init__(lambda z: z, bias=True)
        self.own_loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict:
        logits = self.head(self.body(x))
        return {"loss": self.own_loss(logits, labels), "logits": logits}


def shifted(z: Tensor, labels: Tensor, **arguments) -> Tensor:
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, VOCAB), labels[..., 1:].reshape(-1), **arguments)


def own(loss) -> tuple[Model, Model]:
    return OwnLoss(loss), OwnLoss(loss).fuse()


def computed(logits: LogitsOnDemand) -> bool:
    return logits._source._values is not None
