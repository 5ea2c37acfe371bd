"""The on-disk format: what is written is read back, Megatron agrees both ways, what cannot be read is named."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_prep.format import Place, ShardWriter, TokenStream
from data_prep.manifest import BLOCK_BYTES, DOCUMENT, ShardInfo, read_manifest, token_dtype, write_manifest
from data_prep.summary import PrepSummary
from data_prep.verify import verify

Documents = list[npt.NDArray[np.int64]]
SOURCES = ["a.jsonl", 'dir with "quotes"/b\u00e9.jsonl', "c.jsonl"]


def random_documents(count: int, vocab_size: int, seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, 50)) for _ in range(count)]


def origin_of(shard: int, document: int) -> tuple[int, int]:
    """A file and a record that no two documents share."""
    return (shard + document) % len(SOURCES), 2**40 * shard + document


def write_dataset(folder: Path, shards: list[Documents], vocab_size: int) -> list[ShardInfo]:
    folder.mkdir(parents=True)
    infos = []
    for index, documents in enumerate(shards):
        with ShardWriter(folder, index, vocab_size) as writer:
            for number, ids in enumerate(documents):
                writer.add_document(ids, 3 * ids.size, np.array(origin_of(index, number), DOCUMENT)[()])
            infos.append(writer.close())
    declare(folder, vocab_size, infos)
    return infos


def declare(folder: Path, vocab_size: int, infos: list[ShardInfo]) -> None:
    write_manifest(
        folder, name="x", vocab_size=vocab_size, eos_id=1, tokenizer_sha256="0", tokenizer="tokenizer", shards=infos,
        sources=SOURCES,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, npt.NDArray[np.int64]]:
    folder = tmp_path_factory.mktemp("format") / "x"
    shards = [random_documents(5, 300, seed) for seed in range(4)]
    write_dataset(folder, shards, 300)
    return folder, np.concatenate([ids for documents in shards for ids in documents])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_read_is_a_slice_of_the_concatenation(
    dataset: tuple[Path, npt.NDArray[np.int64]], data: st.DataObject
) -> None:
    folder, whole = dataset
    stream = TokenStream(folder)
    assert stream.num_tokens == whole.size
    start = data.draw(st.integers(0, whole.size))
    count = data.draw(st.integers(0, whole.size - start))
    found = stream.read(start, count)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, whole[start : start + count])


def test_reads_outside_the_stream_are_refused(dataset: tuple[Path, npt.NDArray[np.int64]]) -> None:
    stream = TokenStream(dataset[0])
    for start, count in ((-1, 2), (0, stream.num_tokens + 1), (stream.num_tokens, 1), (3, -1)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def places_token_by_token(bounds: list[list[int]], start: int, stop: int) -> list[Place]:
    """What `locate` says, one token after the other. Bounds of documents, by shard, in tokens of the stream."""
    owner: list[tuple[int, int, int]] = []  # of each token: shard, document, where that begins
    for shard, ends in enumerate(bounds):
        for document, (begin, end) in enumerate(pairwise(ends)):
            owner += [(shard, document, begin)] * (end - begin)
    places: list[Place] = []
    for token in range(start, min(stop, len(owner))):
        shard, document, begin = owner[token]
        if places and (places[-1].shard, places[-1].document) == (shard, document):
            last = places.pop()
            places.append(Place(shard, document, begin, last.offset, last.tokens + 1))
        else:
            places.append(Place(shard, document, begin, token - begin, 1))
    return places


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_locate_is_what_one_token_after_the_other_says(
    dataset: tuple[Path, npt.NDArray[np.int64]], data: st.DataObject
) -> None:
    stream = TokenStream(dataset[0])
    starts = accumulate((int(stream.documents(shard)[-1]) for shard in range(stream.num_shards)), initial=0)
    bounds = [[start + int(end) for end in stream.documents(shard)] for shard, start in zip(range(4), starts)]
    start = data.draw(st.sampled_from([end for ends in bounds for end in ends]) | st.integers(0, stream.num_tokens))
    count = data.draw(st.integers(0, stream.num_tokens - start + 3))
    assert stream.locate(start, count) == places_token_by_token(bounds, start, start + count)


def test_each_document_knows_where_it_came_from(dataset: tuple[Path, npt.NDArray[np.int64]]) -> None:
    stream = TokenStream(dataset[0])
    for shard in range(stream.num_shards):
        rows = np.fromfile(dataset[0] / f"shard-{shard:05d}.docs", DOCUMENT)
        assert len(rows) == stream.documents(shard).size - 1
        for document, row in enumerate(rows):
            file, record = origin_of(shard, document)
            assert (row["file"], row["record"]) == (file, record)
            assert stream.origin(shard, document) == (SOURCES[file], record)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_documents_may_end_anywhere_the_tokens_are_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut at random, also at the very borders of blocks: the .bin file and its checksums do not depend on it."""
    whole = np.random.default_rng(0).integers(0, 300, 5 * BLOCK_BYTES // 4)  # uint16: two blocks and a half
    block = BLOCK_BYTES // 2
    borders = st.sampled_from([1, 2, block - 1, block, block + 1, 2 * block, whole.size - 1])
    cuts = sorted({0, whole.size, *data.draw(st.lists(st.integers(1, whole.size - 1) | borders, max_size=12))})
    folder = tmp_path_factory.mktemp("split")
    (info,) = write_dataset(folder / "x", [[whole[a:b] for a, b in pairwise(cuts)]], 300)
    expected = whole.astype("<u2").tobytes()
    assert (folder / "x" / "shard-00000.bin").read_bytes() == expected
    sidecar = json.loads((folder / "x" / "shard-00000.json").read_bytes())
    blocks = [expected[at : at + BLOCK_BYTES] for at in range(0, len(expected), BLOCK_BYTES)]
    assert sidecar.pop("bin_block_crc32") == [zlib.crc32(block) for block in blocks]
    assert ShardInfo(**sidecar) == info == read_manifest(folder / "x").shards[0]
    assert (info.documents, info.tokens, info.text_bytes) == (len(cuts) - 1, whole.size, 3 * whole.size)
    shutil.rmtree(folder)


def test_a_shard_written_twice_is_the_same_bytes(dataset: tuple[Path, npt.NDArray[np.int64]], tmp_path: Path) -> None:
    write_dataset(tmp_path / "x", [random_documents(5, 300, seed) for seed in range(4)], 300)
    names = sorted(path.name for path in dataset[0].iterdir())
    assert names == sorted(path.name for path in (tmp_path / "x").iterdir()) and len(names) == 4 * 4 + 2
    for name in names:
        assert (tmp_path / "x" / name).read_bytes() == (dataset[0] / name).read_bytes()


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 200_000])
def test_megatron_reads_our_shards(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets import indexed_dataset  # required by setup.py: nothing to skip

    documents = [*random_documents(9, vocab_size), np.array([vocab_size - 1])]
    write_dataset(tmp_path / "x", [documents], vocab_size)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "x" / "shard-00000"))
    assert theirs.index.dtype == indexed_dataset.DType.optimal_dtype(vocab_size) == token_dtype(vocab_size)
    assert len(theirs) == len(documents)
    np.testing.assert_array_equal(theirs.document_indices, np.arange(len(documents) + 1))
    for found, ids in zip(theirs[0 : len(documents)], documents, strict=True):
        np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_makes(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    from megatron.core.datasets import indexed_dataset  # required by setup.py: nothing to skip

    documents = random_documents(6, 60_000)
    for name, part in (("a", documents[:4]), ("b", documents[4:])):
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for ids in part:  # a document of two sequences where it has two tokens
            lengths = [1, ids.size - 1] if ids.size > 1 else [1]
            builder.add_document(ids, lengths)
        builder.finalize(str(tmp_path / f"{name}.idx"))
    folder, pair = TokenStream(tmp_path), TokenStream(tmp_path / "a")
    assert (folder.manifest, folder.vocab_size, folder.eos_id, folder.num_shards) == (None, None, None, 2)
    np.testing.assert_array_equal(folder.read(0, folder.num_tokens), np.concatenate(documents))
    np.testing.assert_array_equal(pair.read(0, pair.num_tokens), np.concatenate(documents[:4]))
    np.testing.assert_array_equal(pair.documents(0), np.cumsum([0, *(ids.size for ids in documents[:4])]))
    assert folder.origin(0, 0) is None and folder.token_bytes() is None
    bounds = [[0, *accumulate(ids.size for ids in documents[:4])]]
    assert pair.locate(1, 10**6) == places_token_by_token(bounds, 1, pair.num_tokens)
    with pytest.raises(UserError, match="no manifest"):
        verify(tmp_path)


def test_empty_documents_of_megatron_hold_no_place(tmp_path: Path) -> None:
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for size in (0, 3, 0, 0, 2, 0):
        builder.add_document(np.arange(size), [size])
    builder.finalize(str(tmp_path / "a.idx"))
    stream = TokenStream(tmp_path / "a")
    assert stream.locate(0, 5) == [Place(0, 1, 0, 0, 3), Place(0, 4, 3, 0, 2)]
    assert stream.locate(2, 2) == [Place(0, 1, 0, 2, 1), Place(0, 4, 3, 0, 1)]


def test_documents_are_where_the_index_says(corpus: PrepSummary) -> None:
    stream = TokenStream(corpus.output / "train" / "email")
    assert stream.num_shards > 1
    tokens = stream.read(0, stream.num_tokens)
    ends = np.concatenate([stream.documents(shard)[1:] for shard in range(stream.num_shards)])
    shard_ends = np.cumsum([0, *(stream.documents(shard)[-1] for shard in range(stream.num_shards - 1))])
    counts = [stream.documents(shard).size - 1 for shard in range(stream.num_shards)]
    np.testing.assert_array_equal(ends + np.repeat(shard_ends, counts) - 1, np.flatnonzero(tokens == stream.eos_id))


def test_streams_travel_to_worker_processes(dataset: tuple[Path, npt.NDArray[np.int64]]) -> None:
    stream = TokenStream(dataset[0])
    stream.read(0, 10)
    message = pickle.dumps(stream)
    assert len(message) < 500  # the path, not the tokens
    np.testing.assert_array_equal(pickle.loads(message).read(3, 90), dataset[1][3:93])  # noqa: S301 (our own bytes)


def test_writer_refuses_foreign_ids_and_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    for ids in ([300], [-1], []):
        with pytest.raises(ValueError), ShardWriter(tmp_path, 0, 300) as writer:
            writer.add_document(np.array(ids, dtype=np.int64), 1)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="without documents"):
        ShardWriter(tmp_path, 0, 300).close()
    assert list(tmp_path.iterdir()) == []


def copy_of(dataset: tuple[Path, npt.NDArray[np.int64]], to: Path) -> Path:
    return Path(shutil.copytree(dataset[0], to / "copy"))


def test_truncated_shards_are_named_with_both_sizes(
    dataset: tuple[Path, npt.NDArray[np.int64]], tmp_path: Path
) -> None:
    for kind in ("bin", "idx", "docs"):
        folder = copy_of(dataset, tmp_path / kind)
        victim = folder / f"shard-00002.{kind}"
        size = victim.stat().st_size
        with victim.open("r+b") as file:
            file.truncate(size - 2)
        with pytest.raises(
            UserError, match=rf"shard-00002.{kind}: {size - 2} bytes\nexpected: {size} bytes\nremedy: .*glam prep"
        ):
            TokenStream(folder)
        victim.unlink()
        with pytest.raises(UserError, match="no such file"):
            TokenStream(folder)


def test_missing_unfinished_and_foreign_datasets(dataset: tuple[Path, npt.NDArray[np.int64]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset"):
        TokenStream(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"(?s)no manifest.json.*glam prep"):
        TokenStream(tmp_path / "empty")
    folder = copy_of(dataset, tmp_path)
    manifest = folder / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.unlink()
    with pytest.raises(UserError, match="unfinished"):  # ours, so not taken for a folder of Megatron pairs
        TokenStream(folder)
    foreign = [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff", json.dumps({**good, "format": 1}).encode()]
    changes: list[dict[str, Any]] = [{"tokens": "12"}, {"tokens": 1}, {"shards": [{}]}, {"x": 1}, {"eos_id": 2}]
    foreign += [json.dumps({**good, **change}).encode() for change in changes]
    for body in foreign:
        manifest.write_bytes(body)
        with pytest.raises(UserError, match=r"manifest.json: .*\nexpected: a manifest"):
            TokenStream(folder)
    declare(folder, 300, [])
    with pytest.raises(UserError, match="holds 0 tokens"):
        TokenStream(folder)


def test_damaged_megatron_pairs(dataset: tuple[Path, npt.NDArray[np.int64]], tmp_path: Path) -> None:
    pair = tmp_path / "theirs"
    for kind in ("bin", "idx"):
        shutil.copy(dataset[0] / f"shard-00000.{kind}", f"{pair}.{kind}")
    index, tokens = Path(f"{pair}.idx").read_bytes(), Path(f"{pair}.bin").read_bytes()
    TokenStream(pair)
    damaged = {
        "begins with": b"PARQUET" + index[7:],
        "dtype code 7": index[:17] + bytes([7]) + index[18:],
        "bytes for": index[:-8],
        "version 9": index[:9] + bytes([9]) + index[10:],
        "out of range": index[:-8] + b"\xff" * 8,
        "in order": index[:-8] + (4).to_bytes(8, "little"),  # the last document belongs to none
    }
    for message, body in damaged.items():
        Path(f"{pair}.idx").write_bytes(body)
        with pytest.raises(UserError, match=message):
            TokenStream(pair).locate(0, 10**6)
    Path(f"{pair}.idx").write_bytes(index)
    Path(f"{pair}.bin").write_bytes(tokens[:-2])
    with pytest.raises(UserError, match="as its index says"):
        TokenStream(pair)
    Path(f"{pair}.idx").unlink()
    with pytest.raises(UserError, match="idx: no such file"):
        TokenStream(pair)


def test_a_corpus_folder_names_its_datasets(corpus: PrepSummary) -> None:
    with pytest.raises(UserError, match="train/email"):
        TokenStream(corpus.output)
