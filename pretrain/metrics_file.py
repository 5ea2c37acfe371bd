"""metrics.jsonl, read: for those who only look, and need no sink."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a line cut off by a crash is passed over."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def drop_after(path: Path, step: int) -> None:
    """Keep only whole records up to `step`, by one rename."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)
