"""gated_rms_norm: both orders, their casts and groups, against fp64 and against the modules of transformers."""

from __future__ import annotations

import sys

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

import ds_fused.ops.norms.gated_rms_norm  # noqa: F401
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms._norms import CASTS
from ds_fused.ops.norms.gated_rms_norm import ORDERS, gated_rms_norm, gated_rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = sys.modules["ds_fused.ops.norms.gated_rms_norm"]


def inputs_of(*shape, device):
    return [randn(*shape, device=device), randn(*shape, device=device, seed=1), randn(shape[-1], device=device)]


def judge(inputs, dtype, **options):
    as_accurate(gated_rms_norm, gated_rms_norm_reference, inputs, dtype, **options)


@pytest.mark.parametrize("order, cast", [(order, cast) for order in ORDERS for cast in CASTS])
@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, the last tile short; three groups; just over a power of two
@pytest.mark.parametrize(
    "shape, group_size",
    [((1,), None), ((3, 7), None), ((5, 27, 33), 11), pytest.param((7, 1025), None, marks=pytest.mark.all)],
)
def test_gated_rms_norm(shape, group_size, dtype, order, cast, device):
    # eps that counts: dx of one column is a difference of equal terms otherwise, noise in any dtype
    judge(inputs_of(*shape, device=device), dtype, eps=0.5, order=order, cast=cast, group_size=group_size)


@pytest.mark.gpu
@pytest.mark.parametrize("order, cast", [(order, cast) for order in ORDERS for cast in CASTS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, group_size",
    [
        ((2, 1023, 32, 128), None),  # Qwen3-Next: a norm per head
        ((2049, 8192), None),  # Mamba-Codestral-7B, the widest that backward takes whole
        ((1023, 7680), 960),  # Nemotron-H: eight groups
        ((513, 16384), None),  # walked backward
        ((65, 40960), 20480),  # walked forward too
    ],
)
def test_gated_rms_norm_of_real_sizes(shape, group_size, dtype, order, cast, device):
    judge(inputs_of(*shape, device=device), dtype, order=order, cast=cast, group_size=group_size)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size, dtype", [(None, torch.float32), (41, torch.bfloat16)])
def test_groups_too_wide_for_a_tile_are_walked(group_size, dtype, order, device, monkeypatch):
    monkeypatch.setattr(FILE, "WHOLE_GROUP_FWD", 8)
    monkeypatch.setattr(FILE, "WHOLE_GROUP_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)
    # 41 columns are three blocks, the last one short; the interpreter's programs take more than one row
    judge(
        inputs_of(3, 82, device=device) if group_size else inputs_of(5, 41, device=device),
        dtype,
        order=order,
        group_size=group_size,
    )


@pytest.mark.parametrize("d", [11, 18])
@pytest.mark.parametrize("group_size", [None, "a half"])
@pytest.mark.parametrize("order", ORDERS)
def test_groups_in_blocks(order, group_size, d, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # three and five of 4 columns, the last one short
    if group_size:
        judge(inputs_of(5, 2 * d, device=device), torch.bfloat16, order=order, group_size=d)
    else:
        judge(inputs_of(5, d, device=device), torch.bfloat16, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_sigmoid(order, device):
    judge(inputs_of(5, 33, device=device), torch.bfloat16, order=order, act="sigmoid")


@pytest.mark.parametrize("order, cast", [(order, cast) for order in ORDERS for cast in CASTS])
def test_without_weight(order, cast, device):
    judge([*inputs_of(5, 33, device=device)[:2], None], torch.bfloat16, order=order, cast=cast)


@pytest.mark.parametrize("order, cast", [(order, cast) for order in ORDERS for cast in CASTS])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_several_dtypes(dtypes, order, cast, device):
    inputs = [x.to(dtype) for x, dtype in zip(inputs_of(5, 33, device=device), dtypes, strict=True)]
    judge(inputs, torch.bfloat16, order=order, cast=cast)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_frozen(frozen, order, device):
    judge(inputs_of(5, 33, device=device), torch.float32, order=order, frozen=frozen)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
def test_rows_wider_than_a_tile_compute_the_gate_again(act, order, device, monkeypatch):
    monkeypatch.setattr(FILE, "WIDEST_ONCE", 16)
    judge(inputs_of(5, 33, device=device), torch.bfloat16, order=order, act=act)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_frozen_and_walked(frozen, device, monkeypatch):
    monkeypatch.setattr(FILE, "WHOLE_GROUP_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)
    for order in ORDERS:
        judge(inputs_of(3, 33, device=device), torch.float32, order=order, frozen=frozen)


def test_large_gates_stay_finite(device):
    gate = torch.tensor([[-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]], device=device)
    for order in ORDERS:
        judge([randn(1, 7, device=device), gate, randn(7, device=device)], torch.float32, order=order)


def test_strided_rows(device):
    # a projection is split: x and gate are columns of one tensor
    packed = randn(2, 3, 66, device=device).bfloat16()
    x, gate = packed.chunk(2, -1)
    judge([x, gate, randn(33, device=device)], torch.bfloat16)
    judge([x, gate, randn(33, device=device)], torch.bfloat16, order="gate_first", group_size=11)
    judge([x.transpose(0, 1), gate[:1].expand(2, 3, 33).transpose(0, 1), randn(66, device=device)[::2]], torch.bfloat16)
    judge([packed[..., 0], packed[..., 1], randn(3, device=device)], torch.bfloat16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, order, device):
    judge(inputs_of(*shape, device=device), torch.float32, order=order)


# what their configurations set; the modules of other families are copies of these
def stock(name: str, weight):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    d = weight.numel()
    module, options = {
        "qwen3_next": (Qwen3NextRMSNormGated(d), {}),
        "mamba2": (MambaRMSNormGated(d), {"order": "gate_first"}),
        "zamba2": (Zamba2RMSNormGated(d, 16), {"order": "gate_first", "group_size": 16}),
        "falcon_h1": (FalconH1RMSNormGated(d, n_groups=2), {"cast": "after_weight", "group_size": d // 2}),
        "falcon_h1 gate first": (
            FalconH1RMSNormGated(d, n_groups=2, norm_before_gate=False),
            {"order": "gate_first", "cast": "after_weight", "group_size": d // 2},
        ),
        "kimi_linear": (KimiLinearRMSNormGated(d), {"cast": "after_weight", "act": "sigmoid"}),
    }[name]
    module.weight = torch.nn.Parameter(weight)
    return module, options


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "zamba2", "falcon_h1", "falcon_h1 gate first", "kimi_linear"])
def test_the_reference_is_the_module_of_transformers(name, weight_dtype):
    x, gate, weight = inputs_of(3, 5, 64, device="cpu")
    module, options = stock(name, weight.to(weight_dtype))
    wanted = module(x.bfloat16(), gate.bfloat16())
    assert same_bits(gated_rms_norm_reference(x.bfloat16(), gate.bfloat16(), module.weight, **options), wanted)


def test_the_bits_are_those_of_the_module(device):
    x, gate, weight = (t.bfloat16() for t in inputs_of(64, 64, device=device))
    for name in ("qwen3_next", "mamba2"):
        module, options = stock(name, weight)
        # 1/rms and the exponential may differ in their last fp32 bit
        assert (gated_rms_norm(x, gate, weight, **options) != module(x, gate)).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    x, gate = (torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2))
    weight = torch.randn(d, device=device).bfloat16()
    for options in ({}, {"order": "gate_first", "group_size": 512}):
        x.grad = gate.grad = None
        y = gated_rms_norm(x, gate, weight, **options)
        y.backward(x.detach())
        tails = [t.detach()[-3:].clone().requires_grad_() for t in (x, gate)]
        y_tail = gated_rms_norm(*tails, weight, **options)
        y_tail.backward(tails[0].detach())
        assert same_bits(y[-3:].detach(), y_tail.detach())
        for whole, tail in zip((x, gate), tails, strict=True):
            assert same_bits(whole.grad[-3:], tail.grad)
        del y


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    judge(inputs_of(5, 33, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_compiles_to_one_graph(order, device):
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(65, 256, device=device)]
    options = {"order": order, "group_size": 64}
    compiled = torch.compile(lambda *inputs: 2 * gated_rms_norm(*inputs, **options), fullgraph=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    outcomes = []
    for y, inputs in (
        (compiled(*leaves), leaves),
        (2 * gated_rms_norm(*leaves, **options), leaves),
        (2 * gated_rms_norm_reference(*exact, **options), exact),
    ):
        outcomes.append([y, *torch.autograd.grad(y.sum(), inputs)])
    for got, wanted, right in zip(*outcomes, strict=True):
        error, allowed = ((value.double() - right).abs().max() for value in (got, wanted))
        assert error <= 1.01 * allowed


def test_errors_name_the_argument(device):
    x = torch.ones(2, 6, device=device)
    with pytest.raises(ValueError, match=r"gated_rms_norm: x \(2, 6\) and gate \(2, 3\)"):
        gated_rms_norm(x, x[:, :3], None)
    with pytest.raises(ValueError, match=r"gated_rms_norm: weight \(0,\) .* x \(2, 6\)"):
        gated_rms_norm(x, x, torch.ones(0, device=device))
    for option, known in (("order", "norm_first"), ("cast", "before_weight"), ("act", "silu")):
        with pytest.raises(ValueError, match=f"gated_rms_norm: {option} is 'x'; known are {known}"):
            gated_rms_norm(x, x, None, **{option: "x"})
    for size in (4, 0, -2):
        with pytest.raises(ValueError, match=f"gated_rms_norm: group_size is {size}; it must divide the 6 columns"):
            gated_rms_norm(x, x, None, group_size=size)
    with pytest.raises(ValueError, match="gated_rms_norm: gate is torch.int64"):
        gated_rms_norm(x, x.long(), None)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(5, 33, device="cpu")]
    assert same_bits(gated_rms_norm(*inputs, group_size=11), gated_rms_norm_reference(*inputs, group_size=11))
