"""group_norm: whole groups and groups in parts against fp64, any trailing shape, the sums of dweight and dbias."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from triton.runtime.jit import JITFunction

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _meet
from ds_fused.ops.norms.group_norm import group_norm, group_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where there are many shapes: fp16 is rounded as bf16 is, in another place
OF_MANY = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.all)]
FILE = registry.op("group_norm").module
PARTS = sys.modules["ds_fused.ops.norms._group_parts"]


def inputs_of(*shape, device):
    return [randn(*shape, device=device), *(randn(shape[1], device=device, seed=seed) for seed in (2, 3))]


def with_groups(n_groups):
    """(op, reference) of tensors only."""

    def bound(function):
        return lambda x, weight, bias, **options: function(x, n_groups, weight, bias, **options)

    return bound(group_norm), bound(group_norm_reference)


@pytest.fixture(params=["whole", "parts", pytest.param("parts in two launches", marks=pytest.mark.gpu)])
def way(request, monkeypatch):
    """Groups that fit a tile, and groups in parts; tiles and grids so small that the shapes below take several.

    Where programs can't meet, as here on a CPU, parts are always in two launches.
    """
    if request.param == "parts in two launches":
        monkeypatch.setattr(_meet, "can_meet", lambda x, size: False)
    constants = {
        "whole": {"TILE_FWD": 256, "TILE_BWD": 256, "WARPS_PER_MULTIPROCESSOR": 4},
        "parts": {"WHOLE_GROUP_FWD": 0, "WHOLE_GROUP_BWD": 0, "PART_TILE_FWD": 256, "PART_TILE_BWD": 128},
    }
    # tiles of parts of several channels
    monkeypatch.setattr(PARTS, "NARROWEST", 64)
    monkeypatch.setattr(PARTS, "MERGE_BLOCK", 4)
    for name, value in constants[request.param.split()[0]].items():
        monkeypatch.setattr(FILE, name, value)
    return request.param.split()[0]


def test_only_compiled_programs_meet():
    # the interpreter runs one after the other, a GPU's tensors too: the first would wait for ever
    assert _meet.DEVICES == () or isinstance(_meet.meet, JITFunction)


@pytest.mark.parametrize("dtype", OF_MANY)
@pytest.mark.parametrize(
    "shape, n_groups",
    [
        ((1, 1), 1),  # one element
        ((2, 45, 7), 15),  # NCL, all odd: no side of a tile is full
        ((2, 8, 11, 13), 2),  # NCHW; rows of two parts, the last one short
        ((9, 36), 4),  # NC: several samples in a tile, and more than the persistent grid has
        ((1, 4, 16, 16), 2),  # all tiles are full
    ],
)
@pytest.mark.usefixtures("way")
def test_group_norm(shape, n_groups, dtype, device):
    # eps that counts: dx of few values is a difference of equal terms otherwise, noise in any dtype
    floor = 2.0**-24 if shape == (1, 1) else 0.0
    as_accurate(*with_groups(n_groups), inputs_of(*shape, device=device), dtype, eps=0.5, floor=floor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, n_groups",
    [
        ((3, 1280, 16, 16), 32),  # a UNet's inner level
        ((3, 320, 64, 64), 32),  # its outer one: too large for a tile
        ((2, 640, 33, 31), 32),  # sides that divide nothing
        ((1, 128, 512, 512), 32),  # a decoder of images: few, large groups
        ((7, 384, 14, 14), 1),  # PoolFormer
        ((4097, 1024), 32),
    ],
)
def test_group_norm_of_real_sizes(shape, n_groups, dtype, device):
    as_accurate(*with_groups(n_groups), inputs_of(*shape, device=device), dtype)


@pytest.mark.parametrize("n_groups", [1, 12])
@pytest.mark.usefixtures("way")
def test_one_group_to_one_of_each_channel(n_groups, device):
    as_accurate(*with_groups(n_groups), inputs_of(3, 12, 5, device=device), torch.bfloat16)


@pytest.mark.usefixtures("way")
def test_values_far_from_zero_keep_their_variance(device):
    # a mean a thousand times the deviation: sums of squares would lose all of it
    x, *affine = inputs_of(2, 12, 21, device=device)
    as_accurate(*with_groups(2), [x - 1000, *affine], torch.float32)


@pytest.mark.parametrize("without", [(1,), (2,), (1, 2)])
@pytest.mark.usefixtures("way")
def test_without_weight_or_bias(without, device):
    inputs = [None if i in without else t for i, t in enumerate(inputs_of(3, 6, 5, device=device))]
    as_accurate(*with_groups(2), inputs, torch.bfloat16)


@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weight_of_another_dtype(x_dtype, weight_dtype, device):
    x, *affine = inputs_of(3, 6, 5, device=device)
    as_accurate(*with_groups(2), [x.to(x_dtype), *(t.to(weight_dtype) for t in affine)], x_dtype)


@pytest.mark.parametrize("trained", [0, 1, 2])
@pytest.mark.usefixtures("way")
def test_frozen(trained, device):
    frozen = [i for i in range(3) if i != trained]
    as_accurate(*with_groups(2), inputs_of(3, 30, 5, device=device), torch.float32, frozen=frozen)


def test_frozen_inputs_cost_no_work(device, monkeypatch, way):
    x, weight, bias = (t.float() for t in inputs_of(3, 6, 5, device=device))
    if way == "parts":
        y = group_norm(x, 2, weight.requires_grad_(), bias)
        monkeypatch.setattr(PARTS, "passes", None)
        y.sum().backward()
        assert weight.grad is not None
    weight.requires_grad_(False)
    monkeypatch.undo()
    monkeypatch.setattr(FILE, "sum_partials", None)
    group_norm(x.requires_grad_(), 2, weight, bias).sum().backward()
    assert x.grad is not None


def test_strided_samples(way, device):
    x = randn(3, 8, 3, 5, device=device).bfloat16()
    views = [
        x.chunk(2, 1)[1],  # read in place: gaps between samples
        x[::2],
        x[:1].expand(2, 8, 3, 5),
        x.contiguous(memory_format=torch.channels_last),  # copied
        x.transpose(0, 1)[:, :2],
    ]
    for view in views[:3] if way == "parts" else views:
        as_accurate(*with_groups(2), [view, *inputs_of(*view.shape, device=device)[1:]], torch.bfloat16)
    vectors = [randn(16, device=device, seed=seed)[::2] for seed in (0, 1)]
    as_accurate(*with_groups(2), [x, *vectors], torch.bfloat16)


def test_no_samples(device):
    as_accurate(*with_groups(2), inputs_of(0, 4, 5, device=device), torch.float32)


@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 4, 3, 0)])
def test_no_values(shape, device):
    # PyTorch's dweight is NaN here: zero times the mean of nothing
    x, weight, bias = (t.float().requires_grad_() for t in inputs_of(*shape, device=device))
    y = group_norm(x, 2, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert not dweight.any() and not dbias.any()


def test_equal_values(device):
    x, *affine = inputs_of(3, 30, 5, device=device)
    x[1] = 2
    as_accurate(*with_groups(2), [x, *affine], torch.float32)


def test_under_autocast_a_result_has_the_dtype_of_pytorchs(device):
    x, weight, bias = (t.to(d) for t, d in zip(inputs_of(3, 6, 5, device=device), DTYPES[1::-1] + DTYPES, strict=False))
    weight, bias = weight.float(), bias.float()
    with torch.autocast(device.type, torch.bfloat16):
        assert group_norm(x, 2, weight, bias).dtype == torch.nn.functional.group_norm(x, 2, weight, bias).dtype


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("n_groups", [1, 2**11])  # in parts; whole
def test_more_elements_than_int32(n_groups, device):
    n, c, s = 2**10 + 1, 2**11, 2**10  # 2^31 + 2^21 elements, 4 GiB each
    x = torch.randn(n, c, s, dtype=torch.bfloat16, device=device).requires_grad_()
    weight, bias = (t.bfloat16() for t in inputs_of(1, c, 1, device=device)[1:])
    y = group_norm(x, n_groups, weight, bias)
    y.backward(x.detach())
    tail = x.detach()[-1:].clone().requires_grad_()
    y_tail = group_norm(tail, n_groups, weight, bias)
    y_tail.backward(tail.detach())
    assert same_bits(y[-1:].detach(), y_tail.detach())
    assert same_bits(x.grad[-1:], tail.grad)


@pytest.mark.gpu
@pytest.mark.gpus
@pytest.mark.usefixtures("way")
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(*with_groups(2), inputs_of(3, 6, 5, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("sides", [(16, 16), (64, 64)])  # whole; in parts
def test_compiles_to_one_graph(sides, device):
    torch.compiler.reset()
    compiled = torch.compile(lambda x, weight, bias: group_norm(x, 8, weight, bias) * 2, fullgraph=True)
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(3, 80, *sides, device=device)]
    got, wanted = compiled(*leaves), group_norm(leaves[0], 8, *leaves[1:]) * 2
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x = torch.ones(2, 6, 3, device=device)
    with pytest.raises(ValueError, match=r"group_norm: x \(6,\) must be \[samples, channels, ...\]"):
        group_norm(torch.ones(6, device=device), 2)
    for n_groups in (4, 0, -2):
        with pytest.raises(ValueError, match=f"group_norm: n_groups is {n_groups}; it must divide the 6 channels"):
            group_norm(x, n_groups)
    with pytest.raises(ValueError, match=r"group_norm: weight \(3,\) .* x \(2, 6, 3\)"):
        group_norm(x, 2, torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"group_norm: bias \(0,\)"):  # a ZeRO-3 shard that nobody gathered
        group_norm(x, 2, None, torch.ones(0, device=device))
    with pytest.raises(ValueError, match="group_norm: x is torch.float64"):
        group_norm(x.double(), 2)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias = (t.bfloat16() for t in inputs_of(3, 6, 5, device="cpu"))
    ours, torchs = (partial(f, x, 2, weight, bias) for f in (group_norm, group_norm_reference))
    assert same_bits(ours(), torchs())
