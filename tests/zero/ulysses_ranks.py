"""One rank of test_ulysses.py: sequences split over two ranks (Ulysses), data over two pairs; stock and sharded modes.

    ulysses_ranks.py OUT

OUT/RANK.json holds a row for each kind of head and place of the loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from joining import joined
from special import STATIONARY, STREAM
from torch import Tensor
from transformers import LlamaForCausalLM

SPLIT = 2  # ranks that share a sequence
ATTENTION = "sdpa"
BLOCKS = {"stock": None, "stream": STREAM, "stationary": STATIONARY}


def model_of(tied: bool) -> LlamaForCausalLM:
    model = LlamaForCausalLM._from_config(jobs.config_of(tied), attn_implementation=ATTENTION)
    weights = jobs.first_weights(tied)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return model


def batches() -> list[dict[str, Tensor]]:
    """This rank's own, whole sequences, of another length in each step; nearly all of the first half is ignored."""
    rank, made = dist.get_rank(), []
    for step in range(products.FEW_STEPS // SPLIT):
        # gloo gathers equal lengths only, so a pair has the same
        length = 8 + 4 * ((rank // SPLIT + step) % 2)
        draw = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(products.SIZES["vocab_size"], (products.ROWS, length), generator=draw)
        labels = ids.clone()
        labels[:, : length // 2 - 1] = jobs.IGNORED
        places = torch.arange(length).expand_as(ids).contiguous()
        made.append({"input_ids": ids, "position_ids": places, "labels": labels})
    return made


class Gathered(torch.autograd.Function):
    """torch.distributed.nn.functional.all_gather, whose backward over gloo knows no group but the world."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        everyones = [torch.empty_like(x) for _ in range(SPLIT)]
        dist.all_gather(everyones, x, group=group)
        return torch.stack(everyones)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        dy = dy.clone()
        dist.all_reduce(dy, group=ctx.group)
        return dy[dist.get_rank(ctx.group)], None


def loss_of(engine: deepspeed.DeepSpeedEngine, batch: dict[str, Tensor], inside: bool, mpu: ModuleType) -> Tensor:
    """The mean over the sequence's labels, as HF Trainer has it (inside), or by DeepSpeed's own tutorial."""
    # slices of the whole sequence, of which a copy to a GPU would make tensors of their own
    batch = {name: x.contiguous() for name, x in batch.items()}
    targets = batch["shift_labels"]
    if inside:
        loss = engine(**batch, labels=targets).loss
    else:
        logits = engine(**batch).logits
        n_vocab = products.SIZES["vocab_size"]
        loss = engine.module.loss_function(logits=logits, labels=None, shift_labels=targets, vocab_size=n_vocab)
    group = mpu.get_sequence_parallel_group()
    counts = Gathered.apply((targets != jobs.IGNORED).sum(), group)
    return (Gathered.apply(loss, group) * counts).sum() / counts.sum()


def train(tied: bool, block: dict | None, inside: bool, mpu: ModuleType) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "gradient_accumulation_steps": SPLIT,
        "gradient_clipping": products.CLIP,
        "sequence_parallel_size": SPLIT,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        config["ds_fused"] = {"enabled": True, **block}
    model = model_of(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=products.LEARNING_RATE["sgd"])
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
    group = mpu.get_sequence_parallel_group()
    loader = UlyssesSPDataLoaderAdapter(
        batches(),
        sp_rank=dist.get_rank(group),
        sp_group=group,
        sp_world_size=SPLIT,
        device=engine.device,
    )
    losses, lengths, norms = [], [], []
    for batch in loader:
        loss = loss_of(engine, batch, inside, mpu)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        lengths.append(batch["input_ids"].shape[1])
        norms.append(float(engine.get_global_grad_norm() or 0))
    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        weights = {name: w.detach().flatten().tolist() for name, w in params.items()}
    out = {"losses": losses, "lengths": lengths, "norms": norms, "weights": weights}
    out["shares"] = dist.get_world_size(params["model.embed_tokens.weight"].ds_process_group)
    out["report"] = str(getattr(engine, "ds_fused_report", None))
    engine.destroy()
    return out


def main(out: Path) -> None:
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model_of(False),
        core_attn_implementation=ATTENTION,
        sequence_parallel_size=SPLIT,
        micro_batch_size=products.ROWS,
        seq_length_is_variable=True,
    )
    rows = {}
    for name, tied, inside in (("untied", False, True), ("tied", True, True), ("outside", False, False)):
        rows[name] = {which: train(tied, block, inside, mpu) for which, block in BLOCKS.items()}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]))
