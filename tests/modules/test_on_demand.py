"""The logits in the output after a fused loss: the tensor they would have been, computed when somebody reads it."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.loss.head_weight import HeadWeight
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.modules.head_model import (
    RECORDED,
    Model,
    batch,
    computed,
    own,
    pair,
    same_gradients,
    shifted,
)

# the tensor after the forward


def logits_of(model: Model) -> Tensor:
    return model(*batch())["logits"]


def saved_and_loaded(logits: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    file.seek(0)
    return torch.load(file)


USES = {
    "argmax": lambda z: z.argmax(-1),
    "slice": lambda z: z[..., :-1, :].contiguous(),
    "arithmetic": lambda z: 1 - 2 * z / 3,
    "softmax": lambda z: F.softmax(z, dim=-1),
    "cat": lambda z: torch.cat([z, z]),
    "iteration": lambda z: list(z)[1],
    "cast": lambda z: z.bfloat16().float() + 0,
    "numpy": lambda z: torch.from_numpy(z.detach().cpu().numpy()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "deepcopy": lambda z: copy.deepcopy(z.detach()),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "save": saved_and_loaded,
    "out of a list": lambda z: torch.stack([z.detach() for _ in range(2)]),
    "data": lambda z: z.data + 0,
}


@pytest.mark.parametrize("name", USES)
def test_logits_after_the_forward_act_as_the_tensor_they_would_have_been(name: str) -> None:
    stock, fused = pair()
    wanted, got = USES[name](logits_of(stock)), USES[name](logits_of(fused))
    assert type(got) is Tensor
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_questions_about_logits_after_the_forward_compute_nothing() -> None:
    stock, fused = pair()
    real, late = logits_of(stock), logits_of(fused)
    assert isinstance(late, Tensor)
    for ask in (
        lambda z: (z.shape, z.size(), z.size(1), z.stride(), z.ndim, z.dim(), z.numel(), len(z)),
        lambda z: (z.dtype, z.device, z.layout, z.is_cuda, z.requires_grad, z.is_leaf, z.is_contiguous()),
        lambda z: (z.is_floating_point(), torch.is_floating_point(z), z.element_size(), z.nbytes),
        lambda z: (z.detach().requires_grad, z.bfloat16().dtype, z.to(torch.float16).dtype, z.to("cpu").shape),
        lambda z: (z.new_zeros(2, 3).tolist(), z.new_full((1,), 4.0).dtype),
    ):
        assert ask(late) == ask(real)
    assert late.grad_fn is not None and late.float() is late and late.contiguous() is late
    assert "LogitsOnDemand" in repr(late) and {late: 1}[late] == 1
    late.register_hook(lambda grad: grad)
    assert not computed(late)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 2 * z * dy


class DoubledApart(Doubled):
    """With its context set up apart, as torch.func wants it."""

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        (z,) = inputs
        return z * z

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class DoubledInAutocast(Doubled):
    forward = staticmethod(torch.amp.custom_fwd(Doubled.forward, device_type="cpu"))


def _taken_by_a_checkpoint(use_reentrant: bool) -> Callable:
    return lambda z, y: checkpoint(shifted, z, y, use_reentrant=use_reentrant) + z.detach().square().mean()


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: shifted(z, y) + Doubled.apply(z).mean(),
        lambda z, y: Doubled.apply(z[:, :-1].float() / 2.0).mean() + shifted(z, y),
        lambda z, y: shifted(z, y) + DoubledApart.apply(z).mean(),
        lambda z, y: shifted(z, y) + DoubledInAutocast.apply(z).mean(),
        _taken_by_a_checkpoint(True),
    ],
    ids=["after the loss", "before it, some", "set up apart", "in autocast", "checkpoint"],
)
def test_logits_that_a_function_is_given_are_an_error(loss: Callable) -> None:
    _, fused = own(loss)
    with pytest.raises(RuntimeError, match="Function, was given logits that are not computed yet, .*use_reentrant"):
        fused(*batch())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: Doubled.apply(z + 1.0 * z).mean() + shifted(z, y),
        lambda z, y: Doubled.apply(z.detach()).mean() + shifted(z, y),
        _taken_by_a_checkpoint(False),
    ],
    ids=["real ones", "detached ones", "checkpoint"],
)
def test_what_a_function_may_be_given(loss: Callable) -> None:
    stock, fused = own(loss)
    x, labels = batch()
    torch.testing.assert_close(fused(x, labels)["loss"], stock(x, labels)["loss"], rtol=1e-6, atol=1e-6)
    same_gradients(stock, fused, lambda out: out["loss"])
    with torch.no_grad():
        torch.testing.assert_close(fused(x, labels)["loss"], stock(x, labels)["loss"], rtol=1e-6, atol=1e-6)


class Passed(torch.autograd.Function):
    """What DeepSpeed does to every tensor that a module returns."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


@pytest.mark.parametrize(
    "of",
    [
        lambda z: z.log_softmax(-1)[..., 0].sum(),
        lambda z: Doubled.apply(z).sum(),
        lambda z: Doubled.apply(z.to(torch.float64)).sum().float(),
        lambda z: Passed.apply(z).square().sum(),
        lambda z: Passed.apply(Passed.apply(z).float()).square().sum(),
    ],
    ids=["op", "function", "cast then function", "passed on", "passed on twice"],
)
@pytest.mark.parametrize("step", ["nothing", "gemma2"])
def test_a_gradient_to_logits_after_the_forward(of, step: str) -> None:
    stock, fused = pair(RECORDED[step], bias=True)
    same_gradients(stock, fused, lambda out: of(out["logits"]))


def told(z: Tensor) -> Tensor:
    z.requires_grad = True
    return z


def told_as_a_statement(z: Tensor) -> Tensor:
    z.requires_grad_(True)
    return z


@pytest.mark.parametrize("made", [Tensor.requires_grad_, told, told_as_a_statement])
@pytest.mark.parametrize("trains", [True, False])
def test_a_leaf_made_of_logits_after_the_forward(made: Callable, trains: bool) -> None:
    found = []
    for model in pair():
        with torch.set_grad_enabled(trains):
            z = made(logits_of(model).detach())
        z.log_softmax(-1)[..., 0].sum().backward()
        assert z.is_leaf and z.requires_grad
        found.append(z.grad)
    torch.testing.assert_close(*found)


def test_a_reentrant_checkpoint_of_logits_after_the_forward() -> None:
    def of(z: Tensor) -> Tensor:
        return z.log_softmax(-1)[..., 0].sum()

    same_gradients(*pair(), lambda out: out["loss"] + checkpoint(of, out["logits"], use_reentrant=True))


def test_writing_to_logits_after_the_forward() -> None:
    stock, fused = pair()

    def written(out):
        z = out["logits"]
        z[..., 2] = 0.0
        return z.square().sum()

    same_gradients(stock, fused, written)
    late = logits_of(fused).detach()
    late[0, 0, 0] = 7.0
    assert late[0, 0, 0] == 7.0


def test_passing_logits_on_computes_nothing() -> None:
    _, fused = pair()
    late = Passed.apply(logits_of(fused))
    assert isinstance(late, LogitsOnDemand) and late.requires_grad and not computed(late)


def test_a_collective_reads_the_values(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stock, fused = pair()
        wanted, late = logits_of(stock).detach(), logits_of(fused).detach()
        gathered = [torch.empty_like(late)]
        torch.distributed.all_gather(gathered, late)
        torch.testing.assert_close(gathered[0], wanted, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_cpp_that_asks_nobody_gets_an_error() -> None:
    stock, fused = pair()
    wanted, late = logits_of(stock).detach(), logits_of(fused).detach()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(late)
    assert not computed(late)
    for taken in (late, torch.utils.dlpack.to_dlpack(late.clone())):
        torch.testing.assert_close(torch.from_dlpack(taken), wanted, rtol=0, atol=0)


def test_autocast_of_the_forward_holds_for_a_later_read() -> None:
    stock, fused = pair(bias=True)
    x, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = stock(x, labels), fused(x, labels)
    assert got["logits"].dtype == wanted["logits"].dtype == torch.bfloat16
    assert got["loss"].dtype == wanted["loss"].dtype == torch.float32
    assert torch.equal(got["logits"].clone(), wanted["logits"])


def test_reading_says_who_reads_once(caplog: pytest.LogCaptureFixture) -> None:
    _, fused = pair()
    with caplog.at_level(logging.WARNING, "ds_fused"):
        for _ in range(2):
            logits_of(fused).sum()
    assert [record.getMessage().count(__file__) for record in caplog.records] == [1]


def test_reading_after_a_step_warns(caplog: pytest.LogCaptureFixture) -> None:
    _, fused = pair()
    x, labels = batch()
    out = fused(x, labels)
    out["loss"].backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    with caplog.at_level(logging.WARNING, "ds_fused"):
        out["logits"].sum()
    assert any("after the head's weight changed" in record.getMessage() for record in caplog.records)


def test_a_read_goes_through_whole_weight() -> None:
    entered = []

    class Whole:
        def __init__(self, head: nn.Module) -> None:
            self.head = head

        def __enter__(self) -> None:
            entered.append(self.head)

        def __exit__(self, *error: object) -> None:
            entered.append("left")

    _, fused = pair(weight=HeadWeight(Whole))
    late = logits_of(fused)
    assert entered == []
    late.sum(), late.argmax()
    assert entered == [fused.head, "left"]


def test_the_output_frees_what_it_holds() -> None:
    _, fused = pair(RECORDED["gemma2"])
    x, labels = batch()
    gc.collect()
    gc.disable()
    try:
        out = fused(x, labels)
        held = [weakref.ref(out["logits"]), weakref.ref(out["logits"]._source)]
        out["loss"].backward()
        out["logits"].argmax(-1)
        del out
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
