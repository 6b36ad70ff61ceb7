"""What a run ran on: versions, the state of the sources, GPUs and the settings that matter; without any secret.

Each node writes its own file into the run's folder `environment/`, and so does the launching machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "ds-fused", "hydra-core", "accelerate", "peft", "trl")
# variables that change what a run does, by how their names begin; no other variable is ever written
SETTINGS = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "TORCH_", "PYTORCH_", "TRITON_", "DS_", "DEEPSPEED_", "OMP_", "MKL_",
    "HF_", "SLURM_JOB_", "SLURM_NNODES", "SLURM_RESTART_COUNT", "MASTER_", "WORLD_SIZE", "LD_LIBRARY_PATH",
)  # fmt: skip
SECRET = re.compile(
    r"(^|[_-])(tokens?|secrets?|keys?|api_?key|apikey|pass|passwd|passwords?|pwd|credentials?|auth|pat|webhook)($|[_-])"
    r"|password|passphrase|secret|credential|(?-i:[a-z](Token|Key)s?(?![a-z]))",
    re.IGNORECASE,
)
# a name such as MAX_TOKENS, HF_TOKEN_PATH, SSH_AUTH_SOCK; and a switch, as HF_HUB_DISABLE_IMPLICIT_TOKEN=1
NO_SECRET = re.compile(r"((max|min|num|n)_?(new_)?tokens|_path|_file|_sock)$", re.IGNORECASE)
SWITCH = re.compile(r"0|1|true|false", re.IGNORECASE)
# user:password@ in an address, and how the tokens of HuggingFace, AWS, GitHub, GitLab, Google, OpenAI and Slack look,
# and signed ones (JWT)
SECRET_VALUE = re.compile(
    r"//[^/@:\s]*:[^/@\s]+@|\bhf_[A-Za-z0-9]{30,}|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{36}|\bgithub_pat_\w{22}"
    r"|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bglpat-[\w-]{20}|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
)


def is_secret(name: str, value: object = None) -> bool:
    by_name = SECRET.search(name) and not NO_SECRET.search(name) and not SWITCH.fullmatch(str(value))
    return bool(by_name or SECRET_VALUE.search(str(value)))


def settings(env: Mapping[str, str], prefixes: Sequence[str] = SETTINGS) -> dict[str, str]:
    """The variables that matter; one that looks like a secret is left out."""
    return {
        name: value
        for name, value in sorted(env.items())
        if name.startswith(tuple(prefixes)) and not is_secret(name, value)
    }


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, object]:
    """The commit of the sources that this file belongs to, and what was changed since."""
    here = ("git", "-C", str(Path(__file__).resolve().parent))
    commit = output_of(*here, "rev-parse", "HEAD")
    changed = output_of(*here, "status", "--porcelain", "--untracked-files=no") or ""
    return {"commit": commit, "changed": [line[2:].strip() for line in changed.splitlines()]}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """Model, memory and driver of each GPU, by the driver: no GPU is opened."""
    listed = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def capture() -> dict[str, object]:
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "git": git_state(),
        "gpus": gpus(),
        "settings": settings(os.environ),
    }


def write(folder: Path, name: str) -> None:
    place = folder / "environment"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.json").write_text(json.dumps(capture(), indent=2) + "\n", encoding="utf-8")
