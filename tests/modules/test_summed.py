"""Linear layers whose weights' gradients are added up by the products that make them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fused.modules.layers.summed import SummedLinears
from ds_fused.modules.layers.tiled_mlp import tiled

ROWS = 5


class Shapes(TorchDispatchMode):
    """Of the results of all additions: what is left of sums that products do not make."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.added.append(tuple(out.shape))
        return out


def summed(layer, weights: list[nn.Parameter], xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients of the xs and, beside what autograd hands out, the sums of the weights."""
    sums: list[Tensor | None] = [None] * len(weights)
    dxs = []
    for x in xs:
        x = x.detach().requires_grad_()
        with SummedLinears(weights, sums):
            y = layer(x)
        dx, *rest = torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True)
        dxs.append(dx)
        for i, gradient in enumerate(rest):
            if gradient is not None:
                sums[i] = gradient + (0 if sums[i] is None else sums[i])
    return dxs, sums


def assert_exact(layer, weights: list[nn.Parameter]) -> None:
    """As autograd has it of all rows together."""
    torch.manual_seed(0)
    xs = [torch.randn(1, ROWS, 6).double() for _ in range(3)]
    dxs, sums = summed(layer, weights, xs)
    whole = torch.cat(xs, 1).requires_grad_()
    dx, *wanted = torch.autograd.grad(layer(whole).square().sum(), [whole, *weights])
    assert torch.allclose(torch.cat(dxs, 1), dx)
    for total, gradient in zip(sums, wanted, strict=True):
        assert torch.allclose(total, gradient)


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_has_its_sum_and_a_bias_its_gradient(bias):
    linear = nn.Linear(6, 4, bias=bias).double()
    assert_exact(linear, list(linear.parameters()))


def test_a_weight_in_several_places():
    first = nn.Linear(6, 6, bias=False).double()

    def layer(x: Tensor) -> Tensor:
        return F.linear(first(first(x).sin()), 2 * first.weight) + x @ first.weight

    assert_exact(layer, [first.weight])


def test_sums_of_16_bits_are_wide():
    linear = nn.Linear(6, 4, bias=False).bfloat16()
    sums: list[Tensor | None] = [None]
    for _ in range(1000):
        with SummedLinears([linear.weight], sums):
            y = linear(torch.ones(1, 1, 6, dtype=torch.bfloat16))
        torch.autograd.grad(y.sum(), [linear.weight], allow_unused=True)
    assert torch.equal(sums[0], torch.full((4, 6), 1000.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 37, 136, 72), (3, 64, 4096, 14336)], ids=str)
def test_sums_of_16_bits_on_a_gpu(dtype, shape):
    *rows, width, out = shape
    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=False, device="cuda", dtype=dtype)
    sums: list[Tensor | None] = [None]
    exact = torch.zeros(out, width, device="cuda", dtype=torch.float64)
    for _ in range(3):
        x, dy = (torch.randn(*rows, n, device="cuda", dtype=dtype) for n in (width, out))
        with SummedLinears([linear.weight], sums):
            y = linear(x)
        torch.autograd.grad(y, [linear.weight], dy, allow_unused=True)
        exact += dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    assert sums[0].dtype == torch.float32
    # of products that are exact, added in fp32 in some order
    bound = 2**-20 * exact.abs().max() * (3 * x.shape[:-1].numel()) ** 0.5
    assert (sums[0] - exact).abs().max() <= bound


def test_what_is_left_to_autograd():
    linear = nn.Linear(6, 4)
    x = torch.randn(2, ROWS, 6)

    def is_autograds(call) -> bool:
        sums: list[Tensor | None] = [None]
        with SummedLinears([linear.weight], sums):
            y = call()
        (gradient,) = torch.autograd.grad(y.sum(), [linear.weight], allow_unused=True)
        assert (gradient is None) != (sums[0] is None)
        return gradient is not None

    assert not is_autograds(lambda: linear(x))
    assert is_autograds(lambda: F.linear(x, weight=linear.weight))
    assert is_autograds(lambda: torch.addmm(linear.bias, x[0], linear.weight.t()))
    assert is_autograds(lambda: linear(x[0, 0]))
    assert is_autograds(lambda: linear(x[:, :0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_autograds(lambda: linear(x))
    seen = []
    handle = linear.weight.register_hook(seen.append)
    assert is_autograds(lambda: linear(x)) and len(seen) == 1
    handle.remove()
    assert not is_autograds(lambda: linear(x))
    other = nn.Linear(6, 4)
    with SummedLinears([linear.weight], [None]):
        y = other(x)
    assert torch.autograd.grad(y.sum(), [other.weight])[0] is not None


def test_tiles_make_no_gradient_of_their_own_but_the_last():
    mlp = nn.Sequential(nn.Linear(6, 10, bias=False), nn.SiLU(), nn.Linear(10, 6, bias=False))
    y = tiled(mlp, torch.randn(1, 12, 6, requires_grad=True), 4, mlp.parameters())
    with Shapes() as shapes:
        y.sum().backward()
    # what the last tile made, once for each weight
    assert sorted(shapes.added) == [(6, 10), (10, 6)]


class Products(TorchDispatchMode):
    """How many products have so many columns in their result."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.count = columns, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += out.shape[-1] == self.columns
        return out


@pytest.mark.parametrize(("read", "computed"), [(False, 1), (True, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_tiles_result_that_nobody_reads_is_computed_once(bias, read, computed):
    up, down = nn.Linear(6, 8, bias=bias).double(), nn.Linear(8, 5, bias=bias).double()

    def layer(x: Tensor) -> Tensor:
        y = down(up(x).sin())
        return y.cos() if read else y

    x = torch.randn(1, 4 * ROWS, 6).double().requires_grad_()
    dy = torch.randn(1, 4 * ROWS, 5).double()
    y = tiled(layer, x, 4, [*up.parameters(), *down.parameters()])
    with Products(5) as products:
        y.backward(dy)
    ours = [x.grad, *(p.grad for p in (*up.parameters(), *down.parameters()))]
    assert products.count == computed
    wanted = torch.autograd.grad(layer(x), [x, *up.parameters(), *down.parameters()], dy)
    for gradient, whole in zip(ours, wanted, strict=True):
        assert torch.allclose(gradient, whole)


def test_a_result_that_is_read_in_some_tiles_only_is_an_error():
    down = nn.Linear(6, 5).double()
    tiles = iter((False, False, True))
    summed = SummedLinears(list(down.parameters()), [None, None])

    def run() -> None:
        with summed:
            y = down(torch.ones(1, 2, 6).double())
        summed.returned(y.cos() if next(tiles) else y)

    run()
    run()
    with pytest.raises(RuntimeError, match="is read in another"):
        run()
