"""What each rank runs under ``deepspeed --config FILE``: the user's script, with FILE as its default config.

    python -m ds_fused.run [--local_rank=N] [--module | --no_python] FILE TARGET [the script's arguments]

Nothing is imported before the script: what it does to its environment ahead of importing torch still counts.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from ds_fused import autoload

USAGE = "usage: python -m ds_fused.run [--local_rank=N] [--module | --no_python] FILE TARGET [arguments]"


def main(argv: list[str]) -> None:
    # DeepSpeed's launcher puts --local_rank=N right behind the program's name; it is meant for the script
    passed_on, how = [], "script"
    rest = list(argv)
    while rest and rest[0].startswith("--"):
        option = rest.pop(0)
        if option.startswith("--local_rank="):
            passed_on.append(option)
        elif option in ("--module", "--no_python"):
            how = option[2:]
        else:
            raise SystemExit(f"ds_fused.run: unknown option {option}\n{USAGE}")
    if len(rest) < 2:
        raise SystemExit(USAGE)
    config, target, *arguments = rest
    if not os.path.isfile(config):
        raise SystemExit(f"ds_fused.run: no such file: {config}")
    # the script may go elsewhere before it reads it
    announce(os.path.abspath(config))
    sys.argv = [target, *passed_on, *arguments]
    if how == "no_python":
        # a Python below it finds the config by its environment, through the plug-in entry point
        try:
            os.execvp(target, sys.argv)
        except OSError as error:
            raise SystemExit(f"ds_fused.run: {target} can't be started: {error.strerror}") from None
    autoload.watch("deepspeed", "ds_fused.engine.default_config")
    if how == "module":
        # `python -m` has put the working directory on sys.path for us, where the user's module is looked up too; where
        # this file was started by its path, that is its folder
        if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
            sys.path[0] = os.getcwd()
        check_module(target)
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # a folder may be a program, too
        if not os.path.exists(os.path.join(target, "__main__.py") if os.path.isdir(target) else target):
            raise SystemExit(f"ds_fused.run: no such script: {target}")
        # as `python train.py` does
        sys.path[0] = os.path.dirname(os.path.realpath(target))
        runpy.run_path(target, run_name="__main__")


def check_module(name: str) -> None:
    """Whether it is there to be run; what fails in the packages above it is theirs to say."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None:
        raise SystemExit(f"ds_fused.run: no such module: {name}, or a package without __main__.py")


def announce(config: str) -> None:
    """Say to everything in this process and below it which config is the default."""
    earlier = os.environ.get(autoload.CONFIG_VARIABLE)
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    # one left by a job of ours that started this one isn't the user's
    if given not in (None, "none", earlier) and os.path.abspath(given) != config:
        raise SystemExit(
            f"ds_fused: two different DeepSpeed configs: --config {config} and ACCELERATE_DEEPSPEED_CONFIG_FILE={given}"
        )
    os.environ[autoload.CONFIG_VARIABLE] = config
    # Trainer and Accelerate scripts take their config from here
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config


if __name__ == "__main__":
    main(sys.argv[1:])
