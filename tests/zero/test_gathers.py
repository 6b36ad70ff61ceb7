"""Leaf modules, sizes and profiles against stock ZeRO-3 on two ranks: gathers change, what is computed does not."""

from __future__ import annotations

import json
from pathlib import Path

import products
import pytest
from launching import launch

LAYERS = products.SIZES["num_hidden_layers"]
RANKS = range(2)
# cases that only --all runs; the quick ones among MODELS and LORA have a layer with and without checkpointing, with
# frozen weights in it, and used for something else between two steps; test_tiled.py has tiles in a leaf module
LONG = (
    "tied", "reentrant", "unwrapped", "some_stay_whole", "lora_reentrant", "lora_plain_without_gradients_of_inputs",
    "tiled_inside", "some_kept",
)  # fmt: skip


def models(*names: str) -> list:
    return [pytest.param(name, marks=[pytest.mark.all] if name in LONG else []) for name in names]


@pytest.fixture(scope="module")
def cases(request, tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what each rank found."""
    out = tmp_path_factory.mktemp("gathers")
    left = () if request.config.getoption("--all") else LONG
    launch(Path(__file__).with_name("gathers_ranks.py"), str(out), *left)
    names = [path.name.removesuffix(".0.json") for path in out.glob("*.0.json")]
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in RANKS] for name in names}


def assert_alike(found: dict, stock: dict) -> None:
    """Losses, gradient norms and whatever was asked in between."""
    assert len(stock["said"]) >= 3 * products.FEW_STEPS and stock["said"][0] != stock["said"][-2]
    # a residual's gradients are added up in another order where DeepSpeed has no hook on each module
    assert found["said"] == pytest.approx(stock["said"], rel=5e-6)


MODELS = models(
    "plain",
    "tied",
    "reentrant",
    "not_reentrant",
    "with_lora",
    "in_between",
    "unwrapped",
    "some_stay_whole",
    "offloaded",
)
LORA = models("lora_reentrant", "lora_plain", "lora_plain_without_gradients_of_inputs")


@pytest.mark.parametrize("model", ["plain", "not_reentrant"])
def test_sizes_change_no_bit(cases, model):
    for found in cases[model]:
        for way in ("small", "large"):
            assert found[way]["said"] == found["stock"]["said"]
            assert found[way]["weights"] == found["stock"]["weights"]


@pytest.mark.parametrize("model", MODELS)
def test_collectives_in_place_change_no_bit(cases, model):
    for found in cases[model]:
        assert found["in place"]["said"] == found["stock"]["said"]
        assert found["in place"]["weights"] == found["stock"]["weights"]
        assert found["in place"]["left"] == []


def test_gradients_in_fp32_where_bf16_is_sent(cases):
    for found in cases["fp32_adapters"]:
        assert found["dtypes"] == ["torch.float32"]
        assert found["in place"]["said"] == found["stock"]["said"]
        assert found["in place"]["weights"] == found["stock"]["weights"]


@pytest.mark.parametrize("model", ["plain", "not_reentrant"])
def test_leaf_modules_by_a_buffer_or_in_place(cases, model):
    for found in cases[model]:
        for what in ("said", "weights", "gathers"):
            assert found["by a buffer"][what] == found["leaf"][what]


BY_BUFFERS, IN_PLACE = {"AllGatherCoalescedHandle", "reduce_scatter_coalesced"}, {"WeightHandle", "_reduce"}


def test_weights_and_gradients_go_from_place_to_place(cases):
    for found in cases["in_place"]:
        assert set(found["plain"]) == IN_PLACE
        assert found["bytes beyond the weight"] == 0
        report = " ".join(found["report"].split())
        for what in ("weights come straight to their places", "gradients leave from where they are"):
            assert f"-> {what}" in report
        for way in ("logged", "restored"):
            assert set(found[way]) == BY_BUFFERS


def test_weights_that_split_unevenly_in_two_dtypes(cases):
    for found in cases["odd"]:
        assert found["class"] == "WeightHandle" and found["got"] == found["expected"]
        assert found["dtypes"] == ["torch.float32", "torch.float32", "torch.bfloat16"]
        assert found["calls"] == {"_allgather_base": 3}
        assert found["got on GPUs"] == found["expected"][:2]
        assert found["calls on GPUs"] == {"allgather_into_tensor_coalesced": 1}


def test_where_a_proof_fails_all_ranks_go_by_buffers(cases):
    weights = "collectives: a weight that comes straight to its place is not the one that DeepSpeed gathers"
    gradients = "collectives: a gradient that leaves from where it is does not come to what DeepSpeed's does"
    unable = "collectives: RuntimeError: Backend other does not support it"
    for found in cases["proofs"]:
        assert found["weights"]["left"] == [f"{weights} (on rank 1 of 2)"]
        assert set(found["weights"]["handles"]) == {"AllGatherCoalescedHandle", "_reduce"}
        assert found["gradients"]["left"] == [f"{gradients} (on rank 1 of 2)"]
        assert set(found["gradients"]["handles"]) == {"WeightHandle", "reduce_scatter_coalesced"}
        assert found["unable"]["left"] == [unable, unable]
        assert set(found["unable"]["handles"]) == BY_BUFFERS


def test_what_the_json_says_of_collectives_stands(cases):
    for found in cases["not_in_place"]:
        (sequential,) = found["stage3_allgather_sequential"]
        assert sequential == "collectives: stage3_allgather_sequential gathers weights one by one"
        (added,) = found["stage3_use_all_reduce_for_fetch_params"]
        assert added == "collectives: stage3_use_all_reduce_for_fetch_params has them added up"
        assert found["reduce_scatter"] == ["collectives: reduce_scatter is off"]
        assert found["stock"] == []


@pytest.mark.parametrize("model", MODELS)
def test_leaf_modules_train_as_stock(cases, model):
    for found in cases[model]:
        assert_alike(found["leaf"], found["stock"])
        assert found["leaf"]["left"] == []
        assert [name.rpartition(".")[2] for name in found["leaf"]["leafs"]] == [str(i) for i in range(LAYERS)]
        # small sizes have other gathers, and the same numbers
        assert found["both"]["weights"] == found["leaf"]["weights"]


@pytest.mark.parametrize("model", ["plain", "not_reentrant"])
def test_leaf_modules_are_deepspeeds_to_the_bit(cases, model):
    for found in cases[model]:
        assert found["leaf"]["weights"] == found["deepspeed's leaf"]["weights"]
        assert found["leaf"]["said"] == found["deepspeed's leaf"]["said"]


@pytest.mark.parametrize("model", LORA)
def test_lora_in_checkpointed_leaf_modules(cases, model):
    for found in cases[model]:
        for way in ("leaf", "both"):
            assert_alike(found[way], found["stock"])


def test_a_repeated_forward_that_runs_to_its_end(cases):
    for found, stopped in zip(cases["checkpoint_to_the_end"], cases["not_reentrant"], strict=True):
        assert "size of tensor" in found["stock"]["error"]
        assert found["leaf"]["weights"] == stopped["leaf"]["weights"]


@pytest.mark.parametrize("how", ["None", "reentrant", "plain"])
def test_a_layer_is_one_gather_each_way(cases, how):
    # beside layers: the embedding once each way, the last norm and the head in forward and in backward
    others = 6
    for found in cases["a_gather_for_each"]:
        assert_alike(found[f"leaf {how}"], found[f"stock {how}"])
        micro_steps = 2
        assert set(found[f"leaf {how}"]["gathers"]) == {micro_steps * (2 * LAYERS + others)}
        # nine modules of a layer have weights
        assert min(found[f"stock {how}"]["gathers"]) >= micro_steps * (2 * LAYERS * 9 + others)


@pytest.mark.parametrize("model", MODELS)
def test_restore_makes_no_leaf_module_stay(cases, model):
    for found in cases[model]:
        assert found["leaf"]["leafs after restore"] == 0


def test_restore_after_the_engine_is_gone_hooks_nothing(cases):
    for found in cases["restored_late"]:
        assert found["hooks"][0] > 0 and found["hooks"][1] == 0 and found["leafs"] == 0


def test_leaf_modules_without_an_optimizer(cases):
    for found in cases["only_inference"]:
        assert (found["stock"]["leafs"], found["leaf"]["leafs"]) == (0, LAYERS)
        assert found["leaf"]["losses"] == found["stock"]["losses"]


def test_small_sizes_took_effect(cases):
    layer = 7744  # parameters
    for found in cases["plain"]:
        sizes = found["small"]["sizes"]
        assert sizes == {
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_reuse_distance": 2 * layer,
            "stage3_max_live_parameters": 3 * layer,
            "reduce_bucket_size": layer // 8,
            "bucket": layer // 8,
            "sub_group_size": 10_000_000,
        }
        # and without the key they are DeepSpeed's
        assert found["leaf"]["sizes"]["reduce_bucket_size"] == 500_000_000


def test_large_sizes_took_effect(cases):
    for found in cases["plain"]:
        sizes = found["large"]["sizes"]
        assert sizes["bucket"] == sizes["reduce_bucket_size"] == 7744
        assert sizes["stage3_max_live_parameters"] == 1_050_007_744


def test_what_the_json_gives_stays(cases):
    for found in cases["given"]:
        sizes = found["small"]["sizes"]
        assert (sizes["stage3_prefetch_bucket_size"], sizes["stage3_max_reuse_distance"]) == (777, 888)
        assert (sizes["reduce_bucket_size"], sizes["sub_group_size"]) == (9999, 10_000_000)
        assert (
            "as the JSON gives them: stage3_prefetch_bucket_size, stage3_max_reuse_distance, reduce_bucket_size"
            in found["small"]["report"]
        )


def test_leaf_modules_of_the_user_stay(cases):
    for found in cases["leafs_of_the_user"]:
        assert found["script"]["leafs"] == ["model.layers.0.mlp"]
        assert found["script"]["left"] == ["leaf_modules: leaf modules are set on the model already"]
        assert found["json"]["leafs"] == ["model.layers.1.mlp"]
        assert found["json"]["left"] == ["leaf_modules: the JSON's zero_optimization says leaf_module"]


@pytest.mark.parametrize("case", models("tiled_inside", "fused", "some_kept", "experts"))
def test_leaf_modules_with_others_inside_or_beside_them(cases, case):
    for found in cases[case]:
        assert_alike(found["leaf"], found["stock"])
        assert found["leaf"]["left"] == []
        assert sum(name.endswith((".0", ".1")) for name in found["leaf"]["leafs"]) == LAYERS


def test_a_large_layer_is_left(cases):
    for found in cases["experts"]:
        assert found["too large"]["weights"] == found["stock"]["weights"]
        (left,) = found["too large"]["left"]
        assert left.startswith("MixtralDecoderLayer: leaf_modules: its ")


def test_of_leaf_modules_the_next_is_on_its_way_as_a_whole(cases):
    for found in cases["whole_ahead"]:
        whole, part = found["whole"], found["part"]
        assert whole["said"] == part["said"]
        assert whole["sizes"]["stage3_prefetch_bucket_size"] == 7744 - 7744 // 16
        assert part["sizes"]["stage3_prefetch_bucket_size"] == 2000
        # once DeepSpeed knows the order, a layer that is not all on its way comes in two gathers
        assert whole["gathers"][-1] < part["gathers"][-1]


def test_rotary_frequencies_that_zero_init_has_rounded(cases):
    for found in cases["frequencies"]:
        # as stock, unless they are asked for in fp32: then as a model that zero.Init has not made
        assert_alike(found["stock by us"], found["stock"])
        assert_alike(found["fp32 by us"], found["whole"])
        assert found["stock"]["said"] != found["whole"]["said"]
        (left,) = [line for line in found["stock by us"]["left"] if "frequencies" in line]
        assert left.startswith("LlamaRotaryEmbedding: rotary_frequencies: its frequencies are in bfloat16, as ")
        assert "-> the same, with its frequencies in fp32" in found["fp32 by us"]["report"]


def test_profiles(cases):
    for found in cases["profiles"]:
        for way in ("auto", "fit", "fast", "small", "explicit"):
            assert_alike(found[way], found["stock"])
        # a CPU's memory has no limit here
        assert found["auto"]["sizes"] == found["fast"]["sizes"] and found["auto"]["leafs"] == found["fast"]["leafs"]
        for way in ("auto", "fit"):
            assert f'profile "{way}": "fast", ' in found[way]["report"]
        assert 'profile "small"; it sets leaf_modules = true, zero_sizes = "small", ' in found["small"]["report"]
        assert "inputs, and what is kept of attention, wait in the host's memory" in found["small"]["report"]
        assert found["small"]["sizes"]["reduce_bucket_size"] == 7744 // 8
        assert found["small"]["sizes"]["stage3_prefetch_bucket_size"] == 7744 - 7744 // 16
        # tiled MLPs too, which are inside
        assert found["fast"]["leafs"] and {*found["fast"]["leafs"]} < {*found["small"]["leafs"]}
        assert found["explicit"]["sizes"]["reduce_bucket_size"] == 500_000_000
        assert "its weight in 2 slabs" not in found["explicit"]["report"]


def test_ranks_with_different_profiles(cases):
    for found in cases["other_profile_on_one"]:
        assert "rank 1 has decisions.config.profile = 'fast', rank 0 has 'auto'" in found["error here"]
