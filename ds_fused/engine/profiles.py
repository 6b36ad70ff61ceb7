"""Profiles: named sets of values for other keys of the block. A key, or an option of one, that is given always wins.

"auto" and "fit" are "fast" where the model's states, activations and the larger sizes fit (``estimate``), else "small".
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_fused.engine.config import HEAD, RECOMPUTE

# the profiles that an estimate decides
ESTIMATED = ("auto", "fit")
# profile -> key -> value, or options of that key
PROFILES: Mapping[str, Mapping[str, object]] = {
    # sets no size of DeepSpeed's: of itself the flag changes neither memory nor the layout of a checkpoint
    "stock": {},
    "fast": {
        "leaf_modules": True,
        "zero_sizes": "large",
        # 1.4 of 37.8 ms for 1.5 GiB where the weight is whole (benchmarks/notes.md)
        HEAD: {"mode": "auto", "grad_in_forward": False},
        # what of a checkpointed layer has room is not computed again
        RECOMPUTE: "fit",
    },
    "small": {
        "leaf_modules": False,
        "zero_sizes": "small",
        "embedding": True,
        # no logits are kept. No tiled MLP: under checkpointing its products run three times forward, a quarter of all
        # the time of products, and it saves nothing but with sequences so long that a layer's MLP is the peak
        HEAD: {"mode": "auto", "keep_mb": 0},
        RECOMPUTE: "full",
    },
}


def filled(block: Mapping[str, object], profile: str) -> tuple[dict[str, object], dict[str, object]]:
    """The block with what a profile adds to it; and that alone, by the dotted names of the README's table.

    The block is one that ``config.parse`` has found well-formed.
    """
    whole, added = dict(block), {}
    for key, value in PROFILES[profile].items():
        given = block.get(key, {})
        if not isinstance(value, Mapping):
            if key not in block:
                whole[key] = added[key] = value
        elif given is not False:
            options = {} if given is True else dict(given)
            fresh = {name: one for name, one in value.items() if name not in options}
            whole[key] = {**fresh, **options}
            added |= {f"{key}.{name}": one for name, one in fresh.items()}
    return whole, added
