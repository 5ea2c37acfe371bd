"""glam submit, stop and status: what is written, what is refused, what is told.

SLURM's programs are stand-ins of a line each here: they show what the verbs write and say for given answers. That the
answers are SLURM's is for tests/slurm_cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import UserError
from configs.run import RunConfig
from pretrain.cli import main
from pretrain.goodput import LedgerFile
from pretrain.incarnation import Incarnation
from pretrain.job_status import as_json, look_at
from pretrain.status import RankStatus, mark_done
from slurm.run_folder import Decision, append_decision
from tests.slurm.plans import ROOT, stub

SINFO = "echo 'batch*|0/2/0/2|up|infinite'"


class Site:
    """A cluster's file, a run's file, and stand-ins."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bin, self.run = folder, folder / "bin", folder / "runs" / "tiny"
        self.cluster, self.config = folder / "cluster.yaml", ROOT / "configs" / "demo.yaml"
        self.write(run_root=str(folder / "runs"))
        self.answers(sbatch="echo 41", sinfo=SINFO, squeue="true")
        stub(self.bin, "scancel", f'echo "$*" >> {self.bin}/scancelled')
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")

    def write(self, **site: Any) -> None:
        tree = {"ranks_per_node": 2, "time_limit": "60", "warning_s": 60, **site}
        self.cluster.write_text(yaml.safe_dump(tree))

    def answers(self, **programs: str) -> None:
        for name, body in programs.items():
            stub(self.bin, name, body)

    def submit(self, *words: str) -> int:
        return main(["submit", str(self.config), "--cluster", str(self.cluster), "run_dir=tiny", *words])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def refusal(site: Site, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    before = sorted(site.folder.rglob("submits/*"))
    assert site.submit(*words) == 2
    assert sorted(site.folder.rglob("submits/*")) == before, "something was written"
    return capsys.readouterr().err


def test_a_submit(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.submit("train.steps=7", "train.schedule.warmup_steps=2") == 0
    made = site.run / "submits" / "0001"
    assert sorted(p.name for p in made.iterdir()) == ["cluster.yaml", "code", "config.yaml", "job.json", "job.sbatch"]
    config = RunConfig.load(made / "config.yaml")
    assert (config.run_dir, config.train.steps) == (str(site.run), 7)
    facts = json.loads((made / "job.json").read_text())
    assert (facts["job"], facts["name"], facts["nodes"], facts["ranks"]) == ("41", "demo", 1, 2)
    said = capsys.readouterr().out
    for way in ("squeue --jobs=41", f"tail -F {made}/job.log", f"glam status {site.run}", f"glam stop {site.run}"):
        assert way in said
    assert site.submit() == 0 and (site.run / "submits" / "0002" / "job.sbatch").exists()


def test_the_code_that_runs_is_the_one_submitted(site: Site) -> None:
    """The copy alone, from any folder, and nothing but code and presets in it."""
    site.submit()
    code = site.run / "submits" / "0001" / "code"
    files = [path for path in code.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".yaml"}
    assert {path.name for path in code.iterdir()} == {"configs", "model", "data_prep", "slurm", "parallel", "pretrain"}
    program = "import configs.run, slurm.verdict, pretrain.main; print(configs.run.__file__, pretrain.main.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(code)}, cwd=site.folder,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(path.startswith(str(code)) for path in done.stdout.split())
    help_text = subprocess.run(
        [sys.executable, code / "pretrain" / "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage: pretrain/main.py" in help_text.stdout


def test_a_dry_run_writes_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.answers(sbatch="exit 9", sinfo="exit 9")
    before = sorted(site.folder.rglob("*"))
    assert site.submit("--dry-run", "--nodes", "2", "--launcher", "torchrun", "parallel.pipeline=2") == 0
    said = capsys.readouterr().out
    assert said.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2" in said and "torch.distributed.run" in said
    assert sorted(site.folder.rglob("*")) == before


def test_prep_is_submitted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.folder)
    words = ["submit", str(ROOT / "configs" / "corpus_demo.yaml"), "--cluster", str(site.cluster), "--prep"]
    assert main([*words, "--nodes", "2", "output=corpus"]) == 0
    script = (site.folder / "corpus.jobs" / "submits" / "0001" / "job.sbatch").read_text()
    assert "--mpi=pmi2" in script and "prep" in script and "#SBATCH --job-name=prep-corpus" in script
    assert main([*words, "--launcher", "torchrun"]) == 2


# ---- refusals -------------------------------------------------------------------------------------------------------
def test_no_slurm_here(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.folder))
    assert "no sbatch on this machine" in refusal(site, capsys)


def test_partitions(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert "3 nodes; partition batch has 2" in refusal(site, capsys, "--nodes", "3", "parallel.pipeline=3")
    site.write(run_root=str(site.folder / "runs"), partition="gpu")
    assert "partition 'gpu'" in refusal(site, capsys)


def test_sbatch_says_no(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are told, and the run is as it was."""
    site.run.mkdir(parents=True)
    (site.run / "STOP").touch()
    site.answers(sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1")
    assert "Invalid account" in refusal(site, capsys)
    assert (site.run / "STOP").exists()
    site.answers(sbatch="echo 42")
    assert site.submit() == 0 and not (site.run / "STOP").exists()


def test_a_run_folder_that_cannot_be_written(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.run.parent.mkdir()
    site.run.write_text("a file")
    assert "cannot be written" in refusal(site, capsys)


def test_a_job_of_the_run_waits_or_runs(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.submit()
    site.answers(squeue="echo '41|RUNNING|demo|node[1-2]'")
    assert "job 41" in (told := refusal(site, capsys)) and "is RUNNING (node[1-2])" in told and "glam stop" in told
    site.answers(squeue="echo '41|RUNNING|another|node1'")  # numbers began anew
    assert site.submit() == 0
    site.answers(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert site.submit() == 0
    site.answers(squeue="echo 'Unable to contact slurm controller' >&2; exit 1")  # then nothing is known
    assert "Unable to contact" in refusal(site, capsys)


def test_a_start_lives(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    Incarnation.take(site.run, 2)  # by this very process
    assert f"process {os.getpid()}" in refusal(site, capsys)
    record = site.run / "starts" / "000001.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "time": 1.0}))  # the number is another process's by now
    assert site.submit() == 0
    record.write_text(json.dumps({**facts, "host": "elsewhere"}))
    (site.run / "metrics.jsonl").write_text("")
    RankStatus(site.run, 0, start=1).write("running")
    assert "on elsewhere (start 1), which wrote 0 s ago" in refusal(site, capsys)
    append_decision(site.run, Decision(time.time() + 1, "1", 1, "node", "r", None, False, True))
    assert site.submit() == 0  # its job has ended


def test_a_run_that_is_done(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.run.mkdir(parents=True)
    mark_done(site.run, 500)
    assert "is done (500 steps)" in refusal(site, capsys)
    assert site.submit("train.steps=501") == 0 and not (site.run / "DONE").exists()


def test_a_warning_too_short_for_a_save(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.run.mkdir(parents=True)
    record = {"kind": "event", "step": 5, "event": "saved", "seconds": 45.0}
    (site.run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "warning_s=60; a save takes 45 s" in refusal(site, capsys)
    site.write(run_root=str(site.folder / "runs"), warning_s=105)
    assert site.submit() == 0
    site.write(run_root=str(site.folder / "other"), storage_bytes_per_s=1e6)  # a new run: 115 MB at 1 MB/s
    assert "a save takes 11" in refusal(site, capsys)


def test_nodes_and_layout(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert "take 1" in refusal(site, capsys, "--nodes", "2", "parallel.data=2")


def test_two_submits_at_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.answers(sbatch="sleep 2; echo 41")
    words = [str(site.config), "--cluster", str(site.cluster), "run_dir=tiny"]
    other = subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", "submit", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while not list(site.run.glob("submits/0001/job.sbatch")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "another submit" in refusal(site, capsys)
    assert other.wait(20) == 0


# ---- stop and status ------------------------------------------------------------------------------------------------
def test_stop(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.submit()
    site.answers(squeue="echo '41|RUNNING|demo|node1'")
    assert main(["stop", str(site.run)]) == 0 and (site.run / "STOP").exists()
    assert "saves after its present step and ends" in capsys.readouterr().out
    site.answers(squeue="echo '41|PENDING|demo|(Priority)'")
    main(["stop", str(site.run)])
    assert (site.bin / "scancelled").read_text().splitlines() == ["--signal=USR1 41", "41"]
    assert "is taken from the queue" in capsys.readouterr().out


def test_stop_without_slurm(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Incarnation.take(site.run, 2)
    monkeypatch.setenv("PATH", str(site.folder))
    assert main(["stop", str(site.run)]) == 0 and (site.run / "STOP").exists()
    assert f"process {os.getpid()}" in capsys.readouterr().out
    assert main(["stop", str(site.folder)]) == 2 and "holds no run" in capsys.readouterr().err


def test_status(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.submit()
    capsys.readouterr()
    start = Incarnation.take(site.run, 2).number
    RankStatus(site.run, 1, start, step=30).write("failed", "out_of_memory", "no [more] memory")
    RankStatus(site.run, 0, start, step=30).write("failed", None, "as rank 1")
    (site.run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (site.run / "metrics.jsonl").write_text('{"kind": "train", "step": 29}\n{"kind": "tra')
    append_decision(site.run, Decision(5.0, "41", 1, "node", "node: lost", 10, True, True))
    LedgerFile(site.run, 1).close(step_seconds=12.5)
    site.answers(squeue="echo '41|RUNNING|demo|node1'")
    assert main(["status", str(site.run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["jobs"] == [{"id": "41", "state": "RUNNING", "name": "demo", "reason": "node1"}]
    assert (found["step"], found["steps"], found["checkpoint_step"]) == (29, 500, 20)
    assert found["last_failure"]["cause"] == "out_of_memory" and found["last_failure"]["rank"] == 1
    assert found["ranks"] == {"failed": 2} and found["starts"][0]["start"] == 1 and found["starts"][0]["ranks"] == 2
    assert found["decisions"][0]["reason"] == "node: lost" and found["goodput"]["steps"] == 12.5
    assert not found["done"] and not found["stop"] and found["log"].endswith("0001/job.log")
    assert main(["status", str(site.run)]) == 0
    shown = capsys.readouterr().out
    for words in ("29 of 500", "step-00000020", "out_of_memory: no [more] memory", "41 RUNNING", "goodput"):
        assert words in shown


def test_status_without_slurm(site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    site.submit()
    capsys.readouterr()
    monkeypatch.setenv("PATH", str(site.folder))
    assert main(["status", str(site.run), "--json"]) == 0
    assert "no squeue on this machine" in json.loads(capsys.readouterr().out)["slurm"]


def test_status_of_a_folder_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: [")
    found = as_json(look_at(tmp_path))
    assert (found["step"], found["steps"], found["checkpoint"], found["goodput"]) == (None, None, None, None)


def test_of_a_long_run_only_the_end_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "x": "{"y" * 1000}"}}\n' for n in range(5000)))
    assert look_at(tmp_path).step == 4999


@pytest.mark.parametrize("verb", ["submit", "status", "stop", "preflight"])
def test_verbs_have_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0 and f"example: glam {verb}" in capsys.readouterr().out


def test_the_example_clusters_carry_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ROOT / "slurm" / "clusters" / "example.yaml"
    assert main(["submit", str(ROOT / "configs" / "glam.yaml"), "--cluster", str(cluster), "--dry-run"]) == 0
    assert "#SBATCH --nodes=128" in capsys.readouterr().out


def test_errors_are_for_users() -> None:
    with pytest.raises(UserError, match="holds no run"):
        from pretrain.job_verbs import _run_folder

        _run_folder("/nonexistent")
