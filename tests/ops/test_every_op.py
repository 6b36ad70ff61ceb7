"""What holds for every op: backward may run twice, a second derivative is refused, autocast, no value is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import randn, same_bits
from torch import Tensor

import ds_fused.ops as ops
from ds_fused.ops.common import _launch, _meet, _triton
from ds_fused.ops.registry import OPS

# of which PyTorch's own differ under autocast; tested in their own files
AUTOCAST = {"layer_norm", "add_layer_norm", "group_norm", "softmax", "experts"}
AUTOCAST |= {"multi_token_attention", "neighborhood_attention", *(op.name for op in OPS if "linear" in op.name)}
LABELS = [3, 1, -100, 4, 0, 2]


def example(
    name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **options: object
) -> tuple[Callable, list[Tensor]]:
    """A call of the op, and the tensors it takes that have a gradient. Options: of the heads."""

    def some(*shape: int, seed: int = 0) -> Tensor:
        return randn(*shape, device=device, seed=seed).to(dtype)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        angle = torch.linspace(0, 2, 3 * 8, device=device).view(1, 3, 8)
        return q, k, angle.cos().to(dtype), angle.sin().to(dtype)

    labels = torch.tensor(LABELS, device=device)
    op, x, weight, head = getattr(ops, name), some(6, 8), some(8), some(11, 8, seed=1)
    teacher = some(6, 8, seed=2), some(11, 8, seed=3)
    logits, others = some(6, 11), some(6, 11, seed=4)
    streams = [some(6, 4, 8), some(24, 32, seed=5), some(24), some(3)]
    calls = {
        "rms_norm": (op, [x, weight]),
        "layer_norm": (op, [x, weight, some(8, seed=1)]),
        "add_rms_norm": (op, [x, some(6, 8, seed=1), weight]),
        "add_layer_norm": (op, [x, some(6, 8, seed=1), weight, some(8, seed=1)]),
        "group_norm": (lambda x, *more: op(x, 4, *more), [x, weight, some(8, seed=1)]),
        "gated_rms_norm": (op, [x, some(6, 8, seed=1), weight]),
        "modulated_rms_norm": (op, [some(2, 3, 8), weight, some(2, 1, 8), some(2, 1, 8, seed=1)]),
        "attention_residual": (lambda q, *blocks: op(blocks, q), [weight, *(some(6, 8, seed=i) for i in (1, 2, 3))]),
        "mhc_coefficients": (op, streams),
        "mhc_in": (op, streams),
        "mhc_pre": (op, [streams[0], some(6, 4)]),
        "mhc_post_res": (op, [streams[0], x, some(6, 4), some(6, 4, 4)]),
        "dyt": (op, [x, some(1), weight]),
        "poly_norm": (op, [x, some(3), some(1)]),
        "rope": (lambda q, k: op(*turned(q, k)), [some(1, 2, 3, 8), some(1, 1, 3, 8)]),
        "rms_norm_rope": (
            lambda q, k, *weights: op(q, k, *weights, *turned(q, k)[2:]),
            [some(1, 2, 3, 8), some(1, 1, 3, 8), weight, some(8, seed=1)],
        ),
        "glu": (op, [x, some(6, 8, seed=1)]),
        "experts": (
            lambda *tensors: op(*tensors[:3], (labels % 3).view(3, 2), tensors[3]),
            [some(3, 8), some(3, 10, 8), some(3, 8, 5), some(3, 2)],
        ),
        "relu2": (op, [x]),
        "lora_linear": (op, [x, head, some(3, 8, seed=2).float(), some(11, 3, seed=3).float()]),
        "embedding": (lambda head: op(labels.clamp_min(0), head), [head]),
        "softmax": (op, [x]),
        "sparsemax": (op, [x]),
        "multi_token_attention": (op, [some(1, 2, 6, 6), some(2, 2, 3, 3), some(2)]),
        "neighborhood_attention": (op, [some(1, 2, 6, 8, seed=i) for i in range(3)]),
        "cross_entropy": (lambda x: op(x, labels, **options), [logits]),
        "linear_cross_entropy": (lambda x, w: op(x, w, labels, **options), [x, head]),
        "linear_log_probs": (lambda x, w: op(x, w, labels, entropy=True, **options), [x, head]),
        "linear_jsd": (lambda x, w: op(x, w, *teacher, labels, **options), [x, head]),
        "linear_kl_div": (lambda x, w: op(x, w, *teacher, labels, **options), [x, head]),
        "linear_cosine": (lambda x, w: op(x, w, *teacher, labels, **options), [x, head]),
        "kl_div": (lambda x: op(x.log_softmax(-1), others.softmax(-1)), [logits]),
        "jsd": (lambda x: op(x, others, labels), [logits]),
        "tvd": (lambda x: op(x, others, labels), [logits]),
    }
    call, tensors = calls[name]
    return call, [t.detach().requires_grad_() for t in tensors]


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A number whose gradients reach every output, each element with another one."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((y.float() * torch.linspace(1, 2, y.numel(), device=y.device).view(y.shape)).sum() for y in outputs)


every_op = pytest.mark.parametrize("name", [op.name for op in OPS])


@every_op
def test_an_option_that_is_no_number_is_an_error_that_says_so(name, device, monkeypatch):
    op = getattr(ops, name)
    for option, parameter in inspect.signature(op).parameters.items():
        kinds = parameter.annotation.split(" | ")
        if parameter.default is parameter.empty or not {"int", "float", "Pair"}.intersection(kinds):
            continue
        wrong = [torch.tensor(1), "1", [1], np.float32(1), *([] if "None" in kinds else [None])]
        # MiB may be parts of one
        for value in [*wrong, *([] if "float" in kinds or option.endswith("_mb") else [1.0])]:
            monkeypatch.setattr(ops, name, functools.partial(op, **{option: value}))
            call, tensors = example(name, device)
            with pytest.raises(ValueError, match=rf"^{name}: {option} is .*; it must be a (whole )?number"):
                call(*tensors)


# of what they lend their gradients the memory, where an option does not forbid it
CAN = {
    "linear_cross_entropy": {"grad_in_forward": False, "keep_mb": 0},
    "linear_log_probs": {"keep_mb": 0},
    "linear_jsd": {"grad_in_forward": False},
    "linear_kl_div": {"grad_in_forward": False},
    "linear_cosine": {"grad_in_forward": False},
}


@every_op
def test_a_second_backward_is_the_first(name, device):
    call, tensors = example(name, device, **CAN.get(name, {}))
    loss = total(call(*tensors))
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, tensors, retain_graph=True)]
    for again, before in zip(torch.autograd.grad(loss, tensors), first, strict=True):
        assert before.abs().sum() > 0 and same_bits(again, before)


@pytest.mark.parametrize("name", CAN)
def test_a_second_backward_of_lent_memory_is_an_error(name, device):
    call, tensors = example(name, device)
    loss = total(call(*tensors))
    torch.autograd.grad(loss, tensors, retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: a second backward"):
        torch.autograd.grad(loss, tensors)


@every_op
def test_a_second_derivative_is_refused(name, device):
    """Whoever asks for it: all leaves, or one input alone, which need not be a leaf."""
    call, leaves = example(name, device)
    tensors = [2 * x.detach().requires_grad_() for x in leaves]
    for ask in (Tensor.backward, lambda x: torch.autograd.grad(x, tensors[0], allow_unused=True)):
        with pytest.raises(RuntimeError, match="once_differentiable"):  # noqa: PT012 (those without inputs at once)
            gradients = torch.autograd.grad(total(call(*tensors)), tensors, create_graph=True)
            ask(sum(gradient.float().square().sum() for gradient in gradients))


def test_a_second_derivative_where_logits_were_written_over_is_refused(device):
    call, (logits,) = example("cross_entropy", device, overwrite_logits=True)
    (gradient,) = torch.autograd.grad(call(2 * logits), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@every_op
def test_a_batch_of_gradients_is_refused(name, device):
    call, tensors = example(name, device)
    outputs = call(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    batches = [torch.ones(2, *y.shape, device=device, dtype=y.dtype) for y in outputs]
    with pytest.raises(RuntimeError, match="Function: a batch of gradients .*, but its backward is a kernel"):
        torch.autograd.grad(outputs, tensors, batches, is_grads_batched=True)


@every_op
def test_a_view_with_another_sign_is_read_with_it(name, device):
    """An input, or the gradient of a result, that is the imaginary part of a conjugate: memory holds the opposite."""
    call, leaves = example(name, device, torch.float32)

    def run(turned: Callable[[Tensor], Tensor], turned_back: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = call(*map(turned, leaves))
        outputs = y if isinstance(y, tuple) else (y,)
        upstream = [turned_back(torch.linspace(1, 2, y.numel(), device=device).view(y.shape)) for y in outputs]
        return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))

    wanted = run(torch.neg, torch.neg)
    for mine in (run(torch._neg_view, torch.neg), run(torch.neg, torch._neg_view)):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [op.name for op in OPS if op.name not in AUTOCAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(name, dtype, device):
    results = []
    for enabled in (False, True):
        call, tensors = example(name, device, dtype)
        if name == "kl_div":  # whose logarithm and softmax are PyTorch's, and follow autocast
            x, target = (t.detach() for t in (tensors[0].log_softmax(-1), tensors[0].flip(0).softmax(-1)))
            call, tensors = lambda x, target=target: ops.kl_div(x, target), [x.requires_grad_()]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            outputs = call(*tensors)
        gradients = torch.autograd.grad(total(outputs), tensors)
        results.append([*(outputs if isinstance(outputs, tuple) else (outputs,)), *gradients])
    for got, wanted in zip(*results, strict=True):
        assert same_bits(got.detach(), wanted.detach())


@pytest.fixture
def on_meta(monkeypatch) -> list[str]:
    """Ops take meta tensors to their kernels, of which the names are noted: none of them has a value to be read."""
    launched: list[str] = []
    meta = torch.device("meta")

    def note(kernel: object, *_: object) -> None:
        launched.append(kernel.__name__)

    monkeypatch.setattr(_launch, "launch_elsewhere", note)
    monkeypatch.setattr(_triton, "KERNEL_DEVICES", ("meta",))
    monkeypatch.setattr(_meet, "DEVICES", ("meta",))
    monkeypatch.setitem(_triton._multiprocessors, meta, 132)
    monkeypatch.setitem(_triton._copies_tiles, meta, True)
    return launched


# heads, which cut their logits, by each way; in chunks of some bytes
IN_CHUNKS = [(name, more | {"chunk_mb": 2**-20}) for name, options in CAN.items() for more in ({}, options)]


# a value that the host reads (item, equal, nonzero) makes it wait for the GPU, and can't be captured in a CUDA graph
@pytest.mark.parametrize(("name", "options"), [*((op.name, {}) for op in OPS), *CAN.items(), *IN_CHUNKS])
def test_the_host_reads_no_value(name, options, on_meta):
    call, tensors = example(name, torch.device("meta"), **options)
    gradients = torch.autograd.grad(total(call(*tensors)), tensors)
    assert on_meta
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]


def results(call: Callable, tensors: list[Tensor]) -> list[Tensor]:
    outputs = call(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(total(outputs), tensors)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), [*((op.name, {}) for op in OPS), *CAN.items()])
def test_a_cuda_graph_captures_it(name, options, device):
    call, tensors = example(name, device, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # kernels are compiled before, and launched by both ways
    with torch.cuda.stream(side):
        for _ in range(3):
            results(call, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call, tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(0.5)
    graph.replay()
    for got, wanted in zip(captured, results(call, tensors), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.gpus
@every_op
def test_runs_on_the_tensors_own_device(name):
    here, there = (results(*example(name, torch.device("cuda", index))) for index in (0, 1))
    for got, wanted in zip(there, here, strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), wanted.cpu())


def test_a_value_that_is_read_would_show(on_meta):
    x = torch.ones(3, device="meta")
    for read in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: torch.equal(x, x), lambda: x.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
