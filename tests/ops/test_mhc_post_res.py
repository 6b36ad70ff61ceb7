"""mhc_post_res: streams mixed and written to, both ways, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.residual.mhc_post_res import mhc_post_res, mhc_post_res_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs_of(*leading, n, c, device):
    shapes = (n, c), (c,), (n,), (n, n)
    return [randn(*leading, *shape, device=device, seed=i) for i, shape in enumerate(shapes)]


def judge(inputs, dtype, **options):
    as_accurate(mhc_post_res, mhc_post_res_reference, inputs, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; two blocks of columns, the last with one; more streams than usual
@pytest.mark.parametrize(("t", "n", "c"), [(1, 1, 1), (5, 3, 7), (2, 4, 513), (3, 8, 5)])
def test_post_res(t, n, c, dtype, device):
    judge(inputs_of(t, n=n, c=c, device=device), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "c"), [(1023, 4, 4096), (515, 4, 7168), (67, 8, 1280), (33, 16, 2048)])
def test_real_sizes(t, n, c, dtype, device):
    judge(inputs_of(t, n=n, c=c, device=device), dtype)


def test_weights_of_another_dtype(device):
    x, y, post, res = inputs_of(2, 3, n=4, c=9, device=device)
    judge([x, y, post.float(), res.float()], torch.bfloat16)
    judge([x.bfloat16(), y.float(), post.bfloat16(), res.bfloat16()], torch.float32)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 2, 3), (1, 2, 3)])
def test_frozen(frozen, device):
    judge(inputs_of(5, n=3, c=7, device=device), torch.bfloat16, frozen=frozen)


def test_autocast_changes_nothing():
    inputs = [t.float() for t in inputs_of(5, n=3, c=7, device="cpu")]
    wanted = mhc_post_res_reference(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(mhc_post_res_reference(*inputs), wanted)


def test_strided(device):
    inputs = [t.bfloat16() for t in inputs_of(6, 2, n=3, c=8, device=device)]
    for at in (slice(None, None, 2), (slice(None), 1)):
        judge([t[at] for t in inputs], torch.bfloat16)
    x, y, post, res = inputs
    judge([x[:1].expand_as(x), y[:1].expand_as(y), post, res.transpose(-1, -2)], torch.bfloat16)


@pytest.mark.parametrize(("leading", "c"), [((0,), 5), ((2, 0), 5), ((2,), 0)])
def test_empty(leading, c, device):
    judge(inputs_of(*leading, n=3, c=c, device=device), torch.float32)


def test_one_token_without_a_dimension(device):
    judge(inputs_of(n=3, c=5, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    t, n, c = 2**17 + 3, 4, 4096
    x, y = (torch.randn(t, *s, device=device, dtype=torch.bfloat16) for s in ((n, c), (c,)))
    leaves = [t.requires_grad_() for t in (x, y, torch.rand(t, n, device=device), torch.rand(t, n, n, device=device))]
    out = mhc_post_res(*leaves)
    gradients = torch.autograd.grad(out, leaves, out.detach())
    tail = [t.detach()[-3:].clone().requires_grad_() for t in leaves]
    out_tail = mhc_post_res(*tail)
    tails = torch.autograd.grad(out_tail, tail, out_tail.detach())
    assert same_bits(out[-3:].detach(), out_tail.detach())
    assert all(same_bits(a[-3:], b) for a, b in zip(gradients, tails, strict=True))


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(5, 13, n=4, c=257, device=device)]
    compiled = torch.compile(mhc_post_res, fullgraph=True)
    got, wanted = compiled(*leaves), mhc_post_res(*leaves)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x, y, post, res = (t.float() for t in inputs_of(2, n=3, c=5, device=device))
    for inputs, said in (
        ((x[0, 0], y, post, res), r"x \(5,\) must have two last dimensions"),
        ((x.repeat(1, 6, 1), y, post, res), r"x \(2, 18, 5\) has 18 streams .* 0 to 16"),
        ((x, y[:1], post, res), r"y \(1, 5\) must be \(2, 5\) for x \(2, 3, 5\)"),
        ((x, y, post[:, :2], res), r"post \(2, 2\) must be \(2, 3\)"),
        ((x, y, post, res[:, :2]), r"res \(2, 2, 3\) must be \(2, 3, 3\)"),
        ((x, y, post, res.double()), "res is torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"mhc_post_res: {said}"):
            mhc_post_res(*inputs)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(2, n=3, c=5, device="cpu")]
    assert same_bits(mhc_post_res(*inputs), mhc_post_res_reference(*inputs))
