"""Which model types there are in the installed transformers, and the classes that train them as language models."""

from __future__ import annotations

import copy
import functools

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MASKED = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
# causal language models, then all that is conditional generation, then the rest that has a head over words
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    MASKED,
)


@functools.cache
def architectures() -> dict[str, dict[str, str]]:
    """Model type -> the names of its classes -> the first mapping that has them, in the order of the mappings."""
    found: dict[str, dict[str, str]] = {}
    for mapping in _MAPPINGS:
        # a version of transformers may lack one
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(model_type, {}).setdefault(name, mapping)
    return found


def is_masked(model_type: str, name: str) -> bool:
    """Whether a class is a masked language model; the others are causal, or generate on a condition."""
    return architectures()[model_type].get(name) == MASKED


def model_class(name: str) -> type[PreTrainedModel]:
    return getattr(transformers, name)


def config_for(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """``config`` or the part of it that ``cls`` is built from: a text model of a type that also sees or hears."""
    wanted = cls.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = [getattr(config, name, None) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, wanted)), config)
    if getattr(config, "is_decoder", False) and cls.__name__ in _masked():
        # masked models look both ways
        config = copy.deepcopy(config)
        config.is_decoder = False
    return config


def _masked() -> set[str]:
    return {name for classes in architectures().values() for name, mapping in classes.items() if mapping == MASKED}
