"""What can be done with each format of tokenizer file. Whoever wants a tokenizer goes through `data_prep.tokenizer`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from configs.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
HUGGINGFACE_SETTINGS = "tokenizer_config.json"  # Hugging Face's own place for the name of the end-of-text token

# SentencePiece writes spaces as this character, so the character itself, met in text, would come back as a space.
_SPACE_MARK = "\u2581"
_NO_CHARACTER = "\U0010ffff"  # reserved for ever, so no vocabulary has it
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_USUAL_EOS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<|eos|>",
    "<eos>",
    "<EOS>",
    "[EOS]",
    "<EOD>",
)
_NAMES_SHOWN = 40


class TokenizerFile(Protocol):
    """One tokenizer file, read."""

    vocab_size: int
    eos_id: int
    eos_token: str

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of a text: int32 [tokens]; never EOS."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens give nothing."""

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes behind each token: int32 [V]."""


class SentencePieceModel:
    """A SentencePiece model file.

    Raises:
        UserError: it cannot be read, or has no end-of-text piece.
    """

    def __init__(self, file: Path) -> None:
        remedy = "mend the tokenizer's path, or train one"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{file}: {error}", "a SentencePiece model", remedy) from None
        self.vocab_size = int(self._model.vocab_size())
        self.eos_id = int(self._model.eos_id())
        if self.eos_id < 0:
            raise UserError(f"{file} has no end-of-text piece", "a model trained with eos_id >= 0", remedy)
        self.eos_token = str(self._model.id_to_piece(self.eos_id))
        mark = [int(self._model.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE_MARK.encode()]
        # Without byte pieces the mark cannot be spelt out; such a model is lossy anyway.
        self._mark = np.array(mark, np.int32) if all(self._model.is_byte(i) for i in mark) else None

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        if self._mark is None or _SPACE_MARK not in text:
            return np.asarray(self._model.encode_as_numpy(text), dtype=np.int32)
        parts = [self._model.encode_as_numpy(part) for part in text.split(_SPACE_MARK)]
        return np.concatenate([parts[0], *(ids for part in parts[1:] for ids in (self._mark, part))]).astype(np.int32)

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode_ids(ids))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        model = self._model
        counts = np.zeros(self.vocab_size, np.int32)
        for token in range(self.vocab_size):
            if model.is_byte(token):
                counts[token] = 1
            elif not (model.is_control(token) or model.is_unknown(token)):
                counts[token] = len(model.id_to_piece(token).replace(_SPACE_MARK, " ").encode("utf-8"))
        return counts


class HuggingFaceTokenizer:
    """A ``tokenizer.json``.

    What the file says of padding, truncation, added special tokens and sampled segmentations is switched off: a
    document's tokens are its text's alone, the same every time. Only calls for a single text are made, which the
    library does in the calling thread: the workers of `glam prep` are the parallelism.

    Args:
        file: the ``tokenizer.json``.
        eos_token: ends a document. None: the one named in the ``tokenizer_config.json`` beside the file, or else the
            only added token of a usual name.

    Raises:
        UserError: it cannot be read, does without an end-of-text token, or fails on characters it does not know.
    """

    def __init__(self, file: Path, eos_token: str | None) -> None:
        remedy = "mend the tokenizer's path, or take another"
        try:
            # The library's own errors are of no narrower class.
            self._tokens = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:
            raise UserError(f"{file}: {error}", "a tokenizer.json of Hugging Face's tokenizers", remedy) from None
        self.eos_token = eos_token or _eos_beside(file) or _usual_eos(file, self._tokens)
        eos_id = self._tokens.token_to_id(self.eos_token)
        if eos_id is None:
            raise UserError(
                f"{file} has no token {self.eos_token!r}; its added tokens: {_names(_added(self._tokens))}",
                "the name of the token that ends a text",
                "mend tokenizer.eos_token",
            )
        self.eos_id = int(eos_id)
        self.vocab_size = max(self._tokens.get_vocab().values()) + 1  # a count would miss holes in the numbering
        self._tokens.no_padding()
        self._tokens.no_truncation()
        for sampling in ("dropout", "alpha", "nbest_size"):
            if getattr(self._tokens.model, sampling, None) is not None:
                setattr(self._tokens.model, sampling, None)
        # As a special token it is nothing in decoded text; its id stays.
        self._tokens.add_special_tokens([tokenizers.AddedToken(self.eos_token, special=True, normalized=False)])
        self._tokens.encode_special_tokens = True  # text that spells a special token is text
        added = self._tokens.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special or token == eos_id}
        try:
            unknown = {piece.id for piece in self._tokens.model.tokenize(_NO_CHARACTER)}
        except Exception as error:
            raise UserError(f"{file}: {error}", "a tokenizer that takes any text", remedy) from None
        self._unknown = unknown.pop() if len(unknown) == 1 else None  # more: spelt in bytes, none: left out
        # Some models hold special tokens among their ordinary pieces and may yield them for text that spells them,
        # whatever the setting above: those are spelt out.
        self._spelling = {token: self._spell(name) for token, name in self._special.items() if token != self._unknown}
        self._is_spelt = np.zeros(self.vocab_size, np.bool_)
        self._is_spelt[list(self._spelling)] = True

    def _spell(self, name: str) -> list[int]:
        """Ids of a special token's name as text, character by character."""
        ids = [int(piece.id) for character in name for piece in self._tokens.model.tokenize(character)]
        return [token for token in ids if token == self._unknown or token not in self._special]

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        ids = np.array(self._tokens.encode(text, add_special_tokens=False).ids, np.int32)
        if self._is_spelt[ids].any():
            ids = np.array([part for token in ids.tolist() for part in self._spelling.get(token, [token])], np.int32)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._tokens.decode(ids, skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int32]:
        steps = _steps(self._tokens.decoder)
        added = self._tokens.get_added_tokens_decoder()
        ordinary = sorted(
            (token, piece)
            for piece, token in self._tokens.get_vocab().items()
            if token not in self._special and token != self._unknown
        )
        counts = np.zeros(self.vocab_size, np.int32)
        # What a piece adds behind another one: the first of a text may lose a space.
        anchor = [token for token, _ in ordinary[:1]]
        anchor_bytes = len(self.decode(anchor).encode("utf-8"))
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        for token, piece in ordinary:
            if token in added:
                counts[token] = len(piece.encode("utf-8"))
            elif "ByteLevel" in steps:  # a character for each byte
                counts[token] = len(piece) if alphabet.issuperset(piece) else len(piece.encode("utf-8"))
            elif "ByteFallback" in steps and _BYTE_PIECE.fullmatch(piece):
                counts[token] = 1
            else:
                counts[token] = max(0, len(self.decode([*anchor, token]).encode("utf-8")) - anchor_bytes)
        return counts


def _eos_beside(file: Path) -> str | None:
    """The end-of-text token that Hugging Face's settings next to a tokenizer.json name, if any."""
    settings = file.with_name(HUGGINGFACE_SETTINGS)
    if not settings.is_file():
        return None
    try:
        name = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{settings}: {error}", "a JSON object", "mend or remove the file") from None
    if isinstance(name, dict):  # an added token with its options
        name = name.get("content")
    return name if isinstance(name, str) and name else None


def _usual_eos(file: Path, tokens: tokenizers.Tokenizer) -> str:
    added = _added(tokens)
    usual = [name for name in _USUAL_EOS if name in added]
    if len(usual) != 1:
        met = f"several tokens may end a text ({_names(usual)})" if usual else "no token of a usual end-of-text name"
        raise UserError(
            f"{file}: {met}; its added tokens: {_names(added)}",
            "to know which token ends a text",
            "set tokenizer.eos_token to its name",
        )
    return usual[0]


def _added(tokens: tokenizers.Tokenizer) -> list[str]:
    """Names of the tokens added to the model's own, special ones first."""
    entries = sorted(tokens.get_added_tokens_decoder().items(), key=lambda item: (not item[1].special, item[0]))
    return [entry.content for _, entry in entries]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (" ".join(names[:_NAMES_SHOWN]) or "none") + more


def _steps(decoder: Any) -> set[str]:
    """The types of a decoder and of those it is made of."""
    if decoder is None:
        return set()
    tree = json.loads(decoder.__getstate__())
    return {step["type"] for step in [tree, *tree.get("decoders", [])]}
