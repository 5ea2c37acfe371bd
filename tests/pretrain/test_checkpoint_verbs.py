"""`glam checkpoint ...`: what each view prints, its exit code, and the messages of what it refuses."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import checkpoint_store as store
from parallel.checkpoint_manifest import Manifest
from pretrain import checkpoint_tools
from pretrain.arguments import CHECKPOINT_VIEWS, STORED_TYPES, glam_arguments
from pretrain.checkpoint_verbs import SHOWN
from pretrain.cli import main
from tests.pretrain.checkpoint_cases import document, planted, read, write, write_run
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny_config("model.num_layers=2")
UP = "blocks.0.moe.experts.up/weight"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2; not to be changed."""
    run = tmp_path_factory.mktemp("verbs") / "run"
    write_run(run, CONFIG, [0, 1])
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each case."""
    return shutil.copytree(made, tmp_path / "run")


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def glam(*arguments: str | Path) -> int:
    return main(["checkpoint", *map(str, arguments)])


def told(capsys: Capture, code: int, *arguments: str | Path) -> str:
    assert glam(*arguments) == code
    return capsys.readouterr().out


def told_json(capsys: Capture, code: int, *arguments: str | Path) -> Any:
    """One JSON object and nothing else, without NaN or Infinity, which are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(told(capsys, code, *arguments, "--json"), parse_constant=refuse)


def refused(capsys: Capture, *arguments: str | Path) -> str:
    """The one message of bad input."""
    assert glam(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and [said.err.count(part) for part in ("found:", "expected:", "remedy:")] == [1, 1, 1]
    return said.err


# ---- words ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("view", CHECKPOINT_VIEWS)
def test_views_have_help_with_an_example(view: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam(view, "--help")
    assert stopped.value.code == 0 and f"example: glam checkpoint {view}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "a view is missing"),
        (["verfy", "runs/demo", "--json"], "unknown view 'verfy': did you mean 'verify'?"),
        (["runs/demo"], "unknown view 'runs/demo'\n"),
    ],
)
def test_without_a_view_all_are_named(given: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam(*given)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and said in err and all(view in err for view in CHECKPOINT_VIEWS)


def test_plain_help_is_no_error(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam("--help")
    assert stopped.value.code == 0 and "verify | show | diff" in capsys.readouterr().out


def test_a_configuration_of_prep_may_bear_the_name_of_a_view_of_checkpoints() -> None:
    assert glam_arguments(["prep", "show"]).config == "show"


@pytest.mark.parametrize(
    "given", [["convert", "a"], ["upcycle", "a", "--to", "b"], ["verify", "a", "--threads", "0"], ["show", "a", "b"]]
)
def test_words_that_are_missing_or_too_many(given: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        glam(*given)
    assert stopped.value.code == 2 and "usage: glam" in capsys.readouterr().err


def test_help_needs_no_torch_and_no_view_loads_deepspeed() -> None:
    program = """
import sys
from pretrain.cli import main
try:
    main(["checkpoint", "show", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules, "help"
import pretrain.checkpoint_verbs, pretrain.huggingface, pretrain.upcycle
print("loaded", {"deepspeed", "megatron", "transformers"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded set()"


# ---- verify ---------------------------------------------------------------------------------------------------------
def test_verify_of_a_sound_run(run: Path, capsys: Capture) -> None:
    assert glam("verify", run) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"2 checkpoint(s) in {run}: all sound; ") and said.out.count("\n") == 1
    assert "GB/s" in said.out and "verify step-00000002" in said.err
    found = told_json(capsys, 0, "verify", run)
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert found["bytes"] == size and found["faults"] == 0 and found["seconds"] > 0


@pytest.mark.parametrize("where", ["head", "data", "manifest", "missing", "cut"])
def test_verify_names_the_damage(run: Path, capsys: Capture, where: str) -> None:
    folder = step(run, 1)
    manifest = Manifest.read(folder)
    file, box = folder / manifest.files[0].name, manifest.tensors[UP].boxes[0]
    data = bytearray((folder / "manifest.json").read_bytes() if where == "manifest" else file.read_bytes())
    if where == "missing":
        file.unlink()
    elif where == "cut":
        file.write_bytes(data[: box.start + 1])
    else:
        data[{"head": 20, "data": box.start + 11, "manifest": 500}[where]] ^= 4
        (folder / "manifest.json" if where == "manifest" else file).write_bytes(data)
    for path, count in ((run, 2), (folder, 1)):
        said = told(capsys, 1, "verify", path, "--threads", "2")
        verdict = said.splitlines()[-1]
        assert verdict.startswith(f"{count} checkpoint(s) in {path}: ") and "in 1 of them" in verdict
        assert str(folder) in said and str(step(run, 2)) not in said
        expected = {
            "head": (f"{file.name}: bytes 0..{manifest.files[0].head_bytes} of xxh128",),
            "data": (f"{file.name}: {UP} at [0, 0, 0]: bytes {box.start}..",),
            "manifest": ("manifest.json does not match its checksum",),
            "missing": (f"{file.name}: No such file",),
            "cut": (f"{box.start + 1} bytes, expected {manifest.files[0].bytes}", f"{UP} at [0, 0, 0]: "),
        }[where]
        assert all(part in said for part in expected), said
    first, second = told_json(capsys, 1, "verify", run)["checkpoints"]
    assert first["faults"] and second["faults"] == []


# ---- show -----------------------------------------------------------------------------------------------------------
def test_show_tells_what_a_run_has_saved(run: Path, capsys: Capture) -> None:
    said = told(capsys, 0, "show", run)
    for part in (step(run, 2), "tiny", "256", "start 1 of the run", "data 1, tensor 1", "experts", "exp_avg_sq"):
        assert str(part) in said
    assert UP not in said
    found = told_json(capsys, 0, "show", run)
    manifest = Manifest.read(step(run, 2))
    assert found["document"] == manifest.document and found["checkpoint"] == str(step(run, 2))
    assert found["tensors"].keys() == manifest.tensors.keys()
    assert found["kinds"]["weight"]["values"] == sum(found["parts"].values())
    assert found["files"] == {file.name: file.bytes for file in manifest.files}
    assert found["tensors"][UP] == {
        "shape": [4, 40, 32],
        "dtype": "float32",
        "boxes": 1,
        "bytes": 4 * 40 * 32 * 4,
        "files": ["rank-00000-000.safetensors"],
    }


def test_show_lists_tensors_by_pattern(run: Path, capsys: Capture) -> None:
    said = told(capsys, 0, "show", step(run, 1), "--tensors", "*.experts.*/weight")
    assert UP in said and "[4, 40, 32]" in said and "norm.scale" not in said and "2 of " in said
    assert "norm.scale/exp_avg_sq" in told(capsys, 0, "show", run, "--tensors")
    assert "'moe'" in refused(capsys, "show", run, "--tensors", "moe")


def test_show_tells_where_weights_come_from(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert glam("average", run, "--last", "2", "--to", tmp_path / "mean") == 0
    assert glam("convert", tmp_path / "mean", "--to", tmp_path / "half", "--dtype", "float16") == 0
    capsys.readouterr()
    said = told(capsys, 0, "show", tmp_path / "half")
    for part in ("checkpoint convert", "checkpoint average", str(tmp_path / "mean"), "step 1", "step 2", "share 0.5"):
        assert part in said
    assert "exp_avg" not in said and "saved" not in said


# ---- diff -----------------------------------------------------------------------------------------------------------
def test_diff_is_silent_about_what_is_equal(run: Path, capsys: Capture) -> None:
    said = told(capsys, 0, "diff", run, step(run, 2))
    count = len(Manifest.read(step(run, 2)).tensors)
    nothing = "0 of other values or types, 0 of other shapes, 0 only in A, 0 only in B: equal"
    assert said.splitlines()[2:] == [f"tensors: {count} bit-equal, {nothing}"]


def test_diff_names_what_differs(run: Path, tmp_path: Path, capsys: Capture) -> None:
    before = read(step(run, 2))
    tensors = {**before, UP: planted(before[UP], 9, float(before[UP].view(-1)[9]) + 0.25)}
    tensors["norm.scale/exp_avg"] = torch.zeros(3)
    del tensors["embed.weight/exp_avg"]
    other = tiny_config("model.num_layers=2", "train.seed=7", "name=other")
    store.save(tmp_path / "c", tensors, document(other, 2))
    said = told(capsys, 1, "diff", run, tmp_path / "c")
    for part in ("train.seed", '"other"', f"{UP}", "1 of 5,120", "0.25", "only in A: embed.weight/exp_avg"):
        assert part in said
    assert "of other shapes: norm.scale/exp_avg [32] [3]" in said and "differ" in said.splitlines()[-1]
    found = told_json(capsys, 1, "diff", run, tmp_path / "c")
    assert found["documents"]["config"] == {"name": {"a": "tiny", "b": "other"}, "train.seed": {"a": 0, "b": 7}}
    assert [(one["name"], one["differing"]) for one in found["unlike"]] == [(UP, 1)]
    assert not found["equal"] and found["bit_equal"] == len(before) - 3

    weights = ("diff", run, tmp_path / "c", "--tensors", "*/weight")
    assert "1 within 0.3" in told(capsys, 0, *weights, "--tolerance", "0.3")
    assert told_json(capsys, 0, *weights, "--tolerance", "0.3")["unlike"][0]["passes"]
    assert "1 of 5,120" in told(capsys, 1, *weights, "--tolerance", "0.2")
    assert told_json(capsys, 0, "diff", run, tmp_path / "c", "--tensors", "blocks.1*")["equal"], "settings do not count"


def test_diff_of_infinite_values_is_json(tmp_path: Path, capsys: Capture) -> None:
    store.save(tmp_path / "a", {"x": torch.tensor([1.0, float("nan"), float("inf")])}, {})
    store.save(tmp_path / "b", {"x": torch.tensor([1.5, 2.0, 3.0])}, {})
    (one,) = told_json(capsys, 1, "diff", tmp_path / "a", tmp_path / "b")["unlike"]
    assert (one["max_abs"], one["nonfinite"]) == (0.5, 2)


def test_diff_cuts_long_lists(tmp_path: Path, capsys: Capture) -> None:
    store.save(tmp_path / "a", {f"x{n:03d}": torch.zeros(1) for n in range(SHOWN + 5)}, {})
    store.save(tmp_path / "b", {"y": torch.zeros(1)}, {})
    said = told(capsys, 1, "diff", tmp_path / "a", tmp_path / "b")
    assert said.count("only in A: x") == SHOWN and "only in A: and 5 more" in said
    store.save(tmp_path / "c", {f"x{n:03d}": torch.ones(1) * n for n in range(SHOWN + 5)}, {})
    said = told(capsys, 1, "diff", tmp_path / "a", tmp_path / "c")
    assert f"tensors that differ: {SHOWN + 4}, the first {SHOWN}" in said, "x000 does not differ"
    rows = [line for line in said.splitlines() if "float32" in line]
    assert len(rows) == SHOWN and f"x{SHOWN + 4:03d}" in rows[0], "the worst first"


# ---- making ---------------------------------------------------------------------------------------------------------
def test_average_by_shares(run: Path, tmp_path: Path, capsys: Capture) -> None:
    paths = (step(run, 1), step(run, 2))
    said = told(capsys, 0, "average", *paths, "--to", tmp_path / "w", "--shares", "0.25,0.75")
    assert f"train.start_from={tmp_path / 'w'}" in said and "share 0.25" in said and str(paths[0]) in said
    first, second, mean = (read(path)[UP] for path in (*paths, tmp_path / "w"))
    assert torch.allclose(mean, first * 0.25 + second * 0.75, rtol=1e-5, atol=1e-7)


def test_convert_tells_what_it_made(run: Path, tmp_path: Path, capsys: Capture) -> None:
    found = told_json(capsys, 0, "convert", run, "--to", tmp_path / "w", "--dtype", "bfloat16")
    manifest = Manifest.read(tmp_path / "w")
    assert found["dtypes"] == ["bfloat16"] and found["tensors"] == len(manifest.tensors)
    assert found["bytes"] == sum(file.bytes for file in manifest.files) and found["origin"]["sources"][0]["step"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["average", "RUN", "RUN", "--last", "2"], "--last with 2 paths"),
        (["average", "RUN", "--last", "3"], "holds 2 checkpoint(s)"),
        (["average", "RUN"], "1 checkpoint to average"),
        (["average", "RUN", "RUN", "--shares", "0.5;0.5"], "--shares 0.5;0.5"),
        (["average", "RUN", "RUN", "--shares", "0.5,0.6"], "together 1.1"),
        (["average", "RUN", "EMPTY"], "no checkpoint and no run that has one"),
        (["convert", "NONE"], "is no folder"),
        (["convert", "EMPTY"], "no checkpoint and no run that has one"),
        (["upcycle", "NONE", "--experts", "4"], "is no folder"),
        (["export", "EMPTY"], "no checkpoint and no run that has one"),
        (["import", "NONE"], "is no folder"),
    ],
)
def test_what_makes_nothing(run: Path, tmp_path: Path, capsys: Capture, given: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "NONE": tmp_path / "none"}
    assert said in refused(capsys, *(places.get(word, word) for word in given), "--to", tmp_path / "w")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "empty"}


@pytest.mark.parametrize("view", ["verify", "show"])
def test_what_there_is_nothing_to_look_at(tmp_path: Path, capsys: Capture, view: str) -> None:
    (tmp_path / "started" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "latest").write_text("global_step10")
    assert "holds no complete checkpoint" in refused(capsys, view, tmp_path / "started")
    assert "glam checkpoint import" in refused(capsys, view, tmp_path / "hf")
    assert "DeepSpeed" in refused(capsys, view, tmp_path / "deepspeed")
    assert "is no folder" in refused(capsys, view, tmp_path / "none")


def test_diff_refuses_what_is_no_tolerance(run: Path, capsys: Capture) -> None:
    for tolerance in ("nan", "-1"):
        assert "--tolerance" in refused(capsys, "diff", run, run, f"--tolerance={tolerance}")


def test_threads_are_passed_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers: int) -> None:
            given.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(checkpoint_tools, "ThreadPoolExecutor", Pool)
    assert glam("verify", step(run, 1), "--threads", "3") == 0 and glam("verify", step(run, 1)) == 0
    assert given == [3, checkpoint_tools.THREADS]


def test_defaults_are_those_of_the_functions() -> None:
    from pretrain.huggingface import DTYPES, export_folder
    from pretrain.upcycle import upcycle

    export = glam_arguments(["checkpoint", "export", "a", "--to", "b"])
    assert export.dtype == inspect.signature(export_folder).parameters["dtype"].default
    assert DTYPES == STORED_TYPES
    made = glam_arguments(["checkpoint", "upcycle", "a", "--to", "b", "--experts", "8"])
    expected = {name: p.default for name, p in inspect.signature(upcycle).parameters.items()}
    assert {key: getattr(made, key) for key in ("k", "every", "offset", "seed")}.items() <= expected.items()


# ---- in and out -----------------------------------------------------------------------------------------------------
def test_export_import_and_diff_meet(tmp_path: Path, capsys: Capture) -> None:
    """Out in float32 and in again: the same weights."""
    write(tmp_path / "c", CONFIG)
    found = told_json(capsys, 0, "export", tmp_path / "c", "--to", tmp_path / "hf", "--dtype", "float32")
    assert found["dtype"] == "float32" and Path(found["folder"]) == tmp_path / "hf"
    said = told(capsys, 0, "import", tmp_path / "hf", "--to", tmp_path / "w")
    assert f"train.start_from={tmp_path / 'w'}" in said
    assert told_json(capsys, 0, "diff", tmp_path / "c", tmp_path / "w", "--tensors", "*/weight")["equal"]


def test_upcycle_copies_a_dense_model(tmp_path: Path, capsys: Capture) -> None:
    dense = tiny_config("model.num_layers=2", "model.moe=null")
    write(tmp_path / "c", dense)
    said = told(capsys, 0, "upcycle", tmp_path / "c", "--to", tmp_path / "w", "--experts", "3", "--seed", "5")
    assert "layers: 0\n" in said and f"train.start_from={tmp_path / 'w'}" in said
    source, made = read(tmp_path / "c"), read(tmp_path / "w")
    for expert in made[UP]:
        assert torch.equal(expert, source["blocks.0.ffn.in_proj.weight/weight"])
    assert len(made[UP]) == 3
