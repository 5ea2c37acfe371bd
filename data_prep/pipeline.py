"""`glam prep`: raw sources in, a tokenizer and verified token shards out.

    OUTPUT/tokenizer/            tokenizer.model, token_bytes.npy
    OUTPUT/train/<source>/       shards and manifest.json (data_prep.format)
    OUTPUT/heldout/<source>/     the same, for the documents kept from training
    OUTPUT/corpus.yaml           the configuration
    OUTPUT/rejects.jsonl         records left out: source, origin, reason
    OUTPUT/summary.json          counts; written last

Sources are read twice: to choose (scan), and to tokenize. Text is held by the document, in a few batches and in the
tokenizer's sample; what grows with the number of documents is about 150 bytes for each. On disk the tokens stand twice
for a while.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from configs.corpus import CorpusConfig, JsonLines, SentencePieceFile, SentencePieceTraining, TextTree
from configs.errors import UserError
from data_prep.encode import encode_batches
from data_prep.format import write_manifest
from data_prep.output import find_complete, staged
from data_prep.progress import Reporter
from data_prep.readers import Document, list_files, read_documents
from data_prep.sampling import BlockSample
from data_prep.scan import HELDOUT, SIDES, TRAIN, SourceScan, order_key, scan_source, text_digest
from data_prep.spool import TokenSpool
from data_prep.storage import write_atomically
from data_prep.summary import SUMMARY, PrepSummary, SideSummary, SourceSummary
from data_prep.tokenizer import Tokenizer, make_tokenizer

_BATCH_BYTES = 1 << 20  # of text sent to a worker at a time: some 50 ms of work or more

Spools = dict[str, TokenSpool]  # by side


def prepare(config: CorpusConfig, console: Console | None = None) -> PrepSummary:
    """Make the corpus of ``config``, or say that it is there. The files are the same for any number of workers.

    Raises:
        UserError: no text, no held-out text, a vocabulary that does not fit, another corpus in the way, a full disk.
            What stood in OUTPUT is untouched and nothing half-made is left.
    """
    reporter, output = Reporter(console), Path(config.output)
    files = _source_files(config, output)
    state, fingerprint = _source_state(config, files), corpus_fingerprint(config)
    if summary := find_complete(output, fingerprint, state):
        reporter.say(f"{output}: already prepared")
    else:
        with staged(output) as staging:
            scans, sample = _scan(config, staging, sum(file.stat().st_size for file in files), reporter)
            with reporter.stage("tokenizer"):
                tokenizer = make_tokenizer(config.tokenizer, sample.lines(), staging / "tokenizer")
            if not tokenizer.lossless:
                reporter.say(
                    "warning: this tokenizer loses some text (spaces or rare characters); bits per byte are approximate"
                )
            datasets = _tokenize(config, staging, scans, tokenizer, reporter)
            lost = tuple(SourceSummary(scan.name, scan.rejects, scan.duplicates) for scan in scans)
            summary = PrepSummary(
                output,
                fingerprint,
                state,
                tokenizer.sha256,
                tokenizer.vocab_size,
                datasets,
                lost,
                seconds=reporter.seconds,
            )
            write_atomically(staging / "corpus.yaml", config.dump().encode())
            write_atomically(staging / SUMMARY, summary.to_json())
    if console is not None:
        console.print(summary.table())
    return summary


def corpus_fingerprint(config: CorpusConfig) -> str:
    """Names what is made, so neither where it is put nor by how many processes counts."""
    return config.model_copy(update={"output": "", "workers": 1}).fingerprint()


def _source_files(config: CorpusConfig, output: Path) -> list[Path]:
    names = [source.name for source in config.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two sources are named {twice[0]!r}", "a name for each", "rename one: names become folders")
    files = [file for source in config.sources for file in list_files(source)]
    inside = str(output.resolve()) + os.sep
    if own := next((file for file in files if str(file.resolve()).startswith(inside)), None):
        found = f"the source file {own} lies in the output {output}"
        raise UserError(found, "sources outside of it", "choose another output=PATH")
    return files


def _source_state(config: CorpusConfig, files: list[Path]) -> str:
    """Twelve hex digits that change when a source file is added, removed, resized or touched."""
    digest = hashlib.sha256()
    for file in sorted(files):
        status = file.stat()
        digest.update(os.fsencode(file) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    if isinstance(config.tokenizer, SentencePieceFile):
        digest.update(Tokenizer(config.tokenizer.path).sha256.encode())
    return digest.hexdigest()[:12]


def _scan(
    config: CorpusConfig, staging: Path, total_bytes: int, reporter: Reporter
) -> tuple[list[SourceScan], BlockSample]:
    """First pass over all sources."""
    training = config.tokenizer if isinstance(config.tokenizer, SentencePieceTraining) else None
    sample = BlockSample(training.sample_bytes if training else 0)
    seen: set[bytes] = set()
    rejects_path = staging / "rejects.jsonl"
    with reporter.stage("scan", total_bytes) as advance, rejects_path.open("w", encoding="utf-8") as rejects:
        scans = [
            scan_source(
                source,
                seed=config.seed,
                heldout_fraction=config.heldout_fraction,
                seen=seen,
                sample=sample if training else None,
                rejects=rejects,
                advance=advance,
            )
            for source in config.sources
        ]
    for scan in scans:
        if scan.count(TRAIN) == 0:
            counts = f"{scan.count(HELDOUT)} held out, {scan.rejects} rejected, {scan.duplicates} duplicates"
            remedy = f"mend or remove the source; the first rejects: {_first_lines(rejects_path)}"
            raise UserError(f"source {scan.name!r}: no document to train on ({counts})", "at least one", remedy)
    if config.heldout_fraction > 0 and not any(scan.count(HELDOUT) for scan in scans):
        found = f"no held-out document among {sum(scan.count(TRAIN) for scan in scans)}"
        remedy = "raise heldout_fraction, change seed, add documents, or set heldout_fraction=0"
        raise UserError(found, f"some, with heldout_fraction={config.heldout_fraction}", remedy)
    return scans, sample


def _first_lines(rejects_path: Path) -> str:
    with rejects_path.open(encoding="utf-8") as file:
        return "".join(line for line, _ in zip(file, range(3), strict=False)).strip() or "none"


def _tokenize(
    config: CorpusConfig, staging: Path, scans: list[SourceScan], tokenizer: Tokenizer, reporter: Reporter
) -> tuple[SideSummary, ...]:
    """Second pass: every document kept becomes tokens on its side's spool, then shards."""
    spool_folder = staging / "spool"
    spool_folder.mkdir()
    spools: dict[str, Spools] = {}
    with ExitStack() as stack:
        with reporter.stage("tokenize", sum(scan.text_bytes for scan in scans)) as advance:
            for scan in scans:
                spools[scan.name] = {}
                for side in (side for side, code in SIDES.items() if scan.count(code)):
                    spool = TokenSpool(spool_folder / f"{scan.name}.{side}", tokenizer.vocab_size)
                    stack.callback(spool.close)
                    spools[scan.name][side] = spool
            _fill_spools(config, scans, staging / "tokenizer", spools, advance)
        rows: list[SideSummary] = []
        with reporter.stage("write shards") as advance:
            for name, by_side in spools.items():
                for side, spool in by_side.items():
                    folder = staging / side / name
                    folder.mkdir(parents=True)
                    shards = spool.write_shards(folder, config.shard_tokens, advance)
                    manifest = write_manifest(
                        folder,
                        name=name,
                        vocab_size=tokenizer.vocab_size,
                        eos_id=tokenizer.eos_id,
                        tokenizer_sha256=tokenizer.sha256,
                        tokenizer="../../tokenizer",
                        shards=shards,
                    )
                    counts = (len(shards), manifest.documents, manifest.tokens, manifest.text_bytes)
                    rows.append(SideSummary(name, side, *counts))
    return tuple(rows)


@dataclass
class _Batch:
    """Documents on their way: texts for a worker, the rest stays here."""

    texts: list[str]
    targets: list[tuple[TokenSpool, int, int]]  # where to, text bytes, place in the shuffle
    text_bytes: int = 0


def _fill_spools(
    config: CorpusConfig,
    scans: list[SourceScan],
    tokenizer: Path,
    spools: dict[str, Spools],
    advance: Callable[[int], None],
) -> None:
    """Encode all sources in one go, so that worker processes start once."""
    on_the_way: deque[_Batch] = deque()

    def texts() -> Iterator[list[str]]:
        for source, scan in zip(config.sources, scans, strict=True):
            for batch in _batches(source, scan, spools[scan.name], config.seed):
                on_the_way.append(batch)
                yield batch.texts

    for encoded in encode_batches(tokenizer, texts(), config.workers):
        batch = on_the_way.popleft()
        end = 0
        for (spool, text_bytes, key), length in zip(batch.targets, encoded.lengths, strict=True):
            spool.add(encoded.ids[end : end + length], text_bytes, key)
            end += length
        advance(batch.text_bytes)


def _batches(source: TextTree | JsonLines, scan: SourceScan, spools: Spools, seed: int) -> Iterator[_Batch]:
    """The documents kept, in reading order, in batches of about `_BATCH_BYTES`.

    Raises:
        UserError: the source is no longer what the scan saw.
    """
    by_code = {SIDES[side]: spool for side, spool in spools.items()}
    batch, number = _Batch([], []), 0
    changed = UserError(
        f"source {source.name!r} changed while it was read", "files that stay as they are", "run it again"
    )
    for document in read_documents(source):
        if not isinstance(document, Document):
            continue
        data = document.text.encode("utf-8")
        digest = text_digest(data, seed)
        if number >= len(scan.sides) or digest != scan.digests[number].tobytes():
            raise changed
        spool = by_code.get(int(scan.sides[number]))
        number += 1
        if spool is None:  # a duplicate
            continue
        batch.texts.append(document.text)
        batch.targets.append((spool, len(data), order_key(digest)))
        batch.text_bytes += len(data)
        if batch.text_bytes >= _BATCH_BYTES:
            yield batch
            batch = _Batch([], [])
    if number != len(scan.sides):
        raise changed
    if batch.texts:
        yield batch
