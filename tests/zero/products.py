"""The product that tests/zero runs: which case is which job, by name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

STEPS = 4
RANKS = 2
ROWS, LENGTH = 2, 12  # of one micro batch on one rank
CLIP = 0.5  # below every gradient norm of these jobs, so clipping always acts
LEARNING_RATE = {"sgd": 0.1, "adamw": 1e-2}

# head width 8, two query heads for each key head; 67 words: odd, so no rank of two owns whole rows of the head
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Case:
    stage: int
    init: bool  # the model is built under zero.Init
    accumulation: int
    optimizer: str
    tied: bool
    dtype: str

    @property
    def name(self) -> str:
        words = [f"zero{self.stage}{'_init' if self.init else ''}", f"acc{self.accumulation}", self.optimizer]
        return "-".join([*words, "tied" if self.tied else "untied", self.dtype])

    @property
    def job(self) -> tuple[int, str, bool]:
        """What the mathematics depends on: cases of one job share one fp64 run."""
        return self.accumulation, self.optimizer, self.tied


STAGES = [(0, False), (1, False), (2, False), (3, False), (3, True)]

ALL = [
    Case(stage, init, accumulation, optimizer, tied, dtype)
    for (stage, init), accumulation, optimizer, tied, dtype in product(
        STAGES, (1, 4), ("sgd", "adamw"), (False, True), ("fp32", "bf16")
    )
]


def in_ci(case: Case) -> bool:
    """Stage x accumulation x optimizer in fp32; tied and untied take turns, so that each stage meets both."""
    if case.dtype == "fp32":
        return case.tied == ((case.accumulation == 4) == (case.optimizer == "sgd"))
    return case.accumulation == 4 and case.optimizer == "adamw" and case.tied
