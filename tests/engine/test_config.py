"""The ds_fused block: what is accepted, and that every malformed one is one error that helps."""

import re
from dataclasses import FrozenInstanceError

import pytest

from ds_fused.engine.config import KEYS, parse_config
from ds_fused.ops.registry import OPS
from ds_fused.policies.recompute import Recomputing

OP_KEYS = [key for op in OPS for key in op.keys]


def test_enabled_means_every_op_but_some():
    config = parse_config({"enabled": True})
    assert list(config.wanted) == [key for key in OP_KEYS if key != "add_rms_norm"]
    assert all(options == {} for options in config.wanted.values())
    assert (config.strict, config.verify, config.report) == (False, True, True)
    assert (config.logits, config.eval) == ("defer", "defer")


def test_keys_come_from_the_registry():
    assert set(OP_KEYS) < set(KEYS)


@pytest.mark.parametrize("key", OP_KEYS)
def test_each_op_can_be_switched_off(key):
    assert key not in parse_config({"enabled": True, key: False}).wanted


@pytest.mark.parametrize("off", ["rms_norm", "rope"])
def test_what_needs_an_op_that_is_off_is_on_where_it_is_named_alone(off):
    block = {"enabled": True, off: False}
    assert "qk_norm_rope" not in parse_config(block).wanted
    assert "qk_norm_rope" in parse_config({**block, "qk_norm_rope": True}).wanted


def test_an_op_that_is_off_can_be_switched_on():
    assert "add_rms_norm" in parse_config({"enabled": True, "add_rms_norm": True}).wanted


def test_options_reach_the_op():
    wanted = parse_config({"enabled": True, "fused_linear_cross_entropy": {"chunk_mb": 256}}).wanted
    assert wanted["fused_linear_cross_entropy"] == {"chunk_mb": 256}


def test_options_of_the_engine_do_not_reach_the_op():
    config = parse_config({"enabled": True, "fused_linear_cross_entropy": {"mode": "stream", "keep_mb": 1}})
    assert config.wanted["fused_linear_cross_entropy"] == {"keep_mb": 1}
    assert config.head == {"mode": "stream", "slab_mb": 132, "copy_engines": False}


def test_everything_can_be_said():
    block = {"enabled": False, "strict": True, "verify": False, "report": False, "logits": "keep", "eval": "stock"}
    block |= {"embedding": True, "warmup": True, "leaf_modules": True, "profile": "small", "zero_sizes": "large"}
    block |= {"collectives": "stock", "rotary_frequencies": "fp32"}
    config = parse_config(block | dict.fromkeys(OP_KEYS, False))
    assert {name: getattr(config, name) for name in block} == block
    assert config.wanted == {}


def test_the_least_values_are_allowed():
    head = {"chunk_mb": 1, "keep_mb": 0, "slab_mb": 0}
    config = parse_config({"enabled": True, "fused_linear_cross_entropy": head, "tiled_mlp": {"tiles": 1}})
    assert {**config.wanted["fused_linear_cross_entropy"], "slab_mb": config.head["slab_mb"]} == head


def test_tiles():
    said = {value: parse_config({"enabled": True, "tiled_mlp": value}).tiles for value in (True, False)}
    assert said == {True: (8, 1), False: None}
    assert parse_config({"enabled": True}).tiles is None
    assert parse_config({"enabled": True, "tiled_mlp": {}}).tiles == (8, 1)
    assert parse_config({"enabled": True, "tiled_mlp": {"tiles": 3, "least_tokens": 9}}).tiles == (3, 9)


def test_recompute():
    assert parse_config({"enabled": True}).recompute == Recomputing("full", None)
    assert parse_config({"enabled": True, "recompute": "matmuls"}).recompute == Recomputing("matmuls", None)
    assert parse_config({"enabled": True, "recompute": {"keep_mb": 4096}}).recompute == Recomputing("auto", 4096)


def test_a_config_does_not_change():
    config = parse_config({"enabled": True})
    with pytest.raises(FrozenInstanceError):
        config.strict = True
    with pytest.raises(TypeError):
        config.wanted["rope"] = {}


# block, and what the error must name: the key, what came, what may stand there
MALFORMED = [
    # the block itself
    (True, "ds_fused", "True", "object"),
    (None, "ds_fused", "None", "object"),
    ("on", "ds_fused", "'on'", "object"),
    ([], "ds_fused", "[]", "object"),
    (1, "ds_fused", "1", "object"),
    # whether it is on must be said
    ({}, "ds_fused.enabled", "missing", "true or false"),
    ({"rope": True}, "ds_fused.enabled", "rope", "true or false"),
    # keys that don't exist: typing errors, other libraries' words, DeepSpeed's own
    ({"enabled": True, "rms_nrom": True}, "'rms_nrom'", "did you mean 'rms_norm'", "known keys"),
    ({"enabled": True, "RMS_NORM": True}, "'RMS_NORM'", "known keys", "rms_norm"),
    ({"enable": True}, "'enable'", "did you mean 'enabled'", "known keys"),
    ({"enabled": True, "flash_attention": True}, "'flash_attention'", "known keys", "rope"),
    ({"enabled": True, "linear_cross_entropy": True}, "did you mean", "fused_linear_cross_entropy", "known keys"),
    ({"enabled": True, "stage": 3}, "'stage'", "known keys", "strict"),
    ({"enabled": True, "": True}, "''", "known keys", "enabled"),
    ({"enabled": True, 7: True}, "7", "known keys", "enabled"),
    # switches that are no booleans
    ({"enabled": "true"}, "ds_fused.enabled", "'true' (str)", "true or false"),
    ({"enabled": 1}, "ds_fused.enabled", "1 (int)", "true or false"),
    ({"enabled": "auto"}, "ds_fused.enabled", "'auto'", "true or false"),
    ({"enabled": None}, "ds_fused.enabled", "None", "true or false"),
    ({"enabled": True, "strict": 0}, "ds_fused.strict", "0 (int)", "true or false"),
    ({"enabled": True, "verify": "no"}, "ds_fused.verify", "'no'", "true or false"),
    ({"enabled": True, "report": {}}, "ds_fused.report", "{}", "true or false"),
    # choices
    ({"enabled": True, "logits": "sealed"}, "ds_fused.logits", "'sealed'", "'defer' or 'keep'"),
    ({"enabled": True, "logits": True}, "ds_fused.logits", "True", "'defer' or 'keep'"),
    ({"enabled": True, "logits": ["keep"]}, "ds_fused.logits", "['keep']", "'defer' or 'keep'"),
    ({"enabled": True, "eval": "fused"}, "ds_fused.eval", "'fused'", "'defer' or 'stock'"),
    ({"enabled": True, "eval": None}, "ds_fused.eval", "None", "'defer' or 'stock'"),
    (
        {"enabled": True, "profile": "tiny"},
        "ds_fused.profile",
        "'tiny'",
        "'stock' or 'auto' or 'fit' or 'fast' or 'small'",
    ),
    ({"enabled": True, "profile": True}, "ds_fused.profile", "True", "'stock' or 'auto' or 'fit' or 'fast' or 'small'"),
    ({"enabled": True, "collectives": True}, "ds_fused.collectives", "True", "'in_place' or 'stock'"),
    ({"enabled": True, "zero_sizes": 5e8}, "ds_fused.zero_sizes", "500000000.0", "'stock' or 'small' or 'large'"),
    ({"enabled": True, "leaf_modules": "layers"}, "ds_fused.leaf_modules", "'layers'", "true or false"),
    # ops
    ({"enabled": True, "rope": "yes"}, "ds_fused.rope", "'yes'", "true or false"),
    ({"enabled": True, "rms_norm": 1}, "ds_fused.rms_norm", "1 (int)", "true or false"),
    ({"enabled": True, "swiglu": None}, "ds_fused.swiglu", "None", "true or false"),
    ({"enabled": True, "cross_entropy": []}, "ds_fused.cross_entropy", "[]", "true or false"),
    # options of ops
    ({"enabled": True, "rope": {"interleaved": True}}, "ds_fused.rope", "'interleaved'", "known keys: none"),
    ({"enabled": True, "fused_linear_cross_entropy": {"chunk": 1}}, "'chunk'", "did you mean 'chunk_mb'", "keep_mb"),
    ({"enabled": True, "fused_linear_cross_entropy": 512}, "fused_linear_cross_entropy", "512", "object of chunk_mb"),
    ({"enabled": True, "fused_linear_cross_entropy": {"chunk_mb": "512"}}, "chunk_mb", "'512' (str)", "an integer"),
    (
        {"enabled": True, "fused_linear_cross_entropy": {"accumulate": "bf16"}},
        "accumulate",
        "'bf16'",
        "'auto' or 'native' or 'fp32'",
    ),
    ({"enabled": True, "fused_linear_cross_entropy": {"chunk_mb": 0.5}}, "chunk_mb", "0.5 (float)", "an integer"),
    ({"enabled": True, "fused_linear_cross_entropy": {"keep_mb": True}}, "keep_mb", "True (bool)", "an integer"),
    ({"enabled": True, "fused_linear_cross_entropy": {"keep_mb": -1}}, "keep_mb", "-1", "at least 0"),
    (
        {"enabled": True, "fused_linear_cross_entropy": {"chunk_mb": 0}},
        "fused_linear_cross_entropy.chunk_mb",
        "at least 1",
        "0",
    ),
    (
        {"enabled": True, "fused_linear_cross_entropy": {"slab_mb": -1}},
        "fused_linear_cross_entropy.slab_mb",
        "at least 0",
        "-1",
    ),
    (
        {"enabled": True, "fused_linear_cross_entropy": {"mode": "slabs"}},
        "mode",
        "'slabs'",
        "'auto' or 'stream' or 'stationary' or 'gather'",
    ),
    ({"enabled": True, "fused_linear_cross_entropy": {"slab_mb": "128"}}, "slab_mb", "'128' (str)", "an integer"),
    ({"enabled": True, "tiled_mlp": 4}, "ds_fused.tiled_mlp", "4 (int)", "true or false or an object of tiles"),
    ({"enabled": True, "tiled_mlp": {"tiles": 0}}, "ds_fused.tiled_mlp.tiles", "at least 1", "0"),
    ({"enabled": True, "tiled_mlp": {"tiles": 2.0}}, "ds_fused.tiled_mlp.tiles", "2.0 (float)", "an integer"),
    ({"enabled": True, "tiled_mlp": {"least_tokens": 0}}, "ds_fused.tiled_mlp.least_tokens", "at least 1", "0"),
    ({"enabled": True, "tiled_mlp": {"shards": 2}}, "ds_fused.tiled_mlp", "'shards'", "known keys: tiles"),
    ({"enabled": True, "recompute": True}, "ds_fused.recompute", "True", '"fit" or an object of level, keep_mb'),
    ({"enabled": True, "recompute": "most"}, "ds_fused.recompute", "'most'", '"full" or "attention"'),
    ({"enabled": True, "recompute": {"keep": 1}}, "ds_fused.recompute", "'keep'", "known keys: level, keep_mb"),
    ({"enabled": True, "recompute": {"keep_mb": "1"}}, "ds_fused.recompute.keep_mb", "'1'", "an integer"),
    ({"enabled": True, "recompute": {"levle": "fit"}}, "ds_fused.recompute", "'levle'", "did you mean 'level'"),
    ({"enabled": True, "recompute": {"level": None}}, "ds_fused.recompute.level must", "None (NoneType)", '"full" or'),
    ({"enabled": True, "recompute": {"offload": 1}}, "ds_fused.recompute.offload", "1 (int)", "true or false or"),
    ({"enabled": True, "recompute": {"keep_mb": 1.0}}, "ds_fused.recompute.keep_mb", "1.0 (float)", "an integer"),
    ({"enabled": True, "recompute": "most " * 99}, "ds_fused.recompute must", "... (str)", '"full" or "attention"'),
    ({"enabled": True, "embedding": {}}, "ds_fused.embedding", "{}", "true or false"),
]


@pytest.mark.parametrize(("block", "named"), [(block, named) for block, *named in MALFORMED], ids=repr)
def test_malformed(block, named):
    with pytest.raises(ValueError, match="^ds_fused") as error:
        parse_config(block)
    for text in named:
        assert text in str(error.value)
    assert not re.search(r"\n", str(error.value))


def test_unknown_key_names_all_known_ones():
    with pytest.raises(ValueError, match="known keys") as error:
        parse_config({"enabled": True, "nothing": 1})
    assert all(key in str(error.value) for key in KEYS)
