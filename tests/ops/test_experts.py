"""experts: both passes against fp64, the routes, and the experts of transformers."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from heads import as_accurate_under_autocast, gathered_anew
from torch import Tensor

from ds_fused.ops.mlp import _experts_kernels, _grouped_products, _routes
from ds_fused.ops.mlp.experts import experts, experts_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 1.0, "offset": 1.0}


@pytest.fixture(autouse=True)
def small(monkeypatch, request) -> None:
    """Tiles and chunks of which small sizes have several; tests of a GPU's sizes have the real ones."""
    if request.node.get_closest_marker("gpu"):
        return
    for name in ("ROWS", "FEW_ROWS", "SMALL_ROWS", "COLS", "SMALL_COLS", "STEP", "SMALL_STEP"):
        monkeypatch.setattr(_grouped_products, name, 16)
    monkeypatch.setattr(_grouped_products, "GROUP", 2)
    for name, value in (("CHUNK", 8), ("COUNTED", 2), ("FOUND", 4)):
        monkeypatch.setattr(_routes, name, value)
    for name in ("SUM_BLOCK", "GATE_BLOCK"):
        monkeypatch.setattr(_experts_kernels, name, 16)


def inputs_of(t: int, k: int, e: int, h: int, i: int, device, ids: Tensor | None = None) -> list[Tensor]:
    """Of T tokens with k choices of E experts, H wide, I inside."""
    generator = torch.Generator().manual_seed(t + k)
    if ids is None:
        ids = torch.rand(t, e, generator=generator).topk(k).indices
    gate_up, down = randn(e, 2 * i, h, device=device, seed=1), randn(e, h, i, device=device, seed=2)
    x, weights = randn(t, h, device=device), randn(t, k, device=device, seed=3).sigmoid()
    return [x, gate_up / h**0.5, down / i**0.5, ids.to(device), weights]


@pytest.mark.parametrize("dtype", DTYPES)
# one of everything; odd, just over a tile
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 2, 3, 17, 9)])
def test_experts(shape, dtype, device):
    as_accurate(experts, experts_reference, inputs_of(*shape, device=device), dtype)


def test_sizes_in_whole_tiles(device):
    as_accurate(experts, experts_reference, inputs_of(7, 3, 3, 32, 16, device), torch.bfloat16)


# several tiles of one expert; one that is chosen twice by a token; choices that are nobody's, all of them
@pytest.mark.parametrize("ids", [[[0, 1]] * 18, [[4, 4]] * 9, [[5, 2], [3, 5], [5, 5]] * 3, [[5, 5]] * 3])
def test_how_tokens_are_shared_out(ids, device):
    inputs = inputs_of(len(ids), 2, 5, 16, 8, device, torch.tensor(ids))
    as_accurate(experts, experts_reference, inputs, torch.bfloat16)


def test_an_expert_without_tokens_gets_zeros(device):
    x, *weights, ids, choices = inputs_of(6, 1, 3, 16, 16, device, torch.full((6, 1), 1))
    weights = [w.float().requires_grad_() for w in weights]
    experts(x.float(), *weights, ids, choices.float()).sum().backward()
    for weight in weights:
        assert not weight.grad[0].any() and not weight.grad[2].any() and weight.grad[1].any()


# glu's tests see to what each of them is
@pytest.mark.parametrize("options", [{"act": "gelu"}, {"act": "relu2", "interleaved": True}, {"limit": 1.0}, GPT_OSS])
def test_gates(options, device):
    x, *others = inputs_of(4, 2, 3, 16, 10, device)
    as_accurate(experts, experts_reference, [2 * x, *others], torch.float32, **options)


@pytest.mark.parametrize("frozen", [(1, 2), (0,), (0, 1), (0, 2, 4), (0, 1, 2), (1, 2, 4)])
def test_frozen(frozen, device):
    as_accurate(experts, experts_reference, inputs_of(5, 2, 3, 16, 10, device), torch.bfloat16, frozen=frozen)


def test_leading_dimensions_and_strides(device):
    x, gate_up, down, ids, weights = inputs_of(6, 2, 3, 16, 10, device)
    x = randn(6, 2, 16, device=device).bfloat16()[:, 1].view(3, 2, 16)
    rest = [gate_up, down, ids.view(3, 2, 2).int(), weights.view(3, 2, 2)]
    as_accurate(experts, experts_reference, [x.transpose(0, 1), *rest[:2], *(t.transpose(0, 1) for t in rest[2:])],
                torch.bfloat16)  # fmt: skip
    as_accurate(experts, experts_reference, [x[:, :1].expand(3, 2, 16), *rest], torch.bfloat16)
    one = torch.ones(1, device=device).expand(3, 2, 2)
    as_accurate(experts, experts_reference, [x, *rest[:3], one], torch.bfloat16, frozen=[4])
    # one token, without a dimension for it
    as_accurate(experts, experts_reference, [x[0, 0], gate_up, down, ids[0], weights[0]], torch.bfloat16)


def test_weights_that_are_stored_the_other_way(device):
    x, gate_up, down, *rest = inputs_of(6, 2, 3, 16, 10, device)
    stored = [w.float().transpose(1, 2).contiguous().requires_grad_() for w in (gate_up, down)]

    def passed(op):
        return lambda x, gate_up, down, *rest: op(x, gate_up.transpose(1, 2), down.transpose(1, 2), *rest)

    as_accurate(passed(experts), passed(experts_reference), [x, *stored, *rest], torch.float32)
    gradients = torch.autograd.grad(passed(experts)(x.float(), *stored, rest[0], rest[1].float()).sum(), stored)
    # as the parameters lie, so that nobody has to turn them
    assert all(gradient.is_contiguous() for gradient in gradients)


def test_choices_weighted_in_fp32(device):
    *inputs, weights = inputs_of(5, 2, 3, 16, 10, device)
    as_accurate(experts, experts_reference, [*(t.bfloat16() for t in inputs[:3]), inputs[3], weights], torch.float32)


def test_without_tokens(device):
    as_accurate(experts, experts_reference, inputs_of(0, 2, 3, 16, 10, device), torch.float32)


def test_autocast(device):
    as_accurate_under_autocast(experts, experts_reference, inputs_of(5, 2, 3, 16, 10, device))


def test_weights_gathered_anew(device):
    x, *weights, ids, choices = (t.float() if t.is_floating_point() else t for t in inputs_of(5, 2, 3, 16, 10, device))
    results = []
    for anew in (False, True):
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        y = experts(x, *parameters, ids, choices)
        if anew:
            for parameter in parameters:
                gathered_anew(parameter)
        results.append(torch.autograd.grad(y.sum(), parameters))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("model", ["Mixtral", "Qwen3Moe"])
def test_as_transformers(model, device):
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if model == "Mixtral":
        theirs, config = MixtralExperts, MixtralConfig(hidden_size=16, intermediate_size=10, num_local_experts=3)
    else:
        theirs, config = Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=10, num_experts=3)
    config._experts_implementation = "eager"
    theirs = theirs(config).to(device)
    x, gate_up, down, ids, choices = inputs_of(7, 2, 3, 16, 10, device)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(gate_up)
        theirs.down_proj.copy_(down)
    leaves = [x.float().requires_grad_(), theirs.gate_up_proj, theirs.down_proj, choices.float().requires_grad_()]
    found = experts(*leaves[:3], ids, leaves[3])
    wanted = theirs(leaves[0], ids, leaves[3])
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("n, e", [(1, 1), (8, 3), (100, 7), (33, 40)])
def test_routes(n, e, device):
    # some of them nobody's
    ids = torch.randint(e + 1, (n,), generator=torch.Generator().manual_seed(n)).to(device)
    routes = _routes.routes_of(ids, 1, e, 16)
    order, last = ids.argsort(stable=True), int((ids < e).sum())
    assert torch.equal(routes.pairs[:last].long(), order[:last]) and torch.equal(
        routes.tokens[:last].long(), order[:last]
    )
    assert torch.equal(routes.places.long(), order.argsort().masked_fill(ids == e, -1))
    ends = torch.bincount(ids, minlength=e + 1)[:e].cumsum(0).tolist()
    assert routes.ends[:, -1].tolist() == ends and routes.bounds.tolist() == [0, *ends]
    begins = [0, *ends[:-1]]
    tiles = [(x, row) for x in range(e) for row in range(begins[x], ends[x], 16)]
    found = list(zip(routes.tile_experts.tolist(), routes.tile_rows.tolist(), strict=True))
    assert int(routes.n_tiles) == len(tiles)
    assert found[: len(tiles)] == tiles and {x for x, _ in found[len(tiles) :]} <= {e}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# Qwen3-30B-A3B, few and many tokens; Mixtral's width; GPT-OSS; each with fewer experts. Rows that 16 does not divide
@pytest.mark.parametrize(
    "shape, options",
    [
        ((64, 8, 32, 2048, 768), {}),
        ((2048, 8, 32, 2048, 768), {}),
        ((511, 2, 8, 4096, 1792), {}),
        ((512, 4, 8, 2880, 2880), GPT_OSS),
        ((300, 2, 5, 100, 36), {}),
        ((300, 2, 5, 33, 7), {}),
    ],
)
def test_experts_of_real_sizes(shape, options, dtype, device):
    as_accurate(experts, experts_reference, inputs_of(*shape, device=device), dtype, **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    t, k, e, h, i = 2**17 + 8, 2, 4, 64, 4160  # 2^31 + 2^25 elements of h, 4 GiB
    x, gate_up, down, ids, weights = (
        v.bfloat16() if v.is_floating_point() else v for v in inputs_of(t, k, e, h, i, device)
    )
    results = []
    for tokens in (slice(None), slice(-8, None)):
        own = x[tokens].clone().requires_grad_()
        y = experts(own, gate_up, down, ids[tokens], weights[tokens])
        results.append([y[-8:], torch.autograd.grad(y, own, own.detach())[0][-8:]])
    # tiles of few rows are others
    torch.testing.assert_close(*results, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_to_one_graph(where, monkeypatch):
    if where == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    torch.compiler.reset()
    # on a CPU Inductor rounds to 16 bits elsewhere
    dtype = torch.float32 if where == "cpu" else torch.bfloat16
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs_of(50, 2, 4, 64, 48, where)]
    leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    compiled = torch.compile(lambda *inputs: experts(*inputs) * 2, fullgraph=True)
    got, wanted = compiled(*inputs), experts(*inputs) * 2
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(experts, experts_reference, inputs_of(50, 2, 4, 64, 48, "cuda:1"), torch.bfloat16)


@pytest.mark.gpu
def test_the_host_waits_for_nothing(device):
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in inputs_of(50, 2, 4, 64, 48, device)]
    leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.autograd.grad(experts(*inputs).sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_errors_name_the_argument(device):
    x, gate_up, down, ids, weights = (
        t.float() if t.is_floating_point() else t for t in inputs_of(5, 2, 3, 16, 10, device)
    )
    good = {"x": x, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}
    for named, wrong in (
        (r"experts: gate_up \(3, 10, 16\) and down \(3, 16, 10\) must be", {"gate_up": gate_up[:, :10]}),
        # a ZeRO-3 shard that nobody gathered
        (r"experts: gate_up \(0,\) and down", {"gate_up": gate_up.flatten()[:0]}),
        (r"experts: down is \(3, 16, 0\)", {"gate_up": gate_up[:, :0], "down": down[..., :0]}),
        (r"experts: x \(5, 15\) must be \[\.\.\., 16\]", {"x": x[:, :15]}),
        (r"experts: ids \(4, 2\) must be the choices of each token of x, \(5,\)", {"ids": ids[:4]}),
        (r"experts: ids \(5, 0\)", {"ids": ids[:, :0]}),
        (r"experts: weights \(5, 1\) must be one for each of ids \(5, 2\)", {"weights": weights[:, :1]}),
        ("experts: ids are torch.float32", {"ids": ids.float()}),
        ("experts: x is torch.float32, gate_up torch.bfloat16", {"gate_up": gate_up.bfloat16()}),
        ("experts: act is 'swish'", {"act": "swish"}),
        ("experts: ids is on meta", {"ids": ids.to("meta")}),
    ):
        with pytest.raises(ValueError, match=named):
            experts(**good | wrong)
    with pytest.raises(ValueError, match="experts: x is torch.float64"):
        experts(*(t.double() for t in (x, gate_up, down)), ids, weights)


def test_an_id_that_is_no_experts_is_an_error():
    x, gate_up, down, ids, weights = inputs_of(5, 2, 3, 16, 20, "cpu")
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=rf"experts: id {wrong} lies outside \[0, 4\)"):
            experts(x.float(), gate_up.float(), down.float(), ids.clone().fill_(wrong), weights.float())


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in inputs_of(5, 2, 3, 16, 20, "cpu")]
    assert same_bits(experts(*inputs), experts_reference(*inputs))
