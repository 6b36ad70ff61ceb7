"""train.py as the user starts it: on CPU ranks, with a tiny model, through real processes."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import REPO, launch, start
from transformers import AutoTokenizer

TRAIN = REPO / "launch" / "train.py"


def ds_config(folder: Path, stage: int, micro_batch: int, accumulate: int = 1, **more: object) -> Path:
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        # no weight is so small that it stays whole: saving those, the ranks would wait for each other
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "tensorboard": {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"},
        **more,
    }
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path, text: Path):
    """Runs train.py into a folder and returns what metrics.jsonl holds, with rank 0's output."""

    def run(
        name: str, *more: str, ranks: int, stage: int, micro_batch: int, accumulate: int = 1, script: Path = TRAIN,
        survives: bool = True, parallel: int = 1, **env: str,
    ):  # fmt: skip
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        more_config = {"tensor_parallel": {"autotp_size": parallel}} if parallel > 1 else {}
        config = ds_config(out, stage, micro_batch, accumulate, **more_config)
        options = ["--model", tiny_model, "--text", text, "--block", 32, "--eval_blocks", 5, "--steps", 4, "--out", out]
        words = [*map(str, options), "--deepspeed_config", str(config), *more]
        ended = launch(script, *words, ranks=ranks, env=env, expect_success=survives)
        assert survives or all(e.status for e in ended)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return rows, ended[0].output

    return run


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


# 2 ranks x 1 against 1 rank x 1 accumulated twice: one global batch, so one curve; 5 held-out blocks leave a rank
# without a share in the last round
def test_two_ranks_under_zero3_resume_and_one_rank_agree(train, tmp_path):
    rows, output = train("whole", "--save_every", "2", ranks=2, stage=3, micro_batch=1)
    curve = losses(rows)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert {"lr", "grad_norm", "tokens_per_s", "memory_gb"} <= rows[1].keys()
    assert f"held-out loss {held_out[0]:.4f} -> {held_out[1]:.4f} in 4 steps" in output
    assert [len(row["memory_gb_by_rank"]) for row in rows if "loss" in row] == [2] * 4
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "ended, " in report and "rank 1</span>" in report
    assert len(list((tmp_path / "whole" / "environment").glob("*.json"))) == 1
    assert list((tmp_path / "whole" / "tensorboard").glob("events.out.tfevents.*"))

    # the same run, killed in the midst of a checkpoint, and of a line
    killed = Path(__file__).with_name("killed_rank.py")
    train("resumed", "--save_every", "2", ranks=2, stage=3, micro_batch=1, script=killed, survives=False)
    assert (tmp_path / "resumed/checkpoints/global_step4").is_dir()
    with (tmp_path / "resumed/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    resumed, output = train("resumed", "--resume", "--save_every", "4", ranks=2, stage=3, micro_batch=1)
    assert "resumed from" in output and "global_step2" in output
    assert losses(resumed) == curve

    # what it has come to already
    over, output = train("resumed", "--resume", "--steps", "3", "--save_every", "2", ranks=2, stage=3, micro_batch=1)
    assert "nothing to train: --steps is 3, and the checkpoint is of step 4" in output and "held-out" not in output
    assert losses(over) == curve

    alone, _ = train("alone", "--no-zero_init", ranks=1, stage=0, micro_batch=1, accumulate=2)
    assert losses(alone) == pytest.approx(curve, rel=1e-5)
    assert [row["held_out_loss"] for row in alone if "held_out_loss" in row] == pytest.approx(held_out, rel=1e-5)


# they see one batch: two are an error of DeepSpeed's
def test_two_tensor_parallel_ranks_train_as_one(train):
    rows, output = train("two", ranks=2, parallel=2, stage=1, micro_batch=1, accumulate=2)
    alone, _ = train("one", ranks=1, stage=1, micro_batch=1, accumulate=2)
    assert losses(rows) == pytest.approx(losses(alone), rel=1e-5)
    held_out = [[row["held_out_loss"] for row in run if "held_out_loss" in row] for run in (rows, alone)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert "2 ranks, 64 tokens a step" in output


# DeepSpeed's build of its op, cut off: PyTorch waits for its lock to go
def test_a_start_that_hangs_says_where(tmp_path, tiny_model, text):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    options = ["--model", tiny_model, "--text", text, "--steps", 1, "--out", tmp_path / "run", "--timeout_s", 3]
    words = [*map(str, options), "--deepspeed_config", str(ds_config(tmp_path, 0, 1))]
    [ended] = launch(TRAIN, *words, ranks=1, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)}, expect_success=False)
    assert ended.status and "Timeout (0:00:06)" in ended.output and "file_baton.py" in ended.output, ended.output


SLOW_EVALUATION = f"""
import sys, time
sys.path.insert(0, {str(TRAIN.parent)!r})
import train
held_out_loss = train.held_out_loss
train.held_out_loss = lambda *a: (time.sleep(5), held_out_loss(*a))[1]
train.main()
"""


def test_evaluating_between_two_logged_steps_is_no_training(train, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_EVALUATION)
    options = ["--steps", "2", "--log_every", "2", "--eval_every", "1"]
    rows, _ = train("slow", *options, ranks=1, stage=0, micro_batch=1, script=script)
    # two steps of 32 tokens
    assert next(row["tokens_per_s"] for row in rows if "loss" in row) > 64 / 5


def test_random_weights_on_a_machine_without_a_compiler(train):
    options = ("random", "--random_weights", "--gradient_checkpointing")
    rows, output = train(*options, ranks=1, stage=3, micro_batch=2, CXX="no-such-compiler")
    # a fresh model guesses evenly over 257 tokens
    assert rows[0]["held_out_loss"] == pytest.approx(5.55, abs=0.1)
    assert "DeepSpeed's CPU communication op is left out, gloo does its work: there is no C++ compiler" in output


@pytest.mark.gpu
def test_one_gpu_by_the_flag_alone(tmp_path, tiny_model, text):
    """The main job on a GPU, as the README starts it: the same losses, with the flag and without."""
    options = ["--model", tiny_model, "--text", text, "--block", 32, "--eval_blocks", 5, "--steps", 8]
    held_out = {}
    for enabled in (False, True):
        out = tmp_path / str(enabled)
        out.mkdir()
        more = {"bf16": {"enabled": True}, "tensorboard": {"enabled": False}, "ds_fused": {"enabled": enabled}}
        config = ds_config(out, stage=3, micro_batch=2, **more)
        command = [shutil.which("deepspeed"), "--num_gpus", 1, "--config", config, TRAIN, *options, "--out", out]
        ended = start([str(word) for word in command], DS_ACCELERATOR="cuda")
        assert ended.status == 0, ended.output
        assert ("layers replaced in" in ended.output) == enabled
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        held_out[enabled] = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert held_out[True][1] < held_out[True][0] - 0.1
    # bf16, over 8 updates
    assert held_out[True] == pytest.approx(held_out[False], rel=1e-2)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch):
    # as a script it finds its neighbours
    monkeypatch.syspath_prepend(str(TRAIN.parent))
    return importlib.import_module("train")


@pytest.fixture
def text_blocks(functions):
    return importlib.import_module("text_blocks")


def test_text_that_is_not_there_or_too_short_is_named(functions, text_blocks, tiny_model, text, tmp_path):
    with pytest.raises(FileNotFoundError, match="--text .*nowhere: neither a file nor a folder with"):
        text_blocks.text_files([str(tmp_path / "nowhere")])
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"--text {latin}: not UTF-8 at byte 3"):
        text_blocks.read(latin)
    options = ["--model", str(tiny_model), "--text", str(text), "--steps", "1", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=r"held-out text has \d+ tokens, .* a --block of 4096: .*--held_out"):
        text_blocks.token_blocks(functions.parse_options([*options, "--block", "4096"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps is 0, but must be at least 1"),
        (["--block", "1"], "--block is 1, but must be at least 2"),
        (["--log_every", "0"], "--log_every is 0, but must be at least 1"),
        (["--eval_blocks", "0"], "--eval_blocks is 0, but must be at least 1"),
        (["--seed", str(2**32)], f"--seed is {2**32}, but must be at most {2**32 - 1}"),
        (["--held_out", "1"], "--held_out is 1.0, but must be a share between 0 and 1"),
        (["--text", "/no/text"], "--text /no/text: neither a file nor a folder with *.txt in it"),
        (["--model", "./no/model"], "--model ./no/model: no such folder"),
        (["--tokenizer", "/no/tokenizer"], "--tokenizer /no/tokenizer: no such folder"),
        (["--out", __file__], f"--out {__file__}: no folder"),
    ],
)
def test_what_no_rank_could_use_is_said_before_the_ranks_meet(options, said, functions, text, tmp_path, capsys):
    right = ["--model", "owner/name", "--text", str(text), "--steps", "1", "--out", str(tmp_path / "run")]
    functions.parse_options(right)
    with pytest.raises(SystemExit):
        functions.parse_options([*right, *options])
    assert f"error: {said}\n" in capsys.readouterr().err


def test_the_held_out_part_is_the_tail_of_every_file(functions, text_blocks, tiny_model, text, tmp_path):
    options = ["--model", str(tiny_model), "--text", str(text), "--steps", "1", "--out", str(tmp_path)]
    args = functions.parse_options([*options, "--held_out", "0.25", "--eval_blocks", "1000000"])
    args.block = 1
    train, held_out = text_blocks.token_blocks(args)
    # one token per byte, and one behind each of the four parts
    assert len(train) + len(held_out) == sum(file.stat().st_size for file in text.iterdir()) + 4
    tail = (text / "b.txt").read_bytes()[-10:]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(held_out.flatten().tolist()).encode().endswith(tail + b"<end>")


def test_every_block_comes_once_in_an_epoch_whatever_the_ranks(text_blocks, monkeypatch):
    blocks = torch.arange(12).view(12, 1)

    def seen(world: int, size: int, micro_steps: int, steps: range) -> list[list[int]]:
        monkeypatch.setattr(text_blocks.dist, "get_world_size", lambda group: world)
        engine = SimpleNamespace(
            train_micro_batch_size_per_gpu=lambda: size,
            gradient_accumulation_steps=lambda: micro_steps,
            data_parallel_group=None,
            device="cpu",
        )
        batches = []
        for step in steps:
            batch = []
            for micro in range(micro_steps):
                for rank in range(world):
                    monkeypatch.setattr(text_blocks.dist, "get_rank", lambda group, rank=rank: rank)
                    batch += text_blocks.micro_batch(engine, blocks, 0, step, micro).flatten().tolist()
            batches.append(batch)
        return batches

    epoch = seen(world=1, size=4, micro_steps=1, steps=range(3))
    assert sorted(sum(epoch, [])) == list(range(12))
    assert epoch == seen(world=2, size=1, micro_steps=2, steps=range(3))
    assert epoch[1:] == seen(world=4, size=1, micro_steps=1, steps=range(1, 3))
    # another epoch, another order
    assert epoch != seen(world=1, size=4, micro_steps=1, steps=range(3, 6))


def test_the_script_has_never_heard_of_us():
    for name in ("train.py", "text_blocks.py", "journal.py"):
        assert "fused" not in TRAIN.with_name(name).read_text()


def test_a_checkpoint_that_is_not_there_or_not_whole_is_named(functions, tmp_path):
    def fails(*_, **__):
        raise AssertionError

    (tmp_path / "global_step4").mkdir()
    (tmp_path / "latest").write_text("global_step8")
    engine = SimpleNamespace(load_checkpoint=fails)
    with pytest.raises(ValueError, match=f"{tmp_path}/latest names 'global_step8'; there is global_step4"):
        functions.load_checkpoint(engine, tmp_path)
    (tmp_path / "latest").write_text("global_step4")
    with pytest.raises(
        ValueError,
        match=f"{tmp_path}/latest names 'global_step4', which is not whole, or .*: no file",
    ):
        functions.load_checkpoint(engine, tmp_path)


def test_a_new_run_is_not_resumed_from_an_earlier_ones_checkpoint(functions, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(functions, "say", said.append)
    functions.set_aside(tmp_path)
    assert not said
    (tmp_path / "latest").write_text("global_step4")
    functions.set_aside(tmp_path)
    assert not (tmp_path / "latest").exists() and (tmp_path / "latest.earlier").read_text() == "global_step4"
    assert len(said) == 1
