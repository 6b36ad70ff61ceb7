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
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.head_call import HeadCall, unwritten
from ds_fused.modules.loss.late_values import Read, Seen, Source, WholeWeight
from ds_fused.modules.loss.steps import Step, replay
from ds_fused.modules.swap import is_gathering
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._say import say_once


class _Logits(torch.autograd.Function):
    """Gives on-demand logits their place in the graph; computes nothing unless a gradient comes."""

    @staticmethod
    def forward(ctx, read: Read, source: Source, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LogitsOnDemand:
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
        if func == _IS_NESTED and args[0]._source.together():
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


def _always() -> bool:
    return True


def on_demand(call: HeadCall, whole_weight: WholeWeight, weight: Tensor, bias: Tensor | None) -> LogitsOnDemand:
    """The output of a postponed head call, on demand. To be called where the weight is whole: in the head's forward."""
    is_sharded = whole_weight is not contextlib.nullcontext
    kept = None if is_sharded else (weight.detach(), None if bias is None else bias.detach())
    read = Read(call, whole_weight, _whole, weight, kept)
    together = _always if is_sharded else read.is_sharded_since
    source = Source(read, call.shape, call.dtype, call.hidden.device, together=together)
    return _Logits.apply(read, source, call.hidden, weight, bias)


def sealed(call: HeadCall, whole_weight: WholeWeight, shard: Seen) -> LogitsOnDemand:
    """The same where the weight is not whole: the logits can be read later, and a gradient to them is an error."""
    # not even looked at: within the model's forward ZeRO-3 would gather it, and hold it until the forward ends
    read = Read(call, whole_weight, shard, shard(call.head))
    return _Sealed.apply(Source(read, call.shape, call.dtype, call.hidden.device, together=_always), call.hidden)


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
