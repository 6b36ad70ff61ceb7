"""Linear layers whose parameters are read past their forward, where to multiply by them is all that they do."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ds_fused.modules.swap import home_of, hooks_of_all


class Linear(NamedTuple):
    weight: nn.Parameter
    bias: nn.Parameter | None


# None: somebody had patched it before
_FORWARD = nn.Linear.forward if home_of(nn.Linear.forward) == "torch.nn.modules.linear" else None
# tensors in copies of a layer, which are compared
_PLAIN = (nn.Parameter, Tensor)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter; None where there is none by this name, and the weight is computed from others (by pruning, or a
    parametrization). To read such a one may change it, as spectral_norm's, and is no use while the others are sharded.
    """
    # past ZeRO-3's own dict, whose look-up of a parameter gathers it
    return dict.get(module._parameters, "weight")


def is_linear_patched() -> bool:
    """Whether the forward of all linear layers is somebody else's."""
    return nn.Linear.forward is not _FORWARD


def linear_of(module: nn.Module) -> Linear | None:
    """Its parameters, where they are in place and to multiply by them is all that it does."""
    # adapters and quantised layers are of other classes, and whoever has hooks on a layer wants it called: ZeRO-3 has
    # them, to gather its weight, where nothing around it is a leaf module
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if type(module) is not nn.Linear or is_linear_patched() or "forward" in vars(module) or any(hooks):
        return None
    if hooks_of_all():
        return None
    weight, bias = own_weight(module), dict.get(module._parameters, "bias")
    # what is parametrized, distributed or elsewhere now
    if type(weight) not in _PLAIN or weight.shape != (module.out_features, module.in_features):
        return None
    if bias is not None and (type(bias) not in _PLAIN or bias.shape != weight.shape[:1]):
        return None
    return Linear(weight, bias)
