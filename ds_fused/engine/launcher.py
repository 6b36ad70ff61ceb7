"""``deepspeed --config FILE train.py ...``: DeepSpeed's launcher learns one option.

The script's own arguments stay as the user wrote them: a script with a strict parser would reject any that we add. The
ranks run it through ``python -m ds_fused.run FILE train.py ...`` instead, which makes FILE the config of a
``deepspeed.initialize`` that is given none.
"""

from __future__ import annotations

import argparse
import functools
import os
from types import FunctionType, ModuleType

RUNNER = "ds_fused.run"
# the same by its path
RUNNER_FILE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "run.py")


def hook(launcher: ModuleType) -> None:
    """``deepspeed.launcher.runner`` was imported: exchange its ``parse_args``, which its ``main`` looks up by name."""
    if not hasattr(launcher.parse_args, "_ds_fused_hook"):
        launcher.parse_args = _with_config(launcher.parse_args)


def _with_config(original: FunctionType) -> FunctionType:
    # The original builds its parser inside. Run its own code with a parser that knows one option more, so that argparse
    # itself decides what belongs to the launcher and what, standing behind the script, to the script.
    names = {**original.__globals__, "argparse": _Argparse()}
    parse = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)

    @functools.wraps(original)
    def parse_args(args=None):
        return rewritten(parse(args))

    parse_args._ds_fused_hook = True
    return parse_args


class _Argparse:
    """The module argparse, but for its parser."""

    def __getattr__(self, name: str) -> object:
        return getattr(argparse, name)

    class ArgumentParser(argparse.ArgumentParser):
        def parse_args(self, args=None, namespace=None):
            self.add_argument(
                "--config",
                type=self.config_file,
                default=None,
                help="DeepSpeed JSON config for a script that gives deepspeed.initialize none; the script's arguments "
                "are left alone (ds_fused)",
            )
            parsed = super().parse_args(args, namespace)
            if parsed.config is not None and parsed.autotuning:
                # the autotuner edits the --deepspeed_config among the script's arguments
                self.error("--config can't be combined with --autotuning")
            if parsed.config is not None and parsed.no_python and parsed.module:
                self.error("--no_python can't be combined with --module")
            return parsed

        @staticmethod
        def config_file(path: str) -> str:
            if not os.path.isfile(path):
                raise argparse.ArgumentTypeError(f"no such file: {path}")
            # ranks on other nodes, and scripts that change directory, mean the same file
            return os.path.abspath(path)


def rewritten(args: argparse.Namespace) -> argparse.Namespace:
    """The same launch, with the rank runner in front of the script."""
    if args.config is None:
        return args
    how = ["--module"] if args.module else ["--no_python"] if args.no_python else []
    args.user_args = [*how, args.config, args.user_script, *args.user_args]
    # for MPICH DeepSpeed puts `-m` ahead of a helper of its own as well, which is a path
    args.module, args.no_python = args.launcher.lower() != "mpich", False
    args.user_script = RUNNER if args.module else RUNNER_FILE
    return args
