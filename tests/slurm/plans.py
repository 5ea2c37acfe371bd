"""Plans of jobs for tests, and programs that stand in for the cluster's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from configs.site import SiteConfig
from slurm.nodes import Nodes
from slurm.render import JobPlan

ROOT = Path(__file__).resolve().parents[2]
HEAD_ENDS = "# ---- what follows is the same in every job"


def make_plan(folder: Path, nodes: int = 2, launcher: str = "srun", name: str = "tiny", **site: Any) -> JobPlan:
    tree = {"ranks_per_node": 2, "time_limit": "10", "warning_s": 60, **site}
    config = SiteConfig.check(tree, where="test")
    return JobPlan(
        name=name,
        run_dir=folder / "run",
        submit_dir=folder / "run" / "submits" / "0001",
        workdir=folder,
        site=config,
        nodes=Nodes(nodes, config.ranks_per_node),
        launcher=launcher,
        python=config.python or sys.executable,
    )


def stub(folder: Path, name: str, body: str) -> None:
    """An executable shell script of this name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
