"""What a SentencePiece model file holds, read from its protocol buffer.

The library tells pieces and scores, but not which pieces are user-defined, nor how text is normalised. Field numbers:
google/sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # model types
_PIECES, _TRAINER, _NORMALISER = 1, 2, 3
_VARINT, _WORD64, _BYTES, _WORD32 = 0, 1, 2, 5  # protobuf's wire types


@dataclass(frozen=True)
class PieceFile:
    """Pieces in order of their ids, and how text becomes pieces."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    model_type: int
    charsmap: bytes  # replaces characters
    dummy_prefix: bool  # a space before each text
    removes_spaces: bool
    escapes_spaces: bool
    space_as_suffix: bool

    @classmethod
    def read(cls, file: Path) -> PieceFile:
        """
        Raises:
            UserError: it is no such file.
        """
        try:
            top = list(_fields(file.read_bytes()))
            pieces = [dict(_fields(value)) for number, value in top if number == _PIECES and isinstance(value, bytes)]
            trainer, normaliser = (
                dict(pair for number, value in top if number == wanted and isinstance(value, bytes) for pair in
                     _fields(value))
                for wanted in (_TRAINER, _NORMALISER)
            )  # fmt: skip
            charsmap = normaliser.get(2, b"")
            return cls(
                pieces=tuple(_text(piece[1]) for piece in pieces),
                scores=tuple(_float(piece.get(2, bytes(4))) for piece in pieces),
                kinds=tuple(_int(piece.get(3, NORMAL)) for piece in pieces),
                model_type=_int(trainer.get(3, _UNIGRAM)),
                charsmap=charsmap if isinstance(charsmap, bytes) else b"",
                dummy_prefix=bool(normaliser.get(3, 1)),
                removes_spaces=bool(normaliser.get(4, 1)),
                escapes_spaces=bool(normaliser.get(5, 1)),
                space_as_suffix=bool(trainer.get(24, 0)),
            )
        except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
            raise UserError(f"{file}: {error}", "a SentencePiece model", "mend the tokenizer's path") from None

    @property
    def is_bpe(self) -> bool:
        return self.model_type == _BPE

    @property
    def unknown(self) -> int:
        return self.kinds.index(UNKNOWN)

    def unlike_ours(self) -> list[str]:
        """How it differs from a model trained here, in ways that change what text becomes."""
        rules = (
            (self.model_type not in (_UNIGRAM, _BPE), "its pieces are words or characters"),
            (bool(self.charsmap), "it normalises characters"),
            (self.dummy_prefix, "it puts a space before each text"),
            (self.removes_spaces, "it removes spaces"),
            (not self.escapes_spaces or self.space_as_suffix, "it writes spaces in a way of its own"),
            (self.kinds.count(BYTE) != 256, "it has no pieces for bytes"),
            (UNUSED in self.kinds, "it has unused pieces"),
        )
        return [reason for holds, reason in rules if holds]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message; words and nested messages as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_WORD32, _WORD64):
            size = 4 if kind == _WORD32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"ends at byte {len(data)}, within a field of {size} bytes from {at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _text(value: int | bytes) -> str:
    if not isinstance(value, bytes):
        raise ValueError("a piece that is no text")
    return value.decode("utf-8")


def _float(value: int | bytes) -> float:
    if not isinstance(value, bytes):
        raise ValueError("a score that is no number")
    return float(struct.unpack("<f", value)[0])


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a kind that is no number")
    return value
