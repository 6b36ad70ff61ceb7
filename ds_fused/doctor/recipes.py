"""What single model types need beyond ``shrink`` to be built tiny, and beyond words to be run. Data.

Sizes that depend on one another, choices that a type's default configuration leaves open, layers by their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_fused.doctor.shrink import LEFT_OUT, VOCAB

_MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}
_HEAD = {"head_dim": 16}
_CONTEXT = {"encoder_config.context_size": 8}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
_CODEC = {"num_filters": 4, "depths": [1] * 7}
_COMPASS_ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_STARTS = {"pad_token_id": 0, "decoder_start_token_id": 1}
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
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8},
    "dbrx": {
        # what its checkpoints have
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8,
        **{
            f"{part}_config.{name}": LEFT_OUT
            for part in ("attn", "ffn")
            for name in ("_name_or_path", "output_attentions")
        },
    },
    "deepseek_v2": _EXPERTS,
    "deepseek_ocr2": _under("text_config", {"mlp_layer_types": ["dense", "sparse"], **_EXPERTS}),
    # its cache asks for layers that its own configuration has not
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "cohere_compass_text": {"rope_parameters": _COMPASS_ROPE},
    "cohere_compass": {"text_config.rope_parameters": _COMPASS_ROPE},
    "dots1": _EXPERTS,
    "nemotron": {"num_key_value_heads": 2},
    "hrm_text": {"use_cache": False},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD,
    "ministral": _HEAD,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": _under("text_config", _INDEXER),
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [3, 4], "axial_pos_embds_dim": [16, 48]},
    # with a cache it writes to what its own backward needs
    "xlstm": {"qk_dim_factor": 1.0, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "hybrid_layer_ids": LEFT_OUT},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.moe_intermediate_size": [32, 16],
    },
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101},
        "vq_config.base_channels": 32,
        "vq_config.codebook_size": 32,
    },
    "blip-2": {"image_token_index": 100, "num_query_tokens": 4},
    "instructblip": {"image_token_index": 100, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 100, "num_query_tokens": 4},
    "florence2": {
        "vision_config.embed_dim": [8, 8, 16, 64],
        "vision_config.num_heads": [2] * 4,
        "vision_config.num_groups": [2] * 4,
    },
    "glm5_next": {"text_config.index_kpool": 2},
    "granite4_vision": {
        "text_config.model_type": "granite",
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "image_grid_pinpoints": [[32, 32]],
        "projector_dropout": 0.0,
    },
    "janus": {"vq_config.base_channels": 32, "vq_config.latent_channels": 32},
    "mistral4": {"head_dim": 32},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 64},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 110, **_MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110},
    "step3p7": {"text_config.sliding_window": 8},
    "hunyuan_vl": {**_under("text_config", _HEAD), "text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "granite_speech": _CONTEXT,
    "granite_speech_plus": _CONTEXT,
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64},
    "moonshine": {"pad_token_id": 0, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0},
    "esmc": {"vocab_size": VOCAB},
    "kosmos-2": {"latent_query_num": 12},
    "mobilebert": {"intra_bottleneck_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 64, "num_self_attends_per_block": 2, "max_position_embeddings": 12},
    "encoder-decoder": _STARTS,
    "vision-encoder-decoder": _STARTS,
    "speech-encoder-decoder": {**_STARTS, "encoder.num_feat_extract_layers": 7, "encoder.apply_spec_augment": False},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "speecht5": {"num_feat_extract_layers": 7, "vocab_size": VOCAB, "apply_spec_augment": False},
    "vibevoice": {**_under("audio_config", _CODEC), **_under("semantic_model_config", _CODEC)},
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 3200,
        **_under("acoustic_tokenizer_encoder_config", _CODEC),
        **_under("semantic_tokenizer_encoder_config", _CODEC),
    },
    "glm46v": _MROPE,
    "glmga": _MROPE,
    "glm_ocr": _MROPE,
    "paddleocr_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
}

_MUSIC = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}

# model type -> the parts of a configuration that has no default
PARTS: Mapping[str, Mapping[str, Any]] = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": _DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _DECODER},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": _DECODER},
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}

_PICTURE = {"pixel_values": (3, 32, 32)}

# words of four codebooks at once
_CODES = {"input_ids": (4, 12), "labels": (12, 4)}

# model type -> the shapes of what its forward takes beside words, for one row. What ends in _ids is whole numbers, and
# labels are; image_token_id, or what the configuration calls it, is how many of them a row begins with. None: it takes
# no such thing beside the others
INPUTS: Mapping[str, Mapping[str, tuple[int, ...] | None]] = {
    "blip": _PICTURE,
    "blip-2": {**_PICTURE, "image_token_index": (4,)},
    "git": _PICTURE,
    "idefics": {"pixel_values": (1, 3, 32, 32), "image_attention_mask": (12, 1)},
    "instructblip": {**_PICTURE, "image_token_index": (4,), "qformer_input_ids": (8,)},
    "instructblipvideo": {"pixel_values": (2, 3, 32, 32), "video_token_index": (8,), "qformer_input_ids": (8,)},
    "kosmos-2": {**_PICTURE, "image_embeds_position_mask": (12,)},
    "pix2struct": {"flattened_patches": (16, 66)},
    "pp_formulanet": {**_PICTURE, "decoder_input_ids": (9,)},
    "vision-encoder-decoder": _PICTURE,
    "udop": {"bbox": (12, 4)},
    "fsmt": {"decoder_input_ids": (9,)},
    "whisper": {"input_features": (80, 256)},
    "seamless_m4t": {"input_features": (12, 160)},
    "seamless_m4t_v2": {"input_features": (12, 160)},
    "canary": {"input_features": (64, 128)},
    "cohere_asr": {"input_features": (64, 128)},
    "speech_to_text": {"input_features": (64, 80)},
    "speecht5": {"input_values": (4000,)},
    "speech-encoder-decoder": {"input_values": (4000,)},
    "moonshine": {"input_values": (4000,)},
    "moonshine_streaming": {"input_values": (4000,)},
    "voxtral_realtime": {"input_features": (128, 96)},
    "pop2piano": {"input_features": (16, 64), "input_ids": None},
    "kyutai_speech_to_text": {"input_ids": (12, 33)},
    "musicgen_decoder": _CODES,
    "musicgen_melody_decoder": _CODES,
}
