"""``"leaf_modules": true``: under ZeRO-3 the weights of a repeated layer are gathered together, not module by module.

DeepSpeed calls a module whose weights come and go as one a leaf module. It decides by the modules when its optimizer is
built, and from then on two things differ: how weights are gathered, and how gradients leave. The latter all wait for
the end of the layer's backward, in a full backward hook. That costs the memory of a layer's gradients, fires before
there are any where no input of the layer needs a gradient (the first layer behind a frozen embedding, as with LoRA),
and more than once where a layer is called more than once. So layers are made leaf modules after the optimizer is
built, when DeepSpeed's hooks on modules are put on again, as DeepSpeed itself does for generation: weights come
together then, and each gradient leaves when it is made, as stock's.

A layer that is computed again in a backward (checkpointing) keeps its weights from there to the end of its backward:
DeepSpeed would release them in between, where the repeated forward runs to its end, and gather them again, or not at
all where the layer's backward had asked for them before. So a checkpointed layer is gathered twice a step, whatever
``stage3_max_reuse_distance`` is.

Memory: with ``"collectives": "stock"`` several weights come in one buffer, of which each is then copied: for a moment,
a layer's weights twice. What is left as it is, and why, the report says.

Hidden states that are given to a layer by keyword are not seen by DeepSpeed's hooks, which then release its weights
only at the end of the backward; that is said where it happens.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_fused.engine.agreement import first_that_holds
from ds_fused.engine.unproven_claim import UnprovenClaim
from ds_fused.engine.zero3.sizes import given
from ds_fused.modules.loss.scope import in_backward
from ds_fused.modules.swap import original_class
from ds_fused.ops.common._say import say_once
from ds_fused.policies.report import Left, counted

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

KEY = "leaf_modules"
# what is saved is the start of a collective for each module: beyond a GiB a layer's matrices are large enough for that
# not to matter, and experts of which a batch may need a few would all be gathered
MOST_BYTES = 2**30
# DeepSpeed's marks: of such a module, and of its parameters
_FLAG, _OF_LEAF = "_z3_leaf", "ds_z3_leaf_module"
# among the ids of modules that use a weight
_HELD = "ds_fused: computed again"


@dataclass(eq=False)
class LeafClaim(UnprovenClaim):
    """Layers of one class, gathered as one each."""

    offload: DeepSpeedZeRoOffload | None  # None: of a copied model, which nobody gathers
    key: str = KEY
    replacement: str = "the same, gathered as one"
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __deepcopy__(self, memo: dict) -> LeafClaim:
        modules, hooks = copy.deepcopy((self.modules, self.hooks), memo)
        return LeafClaim(self.paths, modules, None, hooks=hooks)

    def commit(self) -> None:
        gather_as_one(self.offload, self.modules)
        for layer in self.modules:
            # found once: to walk through a layer's modules takes longer than either hook
            parameters = list(layer.parameters())
            # around DeepSpeed's own, which lets go of what no module is active with
            self.hooks.append(layer.register_forward_hook(partial(_hold, parameters), prepend=True))
            self.hooks.append(layer.register_forward_hook(partial(_hand_on, parameters)))

    def restore(self) -> None:
        for hook in self.hooks:
            hook.remove()
        gather_apart(self.offload, self.modules)

    def in_place(self) -> bool:
        return all(getattr(layer, _FLAG, False) for layer in self.modules)


def are_set(engine: DeepSpeedEngine, model: nn.Module) -> str | None:
    """Where the user has said which modules are leaf modules. To be asked before DeepSpeed sets its own."""
    if any(_FLAG in vars(module) for module in model.modules()):
        return "leaf modules are set on the model already"
    for name in ("leaf_module", "stage3_module_granularity_threshold", "module_granularity_threshold"):
        if name in given(engine):
            return f"the JSON's zero_optimization says {name}"
    return None


def offload_of(engine: DeepSpeedEngine) -> DeepSpeedZeRoOffload | None:
    """What gathers the weights of this engine; None where they are not sharded."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    # without an optimizer it stands in its place
    found = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    return found if isinstance(found, DeepSpeedZeRoOffload) else None


def claims_of(
    engine: DeepSpeedEngine, layers: Mapping[str, nn.Module], slabs: Collection[nn.Parameter]
) -> tuple[list[LeafClaim], list[Left]]:
    """The layers that can be gathered as one, class by class, and those that can't, with the reason.

    ``slabs``: parameters that never are whole.
    """
    offload = offload_of(engine)
    reason = _why_none(engine, offload, layers)
    if reason is not None:
        return [], [Left(KEY, 1, reason)]
    owners = Counter(id(p) for module in engine.module.modules() for p in module._parameters.values() if p is not None)
    fitting: dict[type, dict[str, nn.Module]] = {}
    left: Counter[tuple[str, str]] = Counter()
    for path, layer in layers.items():
        reason = _why_not(layer, owners, slabs)
        if reason is None:
            fitting.setdefault(original_class(layer), {})[path] = layer
        else:
            left[original_class(layer).__name__, f"{KEY}: {reason}"] += 1
    claims = [LeafClaim(tuple(found), list(found.values()), offload) for found in fitting.values()]
    return claims, counted(left)


def _why_none(
    engine: DeepSpeedEngine, offload: DeepSpeedZeRoOffload | None, layers: Mapping[str, nn.Module]
) -> str | None:
    if offload is None:
        return f"ZeRO stage {engine.zero_optimization_stage()} shards no weights"
    return gathered_otherwise(engine) or (None if layers else "the model has no repeated layers")


def gathered_otherwise(engine: DeepSpeedEngine) -> str | None:
    """What else has a say in how this engine's weights are gathered."""
    return first_that_holds(
        {
            "DeepCompile arranges the gathering": engine.is_deepcompile_enabled(),
            "ZenFlow turns weights module by module": bool(getattr(engine.optimizer, "zenflow", False)),
            "stage3_allgather_sequential gathers weights one by one": engine.zero_allgather_sequential(),
        }
    )


def _why_not(layer: nn.Module, owners: Counter[int], slabs: Collection[nn.Parameter]) -> str | None:
    parameters = dict(layer.named_parameters())
    inside = Counter(id(p) for module in layer.modules() for p in module._parameters.values() if p is not None)
    in_slabs = [name for name, p in parameters.items() if p in slabs]
    shared = [name for name, p in parameters.items() if inside[id(p)] < owners[id(p)]]
    n_bytes = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters.values())
    if in_slabs:
        return f"{in_slabs[0]} never is whole"
    if shared:
        return f"{shared[0]} is a weight of another layer, too"
    if len({p.ds_process_group for p in parameters.values()}) > 1:
        return "its weights are sharded over several groups of ranks"
    if n_bytes > MOST_BYTES:
        return f"its {n_bytes / 2**20:,.0f} MiB are more than {MOST_BYTES / 2**20:,.0f}"
    return None


@torch.compiler.disable
def _hold(parameters: Sequence[nn.Parameter], layer: nn.Module, args: tuple, output: object) -> None:
    if torch.is_grad_enabled() and not any(isinstance(arg, torch.Tensor) for arg in args):
        say_once(
            f"ds_fused: {original_class(layer).__name__} gets its hidden states by keyword, and DeepSpeed then keeps "
            'its weights until the backward ends; "leaf_modules": false takes less memory'
        )
    if in_backward():
        for p in filter(_comes_and_goes, parameters):
            p.ds_active_sub_modules.add(_HELD)


@torch.compiler.disable
def _hand_on(parameters: Sequence[nn.Parameter], layer: nn.Module, args: tuple, output: object) -> None:
    """To the layer's backward, at whose end DeepSpeed takes it off."""
    if in_backward():
        for p in filter(_comes_and_goes, parameters):
            p.ds_active_sub_modules.add(layer.ds_id)
            p.ds_active_sub_modules.discard(_HELD)


def _comes_and_goes(p: nn.Parameter) -> bool:
    """Not in a copy of the model."""
    return hasattr(p, "ds_active_sub_modules")


def gather_as_one(offload: DeepSpeedZeRoOffload, modules: Sequence[nn.Module]) -> None:
    """Also after DeepSpeed's optimizer is built: gradients of these modules leave as any others."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)
    _hook_again(offload)


def gather_apart(offload: DeepSpeedZeRoOffload | None, modules: Sequence[nn.Module]) -> None:
    """As before ``gather_as_one``, for this engine and any later one."""
    for module in modules:
        with suppress(AttributeError):
            delattr(module, _FLAG)
        for p in module.parameters():
            if getattr(p, _OF_LEAF, None) is module:
                delattr(p, _OF_LEAF)
    if offload is not None and _is_hooked(offload):
        _hook_again(offload)


def _is_hooked(offload: DeepSpeedZeRoOffload) -> bool:
    """Not once its engine is destroyed: the handles are there, the hooks are not."""
    return any(hook.id in (hook.hooks_dict_ref() or ()) for hook in offload.forward_hooks)


def _hook_again(offload: DeepSpeedZeRoOffload) -> None:
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    offload._register_deepspeed_module(offload.module)
