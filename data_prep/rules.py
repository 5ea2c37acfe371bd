"""What a text must be to enter the corpus: `normalize` cleans it, `first_fault` says what speaks against it.

A rule is one function that measures a text, and one row of `RULES` that names the thresholds it is held against.
Sources: Rae et al. 2021 (Gopher), A.1.1 and table A1; Raffel et al. 2020 (C4), section 2.2.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import import_module
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from configs.filters import FilterSpec, GopherQuality, Language

Integers = npt.NDArray[np.int64]

_ASCII_CONTROLS = bytes(code for code in (*range(32), 127) if chr(code) not in "\n\t")
# At least 33 characters above U+02FF, no letters or digits. Every combining mark is such a character; more than 30 in
# a row are no word of any language (Unicode Standard Annex 15, section 13). The first one stands alone so that `re`
# can skip what is below U+0300 quickly.
_MARK_RUN = re.compile(r"[\u0300-\U0010ffff](?<!\w)[^\w\x00-\u02ff]{32,}")

_BULLETS = ("•", "‣", "⁃", "◦", "▪", "●", "·", "- ", "* ")  # a dash or a star may also begin a word
_ELLIPSES = ("...", "…")
_SENTENCE_ENDS = (".", "!", "?", "…")
_WIDE_SENTENCE_ENDS = ("。", "！", "？")  # no space follows these, so they may stand inside a "word"
_CLOSING = "\"'”’»)]"
_LINE_ENDS = (".", "!", "?", '"', "”")
_PUNCTUATION = string.punctuation + "“”‘’…"
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def normalize(text: str, unicode: Literal["nfc", "keep"], control_characters: Literal["remove", "keep"]) -> str:
    """The text as the corpus holds it; doing it twice changes nothing more.

    Args:
        unicode: ``nfc`` composes characters (Unicode Standard Annex 15).
        control_characters: ``remove`` makes every line end a line feed and takes out the other control characters
            save the tab, byte order marks, and the code points that are none and never will be.
    """
    if control_characters == "remove":
        text = _without_controls(text)
    # After the removal: what stood between a letter and its accent may be gone.
    return _composed(text) if unicode == "nfc" else text


def _without_controls(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        kept = text.encode("ascii").translate(None, _ASCII_CONTROLS)
        return text if len(kept) == len(text) else kept.decode("ascii")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    unwanted = _unwanted()[codes]
    return codes[~unwanted].tobytes().decode("utf-32-le", "surrogatepass") if unwanted.any() else text


@lru_cache(maxsize=1)
def _unwanted() -> npt.NDArray[np.bool_]:
    """For each code point of Unicode: is it taken out?"""
    table = np.zeros(0x110000, dtype=np.bool_)
    table[list(_ASCII_CONTROLS)] = True
    table[0x80:0xA0] = True  # the other control characters
    table[0xFEFF] = True  # the byte order mark
    table[0xFDD0:0xFDF0] = True  # noncharacters, as are the last two of every plane
    table[0xFFFE::0x10000] = True
    table[0xFFFF::0x10000] = True
    return table


def _composed(text: str) -> str:
    if text.isascii():
        return text
    # CPython sorts marks by insertion: the square of a run's length, hours for a megabyte. Sorted ones are fast.
    text = _MARK_RUN.sub(_sorted_marks, text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _sorted_marks(run: re.Match[str]) -> str:
    """The marks in canonical order; NFC of the result is NFC of the run."""
    decomposed = "".join(unicodedata.normalize("NFD", character) for character in run[0])
    groups = groupby(decomposed, key=lambda character: unicodedata.combining(character) > 0)
    return "".join("".join(sorted(group, key=unicodedata.combining) if marks else group) for marks, group in groups)


class Level(NamedTuple):
    """The n-grams of a text that occur more than once."""

    starts: Integers  # number of each one's first word, ascending
    groups: Integers  # which n-gram it is, from 0: equal ones have equal numbers
    later: npt.NDArray[np.bool_]  # it is not the first of its kind


class View:
    """A text and what rules look at, each found when first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._reached: tuple[int, Level | None] = 0, None  # how many words its n-grams have

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def word_chars(self) -> int:
        return sum(map(len, self.words))

    @cached_property
    def lines(self) -> list[str]:
        """Without the blank ones, and without white space at both ends."""
        return [line for piece in self.text.split("\n") if (line := piece.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines."""
        return [paragraph for piece in re.split(r"\n\s*\n", self.text) if (paragraph := piece.strip())]

    @cached_property
    def word_starts(self) -> Integers:
        """How many characters of words stand before each word, and at last in all."""
        lengths = np.fromiter(map(len, self.words), dtype=np.int64, count=len(self.words))
        return np.concatenate([[0], np.cumsum(lengths)])

    def repeated(self, size: int) -> Level:
        """The n-grams of ``size`` words that occur more than once.

        An n-gram can only repeat where the two shorter ones that it is made of do. So few places are left after the
        first levels, except in text that does repeat. Exact: no hashes.
        """
        reached, level = self._reached
        if level is None or reached > size:  # only the last level is held: each may be as large as all the words
            numbers = {word: number for number, word in enumerate(dict.fromkeys(self.words))}
            codes = np.fromiter(map(numbers.__getitem__, self.words), dtype=np.int64, count=len(self.words))
            reached, level = 1, _repeated(np.arange(len(codes), dtype=np.int64), codes)
        while reached < size:
            starts, groups, _ = level
            pairs = np.flatnonzero(np.diff(starts) == 1)
            codes = groups[pairs] * (len(groups) + 1) + groups[pairs + 1]
            reached, level = reached + 1, _repeated(starts[pairs], codes)
        self._reached = reached, level
        return level

    def covered_chars(self, starts: Integers, size: int) -> int:
        """Characters of words in n-grams of ``size`` words that begin at ``starts`` (ascending), each counted once."""
        stops = np.minimum(starts + size, np.append(starts, len(self.words))[1:])
        return int((self.word_starts[stops] - self.word_starts[starts]).sum()) if len(starts) else 0


def _repeated(starts: Integers, codes: Integers) -> Level:
    """Those whose code occurs more than once."""
    order = np.argsort(codes, kind="stable")  # stable: of equal codes the first in the text comes first
    ordered = codes[order]
    fresh = np.ones(len(codes), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=fresh[1:])
    alone = fresh.copy()  # the next one is of another kind too
    alone[:-1] &= fresh[1:]
    group, later = np.empty_like(codes), np.empty_like(fresh)
    group[order] = np.cumsum(fresh & ~alone) - 1
    later[order] = ~fresh
    kept = np.empty_like(fresh)
    kept[order] = ~alone
    return Level(starts[kept], group[kept], later[kept])


class Measured(NamedTuple):
    value: float
    unit: str


def _fraction(part: float, whole: int, unit: str) -> Measured:
    """Of nothing every fraction is 0."""
    return Measured(part / whole if whole else 0.0, unit)


def chars(view: View, _: FilterSpec) -> Measured:
    return Measured(len(view.text), "characters")


def words(view: View, _: FilterSpec) -> Measured:
    return Measured(len(view.words), "words")


def mean_word_length(view: View, _: FilterSpec) -> Measured:
    return _fraction(view.word_chars, len(view.words), "characters")


def hashes(view: View, _: FilterSpec) -> Measured:
    return _fraction(view.text.count("#"), len(view.words), "hash symbols a word")


def ellipses(view: View, _: FilterSpec) -> Measured:
    return _fraction(sum(map(view.text.count, _ELLIPSES)), len(view.words), "ellipses a word")


def bullet_lines(view: View, _: FilterSpec) -> Measured:
    return _fraction(sum(line.startswith(_BULLETS) for line in view.lines), len(view.lines), "of lines")


def ellipsis_lines(view: View, _: FilterSpec) -> Measured:
    return _fraction(sum(line.endswith(_ELLIPSES) for line in view.lines), len(view.lines), "of lines")


def alphabetic_words(view: View, _: FilterSpec) -> Measured:
    unclear = [word for word in view.words if not word[0].isalpha()]
    lacking = sum(not any(map(str.isalpha, word)) for word in unclear)
    return _fraction(len(view.words) - lacking, len(view.words), "of words")


def stop_words(view: View, spec: GopherQuality) -> Measured:
    present = {word.strip(_PUNCTUATION).lower() for word in set(view.words)}
    return Measured(len(present & {word.lower() for word in spec.stop_words}), "stop words")


def duplicates(view: View, _: FilterSpec, *, of: Literal["lines", "paragraphs"]) -> Measured:
    pieces: list[str] = getattr(view, of)
    return _fraction(len(pieces) - len(set(pieces)), len(pieces), f"of {of}")


def duplicate_chars(view: View, _: FilterSpec, *, of: Literal["lines", "paragraphs"]) -> Measured:
    pieces: list[str] = getattr(view, of)
    total = sum(map(len, pieces))
    return _fraction(total - sum(map(len, set(pieces))), total, f"of the characters of {of}")


def top_ngram(view: View, _: FilterSpec, *, size: int) -> Measured:
    """Of the n-grams that occur most often, the longest; one that occurs once is no repetition."""
    starts, groups, _later = view.repeated(size)
    covered = 0
    if len(starts):
        counts = np.bincount(groups)[groups]
        lengths = view.word_starts[starts + size] - view.word_starts[starts]
        top = groups[np.argmax(np.where(counts == counts.max(), lengths, 0))]
        covered = view.covered_chars(starts[groups == top], size)
    return _fraction(covered, view.word_chars, "of the characters of words")


def duplicate_ngrams(view: View, _: FilterSpec, *, size: int) -> Measured:
    starts, _groups, later = view.repeated(size)
    return _fraction(view.covered_chars(starts[later], size), view.word_chars, "of the characters of words")


def sentences(view: View, _: FilterSpec) -> Measured:
    """Words that end in . ! ? or an ellipsis, closing quotation marks and brackets aside, and every wide 。！？ ."""
    narrow = sum(word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS) for word in view.words)
    return Measured(narrow + sum(map(view.text.count, _WIDE_SENTENCE_ENDS)), "sentences")


def lorem_ipsums(view: View, _: FilterSpec) -> Measured:
    return Measured(view.text.lower().count("lorem ipsum"), "times 'lorem ipsum'")


def curly_brackets(view: View, _: FilterSpec) -> Measured:
    return Measured(view.text.count("{"), "opening curly brackets")


def terminal_lines(view: View, _: FilterSpec) -> Measured:
    return _fraction(sum(line.endswith(_LINE_ENDS) for line in view.lines), len(view.lines), "of lines")


def javascript_lines(view: View, _: FilterSpec) -> Measured:
    return _fraction(sum("javascript" in line.lower() for line in view.lines), len(view.lines), "of lines")


def policy_lines(view: View, _: FilterSpec) -> Measured:
    lowered = map(str.lower, view.lines)
    return _fraction(sum(any(phrase in line for phrase in _POLICIES) for line in lowered), len(view.lines), "of lines")


def language(view: View, spec: Language) -> Measured:
    """The probability of the likeliest language if it is one to keep, else 0."""
    identifier = _identifier()
    likeliest, probability = identifier.classify(view.text[: spec.max_chars])
    if likeliest in spec.keep:
        return Measured(probability, f"sure of {likeliest}")
    if unknown := sorted(set(spec.keep) - set(identifier.labels)):
        known = ", ".join(sorted(identifier.labels))
        raise UserError(f"language.keep: {unknown[0]!r}", f"one of {known}", "mend the code in the corpus file")
    return Measured(0.0, f"sure of {' or '.join(spec.keep)}, it looks like {likeliest} ({probability:.4g})")


@lru_cache(maxsize=1)  # the model takes a second to load
def _identifier() -> Any:
    try:
        langid = import_module("py3langid").langid
        return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    except (ImportError, AttributeError) as error:  # before 0.4 the constructor had another name
        expected = "the package py3langid, 0.4 or later, which the filter `language` asks"
        raise UserError(f"{type(error).__name__}: {error}", expected, "pip install py3langid") from error


class Rule(NamedTuple):
    """A name, what is measured, and the fields of the filter that bound it."""

    name: str
    measure: Callable[[View, Any], Measured]
    low: str | None = None
    high: str | None = None

    def bounds(self, spec: FilterSpec) -> tuple[float | None, float | None]:
        return getattr(spec, self.low) if self.low else None, getattr(spec, self.high) if self.high else None

    def judge(self, view: View, spec: FilterSpec) -> str | None:
        """What speaks against the text, with the value and the threshold."""
        value, unit = self.measure(view, spec)
        low, high = self.bounds(spec)
        if low is not None and value < low:
            return f"{_shown(value)} {unit}; at least {_shown(low)}"
        if high is not None and value > high:
            return f"{_shown(value)} {unit}; at most {_shown(high)}"
        return None


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# By kind of filter, in the order of application: what costs little first.
RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType({
    "length": (
        Rule("chars", chars, "min_chars", "max_chars"),
        Rule("words", words, "min_words", "max_words"),
    ),
    "gopher_quality": (
        Rule("words", words, "min_words", "max_words"),
        Rule("hashes", hashes, high="max_hashes_per_word"),
        Rule("ellipses", ellipses, high="max_ellipses_per_word"),
        Rule("mean_word_length", mean_word_length, "min_mean_word_chars", "max_mean_word_chars"),
        Rule("stop_words", stop_words, "min_stop_words"),
        Rule("bullet_lines", bullet_lines, high="max_bullet_line_fraction"),
        Rule("ellipsis_lines", ellipsis_lines, high="max_ellipsis_line_fraction"),
        Rule("alphabetic_words", alphabetic_words, "min_alphabetic_word_fraction"),
    ),
    "gopher_repetition": (
        Rule("duplicate_lines", partial(duplicates, of="lines"), high="max_duplicate_line_fraction"),
        Rule("duplicate_line_chars", partial(duplicate_chars, of="lines"), high="max_duplicate_line_char_fraction"),
        Rule("duplicate_paragraphs", partial(duplicates, of="paragraphs"), high="max_duplicate_paragraph_fraction"),
        Rule("duplicate_paragraph_chars", partial(duplicate_chars, of="paragraphs"),
             high="max_duplicate_paragraph_char_fraction"),
        *(Rule(f"top_{n}_gram", partial(top_ngram, size=n), high=f"max_top_{n}_gram_char_fraction")
          for n in (2, 3, 4)),
        *(Rule(f"duplicate_{n}_grams", partial(duplicate_ngrams, size=n), high=f"max_duplicate_{n}_gram_char_fraction")
          for n in (5, 6, 7, 8, 9, 10)),
    ),
    "c4": (
        Rule("curly_brackets", curly_brackets, high="max_curly_brackets"),
        Rule("lorem_ipsums", lorem_ipsums, high="max_lorem_ipsums"),
        Rule("sentences", sentences, "min_sentences"),
        Rule("terminal_lines", terminal_lines, "min_terminal_line_fraction"),
        Rule("javascript_lines", javascript_lines, high="max_javascript_line_fraction"),
        Rule("policy_lines", policy_lines, high="max_policy_line_fraction"),
    ),
    "language": (Rule("probability", language, "min_probability"),),
})  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Why a text is left out: `gopher_quality.mean_word_length`, `14.2 characters; at most 10`."""

    rule: str
    detail: str


def rule_names(filters: Sequence[FilterSpec]) -> tuple[str, ...]:
    """Every rule by which these filters can drop a text, in the order of application, each once."""
    return tuple(dict.fromkeys(f"{spec.kind}.{rule.name}" for spec in filters for rule in _active(spec)))


def first_fault(text: str, filters: Sequence[FilterSpec]) -> Fault | None:
    """The first rule that speaks against a text.

    Raises:
        UserError: the filter `language` lacks its package, or is told to keep a language that package has no code for.
    """
    view = View(text)
    for spec in filters:
        for rule in _active(spec):
            if detail := rule.judge(view, spec):
                return Fault(f"{spec.kind}.{rule.name}", detail)
    return None


def _active(spec: FilterSpec) -> Iterator[Rule]:
    """Those with a threshold."""
    return (rule for rule in RULES[spec.kind] if rule.bounds(spec) != (None, None))
