"""What a run's folder `checkpoints` holds. Standard library only: the launch asks before any rank has started."""

from __future__ import annotations

from pathlib import Path


def newest(folder: Path) -> str:
    """The name of the checkpoint that the file `latest` names; a ValueError where it isn't there."""
    latest = folder / "latest"
    name = latest.read_text().strip()
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if name not in there:
        raise ValueError(f"{latest} names {name!r}; there is {', '.join(there) or 'no checkpoint'}")
    return name


def unlike(checkpoint: Path, ranks: int, stage: int) -> str | None:
    """Why DeepSpeed can't load what other ranks, or another stage of ZeRO, have saved; None where it can, or may."""
    parts = len([*checkpoint.glob("*zero_pp_rank_*_mp_rank_*_optim_states.pt")])
    if not parts or not stage:
        return None
    is_stage_3 = any(checkpoint.glob("zero_pp_rank_*_model_states.pt"))
    if is_stage_3 != (stage == 3):
        return f"was saved under ZeRO-{'3' if is_stage_3 else '1 or 2'}, and this run is under ZeRO-{stage}"
    return None if parts == ranks else f"was saved by {parts} ranks, and this run has {ranks}"
