"""Which model types there are in the installed transformers, and the classes that train them as language models."""

from __future__ import annotations

import functools

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# causal language models, then all that is conditional generation
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)


@functools.cache
def architectures() -> dict[str, tuple[str, ...]]:
    """Model type -> the names of its classes, each once, in the order of the mappings."""
    found: dict[str, dict[str, None]] = {}
    for mapping in _MAPPINGS:
        # a version of transformers may lack one
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(model_type, {})[name] = None
    return {model_type: tuple(names) for model_type, names in found.items()}


def model_class(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, name)


def config_for(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """``config`` or the part of it that ``cls`` is built from: a text model of a type that also sees or hears."""
    wanted = cls.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, wanted)), config)
