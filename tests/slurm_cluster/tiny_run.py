"""A run of 14,000 parameters on four ranks, and what is to be true of its folder."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.metrics_file import read_metrics
from slurm.run_folder import read_decisions, read_ranks
from tests.slurm_cluster.cluster import Slurm

MAIN = (sys.executable, "pretrain/main.py")
GLAM = (sys.executable, "-m", "pretrain.cli")


@dataclass(frozen=True)
class TinyRun:
    """A configuration file beside its run folder."""

    config: Path
    run: Path

    @classmethod
    def write(cls, folder: Path, corpus: Path, name: str = "run", **train: Any) -> TinyRun:
        """Data × 2, tensor × 2; experts over two ranks. A constant learning rate: weights depend on the step alone."""
        tree: dict[str, Any] = {
            "name": "tiny",
            "run_dir": str(folder / name),
            "model": {
                "vocab_size": 512, "num_layers": 2, "width": 16,
                "attention": {"num_heads": 2, "head_width": 8},
                "ffn": {"width": 32},
                "moe": {
                    "num_experts": 2,
                    "expert": {"width": 32, "activation": "relu", "gated": False},
                    "router": {"kind": "topk"},
                },
            },
            "parallel": {"tensor": 2, "expert": 2},
            "data": {"sources": [{"name": n, "path": str(corpus / "train" / n)} for n in ("json", "email")]},
            "train": {
                "steps": 20, "sequence_length": 32, "batch_tokens": 128, "micro_batch_sequences": 2,
                "optimizer": {"peak_lr": 1e-3},
                "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 0},
                "precision": "float32", "log_every_steps": 1, "save_every_steps": 10,
                **train,
            },
        }  # fmt: skip
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return cls(config, folder / name)

    def command(self, *overrides: str) -> list[str]:
        """For a rank."""
        return [*MAIN, "--config", str(self.config), *overrides]

    def steps(self) -> list[int]:
        """Those with a record, in the order of the file."""
        return [record["step"] for record in read_metrics(self.run) if record["kind"] == "train"]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in read_metrics(self.run) if record["kind"] == "train"}

    def newest(self) -> Path:
        return complete_checkpoints(self.run)[-1]

    def saved_steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in complete_checkpoints(self.run)]

    def starts(self) -> int:
        """How often it was started."""
        return len(list((self.run / "starts").glob("*.json")))

    def weights(self) -> dict[str, bytes]:
        """What each rank wrote into the newest checkpoint."""
        return {path.name: path.read_bytes() for path in sorted(self.newest().glob("rank-*.safetensors"))}

    def check_whole(self, steps: int) -> None:
        """Ended, with each step on record once and in order."""
        assert self.steps() == list(range(1, steps + 1))
        assert self.newest().name == f"step-{steps:08d}"
        assert not [path.name for path in (self.run / "checkpoints").iterdir() if "damaged" in path.name]


@dataclass
class Submitted:
    """A tiny run and the job that `glam submit` makes of it. It has no end until it is told to `end_soon`."""

    slurm: Slurm
    tiny: TinyRun
    site: dict[str, Any] = field(default_factory=dict)  # of the cluster's file
    job: int = 0

    def submit(self, *overrides: str) -> int:
        site = {"ranks_per_node": 2, "time_limit": "30", "warning_s": 60, "kill_wait_s": 5, **self.site}
        file = self.tiny.config.with_name("cluster.yaml")
        file.write_text(yaml.safe_dump(site), encoding="utf-8")
        command = [*GLAM, "submit", self.tiny.config, "--cluster", file, "--nodes", 2, "train.steps=100000", *overrides]
        match = re.search(r"job (\d+) is queued", said := self.slurm.run(*command))
        assert match, said
        self.job = int(match[1])
        return self.job

    @property
    def run(self) -> Path:
        return self.tiny.run

    def nodes(self) -> list[str]:
        """Of the job, as it runs now."""
        names = self.slurm.run("scontrol", "show", "hostnames", self.slurm.facts(self.job)["NodeList"])
        return names.split()

    def rank_processes(self) -> list[int]:
        return self.slurm.processes(f"{self.folder}/code/pretrain/main.py")

    @property
    def folder(self) -> Path:
        """Of the newest submit."""
        return max((self.tiny.run / "submits").iterdir())

    def warn_once(self) -> None:
        """SLURM's warning before a time limit; the start that follows has time again."""
        self.slurm.warn_soon(self.job)
        self.until_log("got USR1")
        self.slurm.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=30")

    def until_step(self, step: int) -> None:
        reached = lambda: max(self.tiny.steps(), default=0) >= step  # noqa: E731
        self.slurm.until(self.job, reached, f"to reach step {step}")

    def until_start(self, number: int) -> None:
        """Until the run was started so many times."""
        self.slurm.until(self.job, lambda: self.tiny.starts() >= number, f"to start for the {number}th time")

    def until_starting_up(self) -> None:
        """Until all ranks are on record; it takes seconds more until they meet, and have a start's number."""
        ranks = 2 * int(self.site.get("ranks_per_node", 2))
        self.slurm.until(self.job, lambda: [r.start for r in read_ranks(self.run)] == [0] * ranks, "to start up")

    def until_decision(self, number: int) -> None:
        """Until the end of so many starts was judged."""
        self.slurm.until(self.job, lambda: len(read_decisions(self.run)) >= number, f"to end for the {number}th time")

    def until_log(self, words: str) -> None:
        self.slurm.until(self.job, lambda: words in self.log(), f"to say {words!r}")

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def log_of_start(self) -> str:
        """What was said since the job's newest start."""
        return self.log().rpartition(": on node")[2]

    def end_soon(self, steps: int = 20) -> None:
        """What starts from now on ends so many steps behind those on record."""
        config = self.folder / "config.yaml"
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        tree["train"]["steps"] = self.tiny.steps()[-1] + steps
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def until_done(self) -> None:
        assert self.slurm.wait(self.job) == "COMPLETED", self.log()
        assert (self.tiny.run / "DONE").exists()

    def check_whole(self, starts: int) -> None:
        tree = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        self.tiny.check_whole(tree["train"]["steps"])
        assert self.tiny.starts() == starts, self.log()
