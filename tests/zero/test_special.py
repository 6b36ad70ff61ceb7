"""Models and uses beside the plain case, fused against stock on two ranks.

test_NAME judges what the case NAME of special_ranks.py returned. All of them run in one pair of processes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import products
import pytest
from launching import PATIENCE, launch
from options import OPTIONS

from ds_fused.engine.zero3.windows import TURNS

HERE = Path(__file__).parent
RANKS = products.RANKS["cpu"]
LAYERS = products.SIZES["num_hidden_layers"]

# cases of mode "stream" that are run with copy engines, too, in either mode
COPIED = (
    "communication_dtype",
    "accumulation_dtype",
    "frozen_trunk",
    "frozen_head",
    "uneven_ranks",
    "autocast",
    "offload",
    "checkpointing",
    "evaluation_and_saving",
    "bias",
    "own_loss",
    "tied_offload",
    "thrown_away",
)
# these and others in the other mode, and two of its own
STATIONARY = (
    *COPIED,
    "unfrozen",
    "gemma",
    "smoothed",
    "embedding",
    "direct_backward",
    "sharded_bias",
    "weighted_ranks",
    "both_ways",
    "memory",
    "measured",
)
# other steps than forward, backward, step, with heads of several kinds
STEPS = (
    "coalesced",
    "callers_accumulation",
    "direct_backward_accumulating",
    "evaluation_in_an_accumulation",
    "universal_checkpoint",
    "checkpointed_head",
    "generating",
    "offload_accumulating",
)

# those in mode "auto" where it has the whole weight gathered
GATHERED = (
    "evaluation_and_saving",
    "tied_offload",
    "sharded_bias",
    "frozen_head",
    "checkpointing",
    "own_loss",
    "measured",
    "smoothed",
    "thrown_away",
)
GATHERED_STEPS = ("checkpointed_head", "callers_accumulation", "evaluation_in_an_accumulation", "universal_checkpoint")

CASES = (
    "lora",
    "lora_zero3",
    "lora_on_the_head",
    "experts",
    "instance_forward",
    "instance_forward_of_the_model",
    "grad_in_forward",
    "residual",
    "qk_norm",
    "logits_read_by_all",
    "logits_kept",
    "ranks_decide_differently",
    "one_rank_proves_a_difference",
    "one_rank_misspells",
    "logits_read_by_one",
    "stream_frozen_trunk",
    "stream_frozen_head",
    "stream_unfrozen",
    "stream_uneven_ranks",
    "stream_embedding",
    "stream_logits_kept",
    "stream_gradient_to_logits",
    "stream_logits_read",
    "stream_logits_read_by_one",
    "stream_communication_dtype",
    "stream_accumulation_dtype",
    "stream_autocast",
    "stream_offload",
    "stream_tied_offload",
    "stream_direct_backward",
    "stream_checkpointing",
    "stream_evaluation_and_saving",
    "stream_bias",
    "stream_sharded_bias",
    "stream_sharded_bias_of_a_frozen_head",
    "stream_frozen_sharded_bias",
    "stream_gemma",
    "stream_own_loss",
    "stream_measured",
    "stream_smoothed",
    "stream_thrown_away",
    *(f"stream_{name}" for name in STEPS),
    "stream_no_sync",
    "stream_predivided",
    "stream_saved_weights",
    "stream_memory",
    "stream_lora_on_the_head",
    "stream_another_deepspeed",
    "stream_tables",
    "stream_computed_since",
    "stream_muon",
    "stream_is_no_use",
    "stream_without_copy_engines",
    "copied_auto_stream",
    "copied_auto_stationary",
    "destroyed",
    "profiled",
    "second_engine",
    "second_engine_over_a_copy",
    "copied_models",
    "whole_weights",
    "two_forwards",
    "weight_hooks",
    "padded_logits",
    "logits_after_a_step",
    "masked",
    *(f"{how}_{name}" for how in ("copied", "carried") for name in (*COPIED, *STEPS)),
    *(f"stationary_{name}" for name in (*STATIONARY, *STEPS)),
    "stationary_class_weights",
    "stationary_entropies",
    *(f"gathered_{name}" for name in (*GATHERED, *GATHERED_STEPS)),
    *(f"option_{name}" for name in OPTIONS),
    "forced",
    "auto",
    "stream_expert_parallel",
    # last: DeepSpeed keeps the mesh of the first engine that splits layers
    "tensor_parallel",
    "stream_tensor_parallel",
)


def skipped(item: pytest.Item) -> bool:
    return item.get_closest_marker("skip") is not None


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """case -> what it returned, on each rank. Only what this session selected is launched."""
    # test_stream[offload] is of the case stream_offload
    items = [item for item in request.session.items if item.module is request.module]
    chosen_names = (item.name.removeprefix("test_") for item in items if not skipped(item))
    wanted = {re.sub("_of_each_kind|_in_each_dtype", "", name).replace("[", "_").rstrip("]") for name in chosen_names}
    chosen = [name for name in CASES if name in wanted]
    out = tmp_path_factory.mktemp("special")
    launch(HERE / "special_ranks.py", str(out), *chosen, ranks=RANKS, timeout=PATIENCE + 15 * len(chosen))

    def ended_of(name: str) -> list[dict]:
        ranks = [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in range(RANKS)]
        for rank, result in enumerate(ranks):
            assert "error" not in result, f"rank {rank}:\n{result['error']}"
        return ranks

    return ended_of


@pytest.fixture
def ranks(request: pytest.FixtureRequest, ended) -> list[dict]:
    """What this test's case returned on each rank."""
    return ended(request.node.name.removeprefix("test_"))


IN_BF16 = ("communication_dtype", "accumulation_dtype", "autocast")
# cases whose embedding is looked up without being whole
LOOKED_UP = ("embedding", "gemma", "own_loss", "tied_offload", "unfrozen")


def equal_losses(ranks: list[dict]) -> None:
    """Four steps at a large learning rate with clipping: what is wrong in a gradient shows in the second loss."""
    for result in ranks:
        # fp32, summed in another order
        assert result["fused"] == pytest.approx(result["stock"], rel=1e-5)


def test_lora(ranks):
    equal_losses(ranks)
    assert ranks[0]["replaced"] == {
        "rms_norm": 2 * LAYERS + 1,
        "rope": LAYERS,
        "lora": 4 * LAYERS,
        "swiglu": LAYERS,
        "fused_linear_cross_entropy": 1,
        "cross_entropy": 1,
    }


def test_lora_zero3(ranks):
    for gathered in ("alone", "layers"):
        found = [rank[gathered] for rank in ranks]
        equal_losses(found)
        assert found[0]["replaced"]["fused_linear_cross_entropy"] == 1
        # in every step, so their weights and their adapters' are there; and for the proof
        assert found[0]["nodes"] >= len(found[0]["fused"]) * 4 * LAYERS, gathered


def test_lora_on_the_head(ranks):
    equal_losses(ranks)
    assert "fused_linear_cross_entropy" not in ranks[0]["replaced"]
    assert any("head" in line and "PEFT" in line for line in ranks[0]["left"]), ranks[0]["left"]


def test_experts(ranks):
    for result in ranks:
        for implementation, each in result.items():
            equal_losses([each])
            assert each["replaced"]["experts" if implementation == "whole" else "swiglu"] == LAYERS, implementation


def test_instance_forward(ranks):
    equal_losses(ranks)
    assert ranks[0]["replaced"]["swiglu"] == LAYERS - 1
    assert any("forward" in line for line in ranks[0]["left"]), ranks[0]["left"]


def test_instance_forward_of_the_model(ranks):
    equal_losses(ranks)


def test_grad_in_forward(ranks):
    equal_losses(ranks)
    assert ranks[0]["replaced"]["fused_linear_cross_entropy"] == 1


def test_residual(ranks):
    equal_losses(ranks)
    for result in ranks:
        assert result["replaced"]["add_rms_norm"] == LAYERS
        # once in each step, and twice where the layer is computed again
        assert result["sums"] == 3 * LAYERS * products.FEW_STEPS


def test_qk_norm(ranks):
    equal_losses(ranks)
    for result in ranks:
        assert result["replaced"]["qk_norm_rope"] == LAYERS
        assert result["calls"] == 3 * LAYERS * products.FEW_STEPS


def test_tensor_parallel(ranks):
    equal_losses(ranks)
    assert ranks[0]["replaced"]["rms_norm"] == 2 * LAYERS + 1
    assert ranks[0]["replaced"]["swiglu"] == LAYERS


def test_logits_read_by_all(ranks):
    equal_losses(ranks)
    for result in ranks:
        assert not result["errors"]
        assert result["logits"]["fused"] == pytest.approx(result["logits"]["stock"], rel=1e-5)


def test_logits_kept(ranks):
    equal_losses(ranks)
    assert not ranks[1]["errors"]
    assert len(ranks[1]["logits"]["fused"]) == products.FEW_STEPS
    assert ranks[1]["logits"]["fused"] == pytest.approx(ranks[1]["logits"]["stock"], rel=1e-5)


def test_logits_read_by_one(ranks):
    # the reader caught the error, and training went on to the right losses
    equal_losses(ranks)
    assert not ranks[0]["errors"]
    ((kind, message, seconds),) = ranks[1]["errors"]
    assert kind == "RuntimeError"
    assert '"logits": "keep"' in message
    assert "1 of 2 ranks" in message
    # its patience is one second, the group's five minutes
    assert seconds < 30
    # from the second step on ZeRO knows that backward begins with the head and keeps its weight: no need of others
    first, *later = ranks[1]["logits"]["fused"]
    assert first is None
    assert later == pytest.approx(ranks[1]["logits"]["stock"][1:], rel=1e-5)


def test_ranks_decide_differently(ranks):
    for result in ranks:
        kind, message = result["refused"]
        assert kind == "RuntimeError"
        assert "rank 1" in message
        assert "rope" in message
        assert result["stock_again"]


def test_one_rank_proves_a_difference(ranks):
    for result in ranks:
        kind, message = result["refused"]
        assert kind == "RuntimeError"
        assert "rank 1 has" in message and "rank 0 has True" in message
        assert "LlamaRMSNorm: none of 6 known forms fits; of the first, its output differs by 1.0e+00" in message
        assert result["stock_again"]


def test_one_rank_misspells(ranks):
    (first, first_message), (second, second_message) = ranks[0]["refused"], ranks[1]["refused"]
    assert second == "ValueError"
    assert "ropes" in second_message
    assert first == "RuntimeError"
    assert "rank 1" in first_message
    assert "ropes" in first_message
    assert ranks[0]["stock_again"]
    assert ranks[1]["stock_again"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("frozen_trunk", marks=pytest.mark.all),
        "frozen_head",
        "unfrozen",
        "uneven_ranks",
        "embedding",
        "logits_kept",
        pytest.param("communication_dtype", marks=pytest.mark.all),
        pytest.param("accumulation_dtype", marks=pytest.mark.all),
        "autocast",
        "offload",
        pytest.param("tied_offload", marks=pytest.mark.all),
        "direct_backward",
        "checkpointing",
        "evaluation_and_saving",
        pytest.param("bias", marks=pytest.mark.all),
        "sharded_bias",
        pytest.param("sharded_bias_of_a_frozen_head", marks=pytest.mark.all),
        pytest.param("frozen_sharded_bias", marks=pytest.mark.all),
        pytest.param("thrown_away", marks=pytest.mark.all),
        pytest.param("gemma", marks=pytest.mark.all),
        "own_loss",
        "measured",
        pytest.param("smoothed", marks=pytest.mark.all),
        pytest.param("expert_parallel", marks=pytest.mark.all),
    ],
)
def test_stream(ended, name):
    ranks = ended(f"stream_{name}")
    for result in ranks:
        assert "its weight in 34 slabs" in result["report"]
        assert ("embedding; its weight in 34 slabs" in result["report"]) == (name in LOOKED_UP)
        # half an ulp of bf16, in which the products are rounded
        assert result["fused"] == pytest.approx(result["stock"], rel=4e-3 if name in IN_BF16 else 1e-5)
        # what is compared has learned something
        assert result["fused"][0] != result["fused"][3]


# where it is not the weight's own dtype
GRADIENT_IN = {"communication_dtype": ["float32"], "autocast": ["bfloat16"]}
QUICK_COPIED = ("communication_dtype", "thrown_away")
QUICK = ("uneven_ranks", "gemma", "weighted_ranks", "both_ways", "measured")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.all) for n in STATIONARY if n != "memory"],
)
def test_stationary(ended, name):
    for result in ended(f"stationary_{name}"):
        assert "its rows stay on 2 ranks, to which the tokens travel" in result["report"]
        assert result["fused"] == pytest.approx(result["stock"], rel=4e-3 if name in IN_BF16 else 1e-5)
        assert result["fused"][0] != result["fused"][3]
        # 33 * 2 is less than the 67 words
        stays = "embedding; its rows stay on 2 ranks up to 33 tokens a rank, its weight in 34 slabs of at most "
        assert (stays in result["report"]) == (name in (*LOOKED_UP, "both_ways"))
        lookups = {"both_ways": [24] * 4} | dict.fromkeys(LOOKED_UP, [24] * products.FEW_STEPS)
        # for the encoder and for the decoder
        lookups["own_loss"] = [24] * 2 * products.FEW_STEPS
        assert result.get("lookups", []) == lookups.get(name, [])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK_COPIED else pytest.mark.all) for n in COPIED])
def test_copied(ended, name):
    for result in ended(f"copied_{name}"):
        (rest,) = re.findall(
            r"its weight in 34 slabs of at most \S+ MiB over 2 ranks, by copy engines(.*)", result["report"]
        )
        assert re.findall(r", but for its gradient, which travels in torch\.(\w+)", rest) == GRADIENT_IN.get(name, [])
        assert result["fused"] == pytest.approx(result["stock"], rel=4e-3 if name in IN_BF16 else 1e-5)
        assert result["fused"][0] != result["fused"][3]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK_COPIED else pytest.mark.all) for n in COPIED])
def test_carried(ended, name):
    for result in ended(f"carried_{name}"):
        assert "its rows stay on 2 ranks, to which the tokens travel by copy engines" in result["report"]
        assert result["fused"] == pytest.approx(result["stock"], rel=4e-3 if name in IN_BF16 else 1e-5)
        assert result["fused"][0] != result["fused"][3]


@pytest.mark.parametrize("mode", ["stream", "stationary"])
def test_copied_auto(ended, mode):
    found = set()
    for result in ended(f"copied_auto_{mode}"):
        assert result["fused"]["losses"] == pytest.approx(result["stock"]["losses"], rel=1e-5)
        before, after = result["fused"]["windows"]
        assert "stream (34 slabs by copy engines, " in result["fused"]["report"]
        assert f" tokens a rank: {mode} (" in result["fused"]["report"]
        # what was measured keeps no memory, what is chosen has it counted
        assert before == 0 and after > 0
        found.add(after)
    assert len(found) == 1


def test_destroyed(ranks):
    """Communicators and windows go with their engine, and where it is garbage once no rank has it."""
    for result in ranks:
        assert all(losses == result["losses"][0] for losses in result["losses"])
        assert len(result["windows"]) == 2 * TURNS + 1 and all(result["windows"])
        assert result["there"] == [[0], [], [1, 2], [3], []]
        assert result["wrapped"] == [[True, True], [False, False]]


QUICK_OPTIONS = ("overlap_comm_3", "flops_profiler")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_OPTIONS else pytest.mark.all) for n in OPTIONS]
)
def test_option(ended, name):
    is_bf16 = "bf16" in OPTIONS[name]
    for result in ended(f"option_{name}"):
        stock = result.pop("stock")
        assert result.keys() == {"default", "small", "stream"}
        for block, losses in result.items():
            # half an ulp of bf16, in which the products are rounded
            assert losses == pytest.approx(stock, rel=4e-3 if is_bf16 else 1e-5), block
        assert stock[0] != stock[3]


def test_profiled(ranks):
    head = products.ROWS * products.LENGTH * products.SIZES["vocab_size"] * products.SIZES["hidden_size"]
    assert ranks == [dict.fromkeys(("stream", "stationary", "gather"), head)] * RANKS


def test_second_engine(ranks):
    """It trains what a model's first engine had fused, whichever the blocks of the two are, as stock's does."""
    for result in ranks:
        for name, pairs in result.items():
            for pair, found in pairs.items():
                assert found["losses"] == pytest.approx(pairs["stock"]["losses"], rel=1e-5), (name, pair)
                assert found["moved"] == pytest.approx(pairs["stock"]["moved"], rel=1e-3), (name, pair)
                # a destroyed engine takes all of itself along
                assert not found["left"] and not found["claims"], (name, pair)


def test_second_engine_over_a_copy(ranks):
    for result in ranks:
        for name, pairs in result.items():
            for pair, found in pairs.items():
                assert found["numbers"] == pytest.approx(pairs["stock"]["numbers"], rel=1e-5), (name, pair)
                assert found["is_stock"], (name, pair)
            # all of it, as of a model that is no copy
            assert pairs["twice"]["replaced"]["swiglu"] == LAYERS and not pairs["twice"]["left"], name
            assert pairs["then stream"]["replaced"]["fused_linear_cross_entropy"] == 1, name


def test_copied_models(ranks):
    """They compute as stock's, fused as the model that they were copied from, and can be restored."""
    for result in ranks:
        for model, runs in result.items():
            for name, found in runs.items():
                assert found["numbers"] == pytest.approx(runs["stock"]["numbers"], rel=1e-5), (model, name)
                assert (found["n_fused"] > 0) == (name != "stock"), (model, name)
                assert found["is_stock"] and not found["left"], (model, name)


def test_whole_weights(ranks):
    for result in ranks:
        for model, found in result.items():
            for name, numbers in found.items():
                assert numbers == pytest.approx(found["stock"], rel=1e-5), (model, name)


def test_weight_hooks(ranks):
    """Hooks on the head's gradient have it gathered; those that come too late for that are an error, not lost."""
    for result in ranks:
        for name, found in result.items():
            ours, stock = found["ours"], found["stock"]
            if name.endswith("after") and "gather" not in name:
                assert "lm_head.weight" in ours["error"] or "embed_tokens.weight" in ours["error"], name
                assert "was given hooks on its gradient after deepspeed.initialize" in ours["error"], name
            else:
                assert ours["calls"] == stock["calls"] > 0, name
                assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5), name
                assert ours["moved"] == pytest.approx(stock["moved"], rel=1e-3), name


def test_padded_logits(ranks):
    for result in ranks:
        for name, numbers in result.items():
            assert numbers == pytest.approx(result["stock"], rel=1e-5), name


def test_logits_after_a_step(ranks):
    for result in ranks:
        assert result == {"gather": [0, 1], "stream": [0, 1]}


def test_masked(ranks):
    for result in ranks:
        for name, found in result.items():
            equal_losses([found])
            assert found["replaced"]["fused_linear_cross_entropy"] == 1, name


def test_two_forwards(ranks):
    for result in ranks:
        for found in result.values():
            equal_losses([found])


def test_stream_without_copy_engines(ranks):
    equal_losses(ranks)
    for result in ranks:
        (line,) = (line for line in result["left"] if line.startswith("copy engines for head lm_head: "))
        assert line.endswith("collectives move its slabs, since they are NCCL's, for NVIDIA's GPUs")
        assert "by copy engines" not in result["report"]


@pytest.mark.parametrize("name", [pytest.param("class_weights", marks=pytest.mark.all), "entropies"])
def test_stationary_in_each_dtype(ended, name):
    for result in ended(f"stationary_{name}"):
        assert result.keys() == {"fp32", "bf16"}
        for dtype, row in result.items():
            # half an ulp
            assert row["fused"] == pytest.approx(row["stock"], rel=4e-3 if dtype == "bf16" else 1e-5), dtype
            assert row["fused"][0] != row["fused"][3]
            if name == "class_weights":
                assert "its rows stay on 2 ranks, to which the tokens travel" in row["report"]


def test_stationary_memory(ranks):
    # of each kind two steps and the evaluation
    assert all(result["lookups"] == [40] * 2 * 3 for result in ranks)
    # behind its part of the gradient a rank has room for what is the next one's of a row
    nothing_whole(ranks, beside=products.SIZES["hidden_size"])


def test_auto(ranks):
    chosen = set()
    for result in ranks:
        assert result["fused"]["losses"] == pytest.approx(result["stock"]["losses"], rel=1e-5)
        assert 'mode "auto": stationary up to ' in result["report"]
        (line,) = (
            line for line in result["fused"]["report"].splitlines() if 'mode "auto" at 24 tokens a rank: ' in line
        )
        for words in (
            "stream (",
            "stationary (",
            " blocks, ",
            " MiB held, ",
            " MiB on the wire, ",
            " ms)",
            " rather than ",
        ):
            assert words in line
        chosen.add(line.partition("a rank: ")[2].partition(" ")[0])
    assert len(chosen) == 1


@pytest.mark.all
@pytest.mark.parametrize("name", STEPS)
def test_stream_of_each_kind(ended, name):
    equal_of_each_kind(ended(f"stream_{name}"), "its weight in 34 slabs")


QUICK_GATHERED = ("evaluation_and_saving", "measured", "smoothed")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_GATHERED else pytest.mark.all) for n in GATHERED]
)
def test_gathered(ended, name):
    for result in ended(f"gathered_{name}"):
        assert result["fused"] == pytest.approx(result["stock"], rel=1e-5)
        assert result["fused"][0] != result["fused"][3]
        # outside of the forward no hook gathers
        assert result["chosen"][-1] == ("stationary" if name == "smoothed" else "gather")


@pytest.mark.all
@pytest.mark.parametrize("name", GATHERED_STEPS)
def test_gathered_of_each_kind(ended, name):
    for result in ended(f"gathered_{name}"):
        assert set(result.pop("chosen")) == {"gather"}
        assert result.keys() >= {"untied", "tied"}
        for kind, row in result.items():
            assert row["fused"] == pytest.approx(row["stock"], rel=1e-5), kind
            assert row["fused"][0] != row["fused"][3], kind


def test_forced(ranks):
    """Each mode that is asked for tells its figures, as "auto" does those of what it chose."""
    for result in ranks:
        assert result.keys() == {"stream", "stationary", "gather"}
        for mode, (before, after) in result.items():
            figures = r"\(\d+ \w+, \S+ MiB held, \S+ MiB on the wire, \S+ ms\)"
            told = rf'; mode "{mode}" at 24 tokens of this rank: {mode} {figures}'
            assert after.startswith(before) and re.fullmatch(told, after.removeprefix(before)), after
        assert result["gather"][0].endswith("; its weight is gathered whole")


@pytest.mark.all
@pytest.mark.parametrize("name", STEPS)
def test_stationary_of_each_kind(ended, name):
    equal_of_each_kind(ended(f"stationary_{name}"), "its rows stay on 2 ranks, to which the tokens travel")


@pytest.mark.all
@pytest.mark.parametrize("name", STEPS)
def test_copied_of_each_kind(ended, name):
    equal_of_each_kind(ended(f"copied_{name}"), "over 2 ranks, by copy engines")


@pytest.mark.all
@pytest.mark.parametrize("name", STEPS)
def test_carried_of_each_kind(ended, name):
    equal_of_each_kind(ended(f"carried_{name}"), "to which the tokens travel by copy engines")


def equal_of_each_kind(ranks: list[dict], way: str) -> None:
    for result in ranks:
        assert result.keys() >= {"untied", "tied"}
        for kind, row in [pair for pair in result.items() if pair[0] != "lookups"]:
            assert way in row["report"], kind
            assert row["fused"] == pytest.approx(row["stock"], rel=1e-5), kind
            assert row["fused"][0] != row["fused"][3], kind


@pytest.mark.all
def test_stream_no_sync(ranks):
    for result in ranks:
        assert "no_sync context manager is incompatible" in result["stock"]
        assert result["fused"] == result["stock"]


@pytest.mark.all
def test_stream_saved_weights(ranks):
    for result in ranks:
        for kind, row in result.items():
            stock, fused = row["stock"], row["fused"]
            assert fused["own"] and stock["own"], kind
            assert fused["dtypes"] == stock["dtypes"] == ["torch.bfloat16" if kind == "bf16" else "torch.float32"]
            assert fused["weights"].keys() == stock["weights"].keys()
            for name, w in fused["weights"].items():
                # fp32, summed in another order; half an ulp of bf16, in which gradients of at most CLIP are rounded
                off = {"rel": 2**-8, "abs": 2**-8 * products.CLIP} if kind == "bf16" else {"rel": 1e-5, "abs": 1e-6}
                assert w == pytest.approx(stock["weights"][name], **off), (kind, name)


@pytest.mark.all
def test_stream_predivided(ranks):
    """ZeRO-3 has no such factor where it scatters gradients, with and without ds_fused."""
    for result in ranks:
        assert "gradient_predivide_factor != 1.0 is not yet supported with ZeRO-3" in result["stock"]
        assert result["fused"] == result["stock"]


def test_stream_gradient_to_logits(ranks):
    for result in ranks:
        assert '"logits": "keep"' in result["raised"]


def test_stream_logits_read(ranks):
    equal_losses(ranks)
    for result in ranks:
        assert not result["errors"]
        assert result["logits"]["fused"] == pytest.approx(result["logits"]["stock"], rel=1e-5)


def test_stream_logits_read_by_one(ranks):
    equal_losses(ranks)
    assert not ranks[0]["errors"]
    # in slabs the weight is never whole, so every read alone is refused
    assert len(ranks[1]["errors"]) == products.FEW_STEPS
    for kind, message, _ in ranks[1]["errors"]:
        assert kind == "RuntimeError"
        assert '"logits": "keep"' in message and "1 of 2 ranks" in message


def test_stream_memory(ranks):
    nothing_whole(ranks)


def nothing_whole(ranks: list[dict], beside: int = 0) -> None:
    """Two ranks: a rank's part of the table and of its gradient is there, and nothing as large as the whole."""
    for result in ranks:
        for kind in ("tied", "untied"):
            stock, fused = result[kind]["stock"], result[kind]["fused"]
            assert fused["losses"] == pytest.approx(stock["losses"], rel=1e-5), kind
            assert min(stock["largest"]) >= max(result["table"], result["logits"]), kind
            assert max(fused["largest"]) <= -(-result["table"] // 2) + beside, (kind, result)


@pytest.mark.parametrize(
    ("mode", "n_ranks"),
    [
        ("stream", 2),
        pytest.param("stream", 4, marks=pytest.mark.all),
        pytest.param("stationary", 3, marks=pytest.mark.all),
    ],
)
def test_a_rank_that_dies_among_its_slabs_ends_the_job(mode, n_ranks):
    ended = launch(HERE / "dying_rank.py", mode, ranks=n_ranks, expect_success=False)
    assert ended.pop(1).status == 17
    for left in ended:
        # those that are left say what happened, and don't wait for ever
        assert left.status not in (0, -9), left.output
        assert "RuntimeError" in left.output or "DistBackendError" in left.output, left.output


GATHERED = 'head lm_head: mode "stream": its weight is gathered whole, since '


def why_gathered(lines: list[str]) -> str:
    (line,) = (line for line in lines if line.startswith(GATHERED))
    return line.removeprefix(GATHERED)


# engine after engine; tests/engine/test_slab_mode.py has each reason by itself
@pytest.mark.all
def test_stream_is_no_use(ranks):
    words = {
        "persistent": "stage3_param_persistence_threshold",
        "stage": "ZeRO stage 2 shards no weights",
        "reduce": "reduce_scatter is off",
        "predivided": "reduce_scatter is off",
        "leaf": "ZeRO-3 leaf module",
        "deepcompile": "DeepCompile arranges the gathering",
        "quantized gradients": "(zero_quantized_gradients)",
        "hpz": "(zero_hpz_partition_size)",
    }
    for result in ranks:
        assert result.keys() == words.keys()
        for name, row in result.items():
            assert words[name] in why_gathered(row["left"]), name
            assert row["replaced"]["fused_linear_cross_entropy"] == 1, name
            assert row["fused"] == pytest.approx(row["stock"], rel=1e-5), name
            assert row["fused"][0] != row["fused"][1], name


def test_stream_tables(ranks):
    words = {
        "pruned": "its weight is computed from other parameters",
        "spectral": "it is a ParametrizedEmbedding",
        "sparse": "sparse gradients",
    }
    for result in ranks:
        assert result.keys() == words.keys()
        for name, row in result.items():
            (line,) = (line for line in row["left"] if line.startswith("embedding "))
            assert words[name] in line, name
            assert row["fused"] == pytest.approx(row["stock"], rel=1e-5), name
        assert why_gathered(result["sparse"]["left"]).startswith("sparse gradients come to it from model.embed_tokens")


def test_stream_computed_since(ranks):
    for result in ranks:
        assert len(result) == 4
        for name, row in result.items():
            assert row["fused"] == pytest.approx(row["stock"], rel=1e-5), name
            assert row["replaced"]["embedding"] == 1, name


# torch compiles the kernels of Muon: 20 s
@pytest.mark.all
def test_stream_muon(ranks):
    equal_losses(ranks)
    for result in ranks:
        assert why_gathered(result["left"]) == "Muon wants whole gradients"


@pytest.mark.all
def test_stream_lora_on_the_head(ranks):
    equal_losses(ranks)
    for result in ranks:
        # no claim of that head at all, so nothing to gather
        (line,) = (line for line in result["left"] if "head" in line)
        assert "PEFT" in line


@pytest.mark.all
def test_stream_tensor_parallel(ranks):
    equal_losses(ranks)
    for result in ranks:
        (line,) = (line for line in result["left"] if line.startswith("head"))
        assert "it is a deepspeed.module_inject.layers.LinearLayer, no plain Linear" in line


@pytest.mark.all
def test_stream_another_deepspeed(ranks):
    for result in ranks:
        stock = result.pop("stock")
        for name, words in (
            ("one rank", "partition_grads does not keep what it is given (on rank 1 of 2)"),
            ("arguments", "partition_grads takes something else than parameters and their parts of gradients"),
            ("name", "its ZeRO-3 optimizer has no get_param_comm_dtype"),
        ):
            row = result.pop(name)
            why = why_gathered(row["left"])
            assert why.startswith("DeepSpeed ") and why.endswith(words), why
            assert row["losses"] == pytest.approx(stock, rel=1e-5)
        assert not result
