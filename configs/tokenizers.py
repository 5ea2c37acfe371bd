"""Where a corpus's tokenizer comes from: trained on it, or a file that is there already."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.base import Strict


class SentencePieceTraining(Strict):
    """Train a new SentencePiece model on a seeded sample of the corpus.

    The sample bounds the training's memory; a large vocabulary needs a large sample, or it cannot be filled.
    """

    kind: Literal["train_sentencepiece"] = "train_sentencepiece"
    algorithm: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = Field(default=4096, ge=260, le=262_144)  # 256 bytes and the control pieces must fit
    sample_bytes: int = Field(default=10_000_000, gt=0)
    character_coverage: float = Field(default=0.9999, ge=0.98, le=1.0)  # of the sample; the rest is spelt in bytes


class SentencePieceFile(Strict):
    """Use an existing SentencePiece model: a file, or a folder with a ``tokenizer.model``."""

    kind: Literal["sentencepiece_file"] = "sentencepiece_file"
    path: str


class HuggingFaceFile(Strict):
    """Use an existing tokenizer of Hugging Face's `tokenizers`: a ``tokenizer.json``, or a folder that holds one."""

    kind: Literal["huggingface_file"] = "huggingface_file"
    path: str
    eos_token: str | None = Field(default=None, min_length=1)  # None: what stands beside the file, or the usual names


TokenizerSpec = Annotated[
    SentencePieceTraining | SentencePieceFile | HuggingFaceFile,
    Field(discriminator="kind"),
]
