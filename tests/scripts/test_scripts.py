"""Real scripts that never heard of ds_fused, on two CPU ranks: with the flag on they compute what they do with it off.

{script} x {ZeRO 0, 3} x {flag on, off} x {`deepspeed --config`, `torchrun`}. The same files run under both launchers;
torchrun gives them the DeepSpeed JSON in the way each kind of script has for that.
"""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import material
import pytest
from launching import REPO, free_port, start

USERS = Path(__file__).parent / "users"
# script -> what it has to measure
SCRIPTS = {
    "plain_labels": {"losses", "held_out"},
    "plain_logits": {"losses", "accuracies"},
    "accelerate_loop": {"losses", "right"},
    "hf_trainer": {"losses", "eval_losses", "accuracies", "logits_sizes"},
    "trl_sft": {"losses", "eval_losses", "accuracies", "entropies"},
}
STAGES = (0, 3)
# of the quick subset; a plain loop that is given labels is launch/train.py, and a trainer of TRL's is a Trainer with
# what test_trl.py compares: they have quick tests of their own
QUICK_STAGES = {"plain_logits": 0, "accelerate_loop": 3, "hf_trainer": 3}
LAUNCHERS = ("deepspeed", "torchrun")

TRAINING = {
    "--max_steps": 4,
    "--per_device_train_batch_size": 2,
    "--per_device_eval_batch_size": 2,
    "--gradient_accumulation_steps": 2,
    "--learning_rate": 1e-2,
    "--logging_steps": 1,
    "--eval_strategy": "steps",
    "--eval_steps": 2,
    "--save_strategy": "no",
    "--report_to": "none",
    "--disable_tqdm": "true",
    # without a GPU, the Trainer starts DeepSpeed's process group only when it is told which
    "--ddp_backend": "gloo",
}


def launchers_of(script: str, stage: int) -> str:
    """They take turns, so that each script meets both, one under each stage."""
    return LAUNCHERS[(list(SCRIPTS).index(script) + STAGES.index(stage)) % 2]


def is_quick(script: str, stage: int, launcher: str) -> bool:
    return stage == QUICK_STAGES.get(script) and launcher == launchers_of(script, stage)


each = pytest.mark.parametrize(
    ("script", "stage", "launcher"),
    [
        pytest.param(
            script,
            stage,
            launcher,
            id=f"{script}-zero{stage}-{launcher}",
            marks=[] if is_quick(script, stage, launcher) else [pytest.mark.all],
        )
        for script in SCRIPTS
        for stage in STAGES
        for launcher in LAUNCHERS
    ],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """run(script, stage, launcher) -> (measured, printed) with the flag off, and with it on. Each is started once."""
    folder = tmp_path_factory.mktemp("scripts")
    material.make(str(folder / "model"))

    def config_of(stage: int, fused: bool, mode: str) -> Path:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "ds_fused": {"enabled": fused, "fused_linear_cross_entropy": {"mode": mode, "slab_mb": 0}},
        }
        file = folder / f"zero{stage}_{mode if fused else 'stock'}.json"
        file.write_text(json.dumps(config))
        return file

    def arguments_of(script: str, out: Path) -> list[str]:
        models = {"hf_trainer": "--model", **dict.fromkeys(("trl_sft", "fused_sft"), "--model_name_or_path")}
        if script not in models:
            return []
        model = models[script]
        more = {model: folder / "model", "--output_dir": out} | TRAINING
        if script in ("trl_sft", "fused_sft"):
            # SFTConfig's default is bf16, which without a GPU is refused
            more["--bf16"] = "false"
        return [str(word) for pair in more.items() for word in pair]

    @cache
    def once(script: str, stage: int, launcher: str, fused: bool, mode: str = "gather") -> tuple[dict, str]:
        config = config_of(stage, fused, mode)
        out = folder / f"{script}_zero{stage}_{launcher}_{fused}_{mode}"
        env = {"LOSSES": str(out) + ".json", "PYTHONPATH": str(REPO)}
        words = [str(USERS / f"{script}.py"), *arguments_of(script, out)]
        tools = Path(sys.executable).parent
        if launcher == "deepspeed":
            command = [tools / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
            if script == "plain_logits":
                # its parser knows --steps and --settings, and refuses the --local_rank that DeepSpeed adds by itself
                command.append("--no_local_rank")
            command += ["--config", config]
        else:
            command = [tools / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
            if script == "plain_labels":
                words += ["--deepspeed_config", str(config)]
            elif script == "plain_logits":
                words += ["--settings", str(config)]
            else:
                # what `accelerate launch` sets
                env |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        ended = start([*command, *words], cwd=folder, **env)
        assert ended.status == 0, ended.output
        return json.loads(Path(env["LOSSES"]).read_text()), ended.output

    @cache
    def run(script: str, stage: int, launcher: str) -> list[tuple[dict, str]]:
        # side by side: a launcher imports for seconds on one core
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda fused: once(script, stage, launcher, fused), (False, True)))

    run.once = once
    return run


@each
def test_on_equals_off(run, script, stage, launcher):
    (off, _), (on, _) = run(script, stage, launcher)
    compare(script, off, on)


# evaluation, and logits that are read after the loss, are what a head in slabs could get wrong; TRL has a loss of its
# own, past the head
@pytest.mark.all
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "trl_sft"])
def test_a_head_in_slabs_equals_off(run, script):
    (off, _), _ = run(script, 3, launchers_of(script, 3))
    on, output = run.once(script, 3, launchers_of(script, 3), True, "stream")
    assert "its weight in 51 slabs" in output
    compare(script, off, on)


@pytest.mark.all
@pytest.mark.parametrize("mode", ["stream", "stationary"])
def test_the_loss_of_an_sft_trainer_that_is_left_to_the_model(run, mode):
    """Under ZeRO-3 TRL gathers the whole head for a loss of its own; the model's is had without."""
    (off, _), (_, gathered) = run("trl_sft", 3, launchers_of("trl_sft", 3))
    assert "TRL has patched its forward with a fused loss of its own" in gathered
    on, output = run.once("fused_sft", 3, launchers_of("trl_sft", 3), True, mode)
    assert ("its weight in 51 slabs" in output) == (mode == "stream") and "TRL has patched" not in output
    # what it measures beside the loss is not logged
    assert on.keys() == {"losses", "eval_losses"}
    compare("fused_sft", {what: off[what] for what in on}, on)


def compare(script: str, off: dict, on: dict) -> None:
    assert on.keys() == off.keys() >= SCRIPTS.get(script, {"losses"})
    for what, values in off.items():
        # fp32, summed in another order, over at most 8 updates
        assert flat(on[what]) == pytest.approx(flat(values), rel=2e-5, abs=1e-7), what
    # a loss that stands still would be the same with any gradient
    losses = flat(off["losses"])
    assert losses[-1] < losses[0] - 0.5


@each
def test_report_is_printed_when_on_only(run, script, stage, launcher):
    (_, off), (_, on) = run(script, stage, launcher)
    assert "ds_fused:" not in off
    assert on.count("layers replaced in") == 1, on
    for key in ("rms_norm", "rope", "swiglu"):
        assert f" {key} " in on


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_mention_ds_fused(script):
    assert "fused" not in (USERS / f"{script}.py").read_text().lower()


def flat(values: object) -> list[float]:
    if isinstance(values, list):
        return [number for value in values for number in flat(value)]
    assert math.isfinite(values)
    return [float(values)]
