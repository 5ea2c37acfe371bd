"""The tokenizer: a SentencePiece model that gives back, for a model trained here, exactly the text it was given.

A tokenizer folder holds `tokenizer.model` and `token_bytes.npy`; whoever only needs bits per byte reads the second,
without SentencePiece.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from configs.corpus import SentencePieceFile, SentencePieceTraining
from configs.errors import UserError
from data_prep.storage import sha256_file, write_atomically

MODEL_FILE = "tokenizer.model"
TOKEN_BYTES_FILE = "token_bytes.npy"

# SentencePiece writes spaces as this character, so the character itself, met in text, would come back as a space.
_SPACE_MARK = "\u2581"
_PROBE = " two  spaces\r\n\n\n\tTab \ufeff\x00 é漢字😀 \ufb01 <unk></s><0x41> x\u2581y   \n   "
_TRAINING_THREADS = 16  # written into the model file, so it must not follow the machine


class Tokenizer:
    """Text to ids and back.

    Args:
        path: a tokenizer folder, or a SentencePiece model file.

    Attributes:
        vocab_size: V, entries of the vocabulary.
        eos_id: the id that ends a document; `encode` does not add it.
        sha256: of the model file.

    Raises:
        UserError: no model there, or one that cannot be read, or one without an end-of-text piece.
    """

    def __init__(self, path: Path | str) -> None:
        model = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        remedy = "mend the tokenizer's path, or train one"
        if not model.is_file():
            raise UserError(f"{model}: no such file", "a SentencePiece model", remedy)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{model}: {error}", "a SentencePiece model", remedy) from None
        self.vocab_size = int(self._model.vocab_size())
        self.eos_id = int(self._model.eos_id())
        self.sha256 = sha256_file(model)
        if self.eos_id < 0:
            raise UserError(f"{model} has no end-of-text piece", "a model trained with eos_id >= 0", remedy)
        mark = [int(self._model.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_MARK.encode()]
        # Without byte pieces the mark cannot be spelt out; such a model is lossy anyway.
        self._mark = np.array(mark, np.int32) if all(self._model.is_byte(i) for i in mark) else None

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text, without EOS: int32 [tokens]."""
        if self._mark is None or _SPACE_MARK not in text:
            return np.asarray(self._model.encode_as_numpy(text), dtype=np.int32)
        parts = [self._model.encode_as_numpy(part) for part in text.split(_SPACE_MARK)]
        return np.concatenate([parts[0], *(ids for part in parts[1:] for ids in (self._mark, part))]).astype(np.int32)

    def decode(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        """Text of ids [tokens]; EOS and other control pieces give nothing."""
        return str(self._model.decode_ids(ids.tolist()))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes behind each token: int32 [V], 0 for control pieces; over a document they sum to its bytes."""
        model = self._model
        counts = np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if model.is_byte(token):
                counts[token] = 1
            elif not (model.is_control(token) or model.is_unknown(token)):
                counts[token] = len(model.id_to_piece(token).replace(_SPACE_MARK, " ").encode("utf-8"))
        return counts

    @property
    def lossless(self) -> bool:
        """Whether a probe of awkward text comes back as it was; models that normalise or add a space fail."""
        return self.decode(self.encode(_PROBE)) == _PROBE


def make_tokenizer(spec: SentencePieceTraining | SentencePieceFile, sample: Iterable[str], folder: Path) -> Tokenizer:
    """Fill a tokenizer folder: train on the lines of ``sample``, or copy the file named.

    Raises:
        UserError: the vocabulary does not fit the sample, or the file is no usable model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(spec, SentencePieceTraining):
        write_atomically(folder / MODEL_FILE, train_model(spec, sample))
    else:
        Tokenizer(spec.path)  # refuses before copying
        source = Path(spec.path) / MODEL_FILE if Path(spec.path).is_dir() else Path(spec.path)
        shutil.copyfile(source, folder / MODEL_FILE)
    tokenizer = Tokenizer(folder)
    table = io.BytesIO()
    np.save(table, tokenizer.token_bytes())
    write_atomically(folder / TOKEN_BYTES_FILE, table.getvalue())
    return tokenizer


def train_model(spec: SentencePieceTraining, lines: Iterable[str]) -> bytes:
    """A SentencePiece model file, the same bytes for the same lines on any number of cores.

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
            character_coverage=0.9999,
            # A training sentence cannot hold a line end, so line ends (and tabs, for indents) are pieces by decree.
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
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
