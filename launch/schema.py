"""What a run is: the keys of `conf/` with their types. The groups `deepspeed` and `fused` are schemas of their own.

Every key of Model, Data and Train is an option of train.py of the same name, but `path` and `fetch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from omegaconf import MISSING

# omegaconf reads these annotations, and knows Optional and Union by these names only
# ruff: noqa: UP007, UP045


@dataclass
class Model:
    path: str = MISSING  # a folder in HuggingFace's format, or a hub name
    fetch: Optional[str] = None  # a name in real_data.FETCH, made on the launching machine
    random_weights: bool = False
    tokenizer: Optional[str] = None
    gradient_checkpointing: bool = False
    zero_init: bool = True


@dataclass
class Data:
    text: list[str] = MISSING  # files, or folders of *.txt
    fetch: Optional[str] = None
    block: int = 1024
    held_out: float = 0.05
    eval_blocks: int = 64


@dataclass
class Train:
    steps: int = MISSING
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0


@dataclass
class Cluster:
    """What every kind of cluster has; each kind adds its own keys in its file under clusters/."""

    kind: str = MISSING
    ranks: Union[int, str] = "auto"  # on each node
    accelerator: str = "auto"
    port: Union[int, str] = "auto"
    preflight: bool = False
    env: Optional[dict[str, str]] = None  # for the ranks


@dataclass
class Run:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)
    cluster: Any = MISSING  # one of the kinds of clusters.KINDS
    folder: str = MISSING
    resume: Union[bool, str] = False
    dry_run: bool = False
