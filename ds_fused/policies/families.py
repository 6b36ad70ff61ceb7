"""Which layer of which family is which body. Data: a family is one line.

A class is found by its name and by the last part of its module (``modeling_llama``), in any base: a subclass written in
a user's script and a copy of the modelling file count as well, since no name is trusted further than the proof goes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_fused.policies.bodies import GATED_MLP, PACKED_MLP, RMS_NORM_GEMMA, RMS_NORM_LLAMA, ROPE_HALF, Body

# instead of a body: why these layers are left, and the JSON key that would have asked for them
EXPERTS = ("swiglu", "its experts are one stacked parameter each, computed by grouped products; glu fuses single MLPs")

# fmt: off
FAMILIES: Mapping[str, Mapping[str, Body | tuple[str, str]]] = {
    "llama": {"LlamaRMSNorm": RMS_NORM_LLAMA, "LlamaMLP": GATED_MLP, "LlamaAttention": ROPE_HALF},
    "mistral": {"MistralRMSNorm": RMS_NORM_LLAMA, "MistralMLP": GATED_MLP, "MistralAttention": ROPE_HALF},
    "mixtral": {"MixtralRMSNorm": RMS_NORM_LLAMA, "MixtralExperts": EXPERTS, "MixtralAttention": ROPE_HALF},
    "qwen2": {"Qwen2RMSNorm": RMS_NORM_LLAMA, "Qwen2MLP": GATED_MLP, "Qwen2Attention": ROPE_HALF},
    "qwen3": {"Qwen3RMSNorm": RMS_NORM_LLAMA, "Qwen3MLP": GATED_MLP, "Qwen3Attention": ROPE_HALF},
    "qwen3_moe": {"Qwen3MoeRMSNorm": RMS_NORM_LLAMA, "Qwen3MoeMLP": GATED_MLP, "Qwen3MoeExperts": EXPERTS, "Qwen3MoeAttention": ROPE_HALF},  # noqa: E501
    "gemma": {"GemmaRMSNorm": RMS_NORM_GEMMA, "GemmaMLP": GATED_MLP, "GemmaAttention": ROPE_HALF},
    "gemma2": {"Gemma2RMSNorm": RMS_NORM_GEMMA, "Gemma2MLP": GATED_MLP, "Gemma2Attention": ROPE_HALF},
    "gemma3": {"Gemma3RMSNorm": RMS_NORM_GEMMA, "Gemma3MLP": GATED_MLP, "Gemma3Attention": ROPE_HALF},
    "phi3": {"Phi3RMSNorm": RMS_NORM_LLAMA, "Phi3MLP": PACKED_MLP, "Phi3Attention": ROPE_HALF},
}
# fmt: on


def find(cls: type) -> Body | tuple[str, str] | None:
    """What the table says about a layer's class or the nearest base that it knows."""
    for base in cls.__mro__:
        family = FAMILIES.get(base.__module__.rpartition(".")[2].removeprefix("modeling_"), {})
        if base.__name__ in family:
            return family[base.__name__]
    return None
