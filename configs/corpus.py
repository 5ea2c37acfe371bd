"""What `glam prep` makes: raw sources in, a tokenizer and verified token shards out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.base import Strict


class TextTree(Strict):
    """Every matching file below a folder is one document. ``{stdlib}`` in the path is Python's own library."""

    kind: Literal["text_tree"] = "text_tree"
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str
    pattern: str = "**/*.txt"
    exclude: tuple[str, ...] = ()  # glob patterns relative to `path`


class JsonLines(Strict):
    """One JSON object a line; `text_field` holds the document. ``.gz`` is read too."""

    kind: Literal["jsonl"] = "jsonl"
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str  # a file, or a glob of files
    text_field: str = "text"


SourceSpec = Annotated[TextTree | JsonLines, Field(discriminator="kind")]


class SentencePieceTraining(Strict):
    """Train a new SentencePiece model on a seeded sample of the corpus."""

    kind: Literal["train_sentencepiece"] = "train_sentencepiece"
    algorithm: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = Field(default=4096, ge=260, le=262_144)  # 256 bytes and the control pieces must fit
    sample_bytes: int = Field(default=10_000_000, gt=0)


class SentencePieceFile(Strict):
    """Use an existing SentencePiece model file."""

    kind: Literal["sentencepiece_file"] = "sentencepiece_file"
    path: str


TokenizerSpec = Annotated[SentencePieceTraining | SentencePieceFile, Field(discriminator="kind")]


class CorpusConfig(Strict):
    """One corpus: where its text comes from, how it is tokenized, where the shards go."""

    output: str
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    tokenizer: TokenizerSpec = SentencePieceTraining()
    heldout_fraction: float = Field(default=0.01, ge=0.0, lt=1.0)  # of documents, chosen by a hash of their text
    shard_tokens: int = Field(default=100_000_000, ge=1)
    seed: int = 0
    workers: int = Field(default=2, ge=1)
