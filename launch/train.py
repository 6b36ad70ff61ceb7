"""Trains a causal language model from HuggingFace on text files with DeepSpeed, on any number of ranks.

    deepspeed --config ds.json launch/train.py --model FOLDER_OR_NAME --text FILE_OR_FOLDER --out runs/first
    deepspeed launch/train.py --deepspeed_config ds.json --model ... --text ... --out ...

Everything about the optimizer, precision, batch sizes and ZeRO stands in the DeepSpeed JSON. Text is tokenized, joined
and cut into blocks of equal length; the tail of every file is held out. In --out: metrics.jsonl, report.html,
checkpoints/, environment/, and what DeepSpeed's own monitor writes.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import deepspeed
import environment
import limits
import report
import torch
import torch.distributed as dist
from checkpoints import newest
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT, default_pg_timeout
from journal import Journal, say
from text_blocks import data_share, micro_batch, text_files, token_blocks
from toolchain import missing_build_tools
from torch import Tensor
from torch.distributed import distributed_c10d
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.integrations import HfDeepSpeedConfig


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--model", required=True, help="a folder in HuggingFace's format, or a hub name")
    parser.add_argument("--random_weights", action=on_off, default=False, help="read only the config of --model")
    parser.add_argument("--tokenizer", help="a folder or a hub name, where it is not that of --model")
    parser.add_argument("--zero_init", action=on_off, default=True, help="ZeRO-3: build the model already sharded")
    parser.add_argument("--gradient_checkpointing", action=on_off, default=False)
    parser.add_argument("--text", nargs="+", required=True, help="text files, or folders of *.txt")
    parser.add_argument("--block", type=int, default=1024, help="tokens in one sequence")
    parser.add_argument("--held_out", type=float, default=0.05, help="share of every file kept for evaluation")
    parser.add_argument("--eval_blocks", type=int, default=64, help="held-out sequences used, spread evenly")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, counted from the very first start")
    parser.add_argument("--eval_every", type=int, default=0, help="steps; 0: only before and after")
    parser.add_argument("--save_every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--log_every", type=int, default=1, help="steps")
    parser.add_argument("--resume", action=on_off, default=False, help="go on from the newest checkpoint in --out")
    wait = int(default_pg_timeout.total_seconds())
    parser.add_argument("--timeout_s", type=int, default=wait, help="seconds that a rank waits for the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    try:
        check(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """What the ranks would stumble over one after the other."""
    for key in {**limits.LEAST, **limits.MOST}:
        name = key.partition(".")[2]
        limits.check(f"--{name}", getattr(args, name), limits.LEAST.get(key), limits.MOST.get(key))
    limits.check_share("--held_out", args.held_out)
    text_files(args.text)
    for name in ("model", "tokenizer"):
        # any other name may be the hub's
        folder = getattr(args, name) or ""
        if folder.startswith((".", "/")) and not os.path.isdir(folder):
            raise FileNotFoundError(f"--{name} {folder}: no such folder")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: no folder")


def use_gloo_alone_where_nothing_compiles() -> None:
    """On CPU ranks DeepSpeed compiles a faster communication op; without a compiler it would stop instead."""
    missing = missing_build_tools() if get_accelerator().device_name() == "cpu" else []
    if missing:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        say(f"DeepSpeed's CPU communication op is left out, gloo does its work: there is no {', no '.join(missing)}")


def join_ranks(timeout_s: int) -> None:
    """Meet the other ranks; none waits longer for another, now or later."""
    limit = timedelta(seconds=timeout_s)
    # DeepSpeed hands the time-out to its first group; the groups that ZeRO adds to it take PyTorch's defaults
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    # where MPI starts the ranks, DeepSpeed finds the address out but not the port
    port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))
    deepspeed.init_distributed(timeout=limit, distributed_port=port)


def expect_progress(timeout_s: int, ends: bool = True) -> None:
    """Unless this is called again in time, say where this process waits, and end it.

    Where the network is cut, PyTorch's store waits for its server's answer for as long as TCP does (a quarter of an
    hour), whatever its time-out; and for a build that was cut off, whose lock stays, PyTorch waits for ever. Twice as
    long as any other wait, since those end with a message of their own.
    """
    faulthandler.dump_traceback_later(2 * timeout_s, repeat=not ends, exit=ends)


def lost_ranks(error: BaseException | None) -> bool:
    """Whether it comes of other ranks that did not answer."""
    if error is None:
        return False
    # gloo's errors have no type of their own: most name its sources
    of_gloo = any(words in str(error) for words in ("/gloo/", "caused pair closure"))
    return of_gloo or isinstance(error, dist.DistError) or lost_ranks(error.__cause__)


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    hf_deepspeed = HfDeepSpeedConfig(args.deepspeed_config) if args.deepspeed_config else None
    dtype = torch.float32
    if hf_deepspeed and hf_deepspeed.is_true("bf16.enabled"):
        dtype = torch.bfloat16
    elif hf_deepspeed and hf_deepspeed.is_true("fp16.enabled"):
        dtype = torch.float16
    if not args.zero_init:
        # transformers shards a model while it is built for as long as this object lives
        hf_deepspeed = None
    if args.random_weights:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@torch.no_grad()
def held_out_loss(engine: deepspeed.DeepSpeedEngine, blocks: Tensor) -> float:
    """Mean loss per token over all ranks. Every rank runs the same number of forwards, as ZeRO-3 needs."""
    size, (rank, world) = engine.train_micro_batch_size_per_gpu(), data_share(engine)
    total = torch.zeros(2, dtype=torch.float64)  # loss summed over tokens, tokens
    engine.eval()
    for first in range(0, len(blocks), size * world):
        mine = blocks[first + rank * size : first + (rank + 1) * size]
        # a rank without a share repeats the first blocks and does not count them
        ids = (mine if len(mine) else blocks[:1]).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        tokens = len(mine) * (blocks.shape[1] - 1)
        total += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
    engine.train()
    total = total.to(engine.device)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def mean_over_ranks(values: Tensor) -> list[float]:
    values = values.clone()
    dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """A checkpoint that is whole once `latest` names it.

    DeepSpeed's first rank names it when its own part is written: killed right then, the others' parts would be missing.
    """
    # its writers of checkpoints in the background know themselves when all is written
    in_background = engine.checkpoint_engine.is_decoupled()
    tag = f"global_step{engine.global_steps}"
    # comes back when every rank is done
    engine.save_checkpoint(str(folder), tag=tag, save_latest=in_background)
    if dist.get_rank() == 0 and not in_background:
        aside = folder / ".latest"
        aside.write_text(tag)
        aside.replace(folder / "latest")


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path) -> Path:
    """The one that `latest` names."""
    tag = newest(folder)
    try:
        engine.load_checkpoint(str(folder), tag=tag)
    except (AssertionError, FileNotFoundError) as error:
        # DeepSpeed's words for files that are not there
        files = ", ".join(sorted(path.name for path in (folder / tag).iterdir())) or "no file"
        latest = f"{folder}/latest names {tag!r}"
        raise ValueError(f"{latest}, which is not whole, or of another stage of ZeRO: {files}") from error
    return folder / tag


class StopSignal:
    """SIGUSR1, as schedulers send it before the time is up: save a checkpoint at the next logging step, and end.

    The file `stopped` in --out then says that the run isn't at its end.
    """

    def __init__(self, out: Path):
        self.came, self.file = False, out / "stopped"
        if dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)
        signal.signal(signal.SIGUSR1, self.arrive)

    def arrive(self, *_: object) -> None:
        self.came = True

    def leave(self) -> None:
        if dist.get_rank() == 0:
            self.file.touch()


def set_aside(checkpoints: Path) -> None:
    """Of an earlier run in this folder: a later --resume would take its newest checkpoint for one of this run."""
    latest = checkpoints / "latest"
    if latest.is_file():
        latest.replace(latest.with_name("latest.earlier"))
        say(f"a new run: {latest} of an earlier one is latest.earlier now")


def peak_memory_gb() -> list[float]:
    """The most memory that each rank has used: the accelerator's, or the process's where the CPU trains."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = accelerator.max_memory_allocated()
    mine = torch.tensor(peak / 2**30, device=accelerator.current_device_name())
    peaks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(peaks, mine)
    return torch.stack(peaks).tolist()


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    stop = StopSignal(args.out)
    # text and weights may be as large as they like
    expect_progress(args.timeout_s, ends=False)
    train_blocks, eval_blocks = token_blocks(args)
    model = load_model(args)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        environment.write(args.out, platform.node())
    # a forward is progress; so is a checkpoint, below
    model.register_forward_pre_hook(lambda *_: expect_progress(args.timeout_s))
    expect_progress(args.timeout_s)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    checkpoints = args.out / "checkpoints"
    if args.resume and (checkpoints / "latest").is_file():
        say(f"resumed from {load_checkpoint(engine, checkpoints)}")
    elif not args.resume and dist.get_rank() == 0:
        set_aside(checkpoints)
    journal = Journal(engine, args)
    if engine.global_steps >= args.steps:
        journal.close("ended")
        say(f"nothing to train: --steps is {args.steps}, and the checkpoint is of step {engine.global_steps}")
        return
    # engine.train_batch_size() counts tensor parallel ranks as if each saw its own
    blocks_per_step = engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()
    tokens_per_step = blocks_per_step * data_share(engine)[1] * args.block
    say(
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{dist.get_world_size()} ranks, {tokens_per_step} tokens a step, "
        f"{len(train_blocks)} training and {len(eval_blocks)} held-out blocks of {args.block} tokens"
    )

    before = after = held_out_loss(engine, eval_blocks)
    journal.held_out(before)
    engine.train()
    began = last = time.perf_counter()
    first_step = logged = engine.global_steps
    loss_sum = torch.zeros((), device=engine.device)
    for step in range(engine.global_steps, args.steps):
        micro_steps = engine.gradient_accumulation_steps()
        for micro in range(micro_steps):
            ids = micro_batch(engine, train_blocks, args.seed, step, micro)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach().float() / micro_steps
        journal.bar.update()
        done, stopping = step + 1, False
        if done % args.log_every == 0 or done == args.steps:
            # the signal reaches the ranks in different steps: here, where they talk anyway, they agree on one
            mean, came = mean_over_ranks(torch.stack([loss_sum / (done - logged), loss_sum.new_tensor(stop.came)]))
            stopping, memory = came > 0 and done < args.steps, peak_memory_gb()
            now = time.perf_counter()
            journal.step(mean, tokens_per_step * (done - logged) / (now - last), memory)
            loss_sum.zero_()
            last, logged = now, done
        saves = stopping or args.save_every and (done % args.save_every == 0 or done == args.steps)
        evaluates = not stopping and (done == args.steps or args.eval_every and done % args.eval_every == 0)
        if saves or evaluates:
            # what is on its way still is training
            get_accelerator().synchronize()
        paused = time.perf_counter()
        if saves:
            expect_progress(args.timeout_s)
            save_checkpoint(engine, checkpoints)
            expect_progress(args.timeout_s)
        if stopping:
            stop.leave()
            journal.close("stopped")
            say(f"stopped by SIGUSR1 after step {done}; --resume goes on from there")
            return
        if evaluates:
            after = held_out_loss(engine, eval_blocks)
            journal.held_out(after)
        # saving and evaluating do not count as training speed
        last += time.perf_counter() - paused
    seconds, memory = time.perf_counter() - began, max(peak_memory_gb())
    journal.row(held_out_before=before, held_out_after=after, seconds=seconds, memory_gb=memory)
    journal.close("ended")
    say(
        f"held-out loss {before:.4f} -> {after:.4f} in {args.steps - first_step} steps, {seconds:.1f} s, "
        f"peak memory {memory:.2f} GB a rank"
    )


def main() -> None:
    args = parse_options()
    use_gloo_alone_where_nothing_compiles()
    try:
        expect_progress(args.timeout_s)
        join_ranks(args.timeout_s)
        train(args)
    except Exception as error:
        rank, host = os.environ.get("RANK", "0"), platform.node()
        if rank == "0" and args.out.is_dir():
            report.write(args.out, "failed")
        if not lost_ranks(error):
            raise
        print(
            f"rank {rank} on {host} has lost the other ranks: one has failed, or its host or the network is down "
            f"({error}); --resume goes on from the newest checkpoint",
            file=sys.stderr,
        )
        leave(1)
    if dist.get_backend() == "gloo":
        dist.barrier()
        leave(0)
    dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Without Python's own end: that of gloo's objects waits for lost ranks, or aborts now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
