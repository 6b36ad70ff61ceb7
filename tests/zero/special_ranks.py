"""One rank of test_special.py: models and uses that are not the plain case, stock and fused, one after another.

    special_ranks.py OUT CASE...

OUT/CASE.RANK.json holds what the case's function returned on that rank, or {"error"}.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import special_slabs
import special_stationary
from special import CASES, add_twins

# each of them adds its cases
for module in ("special_models", "special_steps", "special_gathered", "special_engines", "special_options"):
    import_module(module)
add_twins("stationary", special_stationary.stationary)
add_twins("gathered", special_stationary.gathered)
add_twins("copied", special_slabs.copied)
add_twins("carried", partial(special_slabs.copied, mode="stationary"))


if __name__ == "__main__":
    CASES.run(Path(sys.argv[1]), sys.argv[2:])
