"""Four corrections of triton 3.6's interpreter, without which a CPU judges other kernels than a GPU runs.

And two of its speed.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def correct() -> None:
    # TODO: goes when triton's interpreter rounds to bf16 (it cuts off, a GPU rounds to nearest even)
    stock_cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: object, src: interpreter.TensorHandle, dst_type: tl.dtype) -> interpreter.TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16).reshape(src.data.shape), tl.bfloat16)
        return stock_cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl

    # TODO: goes when triton's interpreter multiplies matrices of bf16 (it takes their bits for integers)
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: object, a: interpreter.TensorHandle, b: interpreter.TensorHandle, *more: object) -> object:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return stock_dot(self, a, b, *more)

    interpreter.InterpreterBuilder.create_dot = create_dot

    # TODO: goes when triton's interpreter says .item() for a loop's bounds: numpy 2.4 refuses int() of [n]
    stock_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: type, scope: object) -> None:
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor

    # TODO: goes when triton's interpreter takes the products that its compilers do (its own are in fp32, or wider)
    precisions = (*interpreter.InterpreterOptions.allowed_dot_input_precisions, "bf16x6")
    options = interpreter.InterpreterOptions(allowed_dot_input_precisions=precisions)
    interpreter.interpreter_builder.options = options

    # TODO: goes when triton's interpreter no longer lists all members of the language for each call of a device
    # function: a third of the time of tests/ops
    names: dict[object, list[str]] = {}

    def patch_builtin(package: object, builder: object, scope: object) -> None:
        if package not in names:
            # as long as it is unpatched, since a member that is patched is none of its builtins
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin

    # TODO: goes when triton's interpreter no longer reduces several tensors at once element by element: a row of 16384
    # columns took it seconds. Here the halves of an axis are combined, over and over, as lanes combine theirs
    def generic_reduce(self: interpreter.ReduceOps, input: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        tensors, axis = self.unravel(input, self.axis)
        parts = [tensor.handle.data for tensor in tensors]
        while parts[0].shape[axis] > 1:
            halves = [half for side in zip(*(np.split(part, 2, axis) for part in parts), strict=True) for half in side]
            both = [self.to_tensor(half, tensors[i % len(parts)].dtype) for i, half in enumerate(halves)]
            found = self.combine_fn.fn(*both)
            parts = [each.handle.data for each in (found if isinstance(found, tuple) else (found,))]
        if not self.keep_dims:
            parts = [part.squeeze(axis) for part in parts]
        elif self.axis is None:
            parts = [part.reshape((1,) * input[0].handle.data.ndim) for part in parts]
        return [self.to_tensor(part, tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    interpreter.ReduceOps.generic_reduce = generic_reduce
