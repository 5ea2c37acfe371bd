"""`glam preflight`: a sound setup passes and is left as it was; every planted fault is found, named and told with a
remedy; exit codes; launched ranks and ranks of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.run import RunConfig
from data_prep.manifest import MANIFEST, json_bytes, read_manifest
from parallel.topology import Topology
from pretrain import preflight_machine as machine
from pretrain.local_ranks import run_ranks
from pretrain.parity_ranks import write_seed_checkpoint
from pretrain.preflight_disk import Disk, judge_disk
from pretrain.preflight_report import GIB, Check, Report, Where, spans
from pretrain.preflight_verbs import preflight
from slurm.environ import free_port
from tests.conftest import MakeData
from tests.pretrain.preflight_jobs import Case, before_and_after_job, cases_job
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("layout", "versions", "same everywhere", "devices", "memory", "main memory", "open files", "leftovers",
         "clocks", "run folder", "room for checkpoints", "disk speed", "data", "tokenizer", "enough data", "checkpoint",
         "checksums")  # fmt: skip


@pytest.fixture(scope="module")
def config(make_data: MakeData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Tensor 2, data 2; experts over both."""
    run_dir = str(tmp_path_factory.mktemp("runs") / "new" / "run")
    plain = tiny_config("model.vocab_size=512", "parallel={tensor: 2, expert: 2}", "train.eval_sequences=32")
    return plain.model_copy(update={"data": make_data(json=1.0, email=3.0), "run_dir": run_dir})


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    """With keys of sections replaced, or whole values."""
    update = {
        name: getattr(config, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return config.model_copy(update=update)


def with_sources(config: RunConfig, **paths: Path) -> RunConfig:
    sources = tuple(
        s.model_copy(update={"path": str(paths[s.name])}) if s.name in paths else s for s in config.data.sources
    )
    return changed(config, data={"sources": sources})


def copied(config: RunConfig, name: str, to: Path) -> Path:
    """A copy of a source's folder, to be spoiled."""
    [path] = [source.path for source in config.data.sources if source.name == name]
    shutil.copytree(path, to)
    return to


# ---- planted faults, all in one start of four ranks -----------------------------------------------------------------
def make_cases(config: RunConfig, tmp: Path) -> dict[str, Case]:
    damaged = copied(config, "json", tmp / "damaged")
    shard = sorted(damaged.glob("*.bin"))[-1]
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    foreign = copied(config, "json", tmp / "foreign")
    manifest = replace(read_manifest(foreign), tokenizer_sha256="f" * 64, tokenizer="nowhere")
    manifest = replace(manifest, sha256=manifest.own_sha256())
    (foreign / MANIFEST).write_bytes(json_bytes(dataclasses.asdict(manifest)))
    for name in ("locks", "shm", "held"):
        (tmp / name / "py311" / "some_op").mkdir(parents=True)
    (tmp / "locks" / "py311" / "some_op" / "lock").touch()
    (tmp / "shm" / "deepspeed_allreduce_buffer_0").write_bytes(bytes(2**20))
    other = changed(config, run_dir=str(tmp / "other_model"))
    wider = changed(other, model={"width": 64})
    write_seed_checkpoint(wider, tmp / "other_model" / "checkpoints" / "step-00000002")
    noisy = RunConfig.check(
        {**config.model_dump(mode="json"), "model": {**config.model_dump(mode="json")["model"], "moe": {
            **config.model_dump(mode="json")["model"]["moe"], "router": {"kind": "noisy_topk"}}}}, where="test"
    )  # fmt: skip
    [email] = [Path(source.path) for source in config.data.sources if source.name == "email"]
    return {
        "sound": Case(config, quick=False),
        "damaged": Case(with_sources(config, json=damaged)),
        "tokenizer": Case(with_sources(config, json=foreign)),
        "vocabulary": Case(changed(config, model={"vocab_size": 500})),
        "apart": Case(config, others=((3, changed(config, run_dir=str(tmp / "elsewhere"))),)),
        "absent": Case(config, others=((2, with_sources(config, json=tmp / "absent")),)),
        "other data": Case(config, others=((1, with_sources(config, json=email)),)),
        "epochs": Case(changed(config, train={"steps": 100_000})),
        "huge": Case(changed(config, model={"vocab_size": 2**32})),
        "checkpoint": Case(other),
        "sums": Case(config, "wrong_sums", (1,)),
        "slow": Case(config, "slow_links", (2,)),
        "lock": Case(config, "stale_lock", (0, 1, 2, 3), path=str(tmp / "locks")),
        "buffers": Case(config, "left_buffers", (0,), path=str(tmp / "shm")),
        "clock": Case(config, "clock_ahead", (2,)),
        "code": Case(config, "other_code", (3,)),
        "torch": Case(config, "other_torch", (1,)),
        "files": Case(config, "few_files", (1,)),
        "tampered": Case(config, "tampered_training", (0, 1, 2, 3), quick=False),
        "noisy": Case(noisy, quick=False),
    }


@pytest.fixture(scope="module")
def reports(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    cases = make_cases(config, tmp_path_factory.mktemp("cases"))
    found = run_ranks(4, cases_job, list(cases.values()), timeout_s=240)
    assert all(rank == found[0] for rank in found), "every rank gets the same report"
    return dict(zip(cases, found[0]))


def named(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_sound_setup_passes(reports: dict[str, Report], config: RunConfig) -> None:
    report = reports["sound"]
    assert report.passed and report.refusal() is None
    told = {check.name: check for check in report.checks}
    links = [f"collectives: {kind}" for kind in ("world", "tensor", "data, expert replicas", "expert")]
    assert list(told) == [*QUICK, *links, "parity"]
    assert {check.status for check in report.checks if not check.name.startswith("collectives")} == {"ok"}
    assert {told[name].status for name in links} <= {"ok", "warn"}  # on a busy machine one pair may be far slower
    assert "tp=2,ep=2,dp=2" in told["parity"].found and "GB/s" in told["collectives: tensor"].found
    assert told["checksums"].numbers["blocks_read"] == told["checksums"].numbers["blocks"] >= 4
    json.loads(json.dumps(report.as_json(), allow_nan=False))


def test_nothing_is_left_behind(reports: dict[str, Report], config: RunConfig) -> None:
    assert not Path(config.run_dir).parent.exists()


@pytest.mark.parametrize(
    ("case", "check", "status", "words", "remedy"),
    [
        ("damaged", "checksums", "no", ("damaged/shard-", ".bin: bytes 0..", "not what was written"), "glam prep"),
        ("tokenizer", "tokenizer", "no", ("different tokenizers", "'json' ffffffffffff", "'email'"), "one tokenizer"),
        ("vocabulary", "tokenizer", "no", ("vocabulary of 512", "model.vocab_size=500"), "model.vocab_size"),
        ("apart", "run folder", "no", ("not one folder for all", "rank 3 on"), "run_dir="),
        ("absent", "data", "no", ("absent: no such dataset", "(rank 2 on"), "glam prep"),
        ("other data", "data", "no", ("other data than on rank 0", "rank 1 on"), "shared disk"),
        ("epochs", "enough data", "warn", ("12,800,000 tokens", "'json'", "times"), "fewer steps"),
        ("huge", "memory", "no", ("GiB a rank needed",), "more ranks"),
        ("huge", "room for checkpoints", "no", ("GiB free", "a checkpoint takes"), "free space"),
        ("checkpoint", "checkpoint", "no", ("holds another model", "model.width is 64 there, 32 here"), "run_dir"),
        ("sums", "collectives: world", "no", ("rank(s) 1: all-reduce gave wrong values", "nan in place"), "network"),
        ("sums", "collectives: tensor", "no", ("group 0, 1: rank(s) 1:",), "ranks 0, 1 on"),
        ("slow", "collectives: tensor", "warn", ("slow: ranks 2, 3 at 0.",), "ranks 2, 3 on"),
        ("slow", "collectives: suspects", "warn", ("rank 2 on", "several kinds"), "node"),
        ("lock", "leftovers", "warn", ("builds that nobody is at", "some_op/lock"), "rm "),
        ("buffers", "leftovers", "warn", ("1 buffer(s) of ended jobs, 1.0 MiB",), "deepspeed_allreduce_buffer_*"),
        ("clock", "clocks", "warn", ("5.0 s apart", "rank 2 on", "+5.0 s"), "time server"),
        ("code", "same everywhere", "no", ("other program files (rank 3 on",), "one checkout"),
        ("torch", "versions", "no", ("torch 2.99.0, expected", "(rank 1 on"), "pip install"),
        ("torch", "same everywhere", "no", ("torch 2.99.0, elsewhere 2.",), "one environment"),
        ("files", "open files", "no", ("200 open files allowed, 268 needed (rank 1 on",), "ulimit -n"),
        ("tampered", "parity", "no", ("departs from one process in the gradients", "ratio 2.0000"), "glam parity"),
        ("noisy", "parity", "left out", ("noisy_topk",), ""),
    ],
)
def test_a_planted_fault_is_found_and_named(
    reports: dict[str, Report], case: str, check: str, status: str, words: tuple[str, ...], remedy: str
) -> None:
    found = named(reports[case], check)
    assert found.status == status and all(word in found.found for word in words), found
    assert remedy in found.remedy
    assert reports[case].passed == ("no" not in {check.status for check in reports[case].checks})


def test_one_fault_hides_no_other_check(reports: dict[str, Report]) -> None:
    """And brings none along, but for what follows from it."""
    noes = {case: [check.name for check in report.checks if check.status == "no"] for case, report in reports.items()}
    assert noes["damaged"] == ["checksums"] and noes["apart"] == ["run folder"] and noes["tampered"] == ["parity"]
    assert noes["noisy"] == noes["slow"] == noes["lock"] == noes["clock"] == []
    assert noes["absent"] == ["data"] and noes["code"] == ["same everywhere"]
    refusal = reports["huge"].refusal()
    assert isinstance(refusal, UserError) and "memory: " in refusal.found and "room for checkpoints: " in refusal.found
    assert named(reports["sums"], "data").status == "ok" and "collectives: expert" in {
        check.name for check in reports["sums"].checks if check.status != "no"
    }


def test_quick_leaves_the_parity_step_out(reports: dict[str, Report]) -> None:
    assert "parity" not in {check.name for check in reports["damaged"].checks}


def test_training_is_the_same_after_a_preflight(config: RunConfig, tmp_path: Path) -> None:
    """To the bit: no group, no random number and no memory of it is left in the process."""
    for before, report, after in run_ranks(4, before_and_after_job, config, str(tmp_path)):
        assert report.passed
        assert before.losses == after.losses and before.norms == after.norms
        for name, boxes in before.weights.items():
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(boxes, after.weights[name]))


def test_a_full_disk_is_a_no(config: RunConfig, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        alone = changed(config, run_dir=str(disk / "run"), parallel={"tensor": 1, "expert": 1})
        (disk / "filler").write_bytes(bytes(200 * 1024))
        [[roomless]] = run_ranks(1, cases_job, [Case(alone)])
        (disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free))
        [[full]] = run_ranks(1, cases_job, [Case(alone)])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    room = named(roomless, "room for checkpoints")
    assert room.status == "no" and "0.1 MiB free" in room.found, room
    assert named(full, "run folder").status == "no" and "No space left" in named(full, "run folder").found
    assert not full.passed


# ---- judging alone --------------------------------------------------------------------------------------------------
def where(config: RunConfig, ranks: int = 4, meant: int | None = None, hosts: int = 1) -> Where:
    names = tuple(f"node{rank * hosts // ranks}" for rank in range(ranks))
    topology = Topology(0, ranks // 2, 2) if ranks > 1 else Topology(0, 1)
    return Where(config, topology, torch.device("cpu"), ranks // hosts, meant or ranks, True, names)


def gpu(rank: int, name: str = "H100", gpus: int = 4) -> machine.Device:
    return machine.Device("nccl", gpus, 4, 4, name, f"GPU-{rank}")


CPU = machine.Device("gloo", 0, 0, 4, "x86_64")


@pytest.mark.parametrize(
    ("devices", "status", "words"),
    [
        ([gpu(rank) for rank in range(4)], "ok", "4 x H100, nccl"),
        ([CPU] * 4, "ok", "4 on the CPU, gloo"),
        ([gpu(0), gpu(1), gpu(2), CPU], "no", "no GPU on rank 3 on node1"),
        ([gpu(rank, gpus=2) for rank in range(4)], "no", "2 GPU(s) for 4 ranks of this machine"),
        ([gpu(0), gpu(0), gpu(2), gpu(3)], "no", "one GPU shared by ranks 0, 1 on node0"),
        ([gpu(0), gpu(1), gpu(2), gpu(3, "A100")], "warn", "3 x H100, 1 x A100"),
        ([replace(CPU, installed=8)] * 4, "warn", "8 GPU(s) that are not used"),
    ],
)
def test_devices(config: RunConfig, devices: list[machine.Device], status: str, words: str) -> None:
    [check] = machine.judge_devices(where(config, hosts=2), devices)
    assert check.status == status and words in check.found, check


@pytest.mark.parametrize(
    ("there_gib", "free_gib", "wanted"),
    [
        (10.0, 100.0, {"memory": "ok", "main memory": "ok"}),
        (0.0001, 100.0, {"memory": "no"}),
        (10.0, 0.0001, {"memory": "ok", "main memory": "warn"}),
    ],
)
def test_memory(config: RunConfig, there_gib: float, free_gib: float, wanted: dict[str, str]) -> None:
    found = machine.Memory(int(there_gib * GIB), "main memory, no GPU", int(free_gib * GIB), False, 4)
    checks = machine.judge_memory(where(config), [found] * 4)
    assert {check.name: check.status for check in checks} == wanted


def test_memory_between_training_and_its_copies(config: RunConfig) -> None:
    """Enough to train, too little to save beside it."""
    need = machine.budget.bytes_per_rank(config, 4)
    found = machine.Memory(10 * GIB, "main memory", need.total * 4 + need.optimizer, False, 4)
    check = machine.judge_memory(where(config), [found] * 4)[1]
    assert check.status == "warn" and "stand still while it saves" in check.found
    at_once = changed(config, train={"async_save": False})
    assert machine.judge_memory(where(at_once), [found] * 4)[1].status == "ok"


def test_memory_of_ranks_that_are_not_here_is_left_out_unless_given(config: RunConfig) -> None:
    found = [machine.Memory(GIB, "main memory", GIB, False, 4)] * 4
    large = changed(config, parallel={"data": 64})
    [check] = machine.judge_memory(where(large, meant=128), found)
    assert check.status == "left out" and "128" in check.found
    given = changed(large, cluster={"device_memory_gib": 0.00001})
    assert machine.judge_memory(where(given, meant=128), found)[0].status == "no"


def test_a_lock_that_is_held_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op" / "lock"
    with lock.open("x"):
        assert machine.stale_locks() == []
    assert machine.stale_locks() == [lock]


def test_room_counts_what_is_kept(config: RunConfig) -> None:
    one = machine.budget.checkpoint_bytes(config.model)
    for free, keep, every, status in (
        (one * 5, 3, None, "ok"), (one * 3, 3, None, "warn"), (one * 5, 3, 2, "warn"), (one - 1, 3, None, "no")
    ):  # fmt: skip
        kept = changed(config, train={"keep_checkpoints": keep, "keep_every_steps": every})
        [_, room] = judge_disk(where(kept, 1), [Disk(free=free)])
        assert room.status == status, (free / one, room)


def test_a_slow_disk_is_told(config: RunConfig) -> None:
    large = changed(config, model={"num_layers": 200_000})
    *_, speed = judge_disk(where(large, 4), [Disk(free=2**50, written=2**20, seconds=1.0)] * 4)
    assert speed.name == "disk speed" and speed.status == "warn" and "a save takes about" in speed.found


def test_spans() -> None:
    assert [spans(n) for n in ([], [3], [1, 2], [0, 1, 2, 5, 7, 8])] == ["", "3", "1, 2", "0-2, 5, 7, 8"]


# ---- the command ----------------------------------------------------------------------------------------------------
def ask(config: RunConfig, tmp_path: Path, *overrides: str, as_json: bool = True) -> int:
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    return preflight(SimpleNamespace(config=str(path), overrides=list(overrides), json=as_json))


def glam(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(launcher or (sys.executable,)), "-m", "pretrain.cli", "preflight", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def torchrun(ranks: int) -> tuple[str, ...]:
    return (str(Path(sys.executable).parent / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={free_port()}")


def test_on_ranks_of_its_own(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(config, tmp_path, "parallel={tensor: 1, expert: 1, data: 1}", as_json=False) == 0
    told = capsys.readouterr().out
    assert "preflight on 1 rank(s), dp=1" in told and "nothing speaks against this run" in told
    assert all(name in told for name in QUICK if name not in ("same everywhere", "clocks"))


def test_a_large_layout_is_tried_on_few_ranks(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensor 2, pipeline 2, data 4: here on eight ranks; and a broken shard is a no, exit code 1."""
    shutil.copytree(config.data.sources[0].path, tmp_path / "copy")
    shard = sorted((tmp_path / "copy").glob("*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    spoiled = with_sources(config, **{config.data.sources[0].name: tmp_path / "copy"})
    layout = "parallel={tensor: 2, pipeline: 2, expert: 4, data: 4}"
    assert ask(spoiled, tmp_path, layout, "train.batch_tokens=256") == 1
    told = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in told["checks"]}
    assert told["ranks"] == 8 and told["layout"] == "tp=2,pp=2,ep=2,dp=2" and not told["passed"]
    assert [name for name, check in checks.items() if check["status"] == "no"] == ["checksums"]
    assert "16 rank(s)" in checks["layout"]["found"] and "tried here on 8" in checks["layout"]["found"]
    assert checks["memory"]["status"] == "left out" and checks["parity"]["status"] == "ok"
    assert {f"collectives: {kind}" for kind in ("pipeline", "tied embedding", "expert")} <= checks.keys()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ("train.stepz", "steps")),
        ("data.heldout=[nowhere/at/all]", ("no data at nowhere/at/all", "glam prep")),
        ("parallel.tensor=3", ("parallel.tensor=3", "num_heads")),
    ],
)
def test_bad_input_ends_with_2(config: RunConfig, tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    (tmp_path / "run.yaml").write_text(config.dump(), encoding="utf-8")
    done = glam(str(tmp_path / "run.yaml"), override)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_on_launched_ranks(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.dump(), encoding="utf-8")
    done = glam(str(tmp_path / "run.yaml"), "--json", launcher=torchrun(4))
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # nothing else on standard output
    assert told["passed"] and told["ranks"] == 4 and told["layout"] == "tp=2,ep=2,dp=2"


def test_launched_ranks_that_do_not_carry_the_layout(config: RunConfig, tmp_path: Path) -> None:
    """A no like others: what needs no layout is looked at all the same."""
    (tmp_path / "run.yaml").write_text(config.dump(), encoding="utf-8")
    done = glam(str(tmp_path / "run.yaml"), "parallel={tensor: 2, pipeline: 2}", "--json", launcher=torchrun(2))
    assert done.stdout, done.stderr[-3000:]
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["layout"]["status"] == "no" and "2 rank(s) are no multiple of" in checks["layout"]["found"]
    assert checks["parity"]["status"] == "left out" and checks["checksums"]["status"] == "ok"


def test_launched_ranks_without_data_tell_it_once(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.dump(), encoding="utf-8")
    done = glam(str(tmp_path / "run.yaml"), "data.heldout=[nowhere]", launcher=torchrun(2))
    assert done.returncode != 0 and done.stderr.count("no data at nowhere") == 1, done.stderr
