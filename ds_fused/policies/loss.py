"""The loss of any causal LM: which model owns a head whose call can wait for the loss, and what stands in the way.

One mechanism serves every class whose forward says ``self.loss_function(logits, labels, vocab_size, ...)``, or calls
PyTorch's cross entropy (or log_softmax and nll_loss) on its logits itself; no family is named here. Around such a model
these things change, and ``restore`` undoes each:

- the head, an ``nn.Linear`` or what computes as one, becomes ``modules.head.Head``;
- two hooks on the model arm the head for forwards that are given labels (``Scope``);
- ``model.loss_function``, which transformers offers for exchanging, becomes a ``CausalLMLoss`` around the original
  where that is ForCausalLMLoss. Every other loss stays: PyTorch's cross entropy, which it calls, takes deferred logits.

``logits``, ``eval`` and ``weight`` are those of ``Scope``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ds_fused.modules.loss.head import CausalLMLoss, Head
from ds_fused.modules.loss.head_weight import HeadWeight
from ds_fused.modules.loss.scope import Scope
from ds_fused.modules.swap import is_live, qualified_name, swap, unswap_all
from ds_fused.policies.loss_code import calls, heads_of, is_masked, labels_at, why_not_head, why_not_loss, why_not_wait
from ds_fused.policies.loss_proof import code_of, linear_differs, real_differs
from ds_fused.policies.report import Claim, Left

LINEAR = "fused_linear_cross_entropy"
REAL = "cross_entropy"


@dataclass(eq=False)
class Site:
    """A head and the models that compute a loss from it. ``owner`` is the outermost of them that is given labels."""

    owner: nn.Module
    head: nn.Module
    losses: Mapping[nn.Module, CausalLMLoss]
    scope: Scope
    users: int = 0
    before: list[tuple[nn.Module, bool, object]] = field(default_factory=list)

    def enter(self) -> None:
        """One more claim is in place here; the first one puts hooks and loss functions on."""
        self.users += 1
        if self.users > 1:
            return
        self.scope.attach(self.owner)
        for model, loss in self.losses.items():
            had_own = "_loss_function" in vars(model)
            self.before.append((model, had_own, vars(model).get("_loss_function")))
            if model is self.owner and not had_own:
                self.scope.chosen_by = (getattr(model, "loss_type", None),)
            model.loss_function = loss

    def leave(self) -> None:
        self.users -= 1
        if self.users:
            return
        self.scope.detach()
        for model, had_own, own in self.before:
            if vars(model).get("_loss_function") is not self.losses[model]:
                continue  # somebody has exchanged it since
            if had_own:
                model.loss_function = own
            else:
                del model._loss_function
        self.before.clear()
        self.scope.chosen_by = ()

    def in_place(self) -> bool:
        return all(model.loss_function is loss for model, loss in self.losses.items())


@dataclass(eq=False)
class LinearClaim:
    """The head's call waits for the loss: linear_cross_entropy, and no logits."""

    site: Site
    paths: tuple[str, ...]
    options: Mapping[str, object]
    cls: type[nn.Linear]
    key: str = LINEAR
    replacement: str = "linear_cross_entropy, logits deferred"

    @property
    def original(self) -> str:
        return qualified_name(self.cls)

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        options = tuple(sorted(self.options.items()))
        # None: the loss that the model's own code computes, by PyTorch's cross entropy
        for original in {loss.original for loss in self.site.losses.values()} or {None}:
            has_bias = self.site.head.bias is not None
            differs = linear_differs(original, has_bias, options, device, dtype, code_of(original))
            if differs is not None:
                return differs
        return None

    def commit(self) -> None:
        swap(self.site.head, Head, _ds_fused_scope=self.site.scope)
        self.site.scope.linear = dict(self.options)
        try:
            self.site.enter()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        # first, for a head that can't be given back goes on as it is
        unswap_all([self.site.head])
        self.site.leave()
        self.site.scope.linear = None

    def in_place(self) -> bool:
        return isinstance(self.site.head, Head) and is_live(self.site.head) and self.site.in_place()

    def watched(self) -> tuple[type, ...]:
        return (type(self.site.head),)


@dataclass(eq=False)
class RealClaim:
    """Logits that exist go to cross_entropy instead of to ForCausalLMLoss."""

    site: Site
    paths: tuple[str, ...]
    original: str
    key: str = REAL
    replacement: str = "cross_entropy, where logits exist"

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        for original in {loss.original for loss in self.site.losses.values()}:
            differs = real_differs(original, device, dtype, code_of(original))
            if differs is not None:
                return differs
        return None

    def commit(self) -> None:
        for loss in self.site.losses.values():
            loss.real = True
        self.site.enter()

    def restore(self) -> None:
        self.site.leave()
        for loss in self.site.losses.values():
            loss.real = False

    def in_place(self) -> bool:
        return self.site.in_place()

    def watched(self) -> tuple[type, ...]:
        # a function, not a layer
        return ()


def claim_loss(
    model: nn.Module,
    wanted: Mapping[str, Mapping[str, object]],
    *,
    logits: str = "defer",
    eval: str = "defer",
    weight: HeadWeight = HeadWeight(),  # noqa: B008 (frozen)
) -> tuple[list[Claim], list[Left]]:
    """What can be done about the loss of ``model`` with the keys that are on, and what can't. Changes nothing."""
    if LINEAR not in wanted and REAL not in wanted:
        return [], []

    claims: list[Claim] = []
    left: list[Left] = []
    names = {id(module): name for name, module in model.named_modules()}
    for head, models in heads_of(model):
        path = names.get(id(head), "output embeddings")
        reasons = {id(m): why_not_loss(m) for m in models}
        usable = [m for m in models if reasons[id(m)] is None]
        if not usable:
            left.append(Left(f"loss of {type(models[0]).__name__}", 1, reasons[id(models[0])]))
            continue
        # a wrapper that hands its labels on may compute no loss itself: the scope is the outermost that knows labels
        owner = next(m for m in models if labels_at(type(m)) is not None)
        masked = any(is_masked(m) for m in usable)
        scope = Scope(labels_at(type(owner)), logits=logits, eval=eval, weight=weight, masked=masked)
        losses = {
            m: CausalLMLoss(m.loss_function, scope)
            for m in usable
            if calls(m, "loss_function") and m.loss_function.__name__ == "ForCausalLMLoss"
        }
        site = Site(owner, head, losses, scope)
        if LINEAR in wanted:
            reason = why_not_head(head) or why_not_wait(models)
            if reason is None:
                claims.append(LinearClaim(site, (path,), wanted[LINEAR], type(head)))
            else:
                left.append(Left(f"head {path}", 1, reason))
        if REAL in wanted and not losses and LINEAR not in wanted:
            left.append(Left(f"loss of {type(owner).__name__}", 1, "its loss takes its own logits; none is exchanged"))
        if REAL in wanted and losses:
            original = next(iter(losses.values())).original
            where = tuple(names[id(m)] for m in losses)
            claims.append(RealClaim(site, where, qualified_name(original)))
    return claims, left
