"""What `glam prep` makes: raw sources in, a tokenizer and verified token shards out.

Sizes are bytes of UTF-8 text unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict
from configs.filters import FilterSpec
from configs.tokenizers import SentencePieceTraining, TokenizerSpec

MAX_SHARD_TOKENS = 150_000_000  # a shard is put in order in memory: at most 600 MB of int32


class Source(Strict):
    """What every kind of source has.

    Of documents that stand in several sources the copy in the first one listed stays.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")  # becomes a folder
    path: str
    weight: float = Field(default=1.0, gt=0)  # share of the training mixture, normalised over all sources
    filters: tuple[FilterSpec, ...] | None = None  # null: those of `clean.filters`


class TextTree(Source):
    """Every matching file below a folder is one document. ``{stdlib}`` in the path is Python's own library."""

    kind: Literal["text_tree"] = "text_tree"
    pattern: str = "**/*.txt"
    exclude: tuple[str, ...] = ()  # glob patterns relative to `path`


class JsonLines(Source):
    """One JSON object a line, plain or compressed (.gz, .zst); `path` is a file, a folder or a glob."""

    kind: Literal["jsonl"] = "jsonl"
    text_field: str = "text"


class Parquet(Source):
    """One row a document; `path` is a file, a folder or a glob."""

    kind: Literal["parquet"] = "parquet"
    text_field: str = "text"


class HuggingFace(Source):
    """Local files that the `datasets` library reads, streamed; nothing is fetched from a hub.

    `builder` is one of its packaged loaders (csv, json, text, arrow, …) with `path` a file, a folder or a glob, or
    ``disk`` with `path` a folder written by ``Dataset.save_to_disk``.
    """

    kind: Literal["huggingface"] = "huggingface"
    builder: str
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)  # for the loader: {delimiter: ";"}
    text_field: str = "text"


SourceSpec = Annotated[TextTree | JsonLines | Parquet | HuggingFace, Field(discriminator="kind")]


class Cleaning(Strict):
    """What becomes of a text before anything looks at it, and which texts are left out."""

    unicode: Literal["nfc", "keep"] = "nfc"
    control_characters: Literal["remove", "keep"] = "remove"  # line ends become "\n", tabs stay
    filters: tuple[FilterSpec, ...] = ()  # for sources without filters of their own


class NearDuplicates(Strict):
    """MinHash with banding (Broder 1997; Leskovec et al., "Mining of Massive Datasets", 3.4).

    Two texts of Jaccard similarity s over their word n-grams meet with probability 1 - (1 - s^rows)^bands: with the
    default 14 x 8 that is 0.92 at s = 0.8, 0.77 at 0.75 and 0.05 at 0.5.
    """

    ngram_words: int = Field(default=5, ge=1, le=100)
    bands: int = Field(default=14, ge=1, le=128)
    rows: int = Field(default=8, ge=1, le=64)


class Deduplication(Strict):
    """Exact: equal after lower-casing and folding white space. Near: see NearDuplicates; null switches it off."""

    exact: bool = True
    near: NearDuplicates | None = NearDuplicates()


class QualityTraining(Strict):
    """GLaM's filter (Du et al. 2021, section 3): a linear classifier over hashed words tells curated sources from
    the others; documents of `filter` are kept if pareto(alpha) > 1 - score, so some low-scoring ones stay."""

    kind: Literal["train_classifier"] = "train_classifier"
    curated: tuple[str, ...] = Field(min_length=1)  # names of sources: what good text looks like
    filter: tuple[str, ...] = Field(min_length=1)  # names of sources that are scored and sampled
    sample_bytes: int = Field(default=50_000_000, gt=0)  # of each of the two classes
    features: int = Field(default=2**18, ge=2**8, le=2**24)
    pareto_alpha: float = Field(default=9.0, gt=0)


class QualityFile(Strict):
    """The same with a classifier made before (`quality/classifier.safetensors` of another corpus)."""

    kind: Literal["classifier_file"] = "classifier_file"
    path: str
    filter: tuple[str, ...] = Field(min_length=1)
    pareto_alpha: float = Field(default=9.0, gt=0)


QualitySpec = Annotated[QualityTraining | QualityFile, Field(discriminator="kind")]


class CorpusConfig(Strict):
    """One corpus: where its text comes from, how it is tokenized, where the shards go."""

    output: str
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    clean: Cleaning = Cleaning()
    deduplicate: Deduplication = Deduplication()
    quality: QualitySpec | None = None
    tokenizer: TokenizerSpec = SentencePieceTraining()
    heldout_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)  # of documents, chosen by a hash of their text
    shard_tokens: int = Field(default=100_000_000, ge=1, le=MAX_SHARD_TOKENS)
    max_document_bytes: int = Field(default=16 * 2**20, ge=1, le=2**28)  # a longer record is rejected, never loaded
    max_reject_fraction: float = Field(default=1.0, ge=0.0, le=1.0)  # of a source's records that cannot be read
    seed: int = Field(default=0, ge=0, lt=2**63)
    # How the work is done; the result does not depend on it.
    workers: int = Field(default=2, ge=1)  # processes; under mpiexec and srun their number counts instead
    unit_bytes: int = Field(default=64 * 2**20, ge=1)  # of source files in one piece of work, redone after a kill

    @model_validator(mode="after")
    def _check(self) -> Self:
        if broken := [fault for rule in RULES if (fault := rule(self))]:
            raise ValueError("; ".join(broken))
        return self

    def filters_of(self, source: int) -> tuple[FilterSpec, ...]:
        """The filters of the source of this number."""
        own = self.sources[source].filters
        return self.clean.filters if own is None else own

    @property
    def makes(self) -> dict[str, object]:
        """What decides the result: neither where it is put nor how the work is shared out."""
        return self.model_dump(mode="json", exclude={"output", "workers", "unit_bytes", "max_reject_fraction"})


def names_differ(c: CorpusConfig) -> str | None:
    names = [source.name for source in c.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"sources: two sources are named {twice[0]!r}; names become folders, rename one" if twice else None


def quality_names_sources(c: CorpusConfig) -> str | None:
    if c.quality is None:
        return None
    named = {*c.quality.filter, *getattr(c.quality, "curated", ())}
    known = [source.name for source in c.sources]
    if unknown := sorted(named - set(known)):
        return f"quality: no source is named {unknown[0]!r}; there are {', '.join(known)}"
    return None


def quality_classes_differ(c: CorpusConfig) -> str | None:
    if c.quality is None or c.quality.kind != "train_classifier":
        return None
    both = sorted(set(c.quality.curated) & set(c.quality.filter))
    return f"quality: {both[0]!r} is both curated and filtered; a source belongs to one class" if both else None


RULES: tuple[Callable[[CorpusConfig], str | None], ...] = (names_differ, quality_names_sources, quality_classes_differ)
