"""``python -m launch model=smollm2 data=shakespeare deepspeed=zero3 fused=all cluster=local train=short``.

Hydra composes ``conf/`` here and nowhere else; what can't run is refused; the run's folder is written; then the run is
started or submitted. The ranks get one resolved ``ds_config.json``. ``dry_run=true`` ends before anything is started.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from launch import environment, report
from launch.check import (
    check,
    missing_paths,
    refuse_no_folder,
    refuse_secrets,
    refuse_secrets_typed,
    typed,
    unknown_key,
)
from launch.clusters import KINDS
from launch.real_data import CACHE, FETCH
from launch.render import Host, Rendered, record
from launch.schema import Run
from launch.supervisor import ended

CONF = Path(__file__).resolve().parents[1] / "conf"

# Hydra's options for a sweep
MULTIRUN = {"-m", "--multirun"}

OmegaConf.register_new_resolver("cached", lambda name: str(CACHE / name), replace=True)


def this_host() -> Host:
    # counts through the driver's library where it can, without opening a GPU
    from torch.cuda import device_count

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free_port = s.getsockname()[1]
    return Host(
        gpus=device_count(),
        cores=os.cpu_count() or 1,
        bin=str(Path(sys.executable).parent),
        path=os.environ["PATH"],
        free_port=free_port,
        name=platform.node(),
        settings=environment.settings(os.environ, ("NCCL_", "UCX_", "GLOO_")),
        ssh_args=os.environ.get("PDSH_SSH_ARGS_APPEND", ""),
    )


def prepare(composed: DictConfig) -> tuple[Run, Rendered]:
    """The run and what it starts; a ValueError where it can't."""
    refuse_secrets(OmegaConf.to_container(composed))
    run = typed(composed)
    rendered = KINDS[run.cluster.kind].render(run, this_host())
    check(run, rendered.ranks)
    for missing in [*missing_paths(run), *missing_commands(run, rendered)]:
        if not run.dry_run:
            raise ValueError(missing)
        # a laptop has not what the cluster has
        print(f"launch: note: {missing} on this machine")
    return run, rendered


def missing_commands(run: Run, rendered: Rendered) -> Iterator[str]:
    """What this machine can't start: `sbatch` on a machine that is none of the cluster's, say."""
    for name in (rendered.command[0], *rendered.needs):
        if not shutil.which(name, path=rendered.env.get("PATH")):
            yield f"cluster.kind is {run.cluster.kind}, which needs the command {name}: there is none"


@contextmanager
def held(run: Run) -> Iterator[IO[str]]:
    """The run's folder is there, and no other launch writes into it while the file is open, here or in a command."""
    folder = Path(run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the system lets go of it when the processes that have it open end, however they do
        file = (folder / "run.yaml").open("a")
    except OSError as error:
        raise ValueError(f"folder is {folder}, which can't be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"folder is {folder}, in which another launch is running") from None
        yield file


def shown(rendered: Rendered) -> str:
    """The command as a person would type it."""
    env = {key: value for key, value in rendered.env.items() if key != "PATH"}
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in env.items()), shlex.join(rendered.command)])


def write(run: Run, rendered: Rendered) -> None:
    """The run's folder: the one configuration of all ranks, the record of the run, and all that is started."""
    folder = Path(run.folder)
    files = {
        **record(run),
        "command.sh": shown(rendered) + "\n",
        "nodes.txt": "".join(f"{name}: {line}\n" for name, line in rendered.nodes.items()),
        **rendered.files,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    environment.write(folder, "launching")


def start(run: Run, rendered: Rendered, lock: IO[str]) -> int:
    for group in (run.model, run.data):
        if group.fetch:
            try:
                FETCH[group.fetch]()
            except (ModuleNotFoundError, OSError) as error:
                print(f"launch: {group.fetch} can't be made: {error}", file=sys.stderr)
                return 1
    # a command that outlives this process keeps the folder
    options = {"folder": Path(run.folder), "env": {**os.environ, **rendered.env}, "pass_fds": [lock.fileno()]}
    for command in rendered.preflight:
        if status := ended(command, **options):
            print("launch: the preflight failed, so nothing was started", file=sys.stderr)
            return status
    return ended(rendered.command, **options)


def followed(run: Run, rendered: Rendered, lock: IO[str]) -> int:
    """Start it; where no rank could say on report.html how the run ended, it is said here."""
    folder = Path(run.folder)
    report.write(folder, "starting")
    try:
        status = start(run, rendered, lock)
    except KeyboardInterrupt:
        # a rank that has lost those on other machines may have taken it for a failure
        report.finish(folder, "interrupted", over="failed")
        raise
    if status:
        report.finish(folder, report.failed(status))
    elif rendered.waits and report.goes_on(folder):
        # DeepSpeed's launcher ends with 0 where a signal has killed the process below it
        report.finish(folder, "failed: no rank has said how it ended")
        print("launch: the command has ended with status 0, but no rank has said how it ended", file=sys.stderr)
        status = 1
    return status


def show(run: Run, rendered: Rendered) -> None:
    """What a dry run prints; the folder holds the same."""
    print(f"\n--- ds_config.json\n{record(run)['ds_config.json']}", end="")
    for name, text in rendered.files.items():
        print(f"\n--- {name}\n{text}", end="")
    print(f"\n{len(rendered.nodes)} nodes, {rendered.ranks} ranks")
    for name, line in rendered.nodes.items():
        print(f"{name}: {line}")
    print(f"\nnothing was started; all of it is in {run.folder}", flush=True)


def in_one_line(error: Exception) -> str:
    """What Hydra or omegaconf could not read or compose, without their pointers to manuals and to their own objects."""
    lines = []
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        kind = cause.parent_node.get("kind") if cause.full_key.startswith("cluster.") else ""
        # a key that the group has, or one of DeepSpeed's or of ours, may be added with a plus, as Hydra says
        if unknown := unknown_key(cause.full_key, kind):
            return unknown
    for part in filter(None, (error, cause)):
        words = re.split(r"\n(?=See https|Config search path|\s+full_key|\s+object_type)", str(part))[0]
        where = getattr(part, "override", None) or getattr(part, "full_key", None)
        lines.append(" ".join((words if where is None or str(where) in words else f"{where}: {words}").split()))
    line = "; ".join(lines)
    return f"{line} (in an override \\${{ is the text ${{)" if "${" in line else line


# folders of the points of this sweep that could not be started, or failed
failed: list[str] = []


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    # absolute, so that the folder means the same to every process; under -m each point of the sweep has its own
    composed.folder = HydraConfig.get().runtime.output_dir
    try:
        run, rendered = prepare(composed)
        with held(run) as lock:
            write(run, rendered)
            print(shown(rendered), flush=True)
            if run.dry_run:
                show(run, rendered)
            elif followed(run, rendered, lock):
                failed.append(run.folder)
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        failed.append(composed.folder)


if __name__ == "__main__":
    # its parser takes no option between two overrides
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)
    try:
        refuse_secrets_typed(sys.argv[1:])
        refuse_no_folder(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"launch: {error}")
    for sign in (signal.SIGTERM, signal.SIGHUP):
        # under nohup it stays ignored
        if signal.getsignal(sign) is not signal.SIG_IGN:
            signal.signal(sign, signal.default_int_handler)
    # Hydra then hands its errors on, instead of showing them in its own way
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        sys.exit(f"launch: {in_one_line(error)}")
    except OSError as error:
        # Hydra makes the run's folder before anything here runs
        if error.filename is None:
            raise
        sys.exit(f"launch: {error.filename} can't be written: {error.strerror}")
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        sys.exit(130)
    # only now: one point that fails doesn't keep the others of its sweep from running
    if failed and MULTIRUN & set(sys.argv):
        print(f"launch: failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)
