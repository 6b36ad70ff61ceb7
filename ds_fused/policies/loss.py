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

import dis
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.code import Code
from ds_fused.modules.head import CausalLMLoss, Head
from ds_fused.modules.scope import HeadWeight, Scope
from ds_fused.modules.swap import is_fused, is_live, qualified_name, swap, unswap_all, why_not_swapped
from ds_fused.policies.loss_proof import code_of, head_differs, linear_differs, real_differs
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
            self.before.append((model, "_loss_function" in vars(model), vars(model).get("_loss_function")))
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
    for head, models in _heads(model):
        path = names.get(id(head), "output embeddings")
        reasons = {id(m): _why_not_loss(m) for m in models}
        usable = [m for m in models if reasons[id(m)] is None]
        if not usable:
            left.append(Left(f"loss of {type(models[0]).__name__}", 1, reasons[id(models[0])]))
            continue
        # a wrapper that hands its labels on may compute no loss itself: the scope is the outermost that knows labels
        owner = next(m for m in models if _labels_at(type(m)) is not None)
        masked = any(_is_masked(m) for m in usable)
        scope = Scope(_labels_at(type(owner)), logits=logits, eval=eval, weight=weight, masked=masked)
        losses = {
            m: CausalLMLoss(m.loss_function, scope)
            for m in usable
            if _calls(m, "loss_function") and m.loss_function.__name__ == "ForCausalLMLoss"
        }
        site = Site(owner, head, losses, scope)
        if LINEAR in wanted:
            reason = _why_not_head(head) or _why_not_wait(models)
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


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each output embedding with the models that have it, outermost first."""
    found: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for module in model.modules():
        if not _has_loss_function(module):
            continue
        head = module.get_output_embeddings() if hasattr(type(module), "get_output_embeddings") else None
        if isinstance(head, nn.Embedding):
            head = _linear_of_its_shape(module, head)
        if isinstance(head, nn.Module):
            found.setdefault(id(head), (head, []))[1].append(module)
    yield from found.values()


def _linear_of_its_shape(model: nn.Module, table: nn.Embedding) -> nn.Module:
    """What computes the logits of a model that names a table of words instead (FSMT): the one layer that can."""
    shape = (table.embedding_dim, table.num_embeddings)
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == shape]
    return found[0] if len(found) == 1 else table


def _has_loss_function(module: nn.Module) -> bool:
    # asked of the class: wrappers (PEFT, DeepSpeed) show what they wrap, and to set it on them changes nothing
    return isinstance(getattr(type(module), "loss_function", None), property)


def _labels_at(cls: type) -> int | None:
    """Position of ``labels`` among the forward's arguments after self; None if it takes none."""
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def _why_not_loss(model: nn.Module) -> str | None:
    if _labels_at(type(model)) is None:
        return "its forward takes no labels"
    library = _loss_of_another(model)
    if library is not None:
        remedy = "; of an SFTTrainer, ds_fused.fuse_sft_loss(trainer) takes it off" if library == "TRL" else ""
        return f"{library} has patched its forward with a fused loss of its own{remedy}"
    if not _calls(model, "loss_function"):
        layers = _own_layers(model)
        computes = any(isinstance(layer, (nn.CrossEntropyLoss, nn.NLLLoss)) for layer in layers)
        computes = computes or any(map(_calls_torchs_loss, _functions(model, *layers)))
        return None if computes else "its forward computes the loss itself, and not by torch's cross_entropy"
    loss = model.loss_function
    if isinstance(loss, CausalLMLoss):
        return "ds_fused has exchanged its loss already; ds_fused.restore(model) comes before another apply"
    name = getattr(loss, "__name__", None)
    if loss.__module__ != "transformers.loss.loss_utils" or name not in ("ForCausalLMLoss", "ForMaskedLMLoss"):
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        return f"its loss is {getattr(loss, '__module__', '?')}.{name}, not ForCausalLMLoss"
    return None


def _calls(model: nn.Module, name: str) -> bool:
    """Whether the forward names it, or a method that the forward names."""
    return any(name in _named_in(function) for function in _functions(model))


def _own_layers(model: nn.Module) -> list[nn.Module]:
    """What of it is no model, and may compute its loss."""
    return [child for child in model.children() if not _has_loss_function(child)]


def _functions(*modules: nn.Module) -> list[FunctionType]:
    """Their forwards, and the methods that these name. The forward of any base: a subclass may call super().forward."""
    found = []
    for cls in map(type, modules):
        forwards = [inspect.unwrap(vars(each)["forward"]) for each in cls.__mro__ if "forward" in vars(each)]
        methods = [getattr(cls, name, None) for name in {name for each in forwards for name in _named_in(each)}]
        found += forwards + [inspect.unwrap(method) for method in methods if inspect.isfunction(method)]
    return [function for function in found if isinstance(function, FunctionType)]


def _named_in(function: object) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _calls_torchs_loss(function: FunctionType) -> bool:
    """Whether a cross entropy that it names is torch's: libraries give theirs, which take real logits, these names."""
    modules = _modules_named_in(function)
    meant = []
    for step in dis.get_instructions(function):
        if step.argval in _LOSSES and step.opname == "LOAD_GLOBAL":
            meant.append(function.__globals__.get(step.argval))
        # F.cross_entropy; from torch.nn import CrossEntropyLoss, within the function
        elif step.argval in _LOSSES and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
            meant.extend(getattr(module, step.argval, None) for module in modules)
    return any(value is own for value in meant for own in (nn.CrossEntropyLoss, F.cross_entropy, F.nll_loss))


_LOSSES = ("CrossEntropyLoss", "cross_entropy", "nll_loss")


def _modules_named_in(function: FunctionType) -> list[ModuleType]:
    """By its globals, by what it imports, and by these."""
    named, spaces, found = _named_in(function), [function.__globals__, sys.modules], {}
    for space in spaces:
        for value in (space[name] for name in named if name in space):
            if isinstance(value, ModuleType) and id(value) not in found:
                found[id(value)] = value
                spaces.append(vars(value))
    return list(found.values())


def _why_not_wait(models: Sequence[nn.Module]) -> str | None:
    """Their forwards may hand the logits to a Function of autograd: no gradient comes back to what is no tensor yet."""
    # a layer that is a loss; what has parameters works on hidden states
    losses = (layer for model in models for layer in _own_layers(model) if next(layer.parameters(), None) is None)
    for found in Code(*_functions(*models, *losses)):
        if isinstance(found, type) and issubclass(found, torch.autograd.Function):
            return (
                f"the forward around it leads to {qualified_name(found)}, an autograd.Function, which may be given the "
                "logits and takes tensors only"
            )
    return None


def _is_masked(model: nn.Module) -> bool:
    """Whether it is a masked language model, whose labels are of few tokens and not shifted."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_type", None) == "ForMaskedLM" and not encoder_decoder


def _loss_of_another(model: nn.Module) -> str | None:
    """The library whose forward, on the class or on the instance, computes the loss past head and loss function."""
    forward = vars(model).get("forward", type(model).forward)
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        library = _LIBRARIES.get(getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0])
        if library is not None:
            return library
        # functools.wraps: what was patched in, last first
        forward = getattr(function, "__wrapped__", None)
    return None


_LIBRARIES = {"liger_kernel": "Liger", "trl": "TRL"}


def _why_not_head(head: nn.Module) -> str | None:
    if is_fused(head):
        return "ds_fused has swapped it already"
    cls = type(head)
    if cls.__module__.startswith("peft."):
        return f"PEFT wraps it ({cls.__name__}); the logits are computed"
    more = head._modules or head._buffers or not head._parameters.keys() <= {"weight", "bias"}
    if not isinstance(head, nn.Linear) or more:
        return f"it is a {qualified_name(cls)}, no plain Linear; the logits are computed"
    reason = why_not_swapped(head)
    if reason is not None:
        return reason
    # DTensor, torchao's quantised tensors; what FSDP2 has made a DTensor has its hooks, too
    kind = type(head.weight.data)
    if kind is not Tensor or not head.weight.is_floating_point():
        return f"its weight is a {kind.__qualname__} of {head.weight.dtype}"
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return "it has hooks, which expect the logits"
    if cls.forward is not nn.Linear.forward:
        differs = head_differs(head)
        if differs is not None:
            return f"it is a {qualified_name(cls)}, no plain Linear: {differs}; the logits are computed"
    return None
