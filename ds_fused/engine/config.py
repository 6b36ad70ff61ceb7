"""The ``ds_fused`` block of a DeepSpeed config, read once and typed.

    "ds_fused": {"enabled": true, "rope": false, "fused_linear_cross_entropy": {"chunk_mb": 256}}

The keys that switch ops, and the options they take, come from the registry of ops. Whatever is malformed is one
ValueError that names the key, what came and what may stand there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ds_fused.modules.layers.tiled_mlp import Tiles
from ds_fused.ops.registry import OPS, Option, switched
from ds_fused.policies.arguments import near, shown
from ds_fused.policies.plan import TILED
from ds_fused.policies.recompute import KEY as RECOMPUTE
from ds_fused.policies.recompute import OPTIONS as RECOMPUTE_OPTIONS
from ds_fused.policies.recompute import Recomputing, recomputing

# key -> default
SWITCHES = {
    # whether anything of ds_fused happens; has to be said
    "enabled": None,
    # raise where a requested kind of layer is not in the model
    "strict": False,
    # compare every replacement with the original on the device of the training; else forms are told apart on the CPU
    "verify": True,
    # print on rank 0 what was replaced, and what was not and why
    "report": True,
    # except in mode "gather": input embeddings not tied to the head are looked up like tied ones
    "embedding": False,
    # under ZeRO-3 the weights of a repeated layer are gathered together, not module by module
    "leaf_modules": False,
    # compile the kernels of the model on each host, side by side, before its layers are replaced
    "warmup": False,
}
# key -> what it may be, the default first
CHOICES = {
    # after a fused loss: compute the logits when they are read, or in the forward as well
    "logits": ("defer", "keep"),
    # evaluation with labels: fused too, or as without ds_fused
    "eval": ("defer", "stock"),
    # values for the keys that are not given, see profiles.py; "auto" and "fit": "fast" where it fits, else "small".
    # Trainer and Accelerate take every "auto" in the JSON for a placeholder of their own, and fail
    "profile": ("stock", "auto", "fit", "fast", "small"),
    # under ZeRO-3: sizes that the JSON does not give DeepSpeed, by the size of the model's layers
    "zero_sizes": ("stock", "small", "large"),
    # under ZeRO-3: weights and gradients travel from place to place, or through buffers
    "collectives": ("in_place", "stock"),
    # rotary frequencies that zero.Init has rounded: as they are, or computed again
    "rotary_frequencies": ("stock", "fp32"),
}
OP_OPTIONS: Mapping[str, Mapping[str, Option]] = MappingProxyType({key: op.options for op in OPS for key in op.keys})
# options of the same objects that are the engine's: how the head's weight comes to the op under ZeRO-3
HEAD = "fused_linear_cross_entropy"
HEAD_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "mode": Option(
            str,
            "auto",
            'under ZeRO-3: "gather" has the whole weight of the head gathered, "stream" slab after slab; with '
            '"stationary" it stays on its ranks, and the tokens travel; "auto" takes one of these three',
            ("auto", "stream", "stationary", "gather"),
        ),
        # 132: at 4096 columns twice shards.WAVE_ROWS; 0: one row at a time
        "slab_mb": Option(
            int,
            132,
            'MiB of weight gathered at a time in mode "stream", where the last three stay from forward to backward; or '
            "of rows in a lookup",
        ),
        "copy_engines": Option(
            bool,
            False,
            'on one host of NVIDIA\'s GPUs: slabs, or in mode "stationary" tokens, are moved by copy engines, beside '
            "which products are faster, through memory that stays: five slabs, or what a block's tokens and their "
            "gradients take",
        ),
    }
)
# MLPs in tiles; off where they are not named
TILED_OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        "tiles": Option(int, 8, "in how many tiles the tokens of an MLP run", least=1),  # 8: not yet measured
        "least_tokens": Option(
            int, 1, "how many tokens a tile is worth while for: fewer than two such run whole", least=1
        ),
    }
)
KEYS = (*SWITCHES, *CHOICES, TILED, RECOMPUTE, *OP_OPTIONS)

_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Config:
    """A block that was found well-formed."""

    enabled: bool
    strict: bool
    verify: bool
    report: bool
    embedding: bool
    leaf_modules: bool
    warmup: bool
    logits: str
    eval: str
    profile: str
    zero_sizes: str
    collectives: str
    rotary_frequencies: str
    tiles: Tiles | None  # None: MLPs run whole
    recompute: Recomputing
    wanted: Mapping[str, Mapping[str, object]]  # JSON key that is on -> the options given for its op
    head: Mapping[str, object]  # HEAD_OPTIONS, each with its value


def parse_config(block: object) -> Config:
    """The block as a `Config`; ValueError where it is malformed."""
    if not isinstance(block, Mapping):
        raise ValueError(f'ds_fused must be an object such as {{"enabled": true}}, got {shown(block)}')
    for key in block:
        _check_known("ds_fused", key, KEYS)
    if "enabled" not in block:
        # neither silently on nor silently off
        raise ValueError(f"ds_fused.enabled is missing: say true or false beside {', '.join(block) or 'nothing else'}")

    switches = {key: _typed(f"ds_fused.{key}", block.get(key, default), bool) for key, default in SWITCHES.items()}
    choices = {key: _chosen(f"ds_fused.{key}", block.get(key, allowed[0]), allowed) for key, allowed in CHOICES.items()}
    wanted = {}
    for key, value in switched(block).items():
        options = _options(key, value)
        if options is not None:
            wanted[key] = options
    asked = wanted.get(HEAD, {})
    head = {name: asked.pop(name, option.default) for name, option in HEAD_OPTIONS.items()}
    frozen = {key: MappingProxyType(options) for key, options in wanted.items()}
    tiles = _tiles(block.get(TILED, False))
    return Config(
        **switches,
        **choices,
        tiles=tiles,
        recompute=recomputing(block.get(RECOMPUTE, {}), f"ds_fused.{RECOMPUTE}"),
        wanted=MappingProxyType(frozen),
        head=MappingProxyType(head),
    )


def options_of(key: str) -> dict[str, Option]:
    """What the JSON object of a key may hold."""
    if key == TILED:
        return dict(TILED_OPTIONS)
    if key == RECOMPUTE:
        return dict(RECOMPUTE_OPTIONS)
    return {**OP_OPTIONS[key], **(HEAD_OPTIONS if key == HEAD else {})}


def _options(key: str, value: object) -> dict[str, object] | None:
    """The options given for an op; {} for true, None for false."""
    if isinstance(value, bool):
        return {} if value else None
    known = options_of(key)
    if not isinstance(value, Mapping):
        options = f" or an object of {', '.join(known)}" if known else ""
        raise ValueError(f"ds_fused.{key} must be true or false{options}, got {shown(value)}")
    for name in value:
        _check_known(f"ds_fused.{key}", name, known)
    return {name: _option(f"ds_fused.{key}.{name}", given, known[name]) for name, given in value.items()}


def _tiles(value: object) -> Tiles | None:
    """Of an MLP: the defaults for true, None for false."""
    options = _options(TILED, value)
    if options is None:
        return None
    numbers = {name: options.get(name, option.default) for name, option in TILED_OPTIONS.items()}
    return Tiles(numbers["tiles"], numbers["least_tokens"])


def _option(where: str, value: object, option: Option) -> object:
    return _chosen(where, value, option.choices) if option.choices else _typed(where, value, option.type, option.least)


def _check_known(where: str, key: object, known: Iterable[str]) -> None:
    known = list(known)
    if key in known:
        return
    raise ValueError(f"{where}: unknown key {key!r}{near(key, known)}; known keys: {', '.join(known) or 'none'}")


def _typed(where: str, value: object, kind: type, least: int = 0) -> object:
    # bool is an int in Python, but not in JSON; an integer is a number in both
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {_WORDS[kind]}, got {shown(value)}")
    if kind in (int, float) and not value >= least:
        raise ValueError(f"{where} must be at least {least}, got {value!r}")
    return value


def _chosen(where: str, value: object, allowed: tuple[object, ...]) -> object:
    if value not in allowed:
        raise ValueError(f"{where} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")
    return value
