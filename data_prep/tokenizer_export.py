"""A tokenizer as Hugging Face transformers wants it: `tokenizer.json` and its settings, compared with ours before use.

A SentencePiece model of the kind trained here becomes a `tokenizer.json` that cuts text alike. Spaces stay spaces in
its pieces, so that SentencePiece's space mark, met in text, is spelt in bytes as `data_prep.tokenizer` does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, models

from configs.errors import UserError
from data_prep.sentencepiece_file import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, PieceFile
from data_prep.storage import write_atomically
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_files import HUGGINGFACE_FILE, HUGGINGFACE_SETTINGS, SENTENCEPIECE_FILE

_UNKNOWN_PENALTY = 10.0  # both libraries': an unknown character scores so much below the worst piece
_TEXT_BYTES = 1 << 20  # compared at most
_DRAWN_TEXTS, _DRAWN_TOKENS = 200, 100
_ROUNDING = 2.0**-23  # of SentencePiece's sums in float32, relative, a token
_AWKWARD = (
    "",
    " two  spaces\r\n\n\n\tTab \ufeff\x00 é漢字😀 \ufb01 x\u2581y   \n   ",
    "<unk></s><s><pad><0x41><0x0A>",
    *(" " * n + "=" * n + "\n" * n + "ab" * n for n in (1, 3, 7, 31)),
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """What was written.

    Attributes:
        files: their names.
        notes: what a user must know, one sentence each.
    """

    files: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """How a tokenizer.json cuts texts, against ours."""

    texts: int
    differ: int  # cut elsewhere
    ties: int  # of those, where the two ways score alike
    lossy: int  # not given back as they were, where ours gives them back

    @property
    def same(self) -> bool:
        return self.differ == self.lossy == 0

    @property
    def same_but_for_ties(self) -> bool:
        return self.differ == self.ties and self.lossy == 0


def export_tokenizer(
    source: Tokenizer, folder: Path, texts: Iterable[str] = (), max_tokens: int | None = None
) -> ExportedTokenizer:
    """Write a tokenizer for `transformers.AutoTokenizer` into an existing folder.

    A SentencePiece model whose cuts cannot be had from a tokenizer.json is written as it is, and a note says so.

    Args:
        texts: real ones to compare on, of which a megabyte is used; texts drawn from the vocabulary are added.
        max_tokens: the model's longest sequence.
    """
    sample = list(_sample(source, texts))
    if source.kind == "huggingface":
        return _export_huggingface(source, folder, sample, max_tokens)
    write_atomically(folder / SENTENCEPIECE_FILE, source.source_file.read_bytes())
    model = PieceFile.read(source.source_file)
    if reasons := model.unlike_ours():
        note = f"no tokenizer.json: {'; '.join(reasons)}. {SENTENCEPIECE_FILE} is SentencePiece's own file"
        return ExportedTokenizer((SENTENCEPIECE_FILE,), (note,))
    made = convert(model)
    # Lines keep sums of scores short, and with them the doubt what a tie is.
    lines = sample if model.is_bpe else [line for text in sample for line in text.split("\n")]
    found = compare(source, made, lines, None if model.is_bpe else np.array(model.scores))
    if not found.same_but_for_ties:
        note = (
            f"no tokenizer.json: it would cut {found.differ} of {found.texts} sample texts elsewhere than "
            f"{SENTENCEPIECE_FILE}, and give back {found.lossy} of them changed"
        )
        return ExportedTokenizer((SENTENCEPIECE_FILE,), (note,))
    notes = []
    if found.differ:
        notes.append(
            f"tokenizer.json cuts {found.differ} of {found.texts} sample lines elsewhere than {SENTENCEPIECE_FILE}, "
            "which made the data: where two ways score alike, rounding decides, and SentencePiece adds scores in "
            "float32, Hugging Face's tokenizers in float64. The text they give back is the same"
        )
    write_atomically(folder / HUGGINGFACE_FILE, made.to_str(pretty=True).encode())
    settings: dict[str, Any] = {"unk_token": model.pieces[model.unknown], "split_special_tokens": True}
    _write_settings(folder, source, settings, max_tokens)
    return ExportedTokenizer((SENTENCEPIECE_FILE, HUGGINGFACE_FILE, HUGGINGFACE_SETTINGS), tuple(notes))


def convert(model: PieceFile) -> tokenizers.Tokenizer:
    """The same pieces as a Hugging Face tokenizer.

    User-defined pieces are added tokens: taken out of a text before all else, the longest first, as SentencePiece does.
    """
    made = tokenizers.Tokenizer(_merges(model) if model.is_bpe else _scores(model))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    of_kind = {
        kind: [piece for piece, k in zip(model.pieces, model.kinds) if k == kind]
        for kind in (USER_DEFINED, UNKNOWN, CONTROL)
    }
    user_defined = [AddedToken(_spaced(piece), special=False, normalized=False) for piece in of_kind[USER_DEFINED]]
    special = [AddedToken(piece, special=True, normalized=False) for k in (UNKNOWN, CONTROL) for piece in of_kind[k]]
    made.add_tokens(user_defined)
    made.add_special_tokens(special)
    return made


def _merges(model: PieceFile) -> models.BPE:
    """Merges in the order of the piece they make; SentencePiece merges any two neighbours that make a piece."""
    spaced = [_spaced(piece) for piece in model.pieces]
    normal = {piece for piece, kind in zip(spaced, model.kinds) if kind == NORMAL}
    order = sorted((n for n, kind in enumerate(model.kinds) if kind == NORMAL), key=lambda n: -model.scores[n])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (spaced[n] for n in order)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    vocabulary = {piece: number for number, piece in enumerate(spaced)}
    unknown = model.pieces[model.unknown]
    return models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=False)


def _scores(model: PieceFile) -> models.Unigram:
    """Pieces with scores. Pieces that text never yields score below any way of spelling them: SentencePiece keeps them
    out of its search, tokenizers does not."""
    lowest = min(score for score, kind in zip(model.scores, model.kinds) if kind == NORMAL) - _UNKNOWN_PENALTY
    pieces = [
        (_spaced(piece), score if kind in (NORMAL, USER_DEFINED) else lowest * len(piece) - 1)
        for piece, score, kind in zip(model.pieces, model.scores, model.kinds)
    ]
    return models.Unigram(pieces, unk_id=model.unknown, byte_fallback=True)


def _spaced(piece: str) -> str:
    return piece.replace("\u2581", " ")


def compare(
    ours: Tokenizer,
    theirs: tokenizers.Tokenizer,
    texts: Sequence[str],
    scores: npt.NDArray[Any] | None = None,
    literal: bool = True,
) -> Comparison:
    """Cut texts both ways.

    Args:
        scores: of each piece, where the way with the largest sum is meant to be taken.
        literal: text that spells a special token is text.
    """
    theirs.encode_special_tokens = literal
    differ = ties = lossy = 0
    for text in texts:
        expected = ours.encode(text)
        found = np.array(theirs.encode(text).ids, np.int32)
        lossy += theirs.decode(found.tolist()) != text and ours.decode(expected) == text
        if np.array_equal(expected, found):
            continue
        differ += 1
        if scores is not None:
            a, b = float(scores[expected].sum()), float(scores[found].sum())
            ties += abs(a - b) <= _ROUNDING * abs(a) * len(expected)
    return Comparison(len(texts), differ, ties, lossy)


def _sample(source: Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """Awkward texts, texts drawn from the vocabulary, and of the real ones as many as fit."""
    yield from (*_AWKWARD, f"a{source.eos_token}b")
    draw = random.Random(0)
    for _ in range(_DRAWN_TEXTS):
        yield source.decode(np.array(draw.choices(range(source.vocab_size), k=_DRAWN_TOKENS)))
    left = _TEXT_BYTES
    for text in texts:
        left -= len(text.encode())
        if left < 0:
            return
        yield text


def _export_huggingface(
    source: Tokenizer, folder: Path, sample: Sequence[str], max_tokens: int | None
) -> ExportedTokenizer:
    """The file as it is, but for what it adds to or cuts from a text: the model never saw that."""
    data = source.source_file.read_bytes()
    tree = json.loads(data)
    added = tokenizers.Tokenizer.from_str(data.decode())
    notes = []
    changed = [key for key in ("truncation", "padding") if tree.get(key) is not None]
    added.no_truncation()
    added.no_padding()
    if added.encode("a").ids != added.encode("a", add_special_tokens=False).ids:
        changed.append("post_processor")
    if changed:
        tree |= dict.fromkeys(changed)
        data = json.dumps(tree, ensure_ascii=False, indent=2).encode()
        notes.append(f"tokenizer.json is without {', '.join(changed)} of the file that made the data, as the data is")
    made = tokenizers.Tokenizer.from_str(data.decode())
    settings_file = source.source_file.with_name(HUGGINGFACE_SETTINGS)
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    found = compare(source, made, sample, literal=settings.get("split_special_tokens", False))
    if not found.same:
        notes.append(
            f"tokenizer.json cuts {found.differ} of {found.texts} sample texts elsewhere than the data was cut, such "
            f"as those that spell {source.eos_token} or another special token: text in the data, a token there"
        )
    write_atomically(folder / HUGGINGFACE_FILE, data)
    _write_settings(folder, source, settings, max_tokens)
    return ExportedTokenizer((HUGGINGFACE_FILE, HUGGINGFACE_SETTINGS), tuple(notes))


def _write_settings(folder: Path, source: Tokenizer, settings: dict[str, Any], max_tokens: int | None) -> None:
    tree = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # by default also one that decoders refuse
        **({"model_max_length": max_tokens} if max_tokens else {}),
        **settings,
        "eos_token": source.eos_token,
    }
    write_atomically(folder / HUGGINGFACE_SETTINGS, json.dumps(tree, ensure_ascii=False, indent=2).encode() + b"\n")


def refuse_larger(source: Tokenizer, vocab_size: int) -> None:
    """A tokenizer must not name rows that a model lacks."""
    if source.vocab_size > vocab_size:
        raise UserError(
            f"{source.source_file} has {source.vocab_size} entries, the model's vocabulary {vocab_size}",
            "a tokenizer whose ids the model knows",
            "name the tokenizer that made the model's data",
        )
