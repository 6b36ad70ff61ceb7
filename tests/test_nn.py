"""ds_fused.nn: each module in the place of PyTorch's or HuggingFace's: states, first values, outputs, gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ds_fused
from ds_fused import nn

D = 12
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(2, 3, 5, D, generator=GENERATOR)
LABELS = torch.randint(0, D, (2, 3, 5), generator=GENERATOR).masked_fill(torch.arange(5) == 2, -100)
IDS = torch.randint(0, 7, (2, 3), generator=GENERATOR)
WEIGHT = torch.rand(D, generator=GENERATOR)
LOG_P, Q = X.log_softmax(-1), X.flip(-1).softmax(-1)


def seeded(make: Callable[[], torch.nn.Module], device: torch.device) -> torch.nn.Module:
    torch.manual_seed(7)
    return make().to(device)


def agree(
    mine: Callable[[], torch.nn.Module],
    theirs: Callable[[], torch.nn.Module],
    device,
    *inputs: Tensor,
    atol: float = 2e-6,
    by_fp64: bool = False,
) -> None:
    """One is the other's drop-in replacement. by_fp64: its results are no farther off than twice the other's."""
    ours, stock = seeded(mine, device), seeded(theirs, device)
    states = ours.state_dict(), stock.state_dict()
    assert [*states[0]] == [*states[1]]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {n for n, p in ours.named_parameters()} == {n for n, p in stock.named_parameters()}
    with torch.no_grad():
        # away from ones and zeros
        for parameter in ours.parameters():
            parameter.add_(torch.rand_like(parameter))
    stock.load_state_dict(ours.state_dict())
    results = [run(module, device, *inputs) for module in (ours, stock)]
    if not by_fp64:
        torch.testing.assert_close(*results, rtol=2e-5, atol=atol)
        return
    exact = run(copy.deepcopy(stock).double(), device, *(x.double() for x in inputs))
    for i, (a, b, c) in enumerate(zip(*results, exact, strict=True)):
        allowed = 2 * (b - c).abs().max() + 4 * torch.finfo(a.dtype).eps * c.abs()
        assert bool(((a - c).abs() <= allowed).all()), f"result {i} is off by {(a - c).abs().max()}"


def run(module: torch.nn.Module, device: torch.device, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of parameters and inputs."""
    leaves = [x.to(device).detach().requires_grad_(x.is_floating_point()) for x in inputs]
    y = module(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).view(y.shape))
    return [y, *(p.grad for p in module.parameters()), *(x.grad for x in leaves if x.is_floating_point())]


@pytest.mark.parametrize("shape", [D, (5, D)])
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"elementwise_affine": False}])
def test_norms(shape, options, device):
    agree(lambda: nn.RMSNorm(shape, **options), lambda: torch.nn.RMSNorm(shape, **options), device, X)
    agree(lambda: nn.LayerNorm(shape, **options), lambda: torch.nn.LayerNorm(shape, **options), device, X)


@pytest.mark.parametrize(("family", "options"), [("gemma", {"offset": 1.0}), ("llama", {"cast": "before_weight"})])
def test_norms_of_gemma_and_llama(family, options, device):
    from importlib import import_module

    stock = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), f"{family.title()}RMSNorm")

    class Sum(nn.AddRMSNorm):
        def forward(self, x):
            y, total = super().forward(x, x.detach())
            return y + 0 * total

    class Twice(stock):
        def forward(self, x):
            return super().forward(x + x.detach())

    agree(lambda: nn.RMSNorm(D, 1e-6, **options), lambda: stock(D, eps=1e-6), device, X)
    agree(lambda: Sum(D, **options), lambda: Twice(D, eps=1e-6), device, X)
    # of a weight in fp32 Llama's rounding shows
    norms = (made.to(device, torch.float32) for made in (nn.RMSNorm(D, 1e-6, **options), stock(D, eps=1e-6)))
    ours, theirs = (norm(X.to(device, torch.bfloat16)) for norm in norms)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    assert repr(nn.RMSNorm(D)) == repr(torch.nn.RMSNorm(D))
    ((name, value),) = options.items()
    assert f"{name}={value}" in repr(nn.RMSNorm(D, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_eps_of_rms_norm_is_pytorchs(dtype, device):
    x = (1e-3 * X).to(device, dtype)
    norms = (made(D, device=device, dtype=dtype) for made in (nn.RMSNorm, torch.nn.RMSNorm))
    torch.testing.assert_close(*(norm(x) for norm in norms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_eps_of_norms_of_one_dimension_may_be_pytorchs_too(dtype, device):
    if dtype == torch.float64:
        device = "cpu"  # the reference's, no kernel's
    x = (1e-3 * X).to(device, dtype)
    place = {"device": device, "dtype": dtype}
    wanted = nn.RMSNorm(D, **place)(2 * x)
    torch.testing.assert_close(nn.AddRMSNorm(D, None, **place)(x, x)[0], wanted)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(nn.ModulatedRMSNorm(D, None, **place)(2 * x, zero, zero), wanted)


@pytest.mark.parametrize("norm", [nn.AddRMSNorm, nn.AddLayerNorm, nn.ModulatedRMSNorm])
def test_norms_of_one_dimension_take_no_more(norm):
    assert norm([D]).weight.shape == (D,)
    with pytest.raises(ValueError, match=rf"{norm.__name__}: hidden_size is \(3, {D}\); it must be one number"):
        norm((3, D))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_under_autocast(dtype):
    """Norms are among what PyTorch computes in fp32; that of root mean squares is in later versions."""
    for kind in ("RMSNorm", "LayerNorm"):
        ours, stock = (getattr(made, kind)(D, 1e-6, device="cuda") for made in (nn, torch.nn))
        fused = torch.nn.Sequential(copy.deepcopy(stock))
        assert ds_fused.apply(fused).replaced
        with torch.autocast("cuda", torch.bfloat16):
            found, swapped, wanted = (norm(X.to("cuda", dtype)) for norm in (ours, fused, stock))
        assert found.dtype == swapped.dtype == wanted.dtype
        torch.testing.assert_close([found, swapped], [wanted, wanted])


def test_a_wrong_shape_is_an_error():
    # as many numbers as wanted, but others
    with pytest.raises(ValueError, match=r"RMSNorm: x \(2, 3, 4\) must end in the normalized shape \(4, 3\)"):
        nn.RMSNorm((4, 3))(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"LayerNorm: x \(3,\) must end in the normalized shape \(4, 3\)"):
        nn.LayerNorm((4, 3))(torch.zeros(3))


def test_layer_norm_without_bias(device):
    agree(lambda: nn.LayerNorm(D, bias=False), lambda: torch.nn.LayerNorm(D, bias=False), device, X)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(affine, device):
    x = X.transpose(1, 3).contiguous()
    agree(lambda: nn.GroupNorm(3, D, affine=affine), lambda: torch.nn.GroupNorm(3, D, affine=affine), device, x)


def test_gated_norm_is_that_of_qwen3_next(device):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    agree(lambda: nn.GatedRMSNorm(D, 1e-5), lambda: Qwen3NextRMSNormGated(D, 1e-5), device, X, X.flip(0))


@pytest.mark.parametrize("affine", [True, False])
def test_modulated_norm(affine, device):
    class Stock(torch.nn.RMSNorm):
        def forward(self, x, scale, shift):
            return super().forward(x) * (1 + scale) + shift

    scale, shift = X[:, :1, :1].clone(), X[:, 1:2, :1].clone()
    agree(
        lambda: nn.ModulatedRMSNorm(D, elementwise_affine=affine),
        lambda: Stock(D, 1e-6, affine), device, X, scale, shift,
    )  # fmt: skip


def test_dyt(device):
    norm = nn.DyT(D, 0.7).to(device)
    assert {name: tuple(p.shape) for name, p in norm.named_parameters()} == {
        "alpha": (1,), "weight": (D,), "bias": (D,)
    }  # fmt: skip
    x = X.to(device)
    torch.testing.assert_close(norm(x), torch.tanh(0.7 * x))
    assert nn.DyT(D, bias=False).bias is None


def test_poly_norm(device):
    class Stock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.full((3,), 1 / 3)), torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            cube, square, first = (torch.nn.functional.rms_norm(x**p, (D,), eps=1e-6) for p in (3, 2, 1))
            return self.weight[0] * cube + self.weight[1] * square + self.weight[2] * first + self.bias

    agree(nn.PolyNorm, Stock, device, X)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "groups": 3, "bias": False}])
def test_multi_token_attention(options, device, monkeypatch):
    # which rounds weights of attention that are equal but for their last bit to others
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    class Stock(torch.nn.Conv2d):
        def reset_parameters(self):
            super().reset_parameters()
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

        def forward(self, scores):
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            return super().forward(scores.masked_fill(later, -torch.inf).softmax(-1)).tril()

    made = (lambda kind=kind: kind(3, 6, 3, **options) for kind in (nn.MultiTokenAttention, Stock))
    agree(*made, device, X[..., :5])
    scores = X[..., :5].to(device)
    sparse = nn.MultiTokenAttention(3, 6, 3, sparse=True, device=device)
    expected = ds_fused.multi_token_attention(scores, sparse.weight, sparse.bias, sparse=True)
    assert torch.equal(sparse(scores), expected)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "dilation": 2, "bias": False, "scale": 0.7}])
def test_neighborhood_attention(options, device):
    class Stock(torch.nn.Module):
        def __init__(self, kernel_size=7, dilation=1, bias=True, scale=None):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, torch.nn.Linear(D, D, bias))
            self.scale, self.near = scale, torch.zeros(5, 5, dtype=torch.bool)
            for i, j in itertools.product(range(5), range(5)):
                self.near[i, j] = abs(i - j) <= kernel_size // 2 * dilation and (i - j) % dilation == 0

        def forward(self, x):
            q, k, v = (p(x).view(*x.shape[:2], 3, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            mask = self.near.to(x.device)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            return self.out_proj(y.transpose(1, 2).reshape(x.shape))

    # the gradient of k_proj's bias is 0, of which either has what rounding left
    agree(lambda: nn.NeighborhoodAttention(D, 3, **options), lambda: Stock(**options), device, 0.1 * X[0], atol=2e-5)


def test_neighborhood_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="NeighborhoodAttention: 5 heads must divide hidden_size, which is 12"):
        nn.NeighborhoodAttention(D, 5)
    with pytest.raises(ValueError, match="NeighborhoodAttention: kernel_size is 4; it must be odd"):
        nn.NeighborhoodAttention(D, 3, 4)


def test_a_hyper_connection(device):
    n, eps = 3, 0.1

    class Stock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(D, D)
            self.fn = torch.nn.Parameter(torch.empty(15, n * D).normal_(std=0.02))
            self.base, self.scale = torch.nn.Parameter(torch.zeros(15)), torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            flat = x.flatten(-2)
            mix = (flat @ self.fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
            parts = zip(mix.split([n, n, n * n], -1), self.base.split([n, n, n * n]), strict=True)
            pre, post, res = (scale * part + base for scale, (part, base) in zip(self.scale, parts, strict=True))
            res = res.unflatten(-1, (n, n)).softmax(-1)
            for dim in (-2, -1, -2):
                res = res / res.sum(dim, keepdim=True)
            y = self.layer((pre.sigmoid().unsqueeze(-1) * x).sum(-2))
            return res @ x + 2 * post.sigmoid().unsqueeze(-1) * y.unsqueeze(-2)

    x = torch.stack([X, X.flip(-1), X.flip(0)], -2)
    options = {"iterations": 2, "eps": eps, "sinkhorn_eps": 0.0}
    # of sums up to 60, of which most cancels, rounding is left: 1.6e-5 by interpreted kernels, 3.5e-5 by the stock code
    agree(lambda: nn.HyperConnection(torch.nn.Linear(D, D), n, D, **options), Stock, device, x, by_fp64=True)
    assert "3, 12, iterations=2" in repr(nn.HyperConnection(torch.nn.Identity(), n, D, **options))
    with pytest.raises(TypeError, match="tmax"):
        nn.HyperConnection(torch.nn.Identity(), n, D, tmax=20)


# of 30 tokens; 7: the last tile is short
@pytest.mark.parametrize("tiles", [1, 7])
@pytest.mark.parametrize(
    ("kind", "act", "options"),
    [
        ("SwiGLU", "silu", {}),
        ("GeGLU", "gelu_pytorch_tanh", {}),
        ("GeGLU", "gelu", {"approximate": "none"}),
        ("ReGLU", "relu", {}),
    ],
)
def test_mlps_are_those_of_llama(kind, act, options, tiles, device):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=D, intermediate_size=20, num_attention_heads=1, hidden_act=act)
    # slices of a backward add up gate's and up's parts of dx in another order
    in_slices = tiles > 1
    agree(
        lambda: getattr(nn, kind)(D, 20, tiles=tiles, **options), lambda: LlamaMLP(config), device, X, by_fp64=in_slices
    )


def test_an_unknown_gelu_is_an_error():
    with pytest.raises(ValueError, match="GeGLU: approximate is 'erf'; known are tanh, none"):
        nn.GeGLU(D, 20, approximate="erf")


def test_squared_relu(device):
    from transformers.activations import ReLUSquaredActivation

    agree(nn.ReLU2, ReLUSquaredActivation, device, X)


def test_tiles_bound_what_lies_between(device):
    mlp, rows = nn.SwiGLU(D, 20, tiles=7).to(device), []
    mlp.up_proj.register_forward_hook(lambda _module, _args, up: rows.append(up.shape[:-1].numel()))
    x = X.to(device)
    # as two micro-batches: gradients add up
    mlp(x).sum().backward()
    once = [p.grad.clone() for p in mlp.parameters()]
    mlp(x).sum().backward()
    assert max(rows) == 5 and len(rows) == 28
    torch.testing.assert_close([p.grad for p in mlp.parameters()], [2 * grad for grad in once])
    assert "tiles=7" in repr(mlp) and "tiles" not in repr(nn.SwiGLU(D, 20))
    for tiles in (0, 1.5):
        with pytest.raises(ValueError, match=f"GeGLU: tiles is {tiles}; it must be a whole number, at least 1"):
            nn.GeGLU(D, 20, tiles=tiles)


@pytest.mark.parametrize("options", [{}, {"padding_idx": -1}])
def test_embedding(options, device):
    agree(lambda: nn.Embedding(7, D, **options), lambda: torch.nn.Embedding(7, D, **options), device, IDS)
    for more in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=f"Embedding: .*{next(iter(more))}={next(iter(more.values()))}"):
            nn.Embedding(7, D, **more)
    assert torch.equal(nn.Embedding.from_pretrained(X[0, 0])(IDS % 5), X[0, 0][IDS % 5])


def test_softmaxes(device):
    agree(lambda: nn.Softmax(1), lambda: torch.nn.Softmax(1), device, X)
    assert torch.equal(nn.Sparsemax(1)(X), ds_fused.sparsemax(X, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 4}])
def test_cross_entropy_loss(options, reduction, device):
    options = {**options, "reduction": reduction}
    labels = LABELS.clamp_min(0) if "ignore_index" in options else LABELS
    mine, theirs = (lambda: nn.CrossEntropyLoss(**options)), (lambda: torch.nn.CrossEntropyLoss(**options))
    agree(mine, theirs, device, X.flatten(0, 2), labels.flatten())
    # classes in the second dimension
    agree(mine, theirs, device, X.movedim(-1, 1).contiguous(), labels)
    agree(mine, theirs, device, X[0, 0, 0], labels[0, 0, 0])


def test_options_that_pytorch_has_not(device):
    x, labels = X.flatten(0, 2).to(device), LABELS.flatten().to(device)
    loss = nn.CrossEntropyLoss(z_loss=0.1, return_accuracy=True)
    assert "z_loss=0.1" in repr(loss)
    for mine, theirs in zip(
        loss(x, labels), ds_fused.cross_entropy(x, labels, z_loss=0.1, return_accuracy=True), strict=True
    ):
        assert torch.equal(mine, theirs)
    for kind in (nn.CrossEntropyLoss, nn.JSDLoss, nn.TVDLoss):
        with pytest.raises(TypeError, match="zloss"):
            kind(zloss=0.1)


@pytest.mark.parametrize("options", [{}, {"bias": True, "weight": WEIGHT, "label_smoothing": 0.1, "reduction": "sum"}])
def test_linear_cross_entropy_loss(options, device):
    x, labels = X.flatten(0, 2), LABELS.flatten()
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # PyTorch has it since 2.13
        made = (nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss)
        agree(lambda: made[0](D, D, **options), lambda: made[1](D, D, **options), device, x, labels)
    loss = nn.LinearCrossEntropyLoss(D, D, chunk_mb=1, **options).to(device)
    expected = torch.nn.functional.cross_entropy(
        loss.linear(x.to(device)), labels.to(device), loss.weight, reduction=options.get("reduction", "mean"),
        label_smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    torch.testing.assert_close(loss(x.to(device), labels.to(device)), expected)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_kl_div_loss(reduction, device):
    options = {"reduction": reduction}
    agree(lambda: nn.KLDivLoss(**options), lambda: torch.nn.KLDivLoss(**options), device, LOG_P, Q)


def test_divergences():
    labels = LABELS
    assert torch.equal(nn.JSDLoss(beta=0.3)(X, X.flip(0), labels), ds_fused.jsd(X, X.flip(0), labels, beta=0.3))
    assert torch.equal(nn.TVDLoss(temperature=2.0)(X, X.flip(0)), ds_fused.tvd(X, X.flip(0), temperature=2.0))


def test_divergences_of_heads():
    x, w, bias = torch.randn(5, D), torch.randn(7, D), torch.randn(7)
    for kind, op, options in (
        (nn.LinearJSDLoss, ds_fused.linear_jsd, {"beta": 0.3, "temperature": 2.0}),
        (nn.LinearKLDivLoss, ds_fused.linear_kl_div, {"reverse": True, "reduction": "sum"}),
        (nn.LinearCosineLoss, ds_fused.linear_cosine, {"reduction": "none"}),
    ):
        expected = op(x, w, x.flip(0), w.flip(0), None, teacher_bias=bias, **options)
        assert torch.equal(kind(**options)(x, w, x.flip(0), w.flip(0), teacher_bias=bias), expected)
        with pytest.raises(TypeError, match="betas"):
            kind(betas=0.3)


@pytest.mark.parametrize(("sums", "norms"), [(nn.AddRMSNorm, torch.nn.RMSNorm), (nn.AddLayerNorm, torch.nn.LayerNorm)])
@pytest.mark.parametrize("affine", [True, False])
def test_sums(sums, norms, affine, device):
    class Stock(norms):
        def forward(self, x, residual):
            return super().forward(x + residual) + 2 * (x + residual)

    class Ours(sums):
        def forward(self, x, residual):
            y, total = super().forward(x, residual)
            return y + 2 * total

    made = (lambda kind=kind: kind(D, 1e-6, elementwise_affine=affine) for kind in (Ours, Stock))
    agree(*made, device, X, X.flip(0).clone())


def test_experts(device):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=8, num_local_experts=3, _experts_implementation="eager")
    theirs, ours = MixtralExperts(config), nn.Experts(3, D, 8, limit=7.0)
    assert 0.2 < ours.down_proj.abs().max() <= 8**-0.5 and "num_experts=3" in repr(ours) and "limit=7.0" in repr(ours)
    theirs.load_state_dict(ours.state_dict())
    x, weights, ids = X.flatten(0, 2), X.flatten(0, 2)[:, :2].sigmoid(), torch.arange(60).view(30, 2) % 3
    torch.testing.assert_close(
        ours.to(device)(*(t.to(device) for t in (x, ids, weights))).cpu(), theirs(x, ids, weights)
    )
    with pytest.raises(TypeError, match="limits"):
        nn.Experts(3, D, 8, limits=7.0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **o: nn.CrossEntropyLoss(**o), "labels"),
        (lambda **o: nn.LinearCrossEntropyLoss(8, 6, **o), "class_weight"),
        (lambda **o: nn.LinearCrossEntropyLoss(8, 6, **o), "x"),
        (lambda **o: nn.JSDLoss(**o), "labels"),
        (lambda **o: nn.LinearKLDivLoss(**o), "teacher_bias"),
        (lambda **o: nn.LinearDPOLoss(**o), "x"),
        (lambda **o: nn.Experts(2, 8, 4, **o), "weights"),
        (lambda **o: nn.HyperConnection(torch.nn.Identity(), 2, 8, **o), "scale"),
    ],
)
def test_what_forward_passes_is_no_option(make, name):
    with pytest.raises(TypeError, match=rf"\w+: {name} is no option of it; of \w+ it takes \w+"):
        make(**{name: 1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.RMSNorm(8, cast="llama"), "RMSNorm: cast is 'llama'; known are"),
        (lambda: nn.AddRMSNorm(8, cast="llama"), "AddRMSNorm: cast is 'llama'"),
        (lambda: nn.GatedRMSNorm(8, order="zzz"), "GatedRMSNorm: order is 'zzz'; known are norm_first"),
        (lambda: nn.GatedRMSNorm(8, act="zzz"), "GatedRMSNorm: act is 'zzz'"),
        (lambda: nn.GatedRMSNorm(8, group_size=3), "GatedRMSNorm: group_size is 3; it must divide the 8 columns"),
        (lambda: nn.JSDLoss(beta=3.0), "jsd: beta is 3.0; it must lie in"),
        (lambda: nn.LinearJSDLoss(beta=-1.0), "linear_jsd: beta is -1.0"),
        (lambda: nn.TVDLoss(temperature=0.0), "tvd: temperature is 0.0; it must be positive"),
        (lambda: nn.LinearKLDivLoss(temperature=-1.0), "linear_kl_div: temperature is -1.0"),
        (lambda: nn.RMSNorm(8, eps="1e-6"), r"RMSNorm: eps is '1e-6' \(str\); it must be a number"),
        (lambda: nn.RMSNorm(8, offset=None), r"RMSNorm: offset is None \(NoneType\); it must be a number"),
        (lambda: nn.GatedRMSNorm(8, eps=None), "GatedRMSNorm: eps is None"),
        (lambda: nn.PolyNorm(eps=torch.tensor(1e-6)), "PolyNorm: eps is a tensor; it must be a number"),
        (lambda: nn.Softmax(None), r"Softmax: dim is None \(NoneType\); it must be a whole number"),
        (lambda: nn.Sparsemax(1.0), "Sparsemax: dim is 1.0"),
        (lambda: nn.NeighborhoodAttention(8, 0), "NeighborhoodAttention: 0 heads must divide"),
        (lambda: nn.NeighborhoodAttention(8, 2, scale="1"), "NeighborhoodAttention: scale is '1'"),
        (lambda: nn.CrossEntropyLoss(reduction="average"), "cross_entropy: reduction is 'average'; it must be"),
        (lambda: nn.CrossEntropyLoss(softcap=-1.0), "cross_entropy: softcap is -1.0; it must be positive"),
        (lambda: nn.LinearCrossEntropyLoss(8, 6, label_smoothing=2.0), "linear_cross_entropy: label_smoothing is 2.0"),
        (lambda: nn.LinearCrossEntropyLoss(8, 6, accumulate="bf16"), "linear_cross_entropy: accumulate is 'bf16'"),
        (lambda: nn.LinearJSDLoss(reduction="average"), "linear_jsd: reduction is 'average'"),
        (lambda: nn.LinearCosineLoss(chunk_mb=0), "linear_cosine: chunk_mb=0 must be positive"),
        (lambda: nn.TVDLoss(ignore_index=None), "tvd: ignore_index is None"),
        (lambda: nn.LinearDPOLoss(temperature=0.0), "linear_log_probs: temperature is 0.0; it must be positive"),
        (lambda: nn.LinearGRPOLoss(keep_mb=-1), "linear_log_probs: .*keep_mb=-1 not negative"),
        (lambda: nn.Experts(2, 8, 4, act="tanh"), "experts: act is 'tanh'; known are"),
        (lambda: nn.HyperConnection(torch.nn.Identity(), 2, 8, iterations=0), "mhc_in: iterations is 0"),
        (lambda: nn.HyperConnection(torch.nn.Identity(), 0, 8), "mhc_in: .* 0 streams"),
    ],
)
def test_a_bad_value_is_refused_where_the_module_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_all_that_is_named_is_there():
    assert ds_fused.nn is nn
    for name in nn.__all__:
        assert issubclass(getattr(nn, name), torch.nn.Module)


OWN = {
    "DyT": (8,),
    "PolyNorm": (),
    "GatedRMSNorm": (8,),
    "Experts": (3, 8, 16),
    "HyperConnection": (torch.nn.Linear(8, 8), 4, 8),
}


@pytest.mark.parametrize("name", OWN)
def test_parameters_begin_where_they_come_to_be(name: str) -> None:
    """As FSDP begins a model that was built on the meta device."""
    cls, sizes = getattr(nn, name), copy.deepcopy(OWN[name])
    torch.manual_seed(3)
    made = cls(*sizes)
    late = cls(*sizes, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    late.reset_parameters()
    own = [parameter for parameter, _ in made.named_parameters() if not parameter.startswith("layer.")]
    assert own
    for parameter in own:
        assert torch.equal(made.get_parameter(parameter), late.get_parameter(parameter))
