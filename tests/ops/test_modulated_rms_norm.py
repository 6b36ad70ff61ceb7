"""modulated_rms_norm against its reference: scales and shifts of samples, of all rows and of each row."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms.modulated_rms_norm import MOST_IN_TURN, modulated_rms_norm, modulated_rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASTS = ["before_weight", "after_weight"]


def some(shape, device, *, of=None):
    """x, weight, scale and shift; one modulation for each of the first dimension, or as large as `of`."""
    of = (*shape[:1], *[1] * (len(shape) - 2), shape[-1]) if of is None else of
    x, weight = randn(*shape, device=device), randn(shape[-1], device=device)
    return [x, weight, randn(*of, device=device, seed=1), randn(*of, device=device, seed=2)]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
# one row; narrow rows, several in a tile, of which samples end within one; one column over a block
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 7, 5), (2, 40, 33), pytest.param((2, 3, 1025), marks=pytest.mark.all)]
)
def test_modulated_rms_norm(shape, dtype, cast, device):
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, some(shape, device), dtype, offset=0.5, cast=cast)


@pytest.mark.gpu
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
# DiT-XL, FLUX, wide
@pytest.mark.parametrize("shape", [(16, 255, 1152), (2, 1027, 3072), (3, 67, 8192), (3, 33, 20480), (2, 17, 40960)])
@pytest.mark.parametrize("per_row", [False, True])
def test_modulated_rms_norm_of_real_sizes(per_row, shape, dtype, cast, device):
    inputs = some(shape, device, of=shape if per_row else None)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, dtype, cast=cast)


# of x [2, 3, 4, 9]: all rows; each sample; each of two dimensions; each row; neither
@pytest.mark.parametrize("of", [(9,), (1, 1, 1, 9), (2, 1, 1, 9), (2, 3, 1, 9), (2, 3, 4, 9), (4, 9), (2, 1, 4, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulations(of, dtype, device):
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, some((2, 3, 4, 9), device, of=of), dtype)


@pytest.mark.parametrize("frozen", [(), (1,), (2, 3)])
def test_more_samples_than_one_program_adds_up(frozen, device):
    inputs = some((MOST_IN_TURN + 3, 2, 9), device)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, frozen=frozen)


@pytest.mark.parametrize("frozen", [(), (1,)])
def test_more_samples_than_programs_beside_each_other(frozen, device, monkeypatch):
    monkeypatch.setattr(registry.op("modulated_rms_norm").module, "MOST_BESIDE", 3)
    inputs = some((MOST_IN_TURN + 3, 2, 9), device)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, frozen=frozen)


@pytest.mark.gpu
def test_more_samples_than_a_grid_has_rows(device):
    inputs = some((65537, 1, 9), device)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.parametrize("shift_of", [(9,), (2, 3, 9)])
def test_scale_and_shift_of_different_rows(shift_of, device):
    inputs = some((2, 3, 9), device)
    inputs[3] = randn(*shift_of, device=device, seed=3)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("of", [(9,), (2, 1, 9), (2, 3, 9)])
def test_rows_too_wide_for_a_tile_are_walked(of, cast, device, monkeypatch):
    module = registry.op("modulated_rms_norm").module
    for name in ("WHOLE_ROW_FWD", "WHOLE_ROW_BWD"):
        monkeypatch.setattr(module, name, 8)
    inputs = some((2, 3, 9), device, of=of)
    for dtype in (torch.float32, torch.bfloat16):
        as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, dtype, cast=cast)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.float32, frozen=(0, 1))


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("of", [(11,), (2, 1, 11), (2, 5, 11), (2, 1, 18)])
def test_rows_in_blocks(of, cast, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    monkeypatch.setattr(registry.op("modulated_rms_norm").module, "WARPS_PER_MULTIPROCESSOR", 2)
    # three or five of 4 columns, the last one short; two programs take more than one row
    inputs = some((2, 5, of[-1]), device, of=of)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
def test_without_weight_or_shift(cast, device):
    x, weight, scale, shift = some((2, 5, 7), device)
    for inputs in ([x, None, scale, shift], [x, weight, scale, None], [x, None, scale, None]):
        as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 2, 3), (1, 2, 3)])
@pytest.mark.parametrize("of", [(2, 1, 7), (2, 5, 7)])
def test_frozen(of, frozen, device):
    inputs = some((2, 5, 7), device, of=of)
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, frozen=frozen)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("wide", [0, 1, 2, 3])
def test_dtypes_promote(wide, cast, device):
    inputs = [t.float() if i == wide else t.bfloat16() for i, t in enumerate(some((2, 5, 7), device))]
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


def test_parts_of_one_tensor(device):
    """As a model has them: six vectors a sample from one product, and rows of a larger tensor."""
    six = randn(2, 1, 6 * 7, device=device).bfloat16()
    x = randn(2, 5, 14, device=device).bfloat16()
    shift, scale = six.chunk(6, -1)[:2]
    inputs = [x[..., 7:], randn(7, device=device), scale, shift]
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape, device):
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, some(shape, device), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("per_row", [False, True])
def test_more_elements_than_int32(per_row, device):
    n, d = 2**18 + 2, 8192
    x = torch.randn(2, n // 2, d, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(d, device=device, dtype=torch.bfloat16)
    sizes = x.shape if per_row else (2, 1, d)
    scale = torch.randn(sizes, device=device, dtype=torch.bfloat16)
    y = modulated_rms_norm(x, weight, scale)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x.detach()[-1:, -3:].double().requires_grad_()
    its = scale[-1:, -3:].double() if per_row else scale[-1:].double()
    exact = modulated_rms_norm_reference(last, weight.double(), its)
    (dexact,) = torch.autograd.grad(exact, last, y.detach()[-1:, -3:].double())
    assert (y[-1:, -3:] - exact).norm() < 1e-2 * exact.norm()
    assert (dx[-1:, -3:] - dexact).norm() < 1e-2 * dexact.norm()


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    inputs = some((2, 5, 33), torch.device("cuda", 1))
    as_accurate(modulated_rms_norm, modulated_rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("of", [(2, 1, 257), (2, 65, 257)])
def test_compiles_to_one_graph(of, device):
    inputs = [t.bfloat16().requires_grad_() for t in some((2, 65, 257), device, of=of)]
    eager = lambda *inputs: modulated_rms_norm(*inputs) * 2  # noqa: E731
    results = []
    for run in (torch.compile(eager, fullgraph=True), eager):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_errors_name_the_argument(device):
    x, weight, scale, shift = some((2, 5, 7), device)
    x, weight, scale, shift = x.float(), weight.float(), scale.float(), shift.float()
    with pytest.raises(ValueError, match=r"modulated_rms_norm: weight \(6,\) must be one value per column of x"):
        modulated_rms_norm(x, weight[:6], scale)
    with pytest.raises(ValueError, match=r"scale \(3, 1, 7\) must have the columns of x \(2, 5, 7\), and of its other"):
        modulated_rms_norm(x, weight, scale[:1].expand(3, 1, 7))
    with pytest.raises(ValueError, match=r"shift \(2, 1, 6\) must have the columns of x"):
        modulated_rms_norm(x, weight, scale, shift[..., :6])
    with pytest.raises(ValueError, match="modulated_rms_norm: cast is 'never'; known are before_weight, after_weight"):
        modulated_rms_norm(x, weight, scale, cast="never")
    with pytest.raises(ValueError, match="modulated_rms_norm: scale is torch.float64; kernels exist for"):
        modulated_rms_norm(x, weight, scale.double())


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [t.float() for t in some((2, 5, 7), torch.device("cpu"))]
    assert torch.equal(modulated_rms_norm(*inputs), modulated_rms_norm_reference(*inputs))
