"""Preflight of the data: every folder opens on every rank, one tokenizer made all of it, sampled blocks are sound,
there is enough of it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from configs.layout import least_micro_batches
from data_prep.format import TokenStream
from data_prep.manifest import BLOCK_BYTES, PREP_AGAIN, ShardInfo, token_dtype
from data_prep.storage import sha256_file
from data_prep.tokenizer import find_file
from data_prep.tokenizer_files import HUGGINGFACE_FILE, SENTENCEPIECE_FILE
from parallel import collectives
from pretrain import build
from pretrain.checkpoint_checks import read_newest_readable
from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.data import Source, check_document_end, check_vocabulary
from pretrain.preflight_report import Check, Step, Where, gib, told_by

MOST_EPOCHS = 4  # repeating text up to so often is nearly as good as new text: arXiv:2305.16264, sec. 6
_WINDOW = BLOCK_BYTES // 4  # tokens read at a time where there are no checksums


class Amount(NamedTuple):
    """How many blocks are sampled, and for how long at most."""

    a_rank: int
    in_all: int
    seconds: float


FULL, QUICK = Amount(64, 4096, 10.0), Amount(4, 256, 1.0)


# ---- opening --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Opened:
    """What one rank found in the data folders, by name of a source or path of a held-out folder."""

    faults: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()  # vocabularies and tokenizers
    identities: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, str | None] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)  # windows of a training source
    tokens: int = 0
    files: dict[str, str] = field(default_factory=dict)  # sha256 of the tokenizer files beside the data; on rank 0


def folders(where: Where) -> dict[str, str]:
    """Name -> path of all data folders."""
    data = where.config.data
    return {s.name: s.path for s in data.sources} | {path: path for path in data.heldout}


def look_at_data(where: Where) -> Opened:
    config, length = where.config, where.config.train.sequence_length
    met, unfit = list[UserError](), list[str]()
    opened: dict[str, Source] = {}
    for name, path in folders(where).items():
        try:
            opened[name] = Source(name, path, length, seed=0)
        except UserError as error:
            met.append(error)
        except OSError as error:
            met.append(UserError(f"{path}: {error}", "", PREP_AGAIN))
    for name, source in opened.items():
        try:
            check_vocabulary({name: source.stream.vocab_size}, config.model.vocab_size)
            check_document_end({name: source.stream.eos_id}, config.model.attention.document_end)
        except UserError as error:
            unfit.append(error.found)
    if config.data.heldout and not met:
        try:
            data = config.parallel.data_degree(where.ranks_meant)
            build.make_heldout(config, data * config.train.micro_batch_sequences, least_micro_batches(config))
        except UserError as error:
            if error.found not in unfit:
                met.append(error)
    training = {s.name for s in config.data.sources}
    return Opened(
        tuple(error.found for error in met),
        tuple(error.remedy for error in met),
        tuple(unfit),
        {name: source.stream.identity for name, source in opened.items()},
        {name: s.stream.manifest.tokenizer_sha256 if s.stream.manifest else None for name, s in opened.items()},
        {name: source.num_samples for name, source in opened.items() if name in training},
        sum(source.stream.num_tokens for name, source in opened.items() if name in training),
        _tokenizer_files(opened) if where.rank == 0 else {},
    )


def _tokenizer_files(opened: dict[str, Source]) -> dict[str, str]:
    found = {}
    for name, source in opened.items():
        manifest = source.stream.manifest
        # A dataset may be taken elsewhere without its tokenizer.
        if manifest is not None and (folder := source.stream.folder / manifest.tokenizer).is_dir():
            try:
                found[name] = sha256_file(find_file(folder, (SENTENCEPIECE_FILE, HUGGINGFACE_FILE)))
            except (UserError, OSError) as error:
                found[name] = str(error)
    return found


def judge_data(where: Where, found: list[Opened]) -> list[Check]:
    if faults := told_by(where, {rank: one.faults for rank, one in enumerate(found)}):
        remedy = "; ".join(dict.fromkeys(text for one in found for text in one.remedies))
        return [Check("data", "no", faults, remedy), _judge_tokenizer(where, found)]
    names = folders(where)
    differing = {
        rank: [f"{names[name]} holds other data than on rank 0" for name, value in one.identities.items()
               if value != found[0].identities[name]]
        for rank, one in enumerate(found)
    }  # fmt: skip
    if told := told_by(where, differing):
        return [Check("data", "no", told, "give every node the same copy, or read from a shared disk")]
    sources, heldout = len(where.config.data.sources), len(where.config.data.heldout)
    told = f"{sources} source(s) of {found[0].tokens:,} tokens, {heldout} held-out folder(s), open on every rank"
    return [Check("data", "ok", told), _judge_tokenizer(where, found), _judge_amount(where, found[0])]


def _judge_tokenizer(where: Where, found: list[Opened]) -> Check:
    name, remedy = "tokenizer", "prepare all data with one tokenizer (kind: sentencepiece_file or huggingface_file)"
    first = found[0]
    known = {source: digest for source, digest in first.tokenizers.items() if digest}
    faults = list(dict.fromkeys(text for one in found for text in one.unfit))
    if len(set(known.values())) > 1:
        told = ", ".join(f"{source!r} {digest[:12]}" for source, digest in known.items())
        faults.append(f"made by different tokenizers (sha256): {told}")
    faults += [f"{source!r} was made by tokenizer {known[source][:12]}, beside it lies {digest[:12]}"
               for source, digest in first.files.items() if digest != known[source]]  # fmt: skip
    if faults:
        vocabulary = "; a vocabulary must fit in model.vocab_size" if any(one.unfit for one in found) else ""
        return Check(name, "no", "; ".join(faults), remedy + vocabulary)
    size = where.config.model.vocab_size
    if not known:
        told = f"no data says which tokenizer made it; model.vocab_size={size:,}"
        return Check(name, "warn", told, "shards made by `glam prep` say it")
    told = f"sha256 {next(iter(known.values()))[:12]} of {len(known)} folder(s), within model.vocab_size={size:,}"
    silent = len(first.tokenizers) - len(known)
    if silent:
        told = f"{told}; {silent} folder(s) made elsewhere do not say"
        return Check(name, "warn", told, "see that they were made by the same tokenizer")
    return Check(name, "ok", told)


def _judge_amount(where: Where, opened: Opened) -> Check:
    config = where.config
    drawn = config.train.steps * config.train.batch_sequences
    total = sum(source.weight for source in config.data.sources)
    epochs = {s.name: drawn * s.weight / total / opened.samples[s.name] for s in config.data.sources}
    most = max(epochs, key=lambda name: epochs[name])
    told = f"{config.train.steps * config.train.batch_tokens:,} tokens to train on; {most!r} is read "
    told += f"{epochs[most]:,.2f} times" + (", others less often" if len(epochs) > 1 else "")
    numbers = {"epochs": epochs}
    if epochs[most] > MOST_EPOCHS:
        often = [name for name, count in epochs.items() if count > MOST_EPOCHS]
        remedy = f"more text, fewer steps, or a smaller weight of {', '.join(often)}"
        return Check("enough data", "warn", f"{told}: beyond {MOST_EPOCHS}, repeating teaches little", remedy, numbers)
    return Check("enough data", "ok", told, "", numbers)


# ---- the newest checkpoint ------------------------------------------------------------------------------------------
def look_at_checkpoint(where: Where) -> tuple[str, UserError | None]:
    """On rank 0: what a start would go on from, or why not."""
    if where.rank:
        return "", None
    config = where.config
    told = "none yet: the run is new"
    if there := complete_checkpoints(Path(config.run_dir)):
        told = f"{there[-1].name} is of this model and tokenizer"
    try:
        tokenizers = {}
        for source in config.data.sources:
            with_manifest = TokenStream(source.path).manifest
            tokenizers[source.name] = with_manifest.tokenizer_sha256 if with_manifest else None
    except (UserError, OSError):  # told by the check of the data
        tokenizers = {}
    try:
        read_newest_readable(Path(config.run_dir), config.model, tokenizers)
        if config.train.start_from and not there:
            build.refuse_unfit_start(config)
            told = f"{told}, and begins with the weights of {config.train.start_from}"
    except UserError as error:
        return told, error
    return told, None


def judge_checkpoint(where: Where, found: list[tuple[str, UserError | None]]) -> list[Check]:
    told, error = found[0]
    return [Check("checkpoint", "no", error.found, error.remedy) if error else Check("checkpoint", "ok", told)]


# ---- sampled blocks -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sampled:
    """What one rank read."""

    asked: int = 0
    read: int = 0
    bytes: int = 0
    there: int = 0  # blocks of all data; the same on every rank
    damages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One BLOCK_BYTES of a shard; `number` counts them from 0."""

    folder: Path
    shard: ShardInfo
    number: int
    vocab_size: int

    def damage(self) -> str:
        """What is wrong with it; empty where nothing is."""
        path = self.folder / f"{self.shard.name}.bin"
        start = self.number * BLOCK_BYTES
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), min(BLOCK_BYTES, self.shard.bin_bytes - start), start)
        place = f"{path}: bytes {start}..{start + len(data)}"
        try:
            wanted = _block_checksums(self.folder / f"{self.shard.name}.json")[self.number]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"{self.folder / self.shard.name}.json: no checksum ({type(error).__name__}: {error})"
        if zlib.crc32(data) != wanted:
            return f"{place}: not what was written"
        ids = np.frombuffer(data, token_dtype(self.vocab_size))
        if ids.size and (int(ids.max()) >= self.vocab_size or int(ids.min()) < 0):
            return f"{place}: an id outside the vocabulary of {self.vocab_size}"
        return ""


@functools.lru_cache(maxsize=64)
def _block_checksums(sidecar: Path) -> list[int]:
    found: list[int] = json.loads(sidecar.read_bytes())["bin_block_crc32"]
    return found


def look_at_blocks(where: Where) -> Sampled:
    """This rank's share of blocks drawn from all folders, as many from each."""
    amount = QUICK if where.quick else FULL
    seed: int = collectives.same_on_all_ranks(random.SystemRandom().getrandbits(32))
    streams = []
    for path in folders(where).values():
        try:
            streams.append(TokenStream(path))
        except (UserError, OSError):  # told by the check of the data
            continue
    if not streams:
        return Sampled()
    wanted = min(amount.in_all, amount.a_rank * where.num_ranks)
    each = -(-wanted // len(streams))
    rng = random.Random(seed)
    drawn = [(stream, block) for stream in streams for block in _draw(stream, each, rng)]
    mine = drawn[where.rank :: where.num_ranks]
    deadline, damages, size, read = time.monotonic() + amount.seconds, list[str](), 0, 0
    for stream, number in mine:
        if time.monotonic() > deadline:
            break
        damage, count = _read_block(stream, number, where.config.model.vocab_size)
        damages += [damage] * bool(damage)
        size, read = size + count, read + 1
    return Sampled(len(mine), read, size, sum(_num_blocks(stream) for stream in streams), tuple(damages))


def _draw(stream: TokenStream, most: int, rng: random.Random) -> list[int]:
    count = _num_blocks(stream)
    return rng.sample(range(count), min(count, most))


def _num_blocks(stream: TokenStream) -> int:
    if stream.manifest is None:
        return -(-stream.num_tokens // _WINDOW)
    return sum(_shard_blocks(shard) for shard in stream.manifest.shards)


def _shard_blocks(shard: ShardInfo) -> int:
    return -(-shard.bin_bytes // BLOCK_BYTES)


def _read_block(stream: TokenStream, number: int, model_vocab_size: int) -> tuple[str, int]:
    """(damage, bytes read) of a block of a folder."""
    try:
        if stream.manifest is None:
            ids = stream.read(number * _WINDOW, min(_WINDOW, stream.num_tokens - number * _WINDOW))
            first = number * _WINDOW
            bad = int(ids.max()) >= model_vocab_size or int(ids.min()) < 0
            told = f"{stream.folder}: an id outside model.vocab_size={model_vocab_size} in tokens {first}.."
            return (f"{told}{first + len(ids)}" if bad else ""), ids.nbytes
        block = _block_at(stream, number)
        return block.damage(), min(BLOCK_BYTES, block.shard.bin_bytes - block.number * BLOCK_BYTES)
    except (UserError, OSError) as error:
        return f"{stream.folder}: {error.found if isinstance(error, UserError) else error}", 0


def _block_at(stream: TokenStream, number: int) -> Block:
    assert stream.manifest is not None
    for shard in stream.manifest.shards:
        if number < _shard_blocks(shard):
            return Block(stream.folder, shard, number, stream.manifest.vocab_size)
        number -= _shard_blocks(shard)
    raise IndexError(number)


def judge_blocks(where: Where, found: list[Sampled]) -> list[Check]:
    read, there = sum(one.read for one in found), found[0].there
    told = f"{read:,} of {there:,} blocks ({gib(sum(one.bytes for one in found))})"
    numbers = {"blocks_read": read, "blocks": there}
    if damages := list(itertools.chain.from_iterable(one.damages for one in found)):
        more = f" and {len(damages) - 3} more" if len(damages) > 3 else ""
        remedy = f"`glam prep verify` tells all of it; {PREP_AGAIN}"
        return [Check("checksums", "no", f"{told}: {'; '.join(damages[:3])}{more}", remedy, numbers)]
    if not there:
        return [Check("checksums", "left out", "no data could be opened")]
    late = sum(one.asked - one.read for one in found)
    if late:
        told += f" are sound; {late:,} more were not read in time"
        return [Check("checksums", "warn", told, "see whether the disk of the data is slow", numbers)]
    return [Check("checksums", "ok", f"{told} are sound", "", numbers)]


DATA_STEPS = (
    Step("data", look_at_data, judge_data),
    Step("checkpoint", look_at_checkpoint, judge_checkpoint),
    Step("checksums", look_at_blocks, judge_blocks),
)
