"""Families as tiny models: what a configuration needs beyond the sizes, and how many layers of it are fused."""

from __future__ import annotations

HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 16}
# of transformers 5's DeepSeek and those that follow it: latent attention, one dense layer, then routed experts
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = HEADS | EXPERTS | ROUTED | LATENT | {"num_key_value_heads": 4}
LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR_SIZES = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR = HEADS | LINEAR_HEADS | LINEAR_SIZES | {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
# of single families
LLAMA_4 = HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
GEMMA_3N = HEADS | GEMMA_LAYERS | {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.5, 0.0], "laurel_rank": 4,
}  # fmt: skip
GEMMA_4 = HEADS | GEMMA_LAYERS | {"global_head_dim": 8, "hidden_size_per_layer_input": 0}
DEEPSEEK_V4 = EXPERTS | {"head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2}
FALCON_H1 = HEADS | MAMBA | {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_rms_norm": True}
NEMOTRON_H = HEADS | EXPERTS | ROUTED | {
    "layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, "n_groups": 1, "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
}  # fmt: skip
GRANITE_HYBRID = EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48}
MAMBA_2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2}
LFM_2 = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}

# name, layers that are fused by JSON key, configuration. "plain" are MLPs without a gate. Norms of a layer: before
# attention and MLP 2, after them 2 more (Gemma 2, 3), on q and k 2 (Qwen3, Gemma 3); 1 last
FIRST = (
    ("Llama", "rms_norm 5, rope 2, swiglu 2", {}),
    ("Mistral", "rms_norm 5, rope 2, swiglu 2", {}),
    ("Mixtral", "rms_norm 5, rope 2, swiglu 2", {"num_local_experts": 4}),
    ("Qwen2", "rms_norm 5, rope 2, swiglu 2", {}),
    ("Qwen3", "rms_norm 9, rope 2, swiglu 2", HEADS),
    ("Qwen3Moe", "rms_norm 9, rope 2, swiglu 2", HEADS | EXPERTS | {"mlp_only_layers": [0]}),
    ("Gemma", "rms_norm 5, rope 2, geglu 2", HEADS),
    ("Gemma2", "rms_norm 9, rope 2, geglu 2", HEADS),
    ("Gemma3Text", "rms_norm 13, rope 2, geglu 2", HEADS),
    ("Phi3", "rms_norm 5, rope 2, swiglu 2", {}),
)
COVERED = (
    ("Llama4Text", "rms_norm 7, rope 2, swiglu 3", LLAMA_4),
    ("MllamaText", "rms_norm 5, rope 2, swiglu 2", {"cross_attention_layers": []}),
    ("Ministral", "rms_norm 5, rope 2, swiglu 2", HEADS),
    ("Ministral3", "rms_norm 5, rope 2, swiglu 2", HEADS),
    ("Nemotron", "layer_norm 5, rope 2, relu2 2", {}),
    ("Gemma3nText", "rms_norm 22, rope 2, geglu 2", GEMMA_3N),
    ("Gemma4Text", "rms_norm 15, rope 2, geglu 2", GEMMA_4),
    ("Qwen2Moe", "rms_norm 5, rope 2, swiglu 4", EXPERTS | SHARED),
    ("Qwen3Next", "rms_norm 7, gated_rms_norm 1, rope 1, swiglu 4", LINEAR | EXPERTS | SHARED),
    ("Qwen3_5Text", "rms_norm 7, gated_rms_norm 1, rope 1, swiglu 2", LINEAR),
    ("Qwen3_5MoeText", "rms_norm 7, gated_rms_norm 1, rope 1, swiglu 4", LINEAR | EXPERTS | SHARED),
    ("Phi", "layer_norm 3, rope 2, plain 2", {}),
    ("Granite", "rms_norm 5, rope 2, swiglu 2", {}),
    ("GraniteMoe", "rms_norm 5, rope 2, swiglu 2", EXPERTS),
    ("Olmo", "layer_norm 5, rope 2, swiglu 2", {}),
    ("Olmo2", "rms_norm 9, rope 2, swiglu 2", {}),
    ("Olmo3", "rms_norm 9, rope 2, swiglu 2", {}),
    ("Glm", "rms_norm 5, rope 2, swiglu 2", HEADS),
    ("Glm4", "rms_norm 9, rope 2, swiglu 2", HEADS),
    ("Glm4Moe", "rms_norm 5, rope 2, swiglu 3", HEADS | EXPERTS | ROUTED),
    ("DeepseekV2", "rms_norm 9, rope 2, swiglu 3", DEEPSEEK),
    ("DeepseekV3", "rms_norm 9, rope 2, swiglu 3", DEEPSEEK),
    ("DeepseekV4", "rms_norm 18, rope 4, swiglu 4", DEEPSEEK_V4),
    ("GptOss", "rms_norm 5, rope 2, swiglu 2", HEADS | EXPERTS),
    ("SmolLM3", "rms_norm 5, rope 2, swiglu 2", {}),
    ("FalconH1", "rms_norm 5, gated_rms_norm 2, rope 2, swiglu 2", FALCON_H1),
    ("HunYuanDenseV1", "rms_norm 9, rope 2, swiglu 2", HEADS),
    ("HunYuanMoEV1", "rms_norm 9, rope 2, swiglu 4", HEADS | {"num_experts": 4, "moe_topk": 2}),
    ("Exaone4", "rms_norm 9, rope 2, swiglu 2", HEADS),
    ("Cohere", "layer_norm 3, rope 2, swiglu 2", {}),
    ("Cohere2", "layer_norm 3, rope 2, swiglu 2", HEADS),
    ("Starcoder2", "layer_norm 5, rope 2, plain 2", {}),
    ("StableLm", "layer_norm 5, rope 2, swiglu 2", {}),
    ("GPTNeoX", "layer_norm 5, rope 2, plain 2", {}),
    ("OPT", "layer_norm 5", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("NemotronH", "rms_norm 4, gated_rms_norm 1, relu2 2", NEMOTRON_H),
)
# whose layers have the same bodies, or bodies that are rare
LONG_TAIL = (
    ("Helium", "rms_norm 5, rope 2, swiglu 2", HEADS),
    ("Ernie4_5", "rms_norm 5, rope 2, swiglu 2", HEADS),
    ("NanoChat", "rms_norm 9, rope 2, relu2 2", {}),
    ("Arcee", "rms_norm 5, rope 2, relu2 2", {}),
    ("Apertus", "rms_norm 9, rope 2, plain 2", {}),
    ("GPTJ", "layer_norm 3, rope 2, plain 2", {"rotary_dim": 4}),
    ("Lfm2", "rms_norm 7, rope 1, swiglu 2", LFM_2),
    ("ModernBertDecoder", "layer_norm 6, rope 2, geglu 2", {}),
    ("DeepseekV32", "rms_norm 9, layer_norm 2, rope 4, swiglu 3", DEEPSEEK),
    ("Bamba", "rms_norm 5, gated_rms_norm 1, rope 1, swiglu 2", HEADS | MAMBA | {"attn_layer_indices": [1]}),
    ("GraniteMoeHybrid", "rms_norm 5, gated_rms_norm 1, rope 1, swiglu 4", GRANITE_HYBRID),
    ("Mamba2", "rms_norm 3, gated_rms_norm 2", MAMBA_2),
)

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "pad_token_id": 0,
}  # fmt: skip
PICTURE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
VIDEO = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4,
    "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 32, "mlp_ratio": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
WAV2VEC2 = TEXT | {
    "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "final_dropout": 0.0,
}  # fmt: skip
# the language models of multimodal ones: positions by time, height and width
MULTIMODAL = TEXT | HEADS | {"num_key_value_heads": 2}
SECTIONED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# file and class, configuration, layers that are fused, kind of input, settings
TOWERS = (
    ("bert.BertModel", "BertConfig", "layer_norm 5", "ids", TEXT),
    ("roberta.RobertaModel", "RobertaConfig", "layer_norm 5", "ids", TEXT),
    ("modernbert.ModernBertModel", "ModernBertConfig", "layer_norm 5, rope 2, geglu 2", "ids", TEXT),
    ("t5.T5EncoderModel", "T5Config", "rms_norm 5, geglu 2", "ids", T5 | {"feed_forward_proj": "gated-gelu"}),
    ("qwen2_vl.Qwen2VLTextModel", "Qwen2VLTextConfig", "rms_norm 5, rope 2, swiglu 2", "ids", MULTIMODAL | SECTIONED),
    (
        "qwen2_5_vl.Qwen2_5_VLTextModel",
        "Qwen2_5_VLTextConfig",
        "rms_norm 5, rope 2, swiglu 2",
        "ids",
        MULTIMODAL | SECTIONED,
    ),
    ("qwen3_vl.Qwen3VLTextModel", "Qwen3VLTextConfig", "rms_norm 9, rope 2, swiglu 2", "ids", MULTIMODAL | SECTIONED),
    ("glm4v.Glm4vTextModel", "Glm4vTextConfig", "rms_norm 9, rope 2, swiglu 2", "ids", MULTIMODAL | SECTIONED),
    ("clip.CLIPVisionModel", "CLIPVisionConfig", "layer_norm 6", "pixels", PICTURE),
    ("siglip.SiglipVisionModel", "SiglipVisionConfig", "layer_norm 6", "pixels", PICTURE),
    (
        "pixtral.PixtralVisionModel",
        "PixtralVisionConfig",
        "rms_norm 5, rope 2, geglu 2",
        "pixels",
        PICTURE | {"head_dim": 8},
    ),
    (
        "internvl.InternVLVisionModel",
        "InternVLVisionConfig",
        "layer_norm 4",
        "pixels",
        PICTURE | {"image_size": (16, 16), "patch_size": (4, 4)},
    ),
    ("qwen2_vl.Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", "layer_norm 5, rope 2", "patches", VIDEO),
    (
        "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        "rms_norm 5, rope 2, swiglu 2",
        "patches",
        VIDEO | {"window_size": 16},
    ),
    (
        "qwen3_vl.Qwen3VLVisionModel",
        "Qwen3VLVisionConfig",
        "layer_norm 5, rope 2",
        "patches",
        VIDEO | {"num_position_embeddings": 16, "deepstack_visual_indexes": []},
    ),
    (
        "glm4v.Glm4vVisionModel",
        "Glm4vVisionConfig",
        "layer_norm 1, rms_norm 6, rope 2, swiglu 3",
        "patches",
        VIDEO | {"image_size": 16},
    ),
    ("dinov2.Dinov2Model", "Dinov2Config", "layer_norm 5, swiglu 2", "pixels", PICTURE | {"use_swiglu_ffn": True}),
    ("wav2vec2.Wav2Vec2Model", "Wav2Vec2Config", "layer_norm 6, group_norm 1", "sound", WAV2VEC2),
)
