"""The code of a run as it was submitted, copied beside it: what is edited afterwards changes nothing in the queue."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOMS = ("configs", "model", "data_prep", "slurm", "parallel", "pretrain")
_KEPT = (".py", ".yaml")


def copy_code(to: Path) -> int:
    """Copy the rooms' *.py and *.yaml from where this very module was loaded; returns the number of files."""
    root, copied = Path(__file__).resolve().parent.parent, 0
    for room in ROOMS:
        for file in sorted((root / room).rglob("*")):
            if file.suffix in _KEPT and file.is_file():
                target = to / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                copied += 1
    return copied
