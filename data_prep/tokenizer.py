"""The tokenizer: text to ids and, for one trained here, back to exactly the text it was given.

A tokenizer folder holds the tokenizer's own file and `token_bytes.npy`; whoever only needs bits per byte reads the
second, without a tokenizer library:

    tokenizer.model              SentencePiece
    tokenizer.json               Hugging Face `tokenizers`, with tokenizer_config.json, which names the token for EOS
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from configs.errors import UserError
from configs.tokenizers import HuggingFaceFile, SentencePieceFile, SentencePieceTraining, TokenizerSpec
from data_prep.storage import sha256_file, write_atomically
from data_prep.tokenizer_files import (
    HUGGINGFACE_FILE,
    HUGGINGFACE_SETTINGS,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceModel,
    TokenizerFile,
)

TOKEN_BYTES_FILE = "token_bytes.npy"

_PROBE = " two  spaces\r\n\n\n\tTab \ufeff\x00 é漢字😀 \ufb01 <unk></s><0x41> x\u2581y   \n   "
_TRAINING_THREADS = 16  # written into the model file, so it must not follow the machine
_SEED_PIECES = 1 << 20  # unigram prunes its vocabulary out of these: four for each piece of the largest
# Older releases index the sample in 32 bits unless told otherwise; each byte may take three (the space mark).
_LARGE_SAMPLE_BYTES = 1 << 29


class Tokenizer:
    """Text to ids and back.

    Args:
        path: a tokenizer folder, a SentencePiece model file, or a ``tokenizer.json`` of Hugging Face.
        eos_token: the token that ends a document, for a ``tokenizer.json``; None: what the file beside it says, or the
            only one of a usual name.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        source_file: the file read.
        vocab_size: V, entries of the vocabulary.
        eos_id: the id that ends a document; `encode` does not add it.
        eos_token: its name.
        sha256: of the file.

    Raises:
        UserError: no tokenizer there, or one that cannot be read, or one without an end-of-text token.
    """

    def __init__(self, path: Path | str, eos_token: str | None = None) -> None:
        self.source_file = find_file(Path(path), (SENTENCEPIECE_FILE, HUGGINGFACE_FILE))
        self.kind = "huggingface" if self.source_file.suffix == ".json" else "sentencepiece"
        self._file: TokenizerFile
        if self.kind == "huggingface":
            self._file = HuggingFaceTokenizer(self.source_file, eos_token)
        else:
            self._file = SentencePieceModel(self.source_file)
        self.vocab_size, self.eos_id = self._file.vocab_size, self._file.eos_id
        self.eos_token = self._file.eos_token
        self.sha256 = sha256_file(self.source_file)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, without EOS: int32 [tokens]. Text that spells a control token is text like any other."""
        return self._file.encode(text)

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Text of ids [tokens]; EOS and other control tokens give nothing."""
        return self._file.decode(ids.tolist())

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes behind each token: int32 [V], 0 for control tokens.

        Over a document they sum to its bytes, if the tokenizer is lossless and adds no space of its own.
        """
        return self._file.token_bytes()

    @property
    def lossless(self) -> bool:
        """Whether a probe of awkward text comes back as it was; tokenizers that normalise or add a space fail."""
        return self.decode(self.encode(_PROBE)) == _PROBE


def find_file(path: Path, names: tuple[str, ...]) -> Path:
    """The file at ``path``, or the first of ``names`` in the folder there.

    Raises:
        UserError: there is none.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not file.is_file():
        expected = "a tokenizer: " + " or ".join(names)
        raise UserError(f"{file}: no such file", expected, "mend the tokenizer's path, or train one")
    return file


def open_source(spec: SentencePieceFile | HuggingFaceFile) -> Tokenizer:
    """The existing tokenizer that a configuration names.

    Raises:
        UserError: as for `Tokenizer`, or it is of the other kind.
    """
    if isinstance(spec, HuggingFaceFile):
        tokenizer = Tokenizer(find_file(Path(spec.path), (HUGGINGFACE_FILE,)), spec.eos_token)
        kind, other = "huggingface", "sentencepiece_file"
    else:
        tokenizer = Tokenizer(find_file(Path(spec.path), (SENTENCEPIECE_FILE,)))
        kind, other = "sentencepiece", "huggingface_file"
    if tokenizer.kind != kind:
        found = f"tokenizer.kind={spec.kind} with {tokenizer.source_file}"
        raise UserError(found, f"a file of {kind}", f"set tokenizer.kind={other}, or mend tokenizer.path")
    return tokenizer


def make_tokenizer(spec: TokenizerSpec, sample: Iterable[str], folder: Path) -> Tokenizer:
    """Fill a tokenizer folder: train on the lines of ``sample``, or copy the file named.

    Raises:
        UserError: the vocabulary does not fit the sample, or the file is no usable tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(spec, SentencePieceTraining):
        write_atomically(folder / SENTENCEPIECE_FILE, train_model(spec, sample))
    else:
        source = open_source(spec)  # refuses before copying
        if isinstance(spec, HuggingFaceFile):
            (folder / SENTENCEPIECE_FILE).unlink(missing_ok=True)  # would be read first
            write_atomically(folder / HUGGINGFACE_SETTINGS, json.dumps({"eos_token": source.eos_token}).encode())
        name = HUGGINGFACE_FILE if isinstance(spec, HuggingFaceFile) else SENTENCEPIECE_FILE
        shutil.copyfile(source.source_file, folder / name)
    tokenizer = Tokenizer(folder)
    table = io.BytesIO()
    np.save(table, tokenizer.token_bytes())
    write_atomically(folder / TOKEN_BYTES_FILE, table.getvalue())
    return tokenizer


def train_model(spec: SentencePieceTraining, lines: Iterable[str]) -> bytes:
    """A SentencePiece model file, the same bytes for the same lines on any number of cores.

    Memory follows the sample: 18 to 26 bytes for each of its bytes.

    Raises:
        UserError: SentencePiece cannot make this many pieces, or this few, of this text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=spec.algorithm,
            vocab_size=spec.vocab_size,
            hard_vocab_limit=True,
            num_threads=_TRAINING_THREADS,
            # Lossless: no normalisation, no added or removed spaces, unseen characters as bytes.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=spec.character_coverage,
            # A training sentence cannot hold a line end, so line ends (and tabs, for indents) are pieces by decree.
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            seed_sentencepiece_size=_SEED_PIECES,
            train_extremely_large_corpus=spec.sample_bytes >= _LARGE_SAMPLE_BYTES,
            max_sentence_length=1 << 20,  # longer sentences would be left out; blocks of the sample are shorter
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"tokenizer.vocab_size={spec.vocab_size} does not fit the text: {str(error).rpartition('] ')[2] or error}",
            "a vocabulary that the training sample can fill, and that holds its characters",
            "change tokenizer.vocab_size as the message says, or prepare more text",
        ) from None
    return model.getvalue()
