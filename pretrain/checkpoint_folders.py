"""The checkpoints of a run on the disk: which are there, which a path means, which may go.

checkpoints/step-00000100/              complete; made by one rename, which replaces nothing
checkpoints/step-00000200.partial-3/    being written by start 3 of the run, or left by it: never read
checkpoints/step-00000200.damaged-4/    found damaged by start 4, which went on from the one before
checkpoints/step-00000200.before-4/     written by an older start, found by start 4 when it came to the same step
checkpoints/step-00000050.dropped-4/    being removed by start 4, as newer ones are there
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from configs.errors import UserError
from parallel.checkpoint_manifest import MANIFEST

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_LEFT = re.compile(r"\.(?:partial|dropped)-(\d+)$")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. Nothing is opened."""
    folder = run_dir / CHECKPOINTS
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run.

    Raises:
        UserError: neither.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder", "a checkpoint, or the folder of a run", "check the path")
    if found := complete_checkpoints(path) or complete_checkpoints(path.parent if path.name == CHECKPOINTS else path):
        return found[-1]
    if (path / CHECKPOINTS).is_dir() and not (path / MANIFEST).exists():
        raise UserError(f"{path} holds no complete checkpoint", "at least one", "train until the first save")
    return path


def to_be_dropped(found: list[Path], keep: int, keep_every_steps: int | None) -> list[Path]:
    """Of checkpoints, oldest first, those that are neither among the newest `keep` nor kept for good."""
    return [p for p in found[:-keep] if not keep_every_steps or step_of(p) % keep_every_steps]


def remove_leftovers(run_dir: Path, number: int) -> None:
    """Remove what starts before start `number` were writing or removing when they ended."""
    for left in (run_dir / CHECKPOINTS).glob("step-*.*"):
        match = _LEFT.search(left.name)
        if match and int(match[1]) < number:
            shutil.rmtree(left, ignore_errors=True)
