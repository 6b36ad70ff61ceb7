"""A configuration made tiny: its numbers become small by their names, its layers few by their kinds.

``shrink`` knows no family. What a family needs beyond it (sizes that depend on one another) stands in ``recipes.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCAB = 128
# ids from here up are special tokens; a batch draws its words below
SPECIAL = 96
WIDTH, HEADS, KV_HEADS, HEAD, LAYERS = 64, 4, 2, 16, 2

# the first rule whose pattern is a name's whole says the most that a number may be
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCAB),
    (r"num_kv_shared_layers|max_window_layers|first_k_dense_replace|.*accept_hidden_layer", 1),
    (r"n_groups?|topk_group", 1),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k|index_topk.*)", 2),
    (r".*num_key_value_heads|num_kv_heads|.*num_key_heads", KV_HEADS),
    # a head of multi-head latent attention: one part with positions, as wide as head_dim, and one without
    (r"qk_head_dim", 2 * HEAD),
    (r"rotary_dim", HEAD // 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 2 * WIDTH // HEAD),
    (r".*(head_dim|headdim|d_head|dim_head|d_kv|head_size|kv_channels)", HEAD),
    (r".*lora_rank|.*dt_rank|time_step_rank|laurel_rank", HEAD),
    (r".*experts|.*expert_num", 4),
    (r".*heads|n_head", HEADS),
    (r".*(intermediate|ffn|feed_forward|mlp_dim|dff|d_ff|dim_ff|n_inner|expert_dim).*", 96),
    (r".*(d_state|state_size)", 16),
    (r".*chunk_size|sliding_window(_size)?|.*attention_window.*|local_attention|block_size", 8),
    (r".*(layers|n_layer|num_blocks|depth)", LAYERS),
    (r".*(max_|n_)pos.*|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|num_position_embeddings", 128),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|hidden_dim|output_dim).*", WIDTH),
    (r".*(proj(ection)?_dim|lru_width|hidden_size_.*|.*_hidden|d_inner)", WIDTH),
    (r"image_size|max_image_size|resolution", 32),
    (r".*patch_size", 8),
)
_RULES = tuple((re.compile(pattern), most) for pattern, most in _SIZES)
_TOKEN = re.compile(r".*(token|start|end|bos|eos|pad|image|video|audio|newline|think|nothink)_(id|index)s?$")
# what the ends of a text are called, the same in every sub-configuration
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_N_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")


def shrink(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (of ``to_dict``) made tiny; ``changes`` come last, "text_config.head_dim" in a sub-configuration."""
    specials: dict[int, int] = {}
    tiny = _shrink(config, specials)
    for path, value in changes.items():
        *outer, name = path.split(".")
        at = tiny
        for part in outer:
            at = at.setdefault(part, {})
        if value is LEFT_OUT:
            at.pop(name, None)
        else:
            at[name] = value
    return tiny


class LEFT_OUT:
    """Instead of a value: the class's own default holds, or what it derives from the others."""


def _shrink(config: Mapping[str, Any], specials: dict[int, int]) -> dict[str, Any]:
    kept = _layers_to_keep(config)
    tiny: dict[str, Any] = {}
    for name, value in config.items():
        if name == "quantization_config":
            continue
        if name == "per_layer_config" and value and kept:
            tiny[name] = {kept[1].index(int(i)): _shrink(v, specials) for i, v in value.items() if int(i) in kept[1]}
        elif isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            tiny[name] = _shrink(value, specials)
        elif isinstance(value, (list, tuple)) and kept and len(value) == kept[0]:
            tiny[name] = [value[i] for i in kept[1]]
        elif name in _N_LAYERS and kept:
            tiny[name] = len(kept[1])
        elif _TOKEN.fullmatch(name):
            tiny[name] = _special(name, value, specials)
        elif name == "mrope_section" and value:
            tiny[name] = _sections(value)
        elif re.search("dropout|drop_rate|drop_path|layerdrop|pdrop", name) and isinstance(value, float):
            tiny[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            tiny[name] = _size(name, value, config.get("num_attention_heads"))
        else:
            tiny[name] = value
    return tiny


def _size(name: str, value: int, n_heads: int | None) -> int:
    """``n_heads``: of queries; as many of keys stay as many."""
    most = next((most for rule, most in _RULES if rule.fullmatch(name)), None)
    if most == KV_HEADS and value == n_heads:
        return min(value, HEADS)
    return value if most is None else min(value, most)


def _layers_to_keep(config: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """How many layers there were, and one of each kind (two at least), by the lists that have an item for each."""
    n = next((config[name] for name in _N_LAYERS if isinstance(config.get(name), int)), None)
    if n is None or n <= LAYERS:
        return None
    lists = [v for v in config.values() if isinstance(v, (list, tuple)) and len(v) == n and len(v) > LAYERS]
    kinds: dict[str, int] = {}
    for i in range(n):
        kinds.setdefault(str([each[i] for each in lists]), i)
    chosen = sorted(kinds.values())[: 2 * LAYERS]
    if len(chosen) < LAYERS:
        chosen = sorted({*chosen, *range(LAYERS)})[:LAYERS]
    return n, chosen


def _special(name: str, value: Any, specials: dict[int, int]) -> Any:
    """An id within the small vocabulary, another for every other id."""
    if isinstance(value, (list, tuple)):
        return [_special(name, v, specials) for v in value]
    if not isinstance(value, int) or value < 0:
        return value
    if name in _ENDS:
        return _ENDS[name]
    return specials.setdefault(value, SPECIAL + len(specials) % (VOCAB - SPECIAL))


def _sections(value: list[int]) -> list[int]:
    """Sections of a rotary embedding, whose sum is half a head."""
    half = HEAD // 2
    first = [max(1, v * half // sum(value)) for v in value[:-1]]
    return [*first, half - sum(first)]
