"""Logits that nobody has computed: the head's input, the head, and what the model did to its output since.

``DeferredLogits`` lives inside the model's forward. The head returns it instead of computing; the model's own code runs
on over it, and what a causal LM does to logits before its loss is recorded:

    logits = head(hidden)                     # postponed
    logits = logits + final_logits_bias       # recorded: BART's second bias
    logits = cap * tanh(logits / cap)         # recorded: Gemma 2's softcap, Granite's division, Cohere's scale
    logits = logits[:, :-1].view(-1, n_vocab) # recorded: which tokens, in which shape
    logits = log_softmax(logits)              # recorded: with nll_loss it is a cross entropy
    loss = cross_entropy(logits, labels)      # linear_cross_entropy(hidden, head.weight, labels, ...)

Every chain of such steps is ``outer * z`` or ``outer * tanh(z)`` with ``z = inner * (head(hidden) + bias)``, for some
of the tokens, or the logarithm of their softmax, of which the cross entropy is the same. Any other operation computes
the real logits, by the head's own call, and goes on with those, so the result is always right.

Each knows whether a graph belongs to it: none to what was derived under no_grad. Logits that have one keep it, whoever
reads them. A reader under no_grad, or of detached ones (a metric), sees their values and leaves no trace: the loss
after it is still fused, unless the reader has written to them.

It is a plain object and no tensor, because torch.compile traces through it, which it does not through a tensor subclass
without values. What leaves the forward after a fused loss has the opposite needs and is a tensor (``on_demand.py``, and
``out_of_graph.py`` where the forward is a part of a compiled graph).

Memory: it holds ``hidden``; once read, the logits as well. It refers to nothing that refers to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.layers.postponed import is_number, operators, run_on_real
from ds_fused.modules.loss.handed_over import check_reader
from ds_fused.modules.loss.head_call import HeadCall, version
from ds_fused.modules.loss.steps import ROW_STEPS, Step, indexed, replay, row_index


def _same_memory(derived: Tensor, whole: Tensor, step: str) -> bool:
    """Whether a step that chooses or arranges tokens left them where they were."""
    # a graph keeps no account of memory, but knows strides
    if torch.compiler.is_compiling():
        return step in ("index", "transpose") or whole.is_contiguous()
    return derived.untyped_storage()._cdata == whole.untyped_storage()._cdata


class DeferredLogits:
    """``steps`` applied to the output of a postponed head call. See the file's text."""

    # __dict__, in which nothing is: DeepSpeed's hooks look through vars() of what a layer returns for parameters
    __slots__ = (
        *("__dict__", "_is_used", "_real", "_unwritten", "_viewed", "bias", "call", "capped", "dtype", "inner"),
        *("log_probs", "outer", "shape", "steps", "with_graph"),
    )
    # as a tensor's: `numpy_number * logits` is ours to compute
    __array_priority__ = 1000

    def __init__(self, call: HeadCall) -> None:
        self.call = call
        self.steps: tuple[Step, ...] = ()
        self.dtype = call.dtype
        self.shape = call.shape
        # [V], beside the head's own
        self.bias: Tensor | None = None
        self.capped = False
        self.inner = 1.0
        self.outer = 1.0
        # whether they are logarithms of probabilities by now
        self.log_probs = False
        # whether gradients pass them
        self.with_graph = call.with_graph
        self._real: Tensor | None = None
        # whether they were computed for more than a look
        self._is_used = False
        # the version of its memory before anybody wrote to it
        self._unwritten = 0.0
        # the logits that these choose from or arrange. In the same memory, what is written to one is seen in the other
        self._viewed: DeferredLogits | None = None

    # what a fused loss needs

    @property
    def rows(self) -> tuple[Step, ...]:
        """The steps that choose and arrange tokens."""
        return tuple(step for step in self.steps if step[0] in ROW_STEPS)

    @property
    def head(self) -> nn.Module:
        return self.call.head

    def scale_and_softcap(self) -> tuple[float, float | None] | None:
        """The op's (logit_scale, softcap): ``softcap * tanh(logit_scale * head(x) / softcap)``, if it has one."""
        if not self.capped:
            return self.inner, None
        if self.outer <= 0.0:
            return None
        return self.inner * self.outer, self.outer

    def is_real(self) -> bool:
        """Whether the logits exist by now and are in use: steps don't tell what the model may have written to them."""
        if self._real is not None and (self._is_used or version(self._real) != self._unwritten):
            return True
        return self._viewed is not None and self._viewed.is_real()

    def materialise(self) -> Tensor:
        """The real logits, with the graph that is theirs. To be called inside the forward that postponed them."""
        check_reader(self)
        return self._computed(torch.is_grad_enabled())

    def _computed(self, for_gradients: bool) -> Tensor:
        for_gradients = for_gradients and self.with_graph
        # in a forward without gradients a read is a use: what has cost its memory need not be computed again
        self._is_used = self._is_used or for_gradients or not self.call.with_graph
        if self._real is not None:
            return self._real
        whole = None if self._viewed is None else self._viewed._computed(for_gradients)
        with self.call.as_called(self.with_graph):
            return self._replayed(whole)

    def _replayed(self, whole: Tensor | None) -> Tensor:
        """``whole``: the logits that these choose from or arrange."""
        if whole is not None:
            real, unwritten = replay(whole, self.steps[-1:]), self._viewed._unwritten
            if _same_memory(real, whole, self.steps[-1][0]):
                self._real, self._unwritten = real, unwritten
                return real
        # what lies elsewhere is a copy, made when nobody had written
        if whole is None or version(whole) != unwritten:
            real = replay(self.call.base(), self.steps)
        self._real, self._unwritten = real, version(real)
        return real

    # what is recorded

    def _step(self, name: str, operand: Any = None) -> DeferredLogits | Tensor:
        if self.is_real() or (self.log_probs and name not in ROW_STEPS):
            return replay(self.materialise(), ((name, operand),))
        new = DeferredLogits(self.call)
        new.steps = (*self.steps, (name, operand))
        new.with_graph = self.with_graph and torch.is_grad_enabled()
        new.dtype = operand if name == "to" else self.dtype
        new.shape, new.bias = self.shape, self.bias
        new.capped, new.inner, new.outer, new.log_probs = self.capped, self.inner, self.outer, self.log_probs
        if name == "index":
            new.shape = indexed(self.shape, operand)
        elif name == "reshape":
            new.shape = torch.Size((*operand, self.shape[-1]))
        elif name == "transpose":
            sizes = list(self.shape)
            a, b = operand
            sizes[a], sizes[b] = sizes[b], sizes[a]
            new.shape = torch.Size(sizes)
        elif name == "log_softmax":
            new.log_probs, new.dtype = True, operand
        elif name == "add":
            new.bias = operand.reshape(-1)
            new.dtype = torch.promote_types(self.dtype, operand.dtype)
        elif name == "tanh":
            new.capped = True
        elif name in ("mul", "div"):
            factor = float(operand) if name == "mul" else 1.0 / float(operand)
            if self.capped:
                new.outer *= factor
            else:
                new.inner *= factor
        return new

    def _view(self, name: str, operand: Any) -> DeferredLogits | Tensor:
        new = self._step(name, operand)
        if isinstance(new, DeferredLogits):
            new._viewed = self
        return new

    def __getitem__(self, index: Any) -> Any:
        rows = row_index(index, self.ndim)
        if rows is None:
            return self.materialise()[index]
        # chosen by numbers they are a copy
        return self._step("index", rows) if isinstance(rows[0], Tensor) else self._view("index", rows)

    def __setitem__(self, index: Any, value: Any) -> None:
        # no function of operator's: torch.compile traces the statement only
        self.materialise()[materialised(index)] = materialised(value)

    def reshape(self, *shape: Any) -> Any:
        sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
        if all(isinstance(size, int) for size in sizes) and sizes.count(-1) <= 1:
            if -1 in sizes:
                sizes[sizes.index(-1)] = self.numel() // max(1, -math.prod(sizes))
            if sizes and sizes[-1] == self.shape[-1] and math.prod(sizes) == self.numel():
                return self._view("reshape", tuple(sizes[:-1]))
        return self.materialise().reshape(*shape)

    def view(self, *shape: Any) -> Any:
        # of another dtype
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            return self.materialise().view(*shape)
        return self.reshape(*shape)

    def transpose(self, dim0: int, dim1: int) -> Any:
        dims = tuple(dim + self.ndim if dim < 0 else dim for dim in (dim0, dim1))
        if all(0 <= dim < self.ndim - 1 for dim in dims):
            return self._view("transpose", dims)
        return self.materialise().transpose(dim0, dim1)

    def detach(self) -> Tensor:
        # a tensor, which also an autograd.Function can be given
        with torch.no_grad():
            return self.materialise().detach()

    def __iter__(self) -> Iterator:
        return map(self.__getitem__, range(len(self)))

    def __add__(self, other: Any) -> Any:
        is_bias = (
            isinstance(other, Tensor)
            and other.is_floating_point()
            # logits that are read later know no gradient of it
            and not other.requires_grad
            and 0 < other.ndim <= self.ndim
            and other.numel() == other.shape[-1] == self.shape[-1]
            and other.device == self.device
        )
        if is_bias and self.bias is None and not self.capped and self.inner == 1.0:
            return self._step("add", other)
        return self.materialise() + materialised(other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return self._step("mul", other) if is_number(other) else self.materialise() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._step("div", other) if is_number(other) and other != 0 else self.materialise() / other

    def mul(self, other: Any) -> Any:
        return self * other

    def div(self, other: Any) -> Any:
        return self / other

    def tanh(self) -> Any:
        # a second tanh is no softcap
        return self.materialise().tanh() if self.capped else self._step("tanh")

    def log_softmax(self, dim: int, dtype: torch.dtype | None = None, **more: Any) -> Any:
        # more: F.log_softmax says how deep in the stack its warning comes from
        if dim not in (-1, self.ndim - 1):
            return self.materialise().log_softmax(dim, dtype=dtype)
        if dtype is None:
            in_fp32 = torch.is_autocast_enabled(self.device.type) and self.dtype != torch.float64
            dtype = torch.float32 if in_fp32 else self.dtype
        return self._step("log_softmax", dtype)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            (target,) = args
            if isinstance(target, torch.dtype) and target.is_floating_point:
                return self if target == self.dtype else self._step("to", target)
            # "cuda" names no index and may be another device than ours: only the whole name is known to change nothing
            if isinstance(target, (torch.device, str)) and torch.device(target) == self.device:
                return self
        return self.materialise().to(*args, **kwargs)

    def float(self) -> Any:
        return self.to(torch.float32)

    def contiguous(self) -> DeferredLogits | Tensor:
        may_copy = any(name in ("index", "transpose") for name, _ in self.steps)
        return self._view("contiguous", None) if may_copy else self

    # what needs no values

    @property
    def device(self) -> torch.device:
        return self.call.hidden.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        if not self.with_graph:
            return False
        return self.call.hidden.requires_grad or any(p.requires_grad for p in self.head.parameters())

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def is_contiguous(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, steps={self.steps})"

    # everything else

    def __getattr__(self, name: str) -> Any:
        # dunder look-ups are questions about the type (copy, pickle, arrays), and our own slots are set in __init__
        if name.startswith("__") or name in DeferredLogits.__slots__:
            raise AttributeError(name)
        return getattr(self.materialise(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            logits = args[0]
            # nll_loss takes logarithms of probabilities, and of these cross_entropy is the same number
            if func is F.cross_entropy or (func is F.nll_loss and logits.log_probs):
                loss = logits.head.cross_entropy(*args, **kwargs)
                if loss is not None:
                    return loss
            elif func in (F.log_softmax, torch.log_softmax):
                return logits.log_softmax(*args[1:], **kwargs)
            elif func in _RECORDED and not kwargs:
                return _RECORDED[func](*args)
        elif func in (torch.mul, torch.multiply) and len(args) == 2 and not kwargs:
            # a number times logits
            return args[1] * args[0]
        return func(*materialised(args), **materialised(kwargs))


def materialised(value: Any) -> Any:
    """``value`` with every ``DeferredLogits`` in it computed."""
    if isinstance(value, DeferredLogits):
        return value.materialise()
    if isinstance(value, (tuple, list)):
        items = [materialised(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: materialised(item) for key, item in value.items()}
    return value


_RECORDED: dict[Callable, Callable] = {
    torch.tanh: DeferredLogits.tanh,
    torch.reshape: DeferredLogits.reshape,
    torch.transpose: DeferredLogits.transpose,
    torch.detach: DeferredLogits.detach,
    torch.add: DeferredLogits.__add__,
    torch.mul: DeferredLogits.__mul__,
    torch.multiply: DeferredLogits.__mul__,
    torch.div: DeferredLogits.__truediv__,
    torch.divide: DeferredLogits.__truediv__,
    torch.true_divide: DeferredLogits.__truediv__,
    torch.numel: DeferredLogits.numel,
    torch.is_floating_point: DeferredLogits.is_floating_point,
}


_BOTH_WAYS = operators("sub", "pow", "matmul", "mod", "floordiv", "and", "or", "xor")
_ONE_WAY = operators("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert")
_BUILTINS = {"float": float, "int": int, "bool": bool, "array": lambda x, *a: x.__array__(*a)}
run_on_real(
    DeferredLogits,
    DeferredLogits.materialise,
    _BOTH_WAYS | _ONE_WAY | _BUILTINS,
    # 1 / logits has no recorded form
    _BOTH_WAYS | operators("truediv"),
    materialised,
)
# __eq__ compares values, as a tensor's does; identity stays the hash
DeferredLogits.__hash__ = object.__hash__
