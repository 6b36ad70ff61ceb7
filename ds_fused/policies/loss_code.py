"""What the code of models says of their loss: who has a head, how the loss comes about, and what speaks against fusing.

Forwards are read, by the names that they use, and nothing is run but a head that is a subclass of Linear.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.code import Code
from ds_fused.modules.layers.linear import own_weight
from ds_fused.modules.loss.head import CausalLMLoss
from ds_fused.modules.swap import home_of, is_fused, library_of, qualified_name, why_not_swapped
from ds_fused.policies.loss_proof import head_differs


def heads_of(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
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


def labels_at(cls: type) -> int | None:
    """Position of ``labels`` among the forward's arguments after self; None if it takes none."""
    names = list(inspect.signature(cls.forward).parameters)
    return names.index("labels") - 1 if "labels" in names else None


def why_not_loss(model: nn.Module) -> str | None:
    if labels_at(type(model)) is None:
        return "its forward takes no labels"
    library = _loss_of_another(model)
    if library is not None:
        remedy = "; of an SFTTrainer, ds_fused.fuse_sft_loss(trainer) takes it off" if library == "TRL" else ""
        return f"{library} has patched its forward with a fused loss of its own{remedy}"
    if not calls(model, "loss_function"):
        layers = _own_layers(model)
        computes = any(isinstance(layer, (nn.CrossEntropyLoss, nn.NLLLoss)) for layer in layers)
        computes = computes or any(map(_calls_torchs_loss, _functions(model, *layers)))
        return None if computes else "its forward computes the loss itself, and not by torch's cross_entropy"
    loss = model.loss_function
    if isinstance(loss, CausalLMLoss):
        return "ds_fused has exchanged its loss already; ds_fused.restore(model) comes before another apply"
    name, home = getattr(loss, "__name__", None), home_of(loss)
    # functools.wraps gives a loss of the user's around it the same name
    if home != "transformers.loss.loss_utils" or name not in ("ForCausalLMLoss", "ForMaskedLMLoss"):
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        return f"its loss is {home or '?'}.{name}, not ForCausalLMLoss"
    return None


def calls(model: nn.Module, name: str) -> bool:
    """Whether the forward names it, or a method that the forward names."""
    return any(name in _named_in(function) for function in _functions(model))


def _own_layers(model: nn.Module) -> list[nn.Module]:
    """What of it is no model, and may compute its loss."""
    return [child for child in model.children() if not _has_loss_function(child)]


def _functions(*modules: nn.Module) -> list[FunctionType]:
    """Their forwards, and the methods that these name. The forward of any base: a subclass may call super().forward."""
    found = []
    for module in modules:
        cls = type(module)
        of_classes = (inspect.unwrap(vars(each)["forward"]) for each in cls.__mro__ if "forward" in vars(each))
        # one that the instance was given, and what decorates it, may be all that runs
        that_run = (getattr(each, "__func__", each) for each in _that_runs(module))
        # mostly they are the same
        forwards = list(dict.fromkeys((*of_classes, *that_run)))
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


def why_not_wait(models: Sequence[nn.Module]) -> str | None:
    """Their forwards may hand the logits to a Function of autograd, through which no gradient comes back to what is no
    tensor yet, or to TorchScript, which refuses it."""
    # a layer that is a loss; what has parameters works on hidden states
    losses = [layer for model in models for layer in _own_layers(model) if next(layer.parameters(), None) is None]
    for found in (*losses, *Code(*_functions(*models, *losses))):
        what = _of_tensors_only(found)
        if what is not None:
            return f"the forward around it leads to {what}, which may be given the logits and takes tensors only"
    return None


def _of_tensors_only(thing: object) -> str | None:
    if isinstance(thing, type) and issubclass(thing, torch.autograd.Function):
        return f"{qualified_name(thing)}, an autograd.Function"
    if isinstance(thing, torch.jit.ScriptFunction):
        return f"{thing.name}, a function of TorchScript"
    if isinstance(thing, torch.jit.ScriptModule):
        return f"{thing.original_name}, a layer of TorchScript"
    return None


def is_masked(model: nn.Module) -> bool:
    """Whether it is a masked language model, whose labels are of few tokens and not shifted."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_type", None) == "ForMaskedLM" and not encoder_decoder


def _loss_of_another(model: nn.Module) -> str | None:
    """The library whose forward, on the class or on the instance, computes the loss past head and loss function."""
    return next((_LIBRARIES[name] for name in map(library_of, _that_runs(model)) if name in _LIBRARIES), None)


def _that_runs(module: nn.Module) -> Iterator[object]:
    """The forward, the instance's or the class's, and what functools.wraps says is under it: last patched in first."""
    forward = module.forward  # asked of the instance: the class of a ScriptModule has none
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


_LIBRARIES = {"liger_kernel": "Liger", "trl": "TRL"}


def why_not_head(head: nn.Module) -> str | None:
    if is_fused(head):
        return "ds_fused has swapped it already"
    cls = type(head)
    if cls.__module__.startswith("peft."):
        return f"PEFT wraps it ({cls.__name__}); the logits are computed"
    if isinstance(head, nn.Linear) and own_weight(head) is None:
        return "its weight is computed from other parameters (pruned or parametrized); the logits are computed"
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
