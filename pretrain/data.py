"""From token shards to batches: mixture, order, and the small cursor that says where a run stands.

A sample is a window of S + 1 tokens of a source's concatenated documents; windows overlap by the one token that is a
label in one and an input in the next. Sample k of a source is window perm(k mod n) of epoch k div n, with a keyed
permutation in place of a built index: opening a corpus costs the same whatever its size. Which source the i-th sample
of a run comes from depends on the weights alone. Nothing here knows of ranks until a global batch is cut.

A blocked sample is stepped over: the source gives its next one instead. So is every later sample of the same window,
and none before: a run that blocks samples on its way draws what one draws that knew them from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.data import DataConfig
from configs.errors import UserError
from data_prep.format import TokenStream
from pretrain.blocklist import Blocked, read_blocklist, united
from pretrain.permute import KeyedPermutation

Windows = npt.NDArray[np.int64]  # [sequences, S + 1]


class Source:
    """One folder of shards, read as windows in a keyed order."""

    def __init__(self, name: str, path: str, sequence_length: int, seed: int) -> None:
        self.name, self.path, self.stream = name, path, TokenStream(path)
        self.length, self.seed = sequence_length, seed
        self._passed: dict[int, int] = {}  # window -> number of the sample from which on it is passed over
        self.num_samples = (self.stream.num_tokens - 1) // sequence_length
        if self.num_samples < 1:
            raise UserError(
                f"{path} holds {self.stream.num_tokens} tokens",
                f"at least train.sequence_length + 1 = {sequence_length + 1}",
                "prepare more text, or train on shorter sequences",
            )
        self._order = lru_cache(maxsize=2)(lambda epoch: KeyedPermutation(self.num_samples, f"{seed}/{name}/{epoch}"))

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens [S + 1] of window `index`, in the order of the documents."""
        return self.stream.read(index * self.length, self.length + 1)

    def sample(self, number: int) -> npt.NDArray[np.int64]:
        """The tokens [S + 1] of the `number`-th sample ever drawn from this source."""
        return self.window(self.window_of(number))

    def window_of(self, number: int) -> int:
        """Which window the `number`-th sample is."""
        epoch, position = divmod(number, self.num_samples)
        return self._order(epoch)(position)

    def next_number(self, number: int) -> int:
        """The first sample from `number` on that is not blocked."""
        if not self._passed:
            return number
        return next(n for n in count(number) if n < self._passed.get(self.window_of(n), n + 1))

    def block(self, one: Blocked) -> None:
        """Pass over the samples, and later ones of the same text.

        Raises:
            UserError: nothing would be left.
        """
        for window, number in self._windows(one):
            self._passed[window] = min(number, self._passed.get(window, number))
        if len(self._passed) == self.num_samples:
            raise UserError(
                f"the blocklist covers all {self.num_samples} samples of data source {self.name!r}",
                "one at least to draw",
                "take lines out of it, or leave the source out",
            )

    def _windows(self, one: Blocked) -> Iterator[tuple[int, int]]:
        """Each window that holds text of the samples, and the number of the sample from which on it is blocked."""
        numbers = range(one.first, one.last + 1)
        if (one.sequence_length, one.seed) == (self.length, self.seed):
            yield from ((self.window_of(number), number) for number in numbers)
            return
        other = Source(one.source, self.path, one.sequence_length, one.seed)  # counted otherwise: known by their place
        for number in numbers:
            start = other.window_of(number) * other.length
            end = min((start + other.length - 1) // self.length, self.num_samples - 1)
            yield from ((window, 0) for window in range(start // self.length, end + 1))


@dataclass
class Cursor:
    """Where a run stands in its data. JSON in a checkpoint; the same for any number of ranks."""

    drawn: dict[str, int] = field(default_factory=dict)  # samples taken from each source, or passed over, ever
    mixed: dict[str, int] = field(default_factory=dict)  # those taken since the weights last changed
    weights: dict[str, float] = field(default_factory=dict)


class Sampler:
    """Draws global batches. `cursor` and `blocklist` are its whole state; `chosen` is the newest batch."""

    def __init__(self, config: DataConfig, sequence_length: int, cursor: Cursor | None = None) -> None:
        self.sources = {s.name: Source(s.name, s.path, sequence_length, config.seed) for s in config.sources}
        self.chosen: list[tuple[str, int]] = []
        self.blocklist: list[Blocked] = []
        if config.blocklist:
            given = read_blocklist(Path(config.blocklist), own=False)
            self._refuse_unknown(given, config.blocklist)
            self.block(given)
        total = sum(s.weight for s in config.sources)
        self.weights = {s.name: s.weight / total for s in config.sources}
        self.resume(cursor or Cursor())

    def resume(self, cursor: Cursor) -> None:
        """Go on from a cursor. Changed weights start a new mixture; what each source has given stays given."""
        same = cursor.weights == self.weights
        self.cursor = Cursor(dict(cursor.drawn), dict(cursor.mixed) if same else {}, dict(self.weights))

    def block(self, entries: Iterable[Blocked]) -> None:
        """Pass over these samples from now on. Those of sources or data that are not read here are only remembered."""
        known = set(self.blocklist)
        self.blocklist = united([*self.blocklist, *entries])
        for one in set(self.blocklist) - known:
            if (source := self.sources.get(one.source)) and source.stream.identity == one.dataset:
                source.block(one)

    def _refuse_unknown(self, entries: list[Blocked], path: str) -> None:
        for one in entries:
            source = self.sources.get(one.source)
            if source and source.stream.identity != one.dataset:
                raise UserError(
                    f"data.blocklist={path} names samples of {one.source!r} as it was in {one.dataset[:12]}...; "
                    f"{source.path} is {source.stream.identity[:12]}...",
                    "the data set that the list was made for: another one has other samples",
                    "take these lines out, or put back what was there",
                )
        if entries and not {one.source for one in entries} & self.sources.keys():
            raise UserError(
                f"data.blocklist={path} is about {', '.join(sorted({one.source for one in entries}))}",
                f"one of the sources read here at least: {', '.join(self.sources)}",
                "check the path, or give the sources the names they had",
            )

    def ranges(self, chosen: Iterable[tuple[str, int]]) -> tuple[Blocked, ...]:
        """Chosen samples as entries of a blocklist."""
        found = []
        for name, number in chosen:
            source = self.sources[name]
            found.append(Blocked(name, source.stream.identity, source.length, source.seed, 0, number, number))
        return tuple(united(found))

    def next_batch(self, num_sequences: int) -> list[tuple[str, int]]:
        """Choose the next global batch, (source, sample number) each, and advance.

        Realised counts never stray by a whole sample from the weights (Tijdeman 1980, "The chairman assignment
        problem"): of the sources that may take a sample without running ahead, the one whose deadline is nearest does.
        """
        names = list(self.sources)
        weight = np.array([self.weights[name] for name in names])
        mixed = np.array([self.cursor.mixed.get(name, 0) for name in names])
        drawn = [self.cursor.drawn.get(name, 0) for name in names]
        slack = 1 / (2 * len(names) - 2) if len(names) > 1 else 0.0
        self.chosen = chosen = []
        for total in range(int(mixed.sum()) + 1, int(mixed.sum()) + num_sequences + 1):
            behind = weight * total - mixed
            deadline = np.where(behind >= slack - 1e-9, (mixed + 1 - slack) / weight, np.inf)
            source = int(np.argmin(deadline))
            number = self.sources[names[source]].next_number(drawn[source])
            chosen.append((names[source], number))
            mixed[source] += 1
            drawn[source] = number + 1
        self.cursor.mixed = dict(zip(names, mixed.tolist()))
        self.cursor.drawn.update(zip(names, drawn))
        return chosen

    def read(self, chosen: Sequence[tuple[str, int]]) -> Windows:
        """The tokens of chosen samples, [sequences, S + 1]."""
        return np.stack([self.sources[name].sample(number) for name, number in chosen])

    @property
    def vocab_sizes(self) -> dict[str, int | None]:
        """Vocabulary size each source was tokenized with; None where a foreign dataset does not say."""
        return {name: source.stream.vocab_size for name, source in self.sources.items()}

    @property
    def document_ends(self) -> dict[str, int | None]:
        """The token that ends a document in each source; None where a foreign dataset does not say."""
        return {name: source.stream.eos_id for name, source in self.sources.items()}

    @property
    def tokenizers(self) -> dict[str, str | None]:
        """sha256 of the tokenizer that made each source; None where a foreign dataset does not say."""
        return {
            name: s.stream.manifest.tokenizer_sha256 if s.stream.manifest else None for name, s in self.sources.items()
        }

    def epochs(self) -> dict[str, float]:
        """How often each source has been used up."""
        return {n: self.cursor.drawn.get(n, 0) / source.num_samples for n, source in self.sources.items()}


class HeldOut:
    """The first windows of the held-out folders, in order; every evaluation sees the same ones."""

    def __init__(
        self, paths: Sequence[str], sequence_length: int, num_sequences: int, multiple: int = 1, least: int = 1
    ) -> None:
        """
        Args:
            num_sequences: as many windows at most.
            multiple: the count is rounded down to a multiple of this, so that ranks share it evenly.
            least: no fewer than so many times `multiple` will do.
        """
        self.sources = [Source(path, path, sequence_length, seed=0) for path in paths]
        places = [(source, index) for source in self.sources for index in range(source.num_samples)]
        count = min(num_sequences, len(places)) // multiple * multiple
        if paths and count < multiple * least:
            raise UserError(
                f"{len(places)} held-out sequences of {sequence_length} tokens in {', '.join(paths)}",
                f"at least {multiple * least}, so that every rank has enough",
                "hold out more text (heldout_fraction in `glam prep`), or use fewer ranks or smaller micro-batches",
            )
        self.places = places[:count]
        tables = [source.stream.token_bytes() for source in self.sources]
        self.token_bytes = tables[0] if tables and all(_equal(table, tables[0]) for table in tables) else None

    def __len__(self) -> int:
        return len(self.places)

    def read(self, part: int = 0, parts: int = 1) -> Windows:
        """Windows of the `part`-th of `parts` equal slices, [sequences, S + 1]."""
        size = len(self) // parts
        return np.stack([source.window(index) for source, index in self.places[part * size : (part + 1) * size]])

    def text_bytes(self) -> int | None:
        """UTF-8 bytes of text behind all labels; None where the tokenizer is not known."""
        if self.token_bytes is None:
            return None
        return int(sum(self.token_bytes[source.window(index)[1:]].sum() for source, index in self.places))


def cut_batch(windows: Windows, micro_batch_sequences: int) -> Iterator[tuple[Windows, Windows]]:
    """(tokens [b, S], labels [b, S]) of each micro-batch of a rank's sequences."""
    for start in range(0, len(windows), micro_batch_sequences):
        part = windows[start : start + micro_batch_sequences]
        yield part[:, :-1], part[:, 1:]


def check_vocabulary(sizes: dict[str, int | None], model_vocab_size: int) -> None:
    """Refuse shards whose token ids the model does not know."""
    for name, size in sizes.items():
        if size is not None and size > model_vocab_size:
            raise UserError(
                f"data source {name!r} has a vocabulary of {size} entries, model.vocab_size={model_vocab_size}",
                "a model with at least as many",
                f"set model.vocab_size={size}, or prepare the data with the tokenizer the model was made for",
            )


def check_document_end(ends: dict[str, int | None], document_end: int | None) -> None:
    """Refuse shards whose documents end otherwise than the model is told: it would take them for one, or cut them."""
    for name, end in ends.items():
        if document_end is not None and end not in (None, document_end):
            raise UserError(
                f"documents of data source {name!r} end with token {end}, model.attention.document_end={document_end}",
                "the same token",
                f"set model.attention.document_end={end}, or null if documents may see each other",
            )


def unigram_nats(sampler: Sampler, heldout: HeldOut, vocab_size: int, max_tokens: int = 20_000_000) -> float:
    """The order-0 baseline: cross-entropy, nats a token, of token frequencies in the training mixture on the held-out
    labels, with one count added to each entry. Reads at most `max_tokens` of each source."""
    counts, read = np.ones(vocab_size), 0.0
    frequencies = np.zeros(vocab_size)
    for name, source in sampler.sources.items():
        tokens = source.stream.read(0, min(source.stream.num_tokens, max_tokens))
        frequencies += sampler.weights[name] * np.bincount(tokens, minlength=vocab_size) / len(tokens)
        read += len(tokens)
    counts += frequencies * read
    log_probs = np.log(counts / counts.sum())
    return float(-log_probs[heldout.read()[:, 1:]].mean())


def _equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)
