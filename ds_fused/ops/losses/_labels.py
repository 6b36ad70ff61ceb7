"""What the losses ask of their labels: is each of them legal, and how many count.

One launch for both answers, and for the sum or the mean of losses that are there already. They stay on the device:
nothing here makes the host wait for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import is_fake, is_vmapped, runs_kernels, waited

# one program reads all labels: 64 Ki of them take it about as long as a launch does
BLOCK = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n_labels", "n_vocab", "ignore_index"])
def _labels_kernel(
    labels_ptr, loss_ptr,  # [N]
    count_ptr,  # []: how many labels count
    are_legal_ptr,  # []: whether all are legal
    total_ptr,  # []: of the losses
    n_labels,
    n_vocab,
    ignore_index,
    HAS_LOSS: tl.constexpr, IS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n_counting = tl.zeros((BLOCK,), tl.int64)
    n_illegal = tl.zeros((BLOCK,), tl.int32)
    losses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_labels, BLOCK):
        places = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = places < n_labels
        label = tl.load(labels_ptr + places, mask=mask, other=0)
        counts = mask & (label != ignore_index)
        n_counting += counts
        n_illegal |= counts & ((label < 0) | (label >= n_vocab))
        if HAS_LOSS:
            losses += tl.load(loss_ptr + places, mask=mask, other=0.0)
    count = tl.sum(n_counting, 0)
    tl.store(count_ptr, count)
    tl.store(are_legal_ptr, tl.max(n_illegal, 0) == 0)
    if HAS_LOSS:
        total = tl.sum(losses, 0)
        if IS_MEAN:
            total = tl.div_rn(total, count.to(tl.float32))
        tl.store(total_ptr, total)


def flat_labels(labels: Tensor) -> Tensor:
    """[...] -> [N] side by side, as the kernels read them: reshaped alone, a column of a table stays where it is."""
    if type(labels) is not Tensor:
        labels = waited(labels)
    return labels if labels.ndim == 1 and labels.is_contiguous() else labels.reshape(-1).contiguous()


def label_facts(labels: Tensor, n_vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels [N] -> how many count (int64), and whether all are legal."""
    if not runs_kernels(labels):
        counts = labels != ignore_index
        return counts.sum(), (((labels >= 0) & (labels < n_vocab)) | ~counts).all()
    return _facts(labels, None, None, n_vocab, ignore_index, is_mean=False)


def reduced_losses(
    loss: Tensor, labels: Tensor, n_vocab: int, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N] fp32, 0 where the label is ignored, to their mean or sum; and label_facts. Where kernels run.

    The mean is over the tokens that count, NaN where none does.
    """
    total = torch.empty((), dtype=torch.float32, device=loss.device)
    return total, *_facts(labels, loss, total, n_vocab, ignore_index, is_mean=reduction == "mean")


def _facts(
    labels: Tensor, loss: Tensor | None, total: Tensor | None, n_vocab: int, ignore_index: int, *, is_mean: bool
) -> tuple[Tensor, Tensor]:
    count = torch.empty((), dtype=torch.int64, device=labels.device)
    are_legal = torch.empty_like(count)
    launch(
        _labels_kernel, (1,), labels, loss, count, are_legal, total, labels.shape[0], n_vocab, ignore_index,
        HAS_LOSS=loss is not None, IS_MEAN=is_mean, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return count, are_legal


def counting_tokens(op: str, labels: Tensor, n_vocab: int, ignore_index: int) -> Tensor:
    """How many of the labels [N] count. One outside the vocabulary is an error: see refuse_illegal."""
    count, are_legal = label_facts(labels, n_vocab, ignore_index)
    refuse_illegal(op, labels, are_legal, n_vocab, ignore_index)
    return count


def refuse_illegal(op: str, labels: Tensor, are_legal: Tensor, n_vocab: int, ignore_index: int) -> None:
    """Raises where not all labels [N] are legal: here on a CPU, on the device else. Within a vmap PyTorch does."""
    if is_vmapped():
        return
    problem = f"lies outside [0, {n_vocab}) and is not ignore_index {ignore_index}"
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(labels):
        torch._assert_async(are_legal, f"{op}: a label {problem}")
        return
    illegal = labels[((labels < 0) | (labels >= n_vocab)) & (labels != ignore_index)]
    if illegal.numel():
        raise ValueError(f"{op}: label {int(illegal[0])} {problem}")
