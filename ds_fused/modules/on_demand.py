"""The logits in a model's output after a fused loss: a tensor that computes its values when somebody reads them.

Code that receives a model's output asks ``isinstance(x, torch.Tensor)`` before it does anything (HF Trainer's
``nested_detach`` and ``nested_concat``, Accelerate's ``gather_for_metrics`` and ``pad_across_processes``, DeepSpeed's
backward hooks on outputs), and hands it to C++ (collectives, ``data_ptr`` for a kernel). A plain object fails all of
those; so this is a tensor subclass without storage, and it is the tensor that the logits would have been:

- what needs no values (shape, dtype, device, hooks) computes nothing, and a cast or a detached one stays on demand;
- any other operation, from Python or from C++, computes the values once and runs on them. C++ that takes the pointer
  and asks neither Python nor the dispatcher, as ``torch.utils.dlpack.to_dlpack`` does, gets an error ("Cannot access
  data pointer"); ``torch.from_dlpack(logits)`` works, and so does ``logits.clone()`` there;
- it has a place in the autograd graph, next to the loss, as an output of the head's own call. A gradient that comes to
  it, also through a custom autograd function, goes on to the hidden states and the head's weight, and under ZeRO-3 it
  passes the same hooks as the loss, which gather the weight for it.

Two things can differ from logits computed in the forward, and not silently: after an optimizer step they are those of
the new weight, and reading them warns; and the fused loss has no gradient to them, of which hooks and retain_grad warn.

Where the weight is sharded all ranks have to read. Accelerate's ``pad_across_processes`` has only those read whose
batch is shorter than the longest, and between two such tensors all of them meet; but every rank asks first whether its
tensor is nested. Nothing else that gets a model's output asks that, so there the logits are computed.

Memory: hidden states [..., H] instead of logits [..., V], and both after a read; freed with the output.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ds_fused.modules.deferred import DeferredLogits
from ds_fused.modules.head_call import HeadCall, unwritten, version
from ds_fused.modules.steps import Step, replay
from ds_fused.modules.swap import is_gathering
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._say import say_once

log = logging.getLogger("ds_fused")

WholeWeight = Callable[[nn.Module], contextlib.AbstractContextManager]

# what tells of a head whether its weight is still the same: it or this rank's part; None where there is no telling
Seen = Callable[[nn.Module], Tensor | None]
# spread over it, these do: a step of an optimizer changes nearly all
SAMPLED_ELEMENTS = 256


def sample(weight: Tensor) -> Tensor:
    """A copy of a few elements, without waiting for the device."""
    flat = weight.detach().reshape(-1)
    # odd: no power of two between samples, or they would all lie in one column
    return flat[:: (flat.numel() // SAMPLED_ELEMENTS) | 1].clone()


def say_if_changed(weight: Tensor, sampled: Tensor) -> None:
    """Warn where it is no longer the weight that ``sampled`` was taken of."""
    if not torch.equal(sample(weight).to(sampled), sampled):
        log.warning(
            "ds_fused: these logits are read after the head's weight changed, so they are those of the new "
            'weight; read them before the optimizer steps, or set "logits": "keep" in the ds_fused block'
        )


class Source:
    """The values behind one or more ``LogitsOnDemand``, and what they look like. Computed once, without a graph."""

    __slots__ = ("__weakref__", "_compute", "_unwritten", "_values", "device", "dtype", "origin", "shape", "together")

    def __init__(
        self,
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        together: bool,  # all ranks have to
        origin: tuple[object, ...] | None = None,  # whose logits they are, and the steps on them but casts
    ) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._values: Tensor | None = None
        # their version before anybody wrote to them
        self._unwritten = 0.0
        self.origin = (object(),) if origin is None else origin
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.together = together

    # whoever's graph reads them, they are computed in front of it
    @torch.compiler.disable
    def values(self) -> Tensor:
        if self._values is None:
            with torch.no_grad():
                self._values = self._compute()
            self._unwritten = version(self._values)
            # lets go of the hidden states
            self._compute = None
        return self._values

    def after(self, steps: tuple[Step, ...], shape: torch.Size, dtype: torch.dtype) -> Source:
        """The values with recorded steps on them, which have this shape and dtype."""
        origin = (*self.origin, *(step for step in steps if step[0] != "to"))
        return Source(lambda: replay(self.values(), steps), shape, dtype, self.device, self.together, origin)

    def is_written(self) -> bool:
        return self._values is not None and version(self._values) != self._unwritten


class _Read:
    """How the logits of one forward are computed: head(hidden), under the forward's autocast."""

    __slots__ = ("autocast", "head", "hidden", "kept", "sample", "seen", "version", "whole_weight")

    def __init__(
        self,
        call: HeadCall,
        whole_weight: WholeWeight,
        seen: Seen,
        now: Tensor | None,  # what ``seen`` gives
        kept: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.head = call.head
        self.hidden = call.hidden.detach()
        self.version = call.version
        self.autocast = call.autocast
        self.seen = seen
        self.sample = None if now is None else sample(now)
        self.whole_weight = whole_weight
        # weight and bias where they stay whole: the head may have others by then, of functional_call or parametrized
        self.kept = kept

    def __call__(self) -> Tensor:
        _say_who_reads(_caller())
        # not the head's own call: outside the model's forward its hooks have no place in ZeRO-3's order of gathering
        with torch.inference_mode(self.hidden.is_inference()), torch.no_grad(), self.whole_weight(self.head):
            weight, bias = self.kept or (self.head.weight, self.head.bias)
            now = weight if self.kept else self.seen(self.head)
            if self.sample is not None and now is not None:
                say_if_changed(now, self.sample)
            return self.logits(unwritten(self.hidden, self.version), weight, bias)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return F.linear(hidden, weight, bias)


class _Logits(torch.autograd.Function):
    """Gives on-demand logits their place in the graph; computes nothing unless a gradient comes."""

    @staticmethod
    def forward(
        ctx, read: _Read, source: Source, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> LogitsOnDemand:
        ctx.read = read
        ctx.save_for_backward(hidden, weight, bias)
        return LogitsOnDemand(source)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx.read.logits, ctx.saved_tensors, ctx.needs_input_grad[2:], dlogits)


class _Sealed(torch.autograd.Function):
    """Gives on-demand logits of a sharded weight their place in the graph, where no gradient can pass them."""

    @staticmethod
    def forward(ctx, source: Source, hidden: Tensor) -> LogitsOnDemand:
        return LogitsOnDemand(source)

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "ds_fused: a gradient came to outputs.logits, beside the one to the loss. The weight of the "
            "head is sharded and was never whole; set "
            '"logits": "keep" in the ds_fused block, which computes the logits inside the forward'
        )


class _Steps(torch.autograd.Function):
    """Recorded steps on on-demand logits, which stay on demand."""

    @staticmethod
    def forward(
        ctx, logits: LogitsOnDemand, steps: tuple[Step, ...], shape: torch.Size, dtype: torch.dtype
    ) -> LogitsOnDemand:
        ctx.source = logits._source
        ctx.steps = steps
        return LogitsOnDemand(logits._source.after(steps, shape, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor) -> tuple[Tensor | None, ...]:
        if all(name == "to" for name, _ in ctx.steps):
            return dlogits.to(ctx.source.dtype), None, None, None
        before = ctx.source.values()
        return *_gradients(lambda x: replay(x, ctx.steps), (before,), (True,), dlogits), None, None, None


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*inputs)`` for the inputs that are wanted, by computing it once more."""
    leaves = [None if x is None else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    with torch.enable_grad():
        y = function(*leaves)
    grads = iter(torch.autograd.grad(y, [x for x, w in zip(leaves, wanted, strict=True) if w], dy))
    return tuple(next(grads) if w else None for w in wanted)


class _Values(torch.autograd.Function):
    """From on-demand logits to a plain tensor of their values."""

    @staticmethod
    def forward(ctx, logits: LogitsOnDemand) -> Tensor:
        # an alias: writing to it is seen by later reads, as it would be in a tensor
        return logits._source.values().detach()

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> Tensor:
        return dlogits


class LogitsOnDemand(torch.Tensor):
    """See the file's text."""

    _source: Source
    _real: Tensor | None

    @staticmethod
    def __new__(cls, source: Source) -> LogitsOnDemand:
        self = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=source.dtype, device=source.device)
        # a null pointer, for C++ that asks nobody; it gets an error instead
        torch._C._set_throw_on_mutable_data_ptr(self)
        self._source = source
        self._real = None
        return self

    def values(self) -> Tensor:
        """The logits as a plain tensor, part of the graph when this one is."""
        if not (torch.is_grad_enabled() and self.requires_grad):
            return self._source.values()
        if self._real is None:
            self._real = _Values.apply(self)
        return self._real

    def is_cast_of(self, other: LogitsOnDemand) -> bool:
        """Whether these are the other's values, with as much of a graph, but for their dtype, and unwritten."""
        mine, others = self._source.origin, other._source.origin
        is_same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))
        is_written = self._source.is_written() or other._source.is_written()
        return is_same and self.requires_grad == other.requires_grad and not is_written

    def __repr__(self, *, tensor_contents: object = None) -> str:
        # printing a model's output is no reason to compute it
        return f"LogitsOnDemand(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_NESTED and args[0]._source.together:
            args[0].values()
        if func in _OF_GRADIENTS and _is_a_users(*args[1:], **kwargs):
            _say_apart()
        if func in FACTS or func in _TRAINING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DETACH or (func is torch.Tensor.clone and _is_of_ddp(sys._getframe(1))):
            return cls(args[0]._source)
        if func in _SAME and len(args) == 1 and not kwargs:
            return args[0]
        if func in _NEW:
            # a fresh tensor of the same dtype and place
            return func(torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)
        dtype = _cast_only(func, args, kwargs)
        if dtype is not None:
            return args[0] if dtype == args[0].dtype else with_steps(args[0], (("to", dtype),), args[0].shape, dtype)
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        # reached from C++, below autograd: collectives, saved tensors
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0]._source)
        args, kwargs = tree_map_only(cls, lambda x: x._source.values(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _cast_only(func: Callable, args: tuple, kwargs: dict) -> torch.dtype | None:
    """The dtype, if the call is a cast of on-demand logits to a floating dtype and nothing else."""
    if kwargs or not isinstance(args[0], LogitsOnDemand):
        return None
    if func in _CASTS and len(args) == 1:
        return _CASTS[func]
    if func is torch.Tensor.to and len(args) == 2:
        if isinstance(args[1], torch.dtype) and args[1].is_floating_point:
            return args[1]
        if isinstance(args[1], (str, torch.device)) and torch.device(args[1]) == args[0].device:
            return args[0].dtype
    return None


_CASTS = {torch.Tensor.float: torch.float32, torch.Tensor.half: torch.float16, torch.Tensor.bfloat16: torch.bfloat16}
_DETACH = {torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__}
_SAME = {torch.Tensor.contiguous}
_NEW = {getattr(torch.Tensor, name) for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")}
# questions about the tensor, and its place in the graph: attributes, then methods
_ATTRIBUTES = """
    shape dtype device layout ndim names nbytes itemsize is_cuda is_cpu is_xpu is_meta is_sparse is_sparse_csr is_mkldnn
    is_nested is_quantized requires_grad grad grad_fn is_leaf output_nr retains_grad _version
    _base _backward_hooks _post_accumulate_grad_hooks
"""
_METHODS = """
    size stride dim ndimension numel nelement element_size storage_offset get_device is_contiguous is_floating_point
    is_complex is_signed is_inference register_hook retain_grad __len__ __hash__
"""
# not every version of PyTorch has them all
FACTS = {getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split() if hasattr(torch.Tensor, name)}
FACTS |= {getattr(torch.Tensor, name) for name in _METHODS.split() if hasattr(torch.Tensor, name)}
FACTS |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference}
FACTS |= {torch.Tensor.grad.__set__, torch.Tensor._backward_hooks.__set__}
# said of the tensor itself, as reentrant checkpoints say it of what they were given
_TRAINING = {torch.Tensor.requires_grad.__set__, torch.Tensor.requires_grad_}
_IS_NESTED = torch.Tensor.is_nested.__get__
_OF_GRADIENTS = {torch.Tensor.register_hook, torch.Tensor.retain_grad}


def _is_of_ddp(frame: FrameType) -> bool:
    """It clones all outputs where parameters may be unused, and nobody else has what it clones."""
    return frame.f_globals.get("__name__") == "torch.nn.parallel.distributed"


def _is_a_users(hook: Callable | None = None) -> bool:
    """DeepSpeed hangs hooks on all outputs, to know when a backward begins; without one, retain_grad was called."""
    return hook is None or not is_gathering(hook)


def _say_apart() -> None:
    say_once(
        "ds_fused: somebody waits for a gradient of outputs.logits, by retain_grad or a hook. That of the fused loss "
        'never comes to them, since it is computed beside them; with "fused_linear_cross_entropy": false it does'
    )


def _whole(head: nn.Module) -> Tensor:
    return head.weight


def on_demand(call: HeadCall, whole_weight: WholeWeight, weight: Tensor, bias: Tensor | None) -> LogitsOnDemand:
    """The output of a postponed head call, on demand. To be called where the weight is whole: in the head's forward."""
    is_sharded = whole_weight is not contextlib.nullcontext
    kept = None if is_sharded else (weight.detach(), None if bias is None else bias.detach())
    read = _Read(call, whole_weight, _whole, weight, kept)
    source = Source(read, call.shape, call.dtype, call.hidden.device, together=is_sharded)
    return _Logits.apply(read, source, call.hidden, weight, bias)


def sealed(call: HeadCall, whole_weight: WholeWeight, shard: Seen) -> LogitsOnDemand:
    """The same where the weight is not whole: the logits can be read later, and a gradient to them is an error."""
    # not even looked at: within the model's forward ZeRO-3 would gather it, and hold it until the forward ends
    read = _Read(call, whole_weight, shard, shard(call.head))
    return _Sealed.apply(Source(read, call.shape, call.dtype, call.hidden.device, together=True), call.hidden)


def leaving(logits: DeferredLogits) -> LogitsOnDemand:
    """Deferred logits as they leave the forward."""
    call = logits.call
    if call.on_demand is None:
        # the head made none: the loss is outside of the forward, or in a compiled graph
        with call.as_called(with_graph=True):
            call.on_demand = logits.head.forward(unwritten(call.hidden, call.version), later=True)
    with call.as_called(logits.with_graph):
        return with_steps(call.on_demand, logits.steps, logits.shape, logits.dtype)


def with_steps(
    logits: LogitsOnDemand, steps: tuple[Step, ...], shape: torch.Size, dtype: torch.dtype
) -> LogitsOnDemand:
    """On-demand logits with what the model did to them, and what they look like after it."""
    return _Steps.apply(logits, steps, shape, dtype) if steps else logits


def _caller() -> str:
    """file:line of whoever reads, the first frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ds_fused", "torch"):
        frame = frame.f_back
    return "C++" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _say_who_reads(caller: str) -> None:
    """One line for each place that reads."""
    say_once(
        f"ds_fused: {caller} reads the logits of a forward whose loss was fused; they are computed now. "
        'Where that is too late (sharded weights), set "logits": "keep" in the ds_fused block'
    )
