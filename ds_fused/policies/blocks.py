"""The repeated layers of a model (its decoder layers, its encoder's, those of a tower), by what they are."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer: what is in the outermost lists that hold at least two modules which are called and have children.

    So the experts of a mixture or the projections of a layer are none, and neither are lists of lists.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in found):
            layers = {f"{path}.{name}": child for name, child in module.named_children() if _is_layer(child)}
            if len(layers) > 1:
                found |= layers
    return found


def _is_layer(module: nn.Module) -> bool:
    # containers have no forward of their own
    return any(True for _ in module.children()) and type(module).forward is not nn.Module.forward
