"""What a profile adds to a block, which one "auto" stands for, and which sizes belong to which layer."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.config import get_zero_config
from torch import nn

from ds_fused.engine.config import CHOICES, HEAD, RECOMPUTE, TILED, parse_config
from ds_fused.engine.profiles import ESTIMATED, PROFILES, filled
from ds_fused.engine.zero3 import leaf_modules
from ds_fused.engine.zero3.estimate import Job, fitting, job_of
from ds_fused.engine.zero3.sizes import set_sizes, sizes_of

ON = {"enabled": True}
SMALL = {"leaf_modules": True, "zero_sizes": "small", "embedding": True}
ON_HOST = {"recompute.level": "attention", "recompute.offload": True}
IF_LONG = {"tiled_mlp.least_tokens": 32768}
IN_TILES = {"tiled_mlp.tiles": 4} | IF_LONG
OF_HEAD = {f"{HEAD}.mode": "auto", f"{HEAD}.keep_mb": 0}

# block, profile, what is added to it
TABLE = [
    (ON, "stock", {}),
    (ON, "small", SMALL | ON_HOST | IN_TILES | OF_HEAD),
    (
        ON | {"recompute": "attention", "embedding": False},
        "small",
        {"leaf_modules": True, "zero_sizes": "small"} | IN_TILES | OF_HEAD,
    ),
    (
        ON | {"recompute": {"level": "fit", "keep_mb": 3}, "zero_sizes": "stock"},
        "small",
        {"leaf_modules": True, "embedding": True} | IN_TILES | OF_HEAD,
    ),
    # no options are added: "matmuls" has no keep_mb, and "fit" by itself has room
    (ON | {"recompute": {"level": "matmuls"}}, "small", SMALL | IN_TILES | OF_HEAD),
    (ON | {"recompute": {"level": "fit"}}, "small", SMALL | IN_TILES | OF_HEAD),
    (ON | {"recompute": "full"}, "small", SMALL | IN_TILES | OF_HEAD),
    (ON | {"recompute": {}}, "small", SMALL | IN_TILES | OF_HEAD),
    (ON | {"tiled_mlp": False}, "small", SMALL | ON_HOST | OF_HEAD),
    (ON | {"tiled_mlp": True}, "small", SMALL | ON_HOST | IN_TILES | OF_HEAD),
    (ON | {"tiled_mlp": {"tiles": 7}}, "small", SMALL | ON_HOST | IF_LONG | OF_HEAD),
    (ON | {HEAD: {"mode": "gather"}}, "small", SMALL | ON_HOST | IN_TILES | {f"{HEAD}.keep_mb": 0}),
    (ON | {HEAD: True}, "small", SMALL | ON_HOST | IN_TILES | OF_HEAD),
    (ON | {HEAD: False}, "small", SMALL | ON_HOST | IN_TILES),
    (
        ON,
        "fast",
        {"leaf_modules": True, "zero_sizes": "large", "recompute": "fit"}
        | {f"{HEAD}.mode": "auto", f"{HEAD}.grad_in_forward": False},
    ),
    (
        ON | {"leaf_modules": False, HEAD: {"mode": "stream", "grad_in_forward": True}},
        "fast",
        {"zero_sizes": "large", "recompute": "fit"},
    ),
    (ON | {"leaf_modules": False, "zero_sizes": "small", "recompute": "fit", HEAD: False}, "fast", {}),
]


@pytest.mark.parametrize("block, profile, added", TABLE)
def test_a_profile_adds_what_is_not_given(block, profile, added):
    whole, fresh = filled(block, profile)
    assert fresh == added
    config = parse_config(whole)
    for name, value in added.items():
        key, _, option = name.partition(".")
        assert (whole[key][option] if option else whole[key]) == value
    # what was given is what it was
    given = parse_config(block)
    for key in block:
        if isinstance(block[key], dict):
            assert block[key].items() <= whole[key].items()
        elif block[key] is not True or key in ON:
            assert whole[key] == block[key]
    assert (HEAD in config.wanted) == (HEAD in given.wanted)
    if TILED in block:
        assert (config.tiles is None) == (given.tiles is None)
    if RECOMPUTE in block:
        assert config.recompute == given.recompute


def test_every_profile_is_a_choice_and_well_formed():
    assert {*PROFILES, *ESTIMATED} == set(CHOICES["profile"])
    for name in PROFILES:
        parse_config(filled(ON, name)[0])


def test_the_flag_alone_sets_nothing():
    config = parse_config(ON)
    assert (config.profile, config.zero_sizes, config.leaf_modules, config.tiles) == ("stock", "stock", False, None)


GIB = 2**30
# Llama-3-8B, 8192 tokens, on four ranks
LLAMA = Job(
    parameters=8_030_261_248,
    here=False,
    trained=8_030_261_248,
    layer=218_112_000,
    layers=32,
    width=4096,
    tokens=8192,
    itemsize=2,
    ranks=4,
    stage=3,
    checkpointing=True,
    offloaded=False,
)


@pytest.mark.parametrize(
    "job, free, profile",
    [
        (LLAMA, 140, "fast"),
        (LLAMA, 79, "fast"),
        (LLAMA, 40, "small"),
        (replace(LLAMA, here=True), 45, "fast"),
        (replace(LLAMA, ranks=1), 140, "small"),
        (replace(LLAMA, ranks=1, offloaded=True), 79, "fast"),
        # no checkpointing: a batch of four does not fit
        (replace(LLAMA, checkpointing=False), 140, "fast"),
        (replace(LLAMA, checkpointing=False, tokens=4 * 8192), 140, "small"),
        # stage 2 has whole weights, stage 0 all of everything
        (replace(LLAMA, stage=2), 79, "fast"),
        (replace(LLAMA, stage=0), 79, "small"),
        # adapters: states of few
        (replace(LLAMA, trained=20_000_000, ranks=2), 40, "fast"),
        (replace(LLAMA, tokens=64 * 8192), 140, "small"),
    ],
)
def test_auto_is_fast_where_it_fits(job, free, profile):
    chosen, why = fitting(job, free * GIB)
    assert chosen == profile, why
    assert f"of {free:.1f} GiB free" in why


def test_the_estimate_adds_up_what_is_known_of_llama():
    parts = LLAMA.bytes()
    assert parts["weights"] + parts["gradients"] == LLAMA.parameters
    assert parts["states"] == 3 * LLAMA.parameters
    # the inputs of 32 layers are 2 GiB
    assert 2 * GIB < parts["activations"] < 4.2 * GIB


@pytest.mark.parametrize("layer", [7744, 218_112_000, 855_654_400])
@pytest.mark.parametrize("choice", ["small", "large"])
def test_sizes_of_a_layer(choice, layer):
    sizes = sizes_of(choice, layer, 32 * layer)
    # else a layer that is computed again would be gathered a third time; small sizes are no larger than DeepSpeed's
    assert sizes["stage3_max_reuse_distance"] >= (2 * layer if choice == "large" else min(2 * layer, 1e9))
    assert sizes["stage3_max_live_parameters"] >= layer + sizes["stage3_prefetch_bucket_size"]
    assert 1 <= sizes["reduce_bucket_size"] <= 32 * layer
    # checkpoints depend on it: "auto" may choose either
    assert sizes["sub_group_size"] == sizes_of("small", layer, 1)["sub_group_size"] >= layer


@pytest.mark.parametrize("layer", [LLAMA.layer, 855_654_400])  # of 8B and of 70B
def test_small_sizes_are_no_larger_than_deepspeeds(layer):
    small = sizes_of("small", layer, 32 * layer)
    stock = {"stage3_prefetch_bucket_size": 5e7, "stage3_max_reuse_distance": 1e9, "stage3_max_live_parameters": 1e9}
    stock |= {"reduce_bucket_size": 5e8, "sub_group_size": 1e9}
    assert all(small[name] <= size for name, size in stock.items()) and small.keys() == stock.keys()


def test_of_layers_that_come_as_one_the_next_is_on_its_way_as_a_whole():
    # of Llama's matrices, as they are gathered: the last one is asked for, the first of the layer after it is not
    matrices = [4096 * n for n in (4096, 1024, 1024, 4096, 14336, 14336, 14336)]
    small = sizes_of("small", LLAMA.layer, 32 * LLAMA.layer, whole=True)
    assert sum(matrices[:-1]) < small["stage3_prefetch_bucket_size"] <= sum(matrices)
    # with the layer in use, and one that is kept for its backward
    assert small["stage3_max_live_parameters"] >= 2 * LLAMA.layer + small["stage3_prefetch_bucket_size"]
    assert small.items() - sizes_of("small", LLAMA.layer, 32 * LLAMA.layer).items() == {
        (name, small[name]) for name in ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    }


@pytest.mark.parametrize("choice", ["small", "large"])
@pytest.mark.parametrize("zenflow", [False, True])
def test_zenflows_buckets_are_deepspeeds(choice, zenflow):
    """Its gradients lie transposed: one that is larger than the bucket ends DeepSpeed's backward."""
    block = {"stage": 3, "stage3_max_live_parameters": 7} | ({"zenflow": {}} if zenflow else {})
    engine = SimpleNamespace(
        zero_optimization_partition_weights=lambda: True,
        zero_offload_optimizer=lambda: None,
        _config=SimpleNamespace(
            zero_config=get_zero_config({"zero_optimization": block}), _param_dict={"zero_optimization": block}
        ),
    )
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 999, bias=False))
    line = set_sizes(engine, choice, model, [model[0]], 0)
    zero, wanted = engine._config.zero_config, sizes_of(choice, 64 * 64, 64 * (64 + 999))
    assert zero.reduce_bucket_size == (5e8 if zenflow else wanted["reduce_bucket_size"])
    assert zero.prefetch_bucket_size == wanted["stage3_prefetch_bucket_size"] and zero.max_live_parameters == 7
    assert ("reduce_bucket_size" in line) is not zenflow and line.endswith("gives them: stage3_max_live_parameters")


def test_a_layer_that_gets_its_input_by_keyword_is_named(caplog):
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    leaf_modules._hold([], layer, (x,), x)
    assert not caplog.messages
    leaf_modules._hold([], layer, (), x)
    (line,) = caplog.messages
    assert line.startswith("ds_fused: Linear gets its hidden states by keyword")


def test_a_job_that_says_too_little_has_no_estimate():
    assert "max_position_embeddings" in job_of(None, nn.Linear(2, 2), [], torch.float32)


def test_nothing_is_trained():
    assert sizes_of("small", 7744, 0)["reduce_bucket_size"] == sizes_of("large", 7744, 0)["reduce_bucket_size"] == 1
