"""What the op files share: which tensors kernels can run on, rows, device guards, sizes of blocks and grids."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_fused.ops.common._say import say_once

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_DEVICES = ("cuda", "xpu")  # an AMD device calls itself cuda in PyTorch
LANES = 64 if torch.version.hip else 32  # threads of a warp
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# of shared memory, in bytes, what a program's tiles on their way may take: sm80 has 163 KiB for a program
MOST_IN_FLIGHT = 128 * 1024
# where a program has 99 KiB: compute capabilities 8.6 (A10, A40), 8.9 (L4, L40S) and 12.x
LEAST_IN_FLIGHT = 80 * 1024

# the types of most tensors, of which nothing more has to be asked: to ask each of them takes three times as long
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

# compute capabilities that copy tiles by descriptors and have the shared memory for large ones
COPIES_TILES = (9, 10)

T = TypeVar("T")

_multiprocessors: dict[torch.device, int] = {}
_copies_tiles: dict[torch.device, bool] = {}
_in_flight: dict[torch.device, int] = {}


def runs_kernels(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors, the first of which is there; if not, an op runs its PyTorch reference.

    CPU tensors can under ``TRITON_INTERPRET=1``, set before triton is imported. The variable is asked at every call, so
    that one process can run both ways (a CPU only; a GPU never asks).
    """
    device = tensors[0].device
    for tensor in tensors[1:]:
        if tensor is not None and tensor.device != device:
            return False  # the reference then fails as any PyTorch code does, naming both devices
    # is_cuda: the type of a device is a string, made anew
    if tensors[0].is_cuda or device.type in KERNEL_DEVICES:
        return _are_plain(tensors)
    # a graph can't hold the interpreter, nor trace the reading of its variable
    is_here = device.type == "cpu" and not torch.compiler.is_compiling()
    return is_here and triton.knobs.runtime.interpret and _are_plain(tensors)


def is_spread(tensor: object) -> bool:
    """Whether it is a DTensor (PyTorch's tensor parallelism, FSDP2), of which each rank holds a part."""
    # nobody has one where nobody has imported them, which takes a tenth of a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether kernels can read them by their addresses: no transform of torch.func, none is spread, a fake, a wrapper
    of others, or a view of something with another sign; and no torch.jit.trace, to which sizes are tensors."""
    if torch.compiler.is_compiling():
        return True
    if _is_transformed() or torch._C._is_tracing():
        return False
    for tensor in tensors:
        # as the imaginary part of a conjugate is: its sign is turned by whoever reads it
        if tensor is not None and tensor.is_neg():
            return False
    if PLAIN.issuperset(map(type, tensors)):
        return True
    if any(is_spread(tensor) for tensor in tensors):
        say_once(
            "ds_fused: an op was given a DTensor, of which a kernel would see this rank's part alone, so such calls "
            "are computed by PyTorch"
        )
        return False
    return not any(is_fake(tensor) or _is_wrapper(tensor) for tensor in tensors)


def _is_wrapper(tensor: object) -> bool:
    """Whether it has no memory, but other tensors that have: what a collective of PyTorch's tensor parallelism has yet
    to bring (AsyncCollectiveTensor), a nested tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return False
    say_once(
        f"ds_fused: an op was given a tensor ({type(tensor).__name__}) with no memory of its own, which no kernel can "
        "read, so such calls are computed by PyTorch"
    )
    return True


def waited(tensor: Tensor) -> Tensor:
    """Of an AsyncCollectiveTensor what its collective has brought, without a graph; any other as it is.

    To ask for an exact Tensor's type before spares most calls.
    """
    module = sys.modules.get("torch.distributed._functional_collectives")
    is_coming = module is not None and isinstance(tensor, module.AsyncCollectiveTensor)
    return tensor.trigger_wait() if is_coming else tensor


def is_fake(tensor: object) -> bool:
    """Whether it has no memory and says that it lies on a device, as under FakeTensorMode."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) is at work, or derivatives go forward beside the values
    (torch.autograd.forward_ad), for which there are PyTorch's own operations only."""
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_vmapped() -> bool:
    """Whether a tensor may stand for many, of which nobody can ask a value: torch.func.vmap, by itself or around a
    gradient."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack)


def refuse_transforms(op: str) -> None:
    """For ops whose whole sense is what the transforms of torch.func would undo."""
    if is_transformed():
        raise RuntimeError(
            f"{op}: torch.func's transforms (grad, vmap, jvp) and forward_ad can't pass it; transform "
            f"ds_fused.ops.registry.op({op!r}).reference, which has all logits at once"
        )


def check_here(op: str, whose: str, x: Tensor, weight: object, bias: Tensor | None) -> None:
    """A head is multiplied by the weight that an op is given: all of it has to be here. ``whose`` begins the names."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if is_spread(tensor):
            raise ValueError(
                f"{op}: {whose}{name} is a DTensor, of which this rank holds a part; pass its full_tensor()"
            )
        if tensor is not x and isinstance(tensor, Tensor) and tensor.shape == (0,):
            raise ValueError(
                f"{op}: {whose}{name} has no elements, as one that ZeRO-3 has sharded, outside of its layer's forward: "
                "have the model compute its loss, which gathers what it needs, or gather it around forward and backward"
            )


def check_dtypes(op: str, **tensors: Tensor | None) -> None:
    """Kernels compute in fp32, so wider floats and integers would lose bits silently."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; kernels exist for bfloat16, float16 and float32")


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New memory without gaps, of x's shape; of x's dtype where no other is named."""
    # half the host time of torch.empty, which takes long to read a torch.Size
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [N, D] with neighbouring columns: a view where one row stride can say it, else a copy."""
    if x.ndim > 2:
        rows = x.flatten(0, -2)
    else:
        rows = x if x.ndim == 2 else x.reshape(1, -1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def lie_apart(rows: Tensor) -> bool:
    """Whether no two of the rows [N, D] share memory, as those of an expanded tensor do: else no kernel may write."""
    return rows.shape[0] < 2 or rows.stride(0) >= rows.shape[1]


def can_take(dy: Tensor, dtype: torch.dtype, swapped: bool = False) -> bool:
    """Whether a gradient of that dtype can be written over dy: rows without gaps, of which no graph of gradients knows.

    ``swapped``: [B, heads, T, D] that lies in memory as [B, T, heads, D].
    """
    rows = dy.transpose(1, 2) if swapped else dy
    return dy.dtype == dtype and rows.is_contiguous() and not dy.requires_grad


def note_taken(dys: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> None:
    """Who has saved one of the dys that a gradient was written over gets autograd's error, not wrong numbers."""
    taken = [dy for dy, gradient in zip(dys, gradients, strict=True) if dy is not None and gradient is dy]
    if taken:
        torch.autograd.graph.increment_version(taken)


def row_stride(x: Tensor) -> int:
    """Elements from one row of x [N, D] to the next."""
    # where a guard has fixed the value of a symbol, dynamo says the shape of a tensor as numbers, but of its strides it
    # makes an error. TODO: goes when dynamo can (2.11 to 2.13 can't; tests/ops/trace_all.py shows it)
    if torch.compiler.is_compiling() and x.is_contiguous():
        return x.shape[1]
    return x.stride(0)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensor's. Free where it is already (the usual case)."""
    device = x.device
    if device.type == "cpu" or torch.compiler.is_compiling():  # a compiled graph brings its own guard
        return nullcontext()
    backend = torch.xpu if device.type == "xpu" else torch.cuda
    if backend.current_device() == device.index:
        return nullcontext()
    return backend.device(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has a matrix product on x's device compute in; None where it is off."""
    kind = x.device.type
    if kind == "meta":
        return None  # PyTorch refuses to be asked
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For products of a reference that are to be as wide as its tensors."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def fp32_in_autocast(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of what PyTorch has among that which autocast computes in fp32, for values of dtype on x's device."""
    return dtype if autocast_dtype(x) is None else torch.promote_types(dtype, torch.float32)


def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The same of PyTorch's norms, which a CPU's autocast leaves alone."""
    return dtype if x.device.type == "cpu" else fp32_in_autocast(x, dtype)


# torch.rms_norm came to autocast's list between PyTorch 2.11 and 2.13
_AUTOCAST_HAS_RMS_NORM = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")


def rms_norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The same of ``torch.rms_norm``, which not every PyTorch computes in fp32 there."""
    return norm_dtype(x, dtype) if _AUTOCAST_HAS_RMS_NORM else dtype


def multiprocessors(x: Tensor) -> int:
    """How many blocks run side by side at least; the size of a persistent grid is a multiple of it."""
    device = x.device
    if device.type == "cpu":
        return 1  # the interpreter: small tests then reach the second turn of a persistent loop
    return _once_a_device(_ask_multiprocessors, _multiprocessors, device)


def _ask_multiprocessors(device: torch.device) -> int:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return torch.cuda.get_device_properties(device).multi_processor_count


def copies_tiles(x: Tensor) -> bool:
    """Whether x's device copies tiles by descriptors (TMA), for which kernels of their own are written."""
    return _once_a_device(_ask_copies_tiles, _copies_tiles, x.device)


def _ask_copies_tiles(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(device).major in COPIES_TILES


def in_flight_on(capability: int) -> int:
    """Bytes of shared memory for tiles on their way to a program, by an NVIDIA GPU's compute capability: 90 is 9.0."""
    return LEAST_IN_FLIGHT if capability in (86, 89) or capability >= 120 else MOST_IN_FLIGHT


def _ask_in_flight(device: torch.device) -> int:
    # AMD's tiles wait in registers
    if device.type != "cuda" or torch.version.hip is not None:
        return MOST_IN_FLIGHT
    properties = torch.cuda.get_device_properties(device)
    return in_flight_on(10 * properties.major + properties.minor)


def _once_a_device(ask: Callable[[torch.device], T], known: dict[torch.device, T], device: torch.device) -> T:
    """What is asked of a device, kept in ``known``; for a graph it is asked again, which would guard what is known."""
    if torch.compiler.is_compiling():
        return ask(device)
    answer = known.get(device)
    if answer is None:
        answer = known[device] = ask(device)
    return answer


def resident(x: Tensor, warps_per_multiprocessor: int, warps: int) -> int:
    """How many programs of so many warps run side by side: the size of a persistent grid."""
    return multiprocessors(x) * max(1, warps_per_multiprocessor // warps)


def cdiv(n: int, size: int) -> int:
    """How many blocks hold n. For launchers: triton.cdiv wraps its arguments, which takes microseconds."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least power of two that holds n (1 for 0): a tile's side."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def warps_for(elements: int, per_thread: int = 16) -> int:
    """Warps for a tile so that each thread holds about `per_thread` elements; at most 1024 threads."""
    return min(1024 // LANES, max(1, power_of_2(elements // (LANES * per_thread))))


def stages_for(x: Tensor, most: int, tile_bytes: int) -> int:
    """Tiles of a program on x's device that are in flight, at most so many: all but one wait in shared memory."""
    return min(most, 1 + _once_a_device(_ask_in_flight, _in_flight, x.device) // tile_bytes)
