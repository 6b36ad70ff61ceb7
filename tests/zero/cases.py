"""Cases that run one after another on every rank of one launch, each a function without arguments."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from joining import joined

Case = Callable[[], dict]


class Cases(dict[str, Case]):
    """Name -> case; called with a function, as a decorator, it adds that."""

    def __call__(self, function: Case) -> Case:
        self[function.__name__] = function
        return function

    def run(self, out: Path, names: Iterable[str]) -> None:
        """OUT/CASE.RANK.json: what the case returned on that rank, or {"error"}."""
        with joined():
            for name in names:
                try:
                    result = self[name]()
                except Exception:
                    result = {"error": traceback.format_exc()}
                (out / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
