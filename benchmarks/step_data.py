"""Tokens of the whole-step benchmark: text where a folder is given, else a stream that can be learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

SEED = 4321
# a stretch of so many tokens is followed by the same once more
COPIED = 16


class Data(Protocol):
    def batch(self, step: int, rank: int, ranks: int, batch: int, length: int) -> Tensor:
        """[batch, length] token ids: a function of its arguments, so the same for every way."""


class Stream:
    """Words by Zipf's law, in stretches that each come twice: both frequencies and copying can be learnt."""

    def __init__(self, vocab: int) -> None:
        weights = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
        self._upto = weights.cumsum(0) / weights.sum()
        # frequent words all over the vocabulary, so that every rank's rows of the head have some
        self._words = torch.randperm(vocab, generator=torch.Generator().manual_seed(SEED))

    def batch(self, step: int, rank: int, ranks: int, batch: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + step * ranks + rank)
        stretches = -(-length // (2 * COPIED))
        drawn = torch.rand(batch, stretches, COPIED, generator=generator, dtype=torch.float64)
        words = self._words[torch.searchsorted(self._upto, drawn).clamp_(max=len(self._words) - 1)]
        return torch.cat((words, words), dim=2).view(batch, -1)[:, :length].contiguous()


class Text:
    """The *.txt of a folder, joined; each batch goes on where the last one ended, and starts anew at the end."""

    def __init__(self, folder: Path, tokenizer: Path, vocab: int) -> None:
        from transformers import AutoTokenizer

        files = sorted(folder.rglob("*.txt"))
        if not files:
            raise FileNotFoundError(f"--data {folder}: no *.txt in it")
        encode = AutoTokenizer.from_pretrained(tokenizer)
        texts = (file.read_text(encoding="utf-8") for file in files)
        ids = [encode(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        self._ids = torch.tensor([token for some in ids for token in some])
        largest = int(self._ids.max())
        if largest >= vocab:
            raise ValueError(f"--tokenizer {tokenizer}: token {largest}, but the model's vocabulary is {vocab}")

    def batch(self, step: int, rank: int, ranks: int, batch: int, length: int) -> Tensor:
        first = (step * ranks + rank) * batch * length
        return self._ids[torch.arange(first, first + batch * length) % len(self._ids)].view(batch, length)
