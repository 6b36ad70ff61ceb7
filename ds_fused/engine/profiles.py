"""Profiles: named sets of values for other keys of the block. A key, or an option of one, that is given always wins.

True leaves all options of a key to the profile. What is given of ``recompute`` stands as it is.

"auto" and "fit" are "fast" where the model's states, activations and the larger sizes fit (``estimate``), else "small".
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_fused.engine.config import HEAD, RECOMPUTE, TILED

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
        # one gather for seven, and the next layer on its way as a whole: for 0.2 GiB a step of 8B on four H100 is 10 %
        # faster and more, or the same where no host is waited for (benchmarks/results/h100x4/end_to_end_leaf.md)
        "leaf_modules": True,
        "zero_sizes": "small",
        "embedding": True,
        # no logits are kept
        HEAD: {"mode": "auto", "keep_mb": 0},
        # of layers nothing is kept on the device, not even their inputs: 0.44 to 0.63 of the memory beside the states,
        # in 0.97 of the time, or the same where the host is waited for (4 x H100, benchmarks/results/h100x4)
        RECOMPUTE: {"level": "attention", "offload": True},
        # what nobody reads is not computed again: so an MLP in tiles, which its backward repeats anyway, runs forward
        # no more often than a whole one. In four, what a tile of Llama-3-8B's MLP holds is less than the rest of its
        # layer. Up to 32768 tokens, what all of an MLP holds is little beside the states: whole, it takes 0.3 GiB for
        # each sequence of 8192 more, and a step is 3 to 14 % faster (4 x H200, benchmarks/results/h200x4)
        TILED: {"tiles": 4, "least_tokens": 32768},
    },
}


def filled(block: Mapping[str, object], profile: str) -> tuple[dict[str, object], dict[str, object]]:
    """The block with what a profile adds to it; and that alone, by the dotted names of the README's table.

    The block is one that ``config.parse_config`` has found well-formed.
    """
    whole, added = dict(block), {}
    for key, value in PROFILES[profile].items():
        given = block.get(key, {})
        has_options = isinstance(value, Mapping)
        # a level of recompute and its room belong together
        is_one = key == RECOMPUTE or not has_options
        if given is False or (is_one and key in block):
            continue
        if not has_options:
            whole[key] = added[key] = value
            continue
        options = {} if given is True else dict(given)
        fresh = {name: one for name, one in value.items() if name not in options}
        whole[key] = {**fresh, **options}
        added |= {f"{key}.{name}": one for name, one in fresh.items()}
    return whole, added
