"""What stands in for the residual stream: attention over earlier blocks, and hyper-connections."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases.case import SIZE, Case, Inputs, randn
from benchmarks.rivals import residuals as rivals


def attention_residual_inputs(generator: torch.Generator, n: int, t: int, d: int) -> Inputs:
    stack, dy = randn(generator, n, t, d).requires_grad_(), randn(generator, t, d)
    # scores of about one: no block is alone
    query = nn.Parameter(randn(generator, d, scale=d**-0.5))
    return Inputs({"stack": stack, "query": query, "weight": nn.Parameter(randn(generator, d)), "dy": dy}, ("dy",))


def listed_blocks_inputs(generator: torch.Generator, n: int, t: int, d: int) -> Inputs:
    tensors = attention_residual_inputs(generator, n, t, d).tensors
    stack = tensors.pop("stack").detach()
    return Inputs({f"block{i}": stack[i].clone().requires_grad_() for i in range(n)} | tensors, ("dy",))


# four, as DeepSeek-V4 has
N_STREAMS = 4
N_COEFFICIENTS = N_STREAMS * (N_STREAMS + 2)


def coefficients_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    n, m = N_STREAMS, N_COEFFICIENTS
    x = randn(generator, t, n, c).requires_grad_()
    # as Liger has it; ours copies it
    phi = nn.Parameter(randn(generator, n * c, m, scale=(n * c) ** -0.5))
    bias, scale = nn.Parameter(randn(generator, m).float()), nn.Parameter(torch.ones(3, device=generator.device))
    # gradients lean on what is projected, for dyt_inputs' reason: each of dscale is a number
    mix = (x.flatten(1) @ phi).detach().float()
    upstream = {
        name: randn(generator, t, part.shape[1]).float() + part
        for name, part in zip(("dpre", "dpost", "dres"), mix.split([n, n, n * n], 1), strict=True)
    }
    upstream["dres"] = upstream["dres"].view(t, n, n)
    return Inputs({"x": x, "phi": phi, "bias": bias, "scale": scale, **upstream}, tuple(upstream))


def streams_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    n = N_STREAMS
    tensors = {
        "x": randn(generator, t, n, c).requires_grad_(),
        "y": randn(generator, t, c).requires_grad_(),
        "post": torch.rand(t, n, generator=generator, device=generator.device).requires_grad_(),
        "res": torch.rand(t, n, n, generator=generator, device=generator.device).softmax(-1).requires_grad_(),
    }
    return Inputs(tensors | {"dout": randn(generator, t, n, c)}, ("dout",))


def pre_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    tensors = streams_inputs(generator, t, c).tensors
    x, pre = tensors["x"], tensors["post"]
    return Inputs({"x": x, "pre": pre, "dy": randn(generator, t, c)}, ("dy",))


def connection_inputs(generator: torch.Generator, t: int, c: int) -> Inputs:
    tensors = coefficients_inputs(generator, t, c).tensors
    tensors = {name: x for name, x in tensors.items() if not name.startswith("d")}
    return Inputs(tensors | {"dout": randn(generator, t, N_STREAMS, c)}, ("dout",))


def _attention_residual_bytes(n: int, t: int, d: int) -> tuple[int, int]:
    # blocks -> y; blocks, dy -> their gradients; query and weight each way, and their gradients
    return SIZE * ((n + 1) * t * d + 2 * d), SIZE * ((3 * n + 2) * t * d + 6 * d)


def _coefficients_bytes(t: int, c: int) -> tuple[int, int]:
    # x; x -> dx; phi each way and its gradient. Coefficients in fp32 and their gradients
    n, m = N_STREAMS, N_COEFFICIENTS
    small = 4 * t * m
    return SIZE * (t * n * c + n * c * m) + small, SIZE * 3 * (t * n * c + n * c * m) + 2 * small


def _pre_bytes(t: int, c: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; pre each way and its gradient, in fp32
    n = N_STREAMS
    return SIZE * (n + 1) * t * c + 4 * t * n, SIZE * (3 * n + 2) * t * c + 12 * t * n


def _post_res_bytes(t: int, c: int) -> tuple[int, int]:
    # x, y -> out; x, y, dout -> dx, dy; post and res each way and their gradients, in fp32
    n = N_STREAMS
    small = 4 * t * n * (n + 1)
    return SIZE * (2 * n + 1) * t * c + small, SIZE * (5 * n + 3) * t * c + 3 * small


def _connection_bytes(t: int, c: int) -> tuple[int, int]:
    # x -> out; x, dout -> dx; phi each way and its gradient. No algorithm is known that takes a token's streams once:
    # what the layer reads hangs on all of them
    n, m = N_STREAMS, N_COEFFICIENTS
    return SIZE * (2 * t * n * c + n * c * m), SIZE * (5 * t * n * c + 3 * n * c * m)


CASES = (
    # eight blocks at Llama-3-8B's width, sixteen at DeepSeek-V3's
    Case(
        "attention_residual", "", attention_residual_inputs, rivals.ATTENTION_RESIDUAL,
        sweep=((8, 16384, 4096), (16, 4096, 7168)), launch_bound=(4, 16, 1024), tiny=(3, 5, 48),
        bytes=_attention_residual_bytes,
    ),
    Case(
        "attention_residual", "blocks", listed_blocks_inputs, rivals.LISTED_ATTENTION_RESIDUAL,
        sweep=((8, 16384, 4096),), launch_bound=(4, 16, 1024), tiny=(3, 5, 48), bytes=_attention_residual_bytes,
    ),
    # DeepSeek-V4-Flash
    Case(
        "mhc_coefficients", "", coefficients_inputs, rivals.COEFFICIENTS,
        sweep=((16384, 4096), (8192, 4096)), launch_bound=(16, 256), tiny=(5, 12), bytes=_coefficients_bytes,
    ),
    Case(
        "mhc_pre", "", pre_inputs, rivals.STREAMS_PRE,
        sweep=((16384, 4096),), launch_bound=(16, 256), tiny=(5, 12), bytes=_pre_bytes,
    ),
    Case(
        "mhc_post_res", "", streams_inputs, rivals.STREAMS_POST_RES,
        sweep=((16384, 4096),), launch_bound=(16, 256), tiny=(5, 12), bytes=_post_res_bytes,
    ),
    # in front of a layer that does nothing, and behind it
    Case(
        "mhc_in", "connection", connection_inputs, rivals.CONNECTION,
        sweep=((16384, 4096), (8192, 4096)), launch_bound=(16, 256), tiny=(5, 12), bytes=_connection_bytes,
    ),
)  # fmt: skip
