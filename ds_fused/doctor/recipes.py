"""What single model types need beyond ``shrink`` to be built tiny, and beyond words to be run. Data: a type is one line.

Sizes that depend on one another, choices that a type's default configuration leaves open, layers by their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_fused.doctor.shrink import LEFT_OUT

_MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}
_HEAD = {"head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}


def _under(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{path}": value for path, value in changes.items()}


# model type -> changes of its shrunk configuration
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bamba": _MAMBA,
    "falcon_h1": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "mamba2": {"num_heads": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}},  # noqa: E501
    "dots1": _EXPERTS,
    "nemotron": {"num_key_value_heads": 2},
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "hunyuan_vl": _under("text_config", _HEAD),
    "ministral": _HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": _under("text_config", _INDEXER),
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [4, 32], "axial_pos_embds_dim": [16, 48]},
    "xlstm": {"hidden_size": 64, "chunk_size": 12},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": LEFT_OUT},
    "glm4v": _MROPE,
    "glm4v_moe": _MROPE,
    "glm46v": _MROPE,
    "glmga": _MROPE,
    "glm_ocr": _MROPE,
    "paddleocr_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
}

# model type -> the shapes of what its forward takes beside words, for one row; what ends in _ids is whole numbers
INPUTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "blip": {"pixel_values": (3, 32, 32)},
    "blip-2": {"pixel_values": (3, 32, 32)},
    "git": {"pixel_values": (3, 32, 32)},
    "idefics": {"pixel_values": (1, 3, 32, 32)},
    "instructblip": {"pixel_values": (3, 32, 32), "qformer_input_ids": (8,)},
    "instructblipvideo": {"pixel_values": (2, 3, 32, 32), "qformer_input_ids": (8,)},
    "kosmos-2": {"pixel_values": (3, 32, 32)},
    "pix2struct": {"flattened_patches": (16, 770)},
    "pp_formulanet": {"pixel_values": (3, 32, 32)},
    "whisper": {"input_features": (80, 256)},
    "seamless_m4t": {"input_features": (16, 160)},
    "seamless_m4t_v2": {"input_features": (16, 160)},
    "canary": {"input_features": (64, 80)},
    "cohere_asr": {"input_features": (64, 128)},
    "speech_to_text": {"input_features": (64, 80)},
    "moonshine": {"input_values": (4000,)},
    "voxtral_realtime": {"input_features": (128, 64)},
    "pop2piano": {"input_features": (16, 64)},
}
