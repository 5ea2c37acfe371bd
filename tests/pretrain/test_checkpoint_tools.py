"""Tools for checkpoints, on real ones: what they find, what they make, what they refuse."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from configs.errors import UserError
from data_prep.progress import Reporter
from parallel import checkpoint_files, checkpoint_serial
from parallel import checkpoint_store as store
from parallel.checkpoint_manifest import MANIFEST, Damaged, Manifest
from parallel.checkpoint_serial import WholeReader
from parallel.checkpoint_write import write_manifest
from pretrain import budget, checkpoint_tools, checkpoint_views
from pretrain.checkpoint_tools import average, convert, find_faults, newest, open_checkpoint, verify_all
from pretrain.checkpoint_views import Comparison, compare, part_of, summarise
from pretrain.local_ranks import run_ranks
from tests.pretrain.checkpoint_cases import document, planted, ranks_job, read, write, write_run
from tests.tiny import make_model, tiny_config

SILENT = Reporter(None)
CONFIG = tiny_config("model.num_layers=2")
UP = "blocks.0.moe.experts.up/weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3; not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder, CONFIG, [0, 1, 2])
    return folder


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 of that run as two ranks write it."""
    folder = tmp_path_factory.mktemp("two") / "c"
    run_ranks(2, ranks_job, str(folder), CONFIG, 0, 1)
    return folder


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def differ(a: Path, b: Path, pattern: str = "*") -> Comparison:
    with open_checkpoint(a) as reader_a, open_checkpoint(b) as reader_b:
        return compare(reader_a, reader_b, pattern, SILENT)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# ---- verify ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit_bytes", [1, 2**28])
def test_verify_finds_the_box_that_is_damaged_however_work_is_cut(
    of_two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint_tools, "UNIT_BYTES", unit_bytes)
    folder = shutil.copytree(of_two_ranks, tmp_path / "c")
    manifest = Manifest.read(folder)
    assert find_faults(folder, manifest, SILENT, 2) == []
    box = manifest.tensors[UP].boxes[-1]
    file = manifest.files[box.file]
    flip(folder / file.name, box.start + 5)
    flip(folder / file.name, 3)  # in its head, which every unit of the file reads
    faults = find_faults(folder, manifest, SILENT, 2)
    assert {(fault.file, fault.tensor) for fault in faults} == {
        (file.name, ""),
        (file.name, f"{UP} at {[*box.offset]}"),
    }
    assert len(faults) == 2 and f"bytes {box.start}..{box.start + manifest.tensors[UP].box_bytes(box)}" in str(faults)
    assert [fault.tensor for fault in find_faults(folder, manifest, SILENT, names=[UP])] == [f.tensor for f in faults]
    boxes = sum(len(tensor.boxes) for tensor in manifest.tensors.values())
    assert len(list(checkpoint_tools._units(manifest, None))) == (boxes if unit_bytes == 1 else 2)


def test_verify_of_some_tensors_reads_no_others(of_two_ranks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(of_two_ranks, tmp_path / "c")
    manifest = Manifest.read(folder)
    for box in manifest.tensors["norm.scale/exp_avg"].boxes:
        flip(folder / manifest.files[box.file].name, box.start)
    assert find_faults(folder, manifest, SILENT, names=checkpoint_tools.weight_names(manifest)) == []
    assert len(find_faults(folder, manifest, SILENT)) == len(manifest.tensors["norm.scale/exp_avg"].boxes)


def test_verify_of_some_tensors_minds_no_other_file(of_two_ranks: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(of_two_ranks, tmp_path / "c")
    manifest = Manifest.read(folder)
    (box,) = manifest.tensors["random_state/rank-00000"].boxes
    flip(folder / manifest.files[1 - box.file].name, 3)
    assert find_faults(folder, manifest, SILENT, names=["random_state/rank-00000"]) == []
    assert len(find_faults(folder, manifest, SILENT)) == 1


def test_verify_reads_a_file_without_tensors_too(tmp_path: Path) -> None:
    file = checkpoint_files.write_file(tmp_path / "rank-00000-000.safetensors", []).file
    write_manifest(tmp_path, Manifest({}, (file,), {}))
    assert verify_all(tmp_path, SILENT)[0].faults == ()
    flip(tmp_path / file.name, file.bytes - 1)
    assert [fault.file for fault in verify_all(tmp_path, SILENT)[0].faults] == [file.name]


def test_verify_of_a_run_goes_on_behind_damage(run: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(run, tmp_path / "run")
    flip(step(spoilt, 1) / MANIFEST, 100)
    (step(spoilt, 2) / "rank-00000-000.safetensors").unlink()
    (spoilt / "checkpoints" / "step-00000009.partial-1").mkdir()
    for path in (spoilt, spoilt / "checkpoints"):
        first, second, third = verify_all(path, SILENT, 2)
        assert "checksum" in first.faults[0].what and first.bytes == 0
        assert [fault.file for fault in second.faults] == ["rank-00000-000.safetensors"]
        assert third.faults == ()
        assert third.bytes == sum(file.stat().st_size for file in step(spoilt, 3).iterdir())
    assert len(verify_all(step(spoilt, 3), SILENT)) == 1, "a checkpoint is itself, not its run"


def test_verify_counts_an_emptied_checkpoint_of_a_run_as_damage(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (found,) = verify_all(tmp_path / "run", SILENT)
    assert str(folder) in found.faults[0].what
    with pytest.raises(UserError, match="no checkpoint and no run"):
        verify_all(folder, SILENT)


def test_progress_ends_at_all_bytes(run: Path) -> None:
    """Of a terminal's bar, and so of what its forecast rests on."""
    told: list[int] = []

    class Counting(Reporter):
        def _lines(self, name: str, total: int, done: int):  # type: ignore[no-untyped-def]
            told.append(-total)
            return told.append

    verify_all(step(run, 1), Counting(Console(file=io.StringIO())))
    differ_reporter = Counting(Console(file=io.StringIO()))
    with open_checkpoint(run) as a, open_checkpoint(step(run, 1)) as b:
        compare(a, b, "*", differ_reporter)
    assert len([n for n in told if n < 0]) == 2 and sum(told) == 0


# ---- show -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.moe=null", "model.tied_embedding=false"),
        ("model.moe.router={kind: noisy_topk}", "model.attention.qk_norm=true", "model.attention.num_kv_heads=1"),
        ("model.attention.position={kind: rotary}", "model.ffn.gated=false", "model.moe.expert.gated=true"),
    ],
)
def test_parts_are_those_that_the_budget_counts(overrides: tuple[str, ...]) -> None:
    model = tiny_config(*overrides).model
    counts: dict[str, int] = {}
    for name, parameter in make_model(model).named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    expected = {key: value for key, value in vars(budget.parameters(model)).items() if value and "active" not in key}
    assert counts == expected


def test_summary_adds_up(run: Path, of_two_ranks: Path) -> None:
    for folder in (step(run, 1), of_two_ranks):
        manifest = Manifest.read(folder)
        summary = summarise(manifest)
        total = budget.parameters(CONFIG.model).total
        assert {kind: summary.kinds[kind].values for kind in ("weight", "exp_avg", "exp_avg_sq")} == dict.fromkeys(
            ("weight", "exp_avg", "exp_avg_sq"), total
        )
        assert set(summary.kinds) == {"weight", "exp_avg", "exp_avg_sq", "random state"}
        assert sum(summary.parts.values()) == total
        sizes = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
        heads = sum(file.head_bytes for file in manifest.files)
        assert summary.bytes == sizes and sum(kind.bytes for kind in summary.kinds.values()) == sizes - heads
        assert summary.files == len(manifest.files) == (2 if folder == of_two_ranks else 1)


# ---- diff -----------------------------------------------------------------------------------------------------------
def test_a_checkpoint_differs_in_nothing_from_itself(run: Path) -> None:
    found = differ(run, step(run, 3))
    assert found.equal(None) and not any(found.documents.values())
    assert all(one.bit_equal for one in found.compared)
    assert len(found.compared) == len(Manifest.read(step(run, 3)).tensors)


def test_layouts_do_not_matter_but_are_told(run: Path, of_two_ranks: Path) -> None:
    found = differ(step(run, 1), of_two_ranks)
    assert found.equal(None) and len(found.compared) == len(Manifest.read(of_two_ranks).tensors)
    assert found.documents == {"config": [], "state": [], "layout": [("data", 1, 2)], "tokenizers": []}


def test_documents_are_compared_by_key(run: Path, tmp_path: Path) -> None:
    other = tiny_config("model.num_layers=2", "train.seed=7")
    store.save(tmp_path / "c", {"x/weight": torch.zeros(1)}, document(other, 1))
    found = differ(step(run, 3), tmp_path / "c", "nothing")
    assert found.documents["config"] == [("train.seed", 0, 7)]
    assert ("step", 3, 1) in found.documents["state"] and ("cursor.drawn.a", 24, 8) in found.documents["state"]
    assert found.equal(None), "settings alone are no difference of tensors"


def test_one_planted_element_is_found(run: Path, of_two_ranks: Path, tmp_path: Path) -> None:
    before = read(of_two_ranks)[UP]
    write(tmp_path / "c", CONFIG, **{UP: planted(before, 1234, float(before.view(-1)[1234]) + 0.5)})
    found = differ(of_two_ranks, tmp_path / "c")
    (one,) = found.differing(None)
    assert (one.name, one.differing, one.nonfinite, one.values) == (UP, 1, 0, before.numel())
    assert one.max_abs == pytest.approx(0.5, rel=1e-6)
    assert one.relative == pytest.approx(0.5 / before.norm().item(), rel=1e-3)
    assert sum(other.bit_equal for other in found.compared) == len(found.compared) - 1
    assert not found.equal(0.49) and found.equal(0.51)


NAN = math.nan


@pytest.mark.parametrize(
    ("new", "differing", "nonfinite", "passes"),
    [
        ([1.0, -0.0, NAN, math.inf], 1, 0, True),  # -0 has other bits than 0, and the same value
        ([1.0, 0.0, 3.0, math.inf], 1, 1, False),  # a NaN is far from any number
        ([1.0, 0.0, NAN, -math.inf], 1, 1, False),
        ([1.0, 0.0, NAN, 2.0], 1, 1, False),
        ([NAN, 0.0, NAN, math.inf], 1, 1, False),
        ([1.5, 0.0, NAN, math.inf], 1, 0, True),
        ([2.5, 0.0, NAN, math.inf], 1, 0, False),
        ([1.0, 0.0, NAN, math.inf], 0, 0, True),
    ],
)
def test_values_that_are_not_finite(
    tmp_path: Path, new: list[float], differing: int, nonfinite: int, passes: bool
) -> None:
    old = torch.tensor([1.0, 0.0, NAN, math.inf])
    store.save(tmp_path / "a", {"x/weight": old}, {})
    store.save(tmp_path / "b", {"x/weight": torch.tensor(new)}, {})
    found = differ(tmp_path / "a", tmp_path / "b")
    (one,) = found.compared
    assert (one.differing, one.nonfinite) == (differing, nonfinite)
    assert found.equal(1.0) is passes and found.equal(None) is (differing == 0)
    assert math.isfinite(one.max_abs) and math.isfinite(one.relative)


def test_nans_of_other_bits_differ(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00000], dtype=torch.int32)
    store.save(tmp_path / "a", {"x/weight": bits.view(torch.float32)}, {})
    store.save(tmp_path / "b", {"x/weight": (bits + torch.tensor([0, 1], dtype=torch.int32)).view(torch.float32)}, {})
    (one,) = differ(tmp_path / "a", tmp_path / "b").compared
    assert (one.differing, one.nonfinite) == (1, 1)


def test_other_types_are_compared_by_value_where_a_tolerance_is_given(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 2.0, -math.inf, 1 + 2**-9])
    store.save(tmp_path / "a", {"x/weight": values}, {})
    store.save(tmp_path / "b", {"x/weight": values.bfloat16()}, {})
    found = differ(tmp_path / "a", tmp_path / "b")
    (one,) = found.compared
    assert one.dtypes == ("float32", "bfloat16") and (one.differing, one.nonfinite) == (1, 0)
    assert one.max_abs == 2**-9 and not found.equal(None) and not found.equal(2**-10) and found.equal(2**-9)


def test_the_same_bits_of_other_types_are_other_values(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 0.0]).half()
    store.save(tmp_path / "a", {"x/weight": values}, {})
    store.save(tmp_path / "b", {"x/weight": values.view(torch.bfloat16)}, {})
    (one,) = differ(tmp_path / "a", tmp_path / "b").compared
    assert one.differing == 1 and one.max_abs > 0.9


@pytest.mark.parametrize("pair", [("a", "more"), ("more", "a"), ("a", "longer")])
def test_any_tensor_too_many_or_of_another_shape_counts(tmp_path: Path, pair: tuple[str, str]) -> None:
    x = torch.zeros(2)
    for name, tensors in (("a", {"x": x}), ("more", {"x": x, "y": x}), ("longer", {"x": torch.zeros(3)})):
        store.save(tmp_path / name, tensors, {})
    assert not differ(tmp_path / pair[0], tmp_path / pair[1]).equal(math.inf)


def test_names_and_shapes_that_differ(tmp_path: Path) -> None:
    store.save(tmp_path / "a", {"x/weight": torch.zeros(2, 3), "y": torch.zeros(1), "t/b": torch.tensor(True)}, {})
    store.save(tmp_path / "b", {"x/weight": torch.zeros(3, 2), "z": torch.zeros(1), "t/b": torch.tensor(False)}, {})
    found = differ(tmp_path / "a", tmp_path / "b")
    assert (found.only_a, found.only_b, found.shapes) == (["y"], ["z"], {"x/weight": ((2, 3), (3, 2))})
    assert [one.name for one in found.differing(None)] == ["t/b"], "a tensor without dimensions"
    assert not found.equal(math.inf)
    assert differ(tmp_path / "a", tmp_path / "b", "none*").equal(None)


tensors_2 = st.integers(1, 40).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(tensors_2, st.sampled_from([1, 7, 2**18]))
def test_diff_says_what_arithmetic_says(pair: tuple[list[float], list[float]], block: int) -> None:
    a, b = (torch.tensor(values) for values in pair)
    sums = checkpoint_views._Sums()
    for block_a, block_b in zip(a.split(block), b.split(block)):
        sums.add(block_a, block_b)
    between, largest = (a.double() - b.double()).norm(), max(a.double().norm(), b.double().norm())
    assert sums.differing == sum(x != y for x, y in zip(a.view(torch.int32).tolist(), b.view(torch.int32).tolist()))
    assert sums.max_abs == (a.double() - b.double()).abs().max()
    assert sums.relative == pytest.approx(float(between / largest) if between else 0.0, rel=1e-9)


# ---- convert --------------------------------------------------------------------------------------------------------
def test_convert_keeps_the_weights_and_leaves_the_rest(of_two_ranks: Path, tmp_path: Path) -> None:
    made = convert(of_two_ranks, tmp_path / "w", "float32", SILENT)
    assert Manifest.read(tmp_path / "w") == made
    found = differ(of_two_ranks, tmp_path / "w")
    source = Manifest.read(of_two_ranks)
    assert found.only_a == sorted(name for name in source.tensors if not name.endswith("/weight"))
    assert found.only_b == [] and found.shapes == {} and all(one.bit_equal for one in found.compared)
    assert made.document["config"] == {"model": source.document["config"]["model"]}
    (origin,) = made.document["origin"]["sources"]
    assert (origin["checkpoint"], origin["step"], origin["name"]) == (str(of_two_ranks), 1, "tiny")
    assert verify_all(tmp_path / "w", SILENT)[0].faults == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_convert_rounds_as_torch_does(run: Path, tmp_path: Path, dtype: str) -> None:
    convert(run, tmp_path / "w", dtype, SILENT)
    made, source = read(tmp_path / "w"), read(step(run, 3), "/weight")
    assert made.keys() == source.keys()
    assert all(torch.equal(made[name], source[name].to(getattr(torch, dtype))) for name in made)
    convert(tmp_path / "w", tmp_path / "back", "float32", SILENT)
    assert all(torch.equal(value, made[name].float()) for name, value in read(tmp_path / "back").items())
    origin = Manifest.read(tmp_path / "back").document["origin"]["sources"][0]["origin"]
    assert origin["sources"][0]["step"] == 3, "where it came from is known two tools later"


def test_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    before = write(tmp_path / "first", CONFIG)[UP]
    write(tmp_path / "c", CONFIG, **{UP: planted(before, 7, -7e4)})
    with pytest.raises(UserError, match=f"{UP} holds 70000"):
        convert(tmp_path / "c", tmp_path / "w", "float16", SILENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "first"]
    convert(tmp_path / "c", tmp_path / "w", "bfloat16", SILENT)


def test_values_that_are_not_finite_are_converted_as_they_are(tmp_path: Path) -> None:
    before = write(tmp_path / "first", CONFIG)[UP]
    write(tmp_path / "c", CONFIG, **{UP: planted(planted(before, 7, NAN), 8, math.inf)})
    convert(tmp_path / "c", tmp_path / "w", "float16", SILENT)
    made = read(tmp_path / "w")[UP].view(-1)
    assert made[7].isnan() and made[8] == math.inf and made.isfinite().sum() == made.numel() - 2


# ---- average --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shares", [None, (0.2, 0.3, 0.5), (1e-3, 1e-3, 0.998), (0.333, 0.333, 0.333)])
def test_the_mean_of_equal_checkpoints_is_that_checkpoint(
    run: Path, of_two_ranks: Path, tmp_path: Path, shares: Sequence[float] | None
) -> None:
    average([step(run, 1), of_two_ranks, of_two_ranks], tmp_path / "w", shares, SILENT)
    assert differ(step(run, 1), tmp_path / "w", "*/weight").equal(None)


def test_the_mean_of_equal_values_keeps_the_sign_of_zero_and_the_smallest_numbers(tmp_path: Path) -> None:
    value = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38])
    store.save(tmp_path / "c", {"x/weight": value}, {"config": {"model": {"a": 1}}})
    average([tmp_path / "c"] * 3, tmp_path / "w", None, SILENT)
    assert differ(tmp_path / "c", tmp_path / "w").equal(None)


def expected_mean(parts: list[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    names = [name for name in parts[0] if name.endswith("/weight")]
    total = sum(shares)
    return {n: sum(p[n].double() * (s / total) for p, s in zip(parts, shares)).float() for n in names}  # type: ignore[union-attr]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_average_is_linear(
    run: Path, of_two_ranks: Path, tmp_path_factory: pytest.TempPathFactory, raw: list[float]
) -> None:
    shares = [share / sum(raw) for share in raw]
    out = tmp_path_factory.mktemp("mean") / "w"
    made = average([step(run, 2), of_two_ranks, step(run, 3)], out, shares, SILENT)
    expected = expected_mean([read(path) for path in (step(run, 2), of_two_ranks, step(run, 3))], shares)
    found = read(out)
    assert found.keys() == expected.keys() == made.tensors.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1.2e-7, atol=0), name  # a half may be rounded either way
    assert [s["share"] for s in made.document["origin"]["sources"]] == pytest.approx(shares)


def test_the_newest_of_a_run(run: Path, tmp_path: Path) -> None:
    assert newest(run, 2) == newest(run / "checkpoints", 2) == [step(run, 2), step(run, 3)]
    with pytest.raises(UserError, match=r"--last 4; .* holds 3 checkpoint\(s\)"):
        newest(run, 4)
    with pytest.raises(UserError, match="--last 0"):
        newest(run, 0)


def test_the_widest_type_is_kept(run: Path, tmp_path: Path) -> None:
    convert(step(run, 1), tmp_path / "half", "bfloat16", SILENT)
    mixed = average([tmp_path / "half", step(run, 1)], tmp_path / "mixed", None, SILENT)
    halves = average([tmp_path / "half"] * 2, tmp_path / "halves", None, SILENT)
    assert {t.dtype for t in mixed.tensors.values()} == {"float32"}
    assert {t.dtype for t in halves.tensors.values()} == {"bfloat16"}
    assert differ(tmp_path / "half", tmp_path / "halves").equal(None)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ((0.5,), "0.5 for 2 checkpoints"),
        ((0.5, 0.2), "together 0.7"),
        ((1.5, -0.5), "above 0"),
        ((NAN, 0.5), "above 0"),
        ((math.inf, 0.5), "above 0"),
    ],
)
def test_shares_that_do_not_fit(run: Path, tmp_path: Path, shares: Sequence[float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        average([step(run, 1), step(run, 2)], tmp_path / "w", shares, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_one_is_no_average(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more"):
        average([run], tmp_path / "w", None, SILENT)


def test_different_models_are_named_by_key(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "c", tiny_config("model.num_layers=2", "model.moe.router.balance_coef=0.5"))
    with pytest.raises(UserError, match=r"model\.moe\.router\.balance_coef is 0\.01 and 0\.5"):
        average([run, tmp_path / "c"], tmp_path / "w", None, SILENT)


def test_different_tensors_are_named(run: Path, tmp_path: Path) -> None:
    tensors = read(step(run, 3))
    tensors["norm.scale/weight"] = torch.zeros(5)
    store.save(tmp_path / "c", tensors, document(CONFIG, 3))
    with pytest.raises(UserError, match=r"norm\.scale/weight: \(32,\) and \(5,\)"):
        average([run, tmp_path / "c"], tmp_path / "w", None, SILENT)


def test_different_tokenizers_are_refused(run: Path, tmp_path: Path) -> None:
    tree = {**document(CONFIG, 3), "tokenizers": {"a": "00" * 32}}
    store.save(tmp_path / "c", read(step(run, 3)), tree)
    with pytest.raises(UserError, match="different tokenizers"):
        average([run, tmp_path / "c"], tmp_path / "w", None, SILENT)
    store.save(tmp_path / "unknown", read(step(run, 3)), {**tree, "tokenizers": {"a": None}})
    average([run, tmp_path / "unknown"], tmp_path / "w", None, SILENT)


# ---- all that make one ----------------------------------------------------------------------------------------------
def make(verb: str, source: Path, out: Path) -> Manifest:
    if verb == "convert":
        return convert(source, out, "bfloat16", SILENT)
    return average([source, source], out, None, SILENT)


@pytest.mark.parametrize("verb", ["convert", "average"])
def test_damaged_weights_are_refused_and_named(run: Path, tmp_path: Path, verb: str) -> None:
    folder = shutil.copytree(step(run, 1), tmp_path / "c")
    manifest = Manifest.read(folder)
    box = manifest.tensors[UP].boxes[0]
    flip(folder / manifest.files[0].name, box.start)
    with pytest.raises(Damaged) as refused:
        make(verb, folder, tmp_path / "w")
    assert manifest.files[0].name in refused.value.found and UP in refused.value.found
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("verb", ["convert", "average"])
def test_places_that_will_not_do(run: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for out, told in (
        ("there", "there exists"),
        ("file", "file exists"),
        ("file/w", "file is no folder"),
        ("run/checkpoints/step-00000004", "among the checkpoints of a run"),
    ):
        with pytest.raises(UserError, match=told):
            make(verb, run, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parent_that_cannot_be_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is read; tests may run as root, whom permissions do not stop."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(checkpoint_tools, "require_sound", pytest.fail)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written"):
        make("convert", run, tmp_path / "w")


def test_a_disk_without_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(checkpoint_tools, "require_sound", pytest.fail)
    with pytest.raises(UserError, match="no room"):
        make("convert", run, tmp_path / "w")


def test_a_new_folder_may_lie_deep(run: Path, tmp_path: Path) -> None:
    make("convert", run, tmp_path / "a" / "b" / "w")
    assert verify_all(tmp_path / "a" / "b" / "w", SILENT)[0].faults == ()


@pytest.mark.parametrize("run_bytes", [4, 200, 5000])
def test_results_do_not_depend_on_the_length_of_runs(
    run: Path, of_two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_bytes: int
) -> None:
    """Not even where a row, or a read, is cut: so that a tensor larger than memory goes the same way."""
    paths = [of_two_ranks, step(run, 2), step(run, 3)]
    whole = differ(paths[0], paths[1])
    average(paths, tmp_path / "whole", None, SILENT)
    monkeypatch.setattr(checkpoint_serial, "RUN_BYTES", run_bytes)
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 64)
    monkeypatch.setattr(checkpoint_tools, "_BLOCK", 13)
    monkeypatch.setattr(checkpoint_views, "_BLOCK", 17)
    largest = 0
    rows = WholeReader.rows

    def measured(self: WholeReader, name: str, first: int, count: int) -> Tensor:
        nonlocal largest
        values = rows(self, name, first, count)
        largest = max(largest, values.nbytes if count > 1 else 0)
        return values

    monkeypatch.setattr(WholeReader, "rows", measured)
    cut = differ(paths[0], paths[1])
    for one, other in zip(whole.compared, cut.compared, strict=True):
        assert (one.name, one.differing, one.max_abs) == (other.name, other.differing, other.max_abs)
        assert one.relative == pytest.approx(other.relative, rel=1e-9)
    assert 0 < largest <= run_bytes
    largest = 0
    average(paths, tmp_path / "cut", None, SILENT)
    assert largest <= run_bytes / len(paths), "all sources together"
    assert differ(tmp_path / "whole", tmp_path / "cut").equal(None)


# ---- what is no checkpoint ------------------------------------------------------------------------------------------
def test_folders_of_others_are_refused_by_name(tmp_path: Path) -> None:
    for name, file, told in (
        ("hf", "config.json", "Hugging Face transformers"),
        ("deepspeed", "latest", "DeepSpeed"),
        ("deepspeed2", "mp_rank_00_model_states.pt", "DeepSpeed"),
        ("dcp", ".metadata", "torch.distributed.checkpoint"),
        ("empty", "notes.txt", "no checkpoint and no run that has one"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
        for use in (lambda path: open_checkpoint(path), lambda path: verify_all(path, SILENT)):
            with pytest.raises(UserError, match=told):
                use(tmp_path / name)
        with pytest.raises(UserError, match=told):
            make("convert", tmp_path / name, tmp_path / "w")
    with pytest.raises(UserError, match="is no folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        verify_all(tmp_path / "run", SILENT)


def test_a_checkpoint_without_weights_or_model_makes_nothing(tmp_path: Path) -> None:
    store.save(tmp_path / "a", {"x/weight": torch.zeros(1)}, {"step": 3})
    with pytest.raises(UserError, match="does not say which model"):
        convert(tmp_path / "a", tmp_path / "w", "float32", SILENT)
    store.save(tmp_path / "b", {"x/exp_avg": torch.zeros(1)}, document(CONFIG, 1))
    with pytest.raises(UserError, match="holds no weights"):
        convert(tmp_path / "b", tmp_path / "w", "float32", SILENT)


def test_weights_can_be_read_as_a_model(run: Path, tmp_path: Path) -> None:
    """What was made is what `train.start_from` and `glam eval` read."""
    from pretrain.checkpoint import load_weights

    average([step(run, 1), step(run, 2)], tmp_path / "w", (0.25, 0.75), SILENT)
    model = make_model(CONFIG.model, seed=9)
    load_weights(tmp_path / "w", model, CONFIG.model)
    expected = expected_mean([read(step(run, 1)), read(step(run, 2))], (0.25, 0.75))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[f"{name}/weight"], rtol=1e-6, atol=1e-9)
