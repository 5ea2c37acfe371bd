"""`glam prep verify`: whatever happens to a file of a corpus is found, and told with its place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_prep.format import ShardWriter, TokenStream
from data_prep.manifest import BLOCK_BYTES, DOCUMENT, ShardInfo, read_manifest, write_manifest
from data_prep.progress import Reporter
from data_prep.summary import PrepSummary
from data_prep.verify import Damage, find_datasets, verify, verify_all
from data_prep.workers import Workers, make_workers

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = (".bin", ".idx", ".docs", ".json", ".model", ".npy")


def faults(folder: Path) -> list[Damage]:
    return verify_all(folder, Workers(None, 1), Reporter(None))


@pytest.fixture(scope="module")
def sound(corpus: PrepSummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of this module's own: each test that breaks it mends it."""
    return Path(shutil.copytree(corpus.output, tmp_path_factory.mktemp("verify") / "corpus"))


def files_of(folder: Path) -> list[Path]:
    """Those that a training run reads."""
    parts = [folder / part for part in ("train", "heldout", "tokenizer")]
    return sorted(path for part in parts for path in part.rglob("*") if path.suffix in ENDINGS)


def write_dataset(folder: Path, documents: int, tokens: int, vocab_size: int = 300) -> ShardInfo:
    """One shard in one folder, without a tokenizer."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, 0, vocab_size) as writer:
        for number in range(documents):
            ids = np.full(tokens, number % vocab_size)
            writer.add_document(ids, tokens, np.array((number % 2, number), DOCUMENT)[()])
        info = writer.close()
    declare(folder, info, vocab_size)
    return info


def declare(folder: Path, info: ShardInfo, vocab_size: int = 300) -> None:
    write_manifest(
        folder, name="x", vocab_size=vocab_size, eos_id=1, tokenizer_sha256="0", tokenizer="../tokenizer",
        shards=[info], sources=["a", "b"],
    )  # fmt: skip


def test_a_sound_corpus_has_no_fault(sound: Path) -> None:
    assert faults(sound) == []
    assert find_datasets(sound) == sorted(path.parent for path in sound.glob("*/*/manifest.json"))
    for dataset in find_datasets(sound):
        assert faults(dataset) == [] and verify(dataset) == read_manifest(dataset)


def test_workers_find_the_same_in_the_same_order(sound: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(sound, tmp_path / "broken"))
    for path in broken.rglob("shard-*.docs"):
        path.write_bytes(path.read_bytes()[:-1])
    with make_workers(2, mpi=False) as workers:
        assert workers is not None
        found = verify_all(broken, workers, Reporter(None))
    assert found == faults(broken) and len(found) == len(list(broken.rglob("shard-*.docs"))) > 3


def flip(data: bytes, draw: Callable[[int], int]) -> bytes:
    at = draw(len(data))
    return data[:at] + bytes([data[at] ^ (1 + draw(255))]) + data[at + 1 :]


def cut(data: bytes, draw: Callable[[int], int]) -> bytes:
    return data[: draw(len(data))]


def delete_some(data: bytes, draw: Callable[[int], int]) -> bytes:
    at = draw(len(data))
    return data[:at] + data[at + 1 + draw(16) :]


def insert_some(data: bytes, draw: Callable[[int], int]) -> bytes:
    at = draw(len(data) + 1)
    return data[:at] + bytes(draw(256) for _ in range(1 + draw(4))) + data[at:]


def append_some(data: bytes, draw: Callable[[int], int]) -> bytes:
    return data + bytes(draw(256) for _ in range(1 + draw(4)))


def swap_two(data: bytes, draw: Callable[[int], int]) -> bytes:
    changed, a, b = bytearray(data), draw(len(data)), draw(len(data))
    changed[a], changed[b] = changed[b], changed[a]
    return bytes(changed)


def swap_halves(data: bytes, draw: Callable[[int], int]) -> bytes:
    at = draw(len(data))
    return data[at:] + data[:at]


DAMAGES = (flip, flip, cut, delete_some, insert_some, append_some, swap_two, swap_halves)


def meaning(path: Path, data: bytes) -> Any:
    """What must not change: of manifests and sidecars what they say, of all else every byte."""
    if path.name == "manifest.json" or (path.name.startswith("shard-") and path.suffix == ".json"):
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return None
    if path.suffix == ".npy":
        return "sound" if loads_as_before(path, data) else data
    return data


def loads_as_before(path: Path, data: bytes) -> bool:
    """An array's header says the same in many ways."""
    try:
        path.with_name("again.npy").write_bytes(data)
        return np.array_equal(np.load(path.with_name("again.npy")), np.load(path))
    except (OSError, ValueError, EOFError, SyntaxError):
        return False
    finally:
        path.with_name("again.npy").unlink()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_to_any_file_is_found(sound: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(sound)))
    damage = data.draw(st.sampled_from(DAMAGES))
    whole = path.read_bytes()
    changed = damage(whole, lambda limit: data.draw(st.integers(0, limit - 1)))
    harmless = changed == whole or meaning(path, changed) == meaning(path, whole)
    path.write_bytes(changed)
    try:
        found = faults(sound)
    finally:
        path.write_bytes(whole)
    assert harmless or found
    assert changed != whole or not found
    assert all(Path(one.path).resolve() in (path, path.parent) for one in found), "it alone is blamed"


def test_every_file_that_goes_is_missed(sound: Path) -> None:
    for path in files_of(sound):
        path.rename(sound / "elsewhere")
        found = faults(sound)
        (sound / "elsewhere").rename(path)
        assert found and all(Path(one.path).resolve() in (path, path.parent) for one in found), path
    assert faults(sound) == []


def test_files_that_changed_places_are_found(sound: Path) -> None:
    """Also where both are sound: two shards of one dataset, two datasets."""
    datasets = [path for path in find_datasets(sound) if path.name == "email"]
    for one, other in ((datasets[0], datasets[1]), (datasets[1], datasets[1])):
        for ending in ("bin", "idx", "docs", "json"):
            a, b = one / f"shard-00000.{ending}", other / f"shard-{int(one == other):05d}.{ending}"
            contents = a.read_bytes(), b.read_bytes()
            for paths in ((b, a), (a, b)):
                for path, content in zip(paths, contents):
                    path.write_bytes(content)
                assert bool(faults(sound)) == (paths == (b, a)), (a, b)


def test_a_dataset_that_goes_is_missed(sound: Path) -> None:
    for dataset in find_datasets(sound):
        dataset.rename(sound / "elsewhere")
        assert faults(sound) == [Damage(str(dataset / "manifest.json"), "", "no such file")]
        (sound / "elsewhere").rename(dataset)
    summary = sound / "summary.json"
    whole = summary.read_bytes()
    summary.write_bytes(whole[:-20])
    assert [one.path for one in faults(sound)] == [str(summary)]
    summary.write_bytes(whole)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_flip_among_the_tokens_is_told_with_its_place(large: Path, data: st.DataObject) -> None:
    path = large / "shard-00000.bin"
    at, bit = data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7))
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
        file.flush()
        found = faults(large)
        file.seek(at)
        file.write(bytes([byte]))
    assert {one.path for one in found} == {str(path)}
    place = re.compile(r"bytes (\d+)\.\.(\d+) \(tokens (\d+)\.\.(\d+)\)")
    spans = [match for one in found if (match := place.fullmatch(one.place))]
    (first, stop, first_token, stop_token) = map(int, spans[0].groups())
    assert len(spans) == 1 and first <= at < stop <= first + BLOCK_BYTES
    assert (first_token, stop_token) == (first // 2, stop // 2)
    foreign = [one for one in found if "outside the vocabulary" in one.fault]
    ids = np.fromfile(path, "<u2")
    assert bool(foreign) == (int(ids[at // 2]) ^ (1 << bit << 8 * (at % 2)) >= 300)
    assert all(one.place == f"token {at // 2}, byte {at - at % 2}" for one in foreign)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two blocks and a half."""
    folder = tmp_path_factory.mktemp("large") / "x"
    write_dataset(folder, 50, BLOCK_BYTES // 40)
    assert faults(folder) == []
    return folder


@pytest.mark.parametrize(("vocab_size", "bad"), [(300, 300), (300, 65_535), (70_000, 70_000), (70_000, -1)])
def test_ids_outside_the_vocabulary_are_named(tmp_path: Path, vocab_size: int, bad: int) -> None:
    """Also where all checksums agree, as of a tool that wrote nonsense."""
    info, path = write_dataset(tmp_path / "x", 4, 25, vocab_size), tmp_path / "x" / "shard-00000.bin"
    ids = np.fromfile(path, "<u2" if vocab_size == 300 else "<i4")
    ids[[41, 60]] = bad
    path.write_bytes(ids.tobytes())
    patched = dataclasses.replace(info, bin_sha256=hashlib.sha256(ids.tobytes()).hexdigest())
    path.with_suffix(".json").write_bytes(patched.sidecar([zlib.crc32(ids.tobytes())]))
    declare(tmp_path / "x", patched, vocab_size)
    (found,) = faults(tmp_path / "x")
    assert found.path == str(path) and found.place == f"token 41, byte {41 * ids.itemsize}"
    assert found.fault == f"id {bad} outside the vocabulary of {vocab_size} (2 such in this block)"
    with pytest.raises(UserError, match=f"id {bad} outside"):
        verify(tmp_path / "x")


def test_an_index_at_odds_with_its_tokens_is_explained(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", 4, 25)
    index, pair = tmp_path / "x" / "shard-00000.idx", tmp_path / "pair"
    whole = index.read_bytes()
    (tmp_path / "pair.bin").write_bytes(index.with_suffix(".bin").read_bytes())
    begin = 9 + 8 + 1 + 8 + 8  # of the lengths: int32 [4], then pointers int64 [4], then documents int64 [5]
    for at, value, size, message in (
        (begin + 4, 24, 4, r"points at byte 50 for 24 tokens|points at byte 100 for 25 tokens"),
        (begin + 16 + 8, 48, 8, "points at byte 48 for 25 tokens"),
        (begin + 16 + 32 + 32, 3, 8, "do not take up"),
        (begin + 16 + 32 + 8, 3, 8, "do not take up"),
        (begin + 16 + 32, 1, 8, "do not take up"),
    ):
        broken = whole[:at] + value.to_bytes(size, "little") + whole[at + size :]
        index.write_bytes(broken)
        found = faults(tmp_path / "x")
        assert found[0].fault.startswith("sha256") and {one.path for one in found} == {str(index)}
        assert any(re.search(message, one.fault) for one in found), (message, found)
        pair.with_suffix(".idx").write_bytes(broken)  # a pair without checksums tells as much
        if size == 8:
            assert any(re.search(message, one.fault) for one in faults(pair)), (message, faults(pair))
    index.write_bytes(whole)
    pair.with_suffix(".idx").write_bytes(whole)
    assert faults(pair) == faults(tmp_path / "x") == []


def test_a_document_of_an_unknown_file_is_named(tmp_path: Path) -> None:
    info, path = write_dataset(tmp_path / "x", 4, 25), tmp_path / "x" / "shard-00000.docs"
    rows = np.fromfile(path, DOCUMENT)
    rows["file"][2] = 2
    path.write_bytes(rows.tobytes())
    patched = dataclasses.replace(info, docs_sha256=hashlib.sha256(rows.tobytes()).hexdigest())
    tokens = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".json").write_bytes(patched.sidecar([zlib.crc32(tokens)]))
    declare(tmp_path / "x", patched)
    assert faults(tmp_path / "x") == [Damage(str(path), "document 2", "comes from file 2 of 2")]


def test_a_sidecar_that_lacks_a_checksum_is_found(tmp_path: Path) -> None:
    info, path = write_dataset(tmp_path / "x", 4, 25), tmp_path / "x" / "shard-00000.json"
    (crc,) = json.loads(path.read_bytes())["bin_block_crc32"]
    for blocks in ([], [crc, crc], [crc + 1], None, crc, "x"):
        path.write_bytes(json.dumps({**dataclasses.asdict(info), "bin_block_crc32": blocks}).encode())
        assert faults(tmp_path / "x"), blocks
    path.write_bytes(info.sidecar([crc]))
    assert faults(tmp_path / "x") == []


def test_the_manifest_vouches_for_itself(tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", 4, 25)
    path = tmp_path / "x" / "manifest.json"
    good = json.loads(path.read_bytes())
    for key, value in good.items():
        other = value + 1 if isinstance(value, int | float) else value + "x" if isinstance(value, str) else []
        path.write_text(json.dumps({**good, key: other}))
        (found,) = faults(tmp_path / "x")
        assert found.path == str(path), key
        with pytest.raises(UserError, match="a manifest written by"):
            TokenStream(tmp_path / "x")
    path.write_text(json.dumps(good))  # other white space, the same meaning
    assert faults(tmp_path / "x") == []


def glam_verify(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.cli", "prep", "verify", str(folder), "--workers", "1", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_says_so_and_by_its_exit_code(sound: Path, tmp_path: Path) -> None:
    done = glam_verify(sound)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 dataset(s) in" in done.stdout and done.stdout.rstrip().endswith("all sound")
    victim = sound / "train" / "email" / "shard-00001.bin"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    done = glam_verify(sound, "--json")
    victim.write_bytes(whole)
    assert done.returncode == 1, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert len(told["datasets"]) == 4 and [one["path"] for one in told["damages"]] == [str(victim)]
    done = glam_verify(tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path) in done.stdout + done.stderr
