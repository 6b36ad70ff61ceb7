"""The loss as a node of a compiled graph: what PyTorch asks of an operator, and graphs that hold for any length."""

from __future__ import annotations

import pytest
import torch
from accuracy import randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ds_fused.ops import linear_cross_entropy
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab import one_pass, one_pass_node
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
# chunks of 4 tokens
CHUNK_MB = 2**-20


def some(n_tokens: int, device: torch.device) -> list[Tensor]:
    """x, weight, bias and labels."""
    labels = torch.randint(0, 8, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens))
    labels[1::4] = -100
    return [randn(n_tokens, 5, device=device), randn(8, 5, device=device), randn(8, device=device), labels.to(device)]


@only_plain
@pytest.mark.parametrize("wants", [(True, True, True), (True, False, False), (False, True, False)])
def test_is_what_an_operator_has_to_be(wants, where):
    x, weight, bias, labels = some(6, where)
    inputs = [t.float().requires_grad_(wanted) for t, wanted in zip((x, weight, bias), wants, strict=True)]
    options = (labels, (labels >= 0).sum(), -100, 0.1, 0.01, 5.0, 0.7, "mean", 1, "auto")
    torch.library.opcheck(one_pass_node._node, (*inputs, list(wants), *options))


def test_where_nothing_trains_the_loss_alone_is_computed(where, monkeypatch):
    monkeypatch.delattr(one_pass, "lent_logits")
    monkeypatch.delattr(one_pass, "cross_entropy_bwd_torch")
    x, weight, bias, labels = (t.float() if t.is_floating_point() else t for t in some(9, where))
    losses = one_pass.CrossEntropyRows(labels, LossOptions(label_smoothing=0.1, softcap=5.0))
    count, nothing = (labels >= 0).sum(), (False, False, False)
    loss, gradients = one_pass.one_pass(x, weight, bias, losses, count, "mean", 4, True, nothing)
    wanted = linear_cross_entropy_reference(x, weight, labels, bias=bias, label_smoothing=0.1, softcap=5.0)
    torch.testing.assert_close(loss, wanted)
    assert gradients == (None, None, None)


@only_plain
def test_one_graph_for_all_lengths(where):
    def step(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return 3.0 * linear_cross_entropy(x, weight, labels, bias=bias, chunk_mb=CHUNK_MB)

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for n_tokens in (6, 9, 13):
        *inputs, labels = some(n_tokens, where)
        inputs = [t.float().requires_grad_() for t in inputs]
        wanted, got = (torch.autograd.grad(run(*inputs, labels), inputs) for run in (step, compiled))
        for mine, exact in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, exact)
    assert graphs.frame_count == 2
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, labels), step(*inputs, labels))


@only_plain
def test_autocast(where):
    x, weight, bias, labels = some(6, where)
    inputs = [t.float().requires_grad_() for t in (x, weight, bias)]
    torch.compiler.reset()
    results = []
    for run in (linear_cross_entropy, torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)):
        with torch.autocast(where.type, dtype=torch.bfloat16):
            loss = run(inputs[0], inputs[1], labels, bias=inputs[2])
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
