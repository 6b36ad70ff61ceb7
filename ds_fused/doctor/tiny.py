"""A tiny random model of a type or of a configuration, and a batch that it can train on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from ds_fused.doctor.pictures import image_token, pictures
from ds_fused.doctor.recipes import CHANGES, INPUTS, PARTS
from ds_fused.doctor.shrink import SPECIAL, shrink

# more is no tiny model: some size has a name that shrink doesn't know
MOST_PARAMETERS = 30_000_000
ROWS, TOKENS = 2, 12


class NotTiny(ValueError):
    """The model can't be built tiny; the message says why."""


def default_config(model_type: str) -> PretrainedConfig:
    # copied: some configurations take their parts apart
    return CONFIG_MAPPING[model_type](**copy.deepcopy(dict(PARTS.get(model_type, {}))))


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A small configuration of the same architecture."""
    small = shrink(config.to_dict(), CHANGES.get(config.model_type, {}))
    made = type(config).from_dict(small)
    if made.is_encoder_decoder and getattr(made, "decoder_start_token_id", None) is None:
        made.decoder_start_token_id = 1
    return made


def build(cls: type[PreTrainedModel], config: PretrainedConfig, whole: bool = False) -> PreTrainedModel:
    """A random model, every parameter away from 0 and 1, where a forgotten one would not show; nothing drops out."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    if not whole:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in cls(config).parameters())
        if parameters > MOST_PARAMETERS:
            raise NotTiny(f"shrunk, it still has {parameters:,} parameters")
    model = cls(config).float()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def batches(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Batches, the richest first: with pictures in one form after the other where a model sees any, then of words."""
    name = image_token(model.config)
    takes = inspect.signature(model.forward).parameters
    if name is not None and "pixel_values" in takes and model.config.model_type not in INPUTS:
        for picture in pictures(model.config, "image_grid_thw" in takes):
            yield batch(model, {name: (picture.n_words,)}, picture.tensors(ROWS))
    yield batch(model, INPUTS.get(model.config.model_type, {}), {})


def batch(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...] | None], more: Mapping[str, Tensor], seed: int = 1
) -> dict[str, Any]:
    """Words, labels (some ignored) and a mask, what ``shapes`` says of a row (see ``INPUTS``), and ``more``."""
    draw = torch.Generator().manual_seed(seed)
    config, takes = model.config, inspect.signature(model.forward).parameters
    ids = torch.randint(3, SPECIAL, (ROWS, TOKENS), generator=draw)
    inputs: dict[str, Any] = dict(more)
    for name, shape in shapes.items():
        if name.endswith(("_token_id", "_token_index")):
            special = torch.full((ROWS, *shape), getattr(config, name))
            ids = torch.cat([special, ids], dim=1)
            # what some models ask for beside the words: which of them are of a picture
            inputs |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), (ids == special[0, 0]).long())
        elif shape is None:
            inputs[name] = None
        elif name.endswith("_ids") or name == "labels":
            inputs[name] = torch.randint(3, SPECIAL, (ROWS, *shape), generator=draw)
        elif name in ("bbox", "flattened_patches"):
            # places: of corners in a page, of patches in a picture
            inputs[name] = torch.rand(ROWS, *shape, generator=draw).sort(dim=-1).values
        else:
            inputs[name] = torch.randn(ROWS, *shape, generator=draw)
    if config.is_encoder_decoder:
        labels = torch.randint(3, SPECIAL, (ROWS, TOKENS - 3), generator=draw)
    else:
        labels = torch.where(ids < SPECIAL, ids, -100)
    labels[:, :3] = -100
    words = {"labels": labels}
    if not (config.is_encoder_decoder and model.main_input_name in inputs):
        words |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = words | inputs
    return {name: value for name, value in inputs.items() if name in takes and value is not None}
