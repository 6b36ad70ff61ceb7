"""``python -m launch model=smollm2 data=shakespeare deepspeed=zero3 fused=all train=short``: compose, write, start.

Hydra composes ``conf/`` here and nowhere else; the ranks get one resolved ``ds_config.json``. ``dry_run=true`` writes
the run's folder and prints the command without starting it.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from launch.real_data import CACHE, FETCH
from launch.render import Host, ds_config, local

CONF = Path(__file__).resolve().parents[1] / "conf"

OmegaConf.register_new_resolver("cached", lambda name: str(CACHE / name), replace=True)


def this_host() -> Host:
    # counts through the driver's library where it can, without opening a GPU
    from torch.cuda import device_count

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free_port = s.getsockname()[1]
    return Host(device_count(), os.cpu_count() or 1, str(Path(sys.executable).parent), os.environ["PATH"], free_port)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    # absolute, so that the folder means the same to every process; under -m each point of the sweep has its own
    composed.folder = HydraConfig.get().runtime.output_dir
    cfg = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    folder = Path(cfg["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "ds_config.json"
    config_file.write_text(json.dumps(ds_config(cfg), indent=2) + "\n")
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
    job = local(cfg, str(config_file), this_host())
    shown = {key: value for key, value in job.env.items() if key != "PATH"}
    print(" ".join([*(f"{key}={value}" for key, value in shown.items()), shlex.join(job.command)]), flush=True)
    if cfg["dry_run"]:
        return
    for group in ("model", "data"):
        if cfg[group].get("fetch"):
            FETCH[cfg[group]["fetch"]]()
    status = subprocess.run(job.command, env={**os.environ, **job.env}).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
