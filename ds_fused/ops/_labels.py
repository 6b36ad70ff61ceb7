"""What the losses ask of their labels: is each of them legal, and how many count.

One launch for both answers, which stay on the device: nothing here makes the host wait for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._triton import runs_kernels

# one program reads all labels: 64 Ki of them take it about as long as a launch does
BLOCK = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n_labels", "n_vocab", "ignore_index"])
def _labels_kernel(
    labels_ptr,  # [N]
    facts_ptr,  # [2]: how many labels count, and whether all are legal
    n_labels,
    n_vocab,
    ignore_index,
    BLOCK: tl.constexpr,
):
    n_counting = tl.zeros((BLOCK,), tl.int64)
    n_illegal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_labels, BLOCK):
        places = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = places < n_labels
        label = tl.load(labels_ptr + places, mask=mask, other=0)
        counts = mask & (label != ignore_index)
        n_counting += counts
        n_illegal |= counts & ((label < 0) | (label >= n_vocab))
    tl.store(facts_ptr, tl.sum(n_counting, 0))
    tl.store(facts_ptr + 1, tl.max(n_illegal, 0) == 0)


def flat_labels(labels: Tensor) -> Tensor:
    """[...] -> [N] side by side, as the kernels read them: reshaped alone, a column of a table stays where it is."""
    return labels.reshape(-1).contiguous()


def label_facts(labels: Tensor, n_vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels [N] -> how many count (int64), and whether all are legal."""
    if not runs_kernels(labels):
        counts = labels != ignore_index
        return counts.sum(), (((labels >= 0) & (labels < n_vocab)) | ~counts).all()
    facts = torch.empty(2, dtype=torch.int64, device=labels.device)
    launch(
        _labels_kernel, (1,), labels, facts, labels.shape[0], n_vocab, ignore_index, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    count, are_legal = facts.unbind()
    return count, are_legal


def counting_tokens(op: str, labels: Tensor, n_vocab: int, ignore_index: int) -> Tensor:
    """How many of the labels [N] count. One outside the vocabulary is an error: here on a CPU, on the device else."""
    count, are_legal = label_facts(labels, n_vocab, ignore_index)
    problem = f"lies outside [0, {n_vocab}) and is not ignore_index {ignore_index}"
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(are_legal, f"{op}: a label {problem}")
        return count
    illegal = labels[((labels < 0) | (labels >= n_vocab)) & (labels != ignore_index)]
    if illegal.numel():
        raise ValueError(f"{op}: label {int(illegal[0])} {problem}")
    return count
