"""Does a replacement compute what the original does? Both run once on small random data, forward and backward.

The judge is the original itself, run in fp64 on the CPU: the replacement may be as far from it as twice the original's
own rounding in the training dtype, plus a few units in the last place. Everything is compared row by row (the last
dimension), so that a large row can't hide an error in a small one.

Nothing of the live model is touched: its parameters may be zero-size shards. Random numbers come from a generator of
their own, no collective is started, and whatever was allocated is gone at return.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# units in the last place, of the largest value in a row: 4 as for every op, and as many again for the judge, which
# rounds to fp32 inside wherever the original says `.float()`
ULPS = 8

Run = Callable[[Mapping[str, Tensor]], "Tensor | Sequence[Tensor]"]


class _Mode(threading.local):
    """Of the copies that a comparison makes."""

    trains = True
    # whether the code of one of them asks for it
    counts = False


_mode = _Mode()


def _asks_for_mode(cls: type[nn.Module]) -> bool:
    """Whether a method of a layer's class, down to PyTorch's own, names ``training``."""
    own = itertools.takewhile(lambda each: each is not nn.Module, cls.__mro__)
    methods = (inspect.unwrap(method) for each in own for method in vars(each).values() if inspect.isfunction(method))
    return any("training" in method.__code__.co_names for method in methods if inspect.isfunction(method))


class Stub(nn.Module):
    """A linear child of a copied layer: a small weight that is in nobody's list of parameters."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.__dict__["weight"] = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scale(nn.Module):
    """In the place of a norm within a copied layer: a vector of the proof's own times what it is given."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.__dict__["vector"] = vector

    def forward(self, x: Tensor) -> Tensor:
        return x * self.vector


def replica(
    module: nn.Module,
    cls: type[nn.Module],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, object],
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """A shallow copy of a layer, of class ``cls``, over ``tensors``: its own "weight", a projection's "up_proj.weight",
    a norm's "sub_norm.vector".

    ``children``: what stands in the copy for those of these names.
    """
    made = cls.__new__(cls)
    made.__dict__.update(vars(module))
    # hooks, compiled call, gradient bookkeeping: as a fresh module has them
    made.__dict__.update(vars(nn.Module()))
    made.training = _mode.trains
    # on the meta device nobody trains
    _mode.counts = _mode.counts or (not tensors["x"].is_meta and _asks_for_mode(type(module)))
    made.__dict__.update(state)
    like = tensors["x"]
    for name, parameter in module._parameters.items():
        made._parameters[name] = None if parameter is None else tensors[name]
    for name, buffer in module._buffers.items():
        made._buffers[name] = None if buffer is None else buffer.detach().clone().to(like.device)
    for name, child in module._modules.items():
        if children is not None and name in children:
            made._modules[name] = children[name]
        elif f"{name}.weight" in tensors:
            made._modules[name] = Stub(tensors[f"{name}.weight"])
        elif f"{name}.vector" in tensors:
            made._modules[name] = Scale(tensors[f"{name}.vector"])
        elif child is not None:
            if next(child.parameters(), None) is not None:
                raise ValueError(f"its child {name!r} has parameters of its own")
            made._modules[name] = copy.deepcopy(child).train(_mode.trains)
    return made


def randn(seed: int, *shape: int) -> Tensor:
    """Normal numbers in fp64 on the CPU, the same in every process, from no shared generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _in_both_modes(compare: Callable[..., str | None]) -> Callable[..., str | None]:
    """Layers train, so that a dropout shows; those whose code asks whether they do are compared in evaluation too."""

    @functools.wraps(compare)
    def compare_both(*args: object, **options: object) -> str | None:
        _mode.counts = False
        differs = compare(*args, **options)
        if differs is not None or not _mode.counts:
            return differs
        _mode.trains = False
        try:
            differs = compare(*args, **options)
        finally:
            _mode.trains = True
        return None if differs is None else f"in evaluation {differs}"

    return compare_both


@_in_both_modes
def compare(
    stock: Run,
    fused: Run,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    gradients: Sequence[str] | None = None,
    may_refuse: bool = False,
) -> str | None:
    """None when ``fused`` gives what ``stock`` gives, else what differed. ``gradients``: of which tensors (all).

    ``may_refuse``: where ``stock`` raises, no model can call it so, and there is nothing to compare.
    """
    names = list(tensors) if gradients is None else list(gradients)
    # drawn once for all three
    upstream = functools.cache(lambda i, shape: randn(97 + i, *shape))
    with undisturbed(device):
        # rounded first: all three see the same numbers
        given = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
        if device.type == "meta":
            # nobody trains there: it is only seen which kernels a proof would launch
            _run(fused, {name: tensor.to(device) for name, tensor in given.items()}, names, upstream)
            return None
        wanted = _run(stock, {name: tensor.double() for name, tensor in given.items()}, names, upstream)
        here = {name: tensor.to(device) for name, tensor in given.items()}
        before = _generator_states(device)
        try:
            theirs = _run(stock, here, names, upstream)
        except RuntimeError:
            if may_refuse:
                return None
            raise
        if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(device), strict=True)):
            return "it draws random numbers"
        ours = _run(fused, here, names, upstream)
        return _difference(ours, theirs, wanted)


def accepts(run: Run, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it can be called so at all."""
    with undisturbed(torch.device("cpu")):
        try:
            run(tensors)
        except (RuntimeError, IndexError):
            return False
    return True


def _run(
    run: Run, tensors: Mapping[str, Tensor], names: Sequence[str], upstream: Callable[[int, torch.Size], Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients by name. ``upstream``: of output i in its shape, random and the same for everyone."""
    leaves = {name: tensor.detach().clone().requires_grad_(name in names) for name, tensor in tensors.items()}
    outputs = run(leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    doutputs = [upstream(i, y.shape).to(y) for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], doutputs, allow_unused=True)
    found = {f"output {i}" if len(outputs) > 1 else "output": y.detach() for i, y in enumerate(outputs)}
    for name, gradient in zip(names, gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    if list(ours) != list(theirs):
        return f"it gives {len(theirs)} tensors, the replacement {len(ours)}"
    for name, stock in theirs.items():
        mine, exact = ours[name], wanted[name]
        if mine.shape != stock.shape or mine.dtype != stock.dtype:
            return (
                f"its {name} is {_kind(stock.dtype)} {list(stock.shape)}, "
                f"the replacement's {_kind(mine.dtype)} {list(mine.shape)}"
            )
        ulp = torch.finfo(mine.dtype).eps * exact.abs().amax(-1)
        error = (mine.cpu().double() - exact).abs().amax(-1)
        allowed = 2 * (stock.cpu().double() - exact).abs().amax(-1) + ULPS * ulp
        # written so that NaN is a difference
        if not bool((error <= allowed).all()):
            worst = int((error - allowed).nan_to_num(nan=float("inf")).argmax())
            return f"its {name} differs by {error.flatten()[worst]:.1e}, allowed {allowed.flatten()[worst]:.1e}"
    return None


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def undisturbed(device: torch.device):
    """Whatever the caller has on (no_grad, autocast, a seed) neither changes the comparison nor is changed by it."""
    devices, kind = [], "cuda"  # with no device named, only the CPU's generator is kept
    if device.type == "meta":
        device = torch.device("cpu")
    if device.type != "cpu":
        kind = device.type
        devices = [torch.get_device_module(device).current_device() if device.index is None else device.index]
    with (
        torch.random.fork_rng(devices=devices, device_type=kind),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def facts(module: nn.Module) -> tuple:
    """What tells two layers of one class apart: their plain attributes. Layers that agree in them share one proof."""
    return tuple((name, _fact(value)) for name, value in attributes(module))


def attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Name and value of its own plain ones."""
    machinery = vars(nn.Module())
    return ((name, value) for name, value in vars(module).items() if name not in machinery)


def _fact(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_fact, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)
