"""The store: each box once, any box back, every damage found, nothing foreign taken for ours."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from parallel import checkpoint_files, checkpoint_write
from parallel import checkpoint_store as store
from parallel.checkpoint_files import verify
from parallel.checkpoint_manifest import MANIFEST, Damaged, Manifest
from parallel.fragments import Box, TensorBoxes, fragment_boxes
from parallel.sharding import Placement
from pretrain.local_ranks import run_ranks
from tests.conftest import MakeData
from tests.parallel.checkpoint_jobs import damage_job, overlapping_job, store_job
from tests.tiny import tiny_config

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def test_each_box_is_written_once_and_nothing_executes(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run_ranks(3, store_job, str(folder))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}  # DCP's own metadata is a pickle
    assert len(list(folder.glob("rank-*.safetensors"))) == 3
    target = {"cut": torch.zeros(7, 5, 3), "same": torch.zeros(4, dtype=torch.int64), "own/2": torch.zeros(2)}
    store.load(folder, target)
    assert torch.equal(target["cut"], torch.arange(105.0).view(7, 5, 3))
    assert torch.equal(target["same"], torch.arange(4)) and torch.equal(target["own/2"], torch.full((2,), 2.0))
    manifest = Manifest.read(folder)
    assert manifest.document == {"step": 3} and verify(folder, manifest) == []
    assert sum(file.bytes - file.head_bytes for file in manifest.files) == 105 * 4 + 4 * 8 + 3 * 8  # "same" once


def test_other_tools_can_open_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run_ranks(2, store_job, str(folder))
    manifest, seen = Manifest.read(folder), 0
    for name, tensor in manifest.tensors.items():
        for box in tensor.boxes:
            with safetensors.safe_open(folder / manifest.files[box.file].name, framework="pt") as file:  # type: ignore[no-untyped-call]
                found = file.get_tensor(f"{name}@{','.join(map(str, box.offset))}")
            assert tuple(found.shape) == box.shape
            seen += found.numel() * found.element_size()
    assert seen == sum(tensor.num_bytes for tensor in manifest.tensors.values())


def test_ranks_that_disagree_on_a_tensor_are_told(tmp_path: Path) -> None:
    for told in run_ranks(2, overlapping_job, str(tmp_path / "c")):
        assert "overlap" in told and "x" in told
    assert not (tmp_path / "c" / MANIFEST).exists()


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[list[tuple[int, int]]]]:
    """A tensor, where its flat order is cut into fragments, and boxes (begin, length a dimension) to ask for."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.arange(math.prod(shape)).remainder(251).view(shape)
    tensor = values.bool() if dtype == torch.bool else values.to(dtype)
    cuts = sorted(set(draw(st.lists(st.integers(1, tensor.numel()), max_size=4))) - {tensor.numel()})
    asked = []
    for _ in range(draw(st.integers(1, 3))):
        begins = [draw(st.integers(0, size - 1)) for size in shape]
        asked.append([(b, draw(st.integers(1, size - b))) for b, size in zip(begins, shape)])
    return tensor, cuts, asked


@settings(max_examples=150, deadline=None)
@given(cut_tensors(), st.sampled_from([8, 40, 1 << 24]), st.sampled_from([32, 1 << 30]), st.sampled_from([1, 64]))
def test_any_box_of_a_tensor_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[torch.Tensor, list[int], list[list[tuple[int, int]]]],
    chunk_bytes: int,
    file_bytes: int,
    open_files: int,
) -> None:
    """However it was cut when written, into however many files, read in however small pieces."""
    tensor, cuts, asked = case
    folder = tmp_path_factory.mktemp("boxes") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(checkpoint_write, "FILE_BYTES", file_bytes)
        patch.setattr(checkpoint_files, "OPEN_FILES", open_files)
        ends = [0, *cuts, tensor.numel()]
        boxes = [
            box
            for a, b in pairwise(ends)
            for box in fragment_boxes(
                tensor.flatten()[a:b], a, tuple(tensor.shape), Placement(tuple(tensor.shape), (0,) * tensor.ndim)
            ).boxes
        ]
        store.save(folder, {"x": TensorBoxes(tuple(tensor.shape), boxes), "scalar": torch.tensor(3.5)}, {})
        assert verify(folder, Manifest.read(folder)) == []
        for box in asked:
            place = tuple(slice(b, b + n) for b, n in box)
            # The target is itself a part of something larger: not contiguous.
            around = torch.zeros([n + 1 for _, n in box], dtype=tensor.dtype)
            inner = around[tuple(slice(0, n) for _, n in box)]
            wanted = TensorBoxes(tuple(tensor.shape), [Box(tuple(b for b, _ in box), inner)])
            scalar = torch.zeros(())
            store.load(folder, {"x": wanted, "scalar": scalar})
            assert torch.equal(inner, tensor[place]) and scalar == 3.5


def test_no_rank_reads_more_than_it_wants(tmp_path: Path) -> None:
    """A column of a large tensor, with a buffer of one piece."""
    folder, big = tmp_path / "c", torch.randn(4096, 4096)
    store.save(folder, {"big": big}, {})
    columns, rows = torch.zeros(4096, 8), torch.zeros(8, 4096)
    with checkpoint_files.BoxReader(folder, Manifest.read(folder)) as reader:
        stored = reader.manifest.tensors["big"]
        store.read_boxes(reader, "big", stored, [((16, 0), rows)])
        assert reader._buffer.nbytes == 0, "whole rows go straight into their place"
        store.read_boxes(reader, "big", stored, [((0, 8), columns)])
        assert 0 < reader._buffer.nbytes <= checkpoint_files.CHUNK_BYTES < big.nbytes
    assert torch.equal(columns, big[:, 8:16]) and torch.equal(rows, big[16:24])


# ---- damage -----------------------------------------------------------------------------------------------------
def test_two_hundred_damages_are_found_and_none_is_loaded(tmp_path: Path, make_data: MakeData) -> None:
    """Flipped bits, cuts, missing files, in data, heads and the manifest; each time the older one is taken."""
    config = tiny_config("model.vocab_size=512", "train.batch_tokens=64")
    config = config.model_copy(update={"data": make_data(json=1.0)})
    [found] = run_ranks(1, damage_job, config, str(tmp_path), 200, timeout_s=300)
    assert len(found) == 200
    for done, restored, told in found:
        assert restored == "step-00000001", done
        assert told and done.split(":")[0] in " ".join(told), (done, told)
    assert len({told[0] for _, _, told in found}) > 50
    named = [told for done, _, told in found if "bit of byte" in done and done.startswith("rank")]
    assert sum("/" in " ".join(told) for told in named) > len(named) / 3, "damage in data names the tensor"


def test_every_part_of_a_file_is_covered(tmp_path: Path) -> None:
    """Every single byte of a small checkpoint, flipped."""
    store.save(tmp_path / "c", {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}, {"k": "v"})
    folder = tmp_path / "c"
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for place in range(len(sound)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
            try:
                faults = verify(folder, Manifest.read(folder))
            except Damaged:
                continue
            assert faults, (path.name, place)
        path.write_bytes(sound)
    assert verify(folder, Manifest.read(folder)) == []


def test_ranks_share_the_verification(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    run_ranks(3, store_job, str(folder))
    path = folder / "rank-00001-000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = Manifest.read(folder)
    by_rank = [verify(folder, manifest, rank, 2) for rank in range(2)]
    assert [len(faults) for faults in by_rank] == [0, 1]
    assert by_rank[1] == verify(folder, manifest, threads=2)
    assert by_rank[1][0].file == path.name and by_rank[1][0].tensor


@pytest.mark.parametrize(
    ("text", "kind", "word"),
    [
        ("", Damaged, "cut short"),
        ("[1, 2]", Damaged, "cut short"),
        (json.dumps({"format": 1, "tensors": {}}), UserError, "format 1"),
        (json.dumps({"format": 99}), UserError, "format 99"),
        ('{"format": 2}', Damaged, "cut short"),
        ("\x80\x04", Damaged, "cut short"),
    ],
)
def test_foreign_manifest_is_refused(tmp_path: Path, text: str, kind: type[UserError], word: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=word) as met:
        Manifest.read(tmp_path)
    assert type(met.value) is kind


@pytest.mark.parametrize(
    ("file", "program"),
    [
        ("mp_rank_00_model_states.pt", "DeepSpeed"),
        (".metadata", "torch.distributed.checkpoint"),
        ("config.json", "Hugging Face"),
    ],
)
def test_other_programs_checkpoints_are_named(tmp_path: Path, file: str, program: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=program) as met:
        Manifest.read(tmp_path)
    assert not isinstance(met.value, Damaged)


def test_missing_and_reshaped_tensors_are_refused(tmp_path: Path) -> None:
    store.save(tmp_path / "c", {"a": torch.zeros(4, 3)}, {})
    with pytest.raises(UserError, match="nothing of that name for b"):
        store.load(tmp_path / "c", {"b": torch.zeros(1)})
    with pytest.raises(UserError, match=r"\[4, 3\] for a"):
        store.load(tmp_path / "c", {"a": torch.zeros(3, 4)})


def test_a_write_into_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="could not be written"):
        store.save(tmp_path / "file" / "c", {"a": torch.zeros(4)}, {})
    assert (tmp_path / "file").read_text() == "mine"


def test_same_bytes_at_any_number_of_ranks(tmp_path: Path) -> None:
    """What a checkpoint holds does not depend on who wrote it."""
    held = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        run_ranks(ranks, store_job, str(folder))
        target = {"cut": torch.zeros(7, 5, 3), "same": torch.zeros(4, dtype=torch.int64)}
        store.load(folder, target)
        held.append(target)
    assert all(torch.equal(held[0][key], other[key]) for other in held[1:] for key in held[0])
