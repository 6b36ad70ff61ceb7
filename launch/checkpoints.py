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
