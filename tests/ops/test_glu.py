"""glu: both passes against fp64, in place on the halves of a chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.mlp._gates import ACTS, GLUForm
from ds_fused.ops.mlp.glu import BLOCK, glu, glu_again, glu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 1025)])  # one element; odd; several blocks, the last one short
def test_glu(shape, dtype, act, device):
    inputs = [randn(*shape, device=device, seed=seed) for seed in (0, 1)]
    as_accurate(glu, glu_reference, inputs, dtype, act=act)


GPT_OSS = {"alpha": 1.702, "limit": 7.0, "offset": 1.0}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "form",
    [{}, {"act": "relu2"}, GPT_OSS, {"act": "gelu_tanh", "limit": 1.0}],  # 1: many values beyond it
    ids=["silu", "relu2", "gpt_oss", "clamped gelu"],
)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.all)])
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 2 * BLOCK + 6)])  # one pair; odd halves; over one block
def test_packed(shape, dtype, form, interleaved, device):
    as_accurate(glu, glu_reference, [3 * randn(*shape, device=device), None], dtype, interleaved=interleaved, **form)


def test_packed_in_fp16(device):
    for interleaved in (False, True):
        as_accurate(
            glu,
            glu_reference,
            [3 * randn(3, 14, device=device), None],
            torch.float16,
            interleaved=interleaved,
            **GPT_OSS,
        )


def test_forms_of_two_tensors(device):
    inputs = [4 * randn(3, 7, device=device, seed=seed) for seed in (0, 1)]
    for form in (GPT_OSS, {"limit": 2.0}, {"act": "relu", "limit": 2.0, "offset": -0.5}):
        for dtype in DTYPES:
            as_accurate(glu, glu_reference, inputs, dtype, **form)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_rows_with_gaps(interleaved, device):
    gate_up = randn(3, 40, device=device).bfloat16()[:, 3:17]
    as_accurate(glu, glu_reference, [gate_up, None], torch.bfloat16, interleaved=interleaved, **GPT_OSS)
    columns_apart = randn(6, 5, device=device).bfloat16().t()
    as_accurate(glu, glu_reference, [columns_apart, None], torch.bfloat16, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", [{}, {"act": "gelu"}, GPT_OSS], ids=["silu", "gelu", "gpt_oss"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, BLOCK + 3), (0, 5)])  # one; odd; over one block; no row
def test_again_writes_what_forward_and_backward_do(shape, dtype, form, interleaved, device):
    n, d = shape
    gate_up, dy = (x.to(dtype) for x in (3 * randn(n, 2 * d, device=device), randn(n, d, device=device, seed=1)))
    leaf = gate_up.clone().requires_grad_()
    y = glu(leaf, interleaved=interleaved, **form)
    y.backward(dy)
    glu_again(dy, gate_up, GLUForm(**form), interleaved)
    assert same_bits(dy, y.detach()) and same_bits(gate_up, leaf.grad)


def test_again_without_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gate_up, dy = randn(3, 14, device="cpu").float(), randn(3, 7, device="cpu", seed=1).float()
    leaf = gate_up.clone().requires_grad_()
    y = glu_reference(leaf, **GPT_OSS)
    y.backward(dy)
    glu_again(dy, gate_up, GLUForm(**GPT_OSS))
    assert same_bits(dy, y.detach()) and same_bits(gate_up, leaf.grad)


def test_gradients_at_the_limits_are_those_of_clamp(device):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([-inf, -7.5, -7.0, 0.0, 6.96875, 7.0, 7.03125, inf, nan], device=device)
    gate, up = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    for dtype in (torch.float32, torch.bfloat16):
        as_accurate(glu, glu_reference, [gate.to(dtype), up.to(dtype)], dtype, limit=7.0, offset=1.0)
    gate, up = (torch.full((3,), 7.0, device=device, requires_grad=True) for _ in range(2))
    glu(gate, up, **GPT_OSS).sum().backward()
    assert (gate.grad > 7.0).all() and (up.grad > 6.0).all()


@pytest.mark.parametrize("act", ["relu", "relu2"])
def test_relu_at_zero_and_nan(act, device):
    gate = torch.tensor([-0.0, 0.0, float("nan"), -1e-30, 1e-30], device=device)
    as_accurate(glu, glu_reference, [gate, torch.ones_like(gate)], torch.float32, act=act)


def test_gpt_oss_computes_the_same(device):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts
    experts = SimpleNamespace(alpha=1.702, limit=7.0)
    gate_up = 6 * randn(5, 14, device=device).float()
    wanted = gpt_oss._apply_gate(experts, gate_up)
    assert torch.allclose(glu(gate_up, interleaved=True, **GPT_OSS), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(511, 2 * 8192), (511, 2 * 2880)])  # Phi-3-mini; GPT-OSS, no multiple of a block
def test_packed_of_real_sizes(shape, dtype, interleaved, device):
    as_accurate(glu, glu_reference, [randn(*shape, device=device), None], dtype, interleaved=interleaved, **GPT_OSS)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(511, 14336), (63, 28672)])  # Llama-3-8B and 70B, an odd number of tokens
def test_glu_of_real_sizes(shape, dtype, act, device):
    inputs = [randn(*shape, device=device, seed=seed) for seed in (0, 1)]
    as_accurate(glu, glu_reference, inputs, dtype, act=act)


@pytest.mark.parametrize("d", [5, BLOCK + 1])  # columns under and over one block
def test_halves_of_a_chunk_are_read_in_place(d, device):
    gate, up = randn(2, 2, 2 * d, device=device).bfloat16().chunk(2, dim=-1)
    as_accurate(glu, glu_reference, [gate, up], torch.bfloat16)


def test_columns_apart_are_copied(device):
    gate = randn(7, 3, device=device).bfloat16().t()
    as_accurate(glu, glu_reference, [gate, randn(3, 7, device=device)], torch.bfloat16)


def test_mixed_dtypes_promote(device):
    gate, up = randn(3, 7, device=device).bfloat16(), randn(3, 7, device=device, seed=1).float()
    as_accurate(glu, glu_reference, [gate, up], torch.float32)


def test_large_values_stay_finite(device):
    # exp(-x) of a plain sigmoid would overflow at -100; act and slope are 0 and 1 there
    gate = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], device=device)
    for act in ACTS:
        as_accurate(glu, glu_reference, [gate, torch.ones_like(gate)], torch.float32, act=act)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, device):
    as_accurate(glu, glu_reference, [randn(*shape, device=device)] * 2, torch.float32)


@pytest.mark.parametrize("shape", [(0, 6), (5, 0), (2, 0, 4)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_empty_packed(shape, interleaved, device):
    as_accurate(glu, glu_reference, [randn(*shape, device=device), None], torch.float32, interleaved=interleaved)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_frozen_input(frozen, device):
    inputs = [randn(3, 7, device=device, seed=seed) for seed in (0, 1)]
    as_accurate(glu, glu_reference, inputs, torch.float32, frozen=(frozen,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, device):
    gate, up = (randn(3, 7, device=device, seed=seed).float() for seed in (0, 1))
    wanted = glu(gate, up)
    with torch.autocast(device.type, dtype):
        assert same_bits(glu(gate, up), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_of_more_elements_than_int32(interleaved, device):
    n, d = 2**17 + 1, 2**14  # 2^31 + 2^14 elements, 4 GiB
    gate_up = torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_()
    y = glu(gate_up, interleaved=interleaved)
    y.backward(y.detach())
    tail = gate_up.detach()[-3:].clone().requires_grad_()
    y_tail = glu(tail, interleaved=interleaved)
    y_tail.backward(y_tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(gate_up.grad[-3:], tail.grad)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**18 + 1, 2**13  # 2^31 + 2^13 elements, 4 GiB each
    gate = torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_()
    up = torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_()
    y = glu(gate, up)
    y.backward(up.detach())
    tail = [x.detach()[-3:].clone().requires_grad_() for x in (gate, up)]
    y_tail = glu(*tail)
    y_tail.backward(tail[1].detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(gate.grad[-3:], tail[0].grad)
    assert same_bits(up.grad[-3:], tail[1].grad)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    gate, up = (randn(65, 257, device=device, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    compiled = torch.compile(lambda a, b: glu(a, b) * 2, fullgraph=True)
    got, wanted = compiled(gate, up), glu(gate, up) * 2
    assert torch.equal(got, wanted)
    dys = [torch.autograd.grad(y.sum(), (gate, up)) for y in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*dys, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_compiles_to_one_graph(interleaved, device):
    gate_up = randn(65, 514, device=device).bfloat16().requires_grad_()
    compiled = torch.compile(lambda x: glu(x, interleaved=interleaved, **GPT_OSS) * 2, fullgraph=True)
    got, wanted = compiled(gate_up), glu(gate_up, interleaved=interleaved, **GPT_OSS) * 2
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), gate_up)[0] for y in (got, wanted)))


def test_errors_name_the_argument(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"glu: gate \(2, 3\) and up \(2, 4\)"):
        glu(x, torch.ones(2, 4, device=device))
    with pytest.raises(ValueError, match="glu: act is 'tanh'; known are silu"):
        glu(x, x, "tanh")
    with pytest.raises(ValueError, match=r"without up, .* an even number of columns .*; got \(2, 3\)"):
        glu(x)
    with pytest.raises(ValueError, match="interleaved is for gate and up in one tensor"):
        glu(x, x, interleaved=True)
    with pytest.raises(ValueError, match=r"alpha is 1.702 and act 'relu'; only silu has an alpha"):
        glu(x, x, "relu", alpha=1.702)
    for limit in (0.0, -7.0, float("nan")):
        with pytest.raises(ValueError, match=rf"limit is {limit}; it must be above 0"):
            glu(x, x, limit=limit)
    with pytest.raises(ValueError, match="glu: gate is torch.float64"):
        glu(x.double(), x.double())


@pytest.mark.parametrize("layout", ["apart", "halves", "packed", "interleaved"])
def test_gradients_may_overwrite_the_inputs(layout, device):
    """The same bits, in the memory of what was lent; but not where the graph is kept for who asks again."""

    def run(overwrite: bool, keep: bool = False) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        both = randn(3, 5, 34, device=device).bfloat16().requires_grad_() * 1
        if layout in ("packed", "interleaved"):
            lent = [both]
            y = glu(both, interleaved=layout == "interleaved", overwrite_inputs=overwrite)
        else:
            lent = list(both.chunk(2, -1))
            lent = [x * 1 for x in lent] if layout == "apart" else lent
            y = glu(*lent, overwrite_inputs=overwrite)
        return y, lent, list(torch.autograd.grad(y.square().sum(), lent, retain_graph=keep))

    (y, lent, got), (_, _, wanted) = run(True), run(False)
    for x, dx, exact in zip(lent, got, wanted, strict=True):
        assert same_bits(dx, exact)
        assert dx.data_ptr() == x.data_ptr()
    y, lent, got = run(True, keep=True)
    assert all(dx.data_ptr() != x.data_ptr() for x, dx in zip(lent, got, strict=True))
    again = torch.autograd.grad(y.square().sum(), lent)
    assert all(same_bits(a, b) for pair in (got, again) for a, b in zip(pair, wanted, strict=True))


def test_overwriting_goes_well_with_what_made_the_inputs(device):
    def gradients(overwrite: bool) -> list[torch.Tensor]:
        x, weight = (randn(n, 6, device=device).float().requires_grad_() for n in (5, 16))
        gate, up = torch.nn.functional.linear(x, weight).chunk(2, -1)
        glu(gate, up, overwrite_inputs=overwrite).square().sum().backward()
        return [x.grad, weight.grad]

    assert all(same_bits(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_what_shares_memory_is_not_overwritten(device):
    x = randn(4, 6, device=device).float().requires_grad_()
    for gate, up in ((x * 1,) * 2, ((x * 1)[:1].expand(4, 6), x * 1), ((x * 1).t(), (x * 1).t())):
        got, wanted = (
            torch.autograd.grad(glu(gate, up, overwrite_inputs=overwrite).sum(), (gate, up), retain_graph=True)
            for overwrite in (False, True)
        )
        assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(got, wanted, strict=True))


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    gate, up = randn(3, 7, device="cpu").float(), randn(3, 7, device="cpu", seed=1).float()
    assert same_bits(glu(gate, up), glu_reference(gate, up))
    assert glu(gate.double(), up.double()).dtype == torch.float64
