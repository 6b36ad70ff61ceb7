"""Whether a model trains with ds_fused as it does without.

    python -m ds_fused.doctor FOLDER          a model's folder, or its config.json
    python -m ds_fused.doctor NAME            a model of the hub that is in the cache
    python -m ds_fused.doctor qwen3           a model type of transformers

Builds the architecture with random weights, small enough for any machine (``--whole``: in its own sizes), trains one
step stock and one fused, and prints which layers were replaced, which were left and why, and whether loss and all
gradients agree. Exit status: 0 if they do, 1 if they differ, 2 if the model can't be built or run.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import transformers
from transformers import AutoConfig, PretrainedConfig

from ds_fused.doctor.architectures import architectures, config_for, model_class
from ds_fused.doctor.diagnosis import examine
from ds_fused.doctor.tiny import default_config, tiny_config

AGREES, DIFFERS, NOT_RUN = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "ds_fused.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_OR_CONFIG")
    parser.add_argument("--whole", action="store_true", help="in the sizes of the configuration")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        config = _config(given.model)
        if not given.whole:
            config = tiny_config(config)
        classes = _classes(config)
    except Exception as error:
        # of the configuration's code: transformers checks one by errors of many types
        print(f"{given.model}: {type(error).__name__}: {' '.join(str(error).split())}")
        return NOT_RUN
    return max(_report(name, config, given.whole) for name in classes)


def _report(name: str, config: PretrainedConfig, whole: bool) -> int:
    cls = model_class(name)
    try:
        found = examine(cls, config_for(cls, config), whole)
    except Exception as error:
        # of the model's code: whatever it is, the answer is that it could not be run
        print(f"{name} can't be built or run: {type(error).__name__}: {error}")
        return NOT_RUN
    print(f"{name}\n{found}")
    return DIFFERS if found.differs else AGREES


def _config(model: str) -> PretrainedConfig:
    if model in architectures():
        return default_config(model)
    return AutoConfig.from_pretrained(model, local_files_only=True)


def _classes(config: PretrainedConfig) -> list[str]:
    """What the configuration says it is of, else all that its type can be."""
    known = architectures().get(config.model_type)
    if known is None:
        raise ValueError(f"{config.model_type} is no language model of transformers {transformers.__version__}")
    return [name for name in config.architectures or () if name in known] or list(known)


if __name__ == "__main__":
    sys.exit(main())
