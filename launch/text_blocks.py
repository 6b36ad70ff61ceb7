"""Text files as the blocks of tokens that train.py trains on and evaluates, and which of them a rank takes when."""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer


def text_files(places: list[str]) -> list[Path]:
    files: list[Path] = []
    for place in map(Path, places):
        found = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
        if not found or not found[0].is_file():
            raise FileNotFoundError(f"--text {place}: neither a file nor a folder with *.txt in it")
        files += found
    return files


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {file}: not UTF-8 at byte {error.start}") from None


def token_blocks(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The training blocks [N, block] and the held-out blocks [M, block], the same on every rank."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    train: list[int] = []
    held_out: list[int] = []
    for file in text_files(args.text):
        ids = tokenizer(read(file), add_special_tokens=False, verbose=False)["input_ids"]
        # one cut per file, so that no held-out line has its neighbours in the training part
        cut = len(ids) - int(len(ids) * args.held_out)
        train += ids[:cut] + end
        held_out += ids[cut:] + end
    blocks = [
        torch.tensor(ids[: len(ids) // args.block * args.block]).view(-1, args.block) for ids in (train, held_out)
    ]
    for name, ids, remedy in (("training", train, ""), ("held-out", held_out, ", or a larger --held_out")):
        if len(ids) < args.block:
            raise ValueError(
                f"the {name} text has {len(ids)} tokens, which are fewer than a --block of {args.block}: give more "
                f"text, or smaller blocks{remedy}"
            )
    every = max(1, len(blocks[1]) // args.eval_blocks)
    return blocks[0], blocks[1][::every][: args.eval_blocks]


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))


def data_share(engine: deepspeed.DeepSpeedEngine) -> tuple[int, int]:
    """This rank's number among those that see different data, and how many they are: tensor parallel ranks see one."""
    return dist.get_rank(engine.data_parallel_group), dist.get_world_size(engine.data_parallel_group)


def micro_batch(engine: deepspeed.DeepSpeedEngine, blocks: Tensor, seed: int, step: int, micro: int) -> Tensor:
    """This rank's blocks of one micro step; a pure function of its arguments, so a resumed run sees the same data."""
    size, (rank, world) = engine.train_micro_batch_size_per_gpu(), data_share(engine)
    first = ((step * engine.gradient_accumulation_steps() + micro) * world + rank) * size
    places = range(first, first + size)
    rows = [epoch_order(len(blocks), seed, place // len(blocks))[place % len(blocks)] for place in places]
    return blocks[torch.stack(rows)].to(engine.device)
