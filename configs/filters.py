"""Which texts `glam prep` leaves out, and where each rule draws the line.

Every threshold is inclusive: a text that sits on it is kept. Null switches a rule off. Characters of words and of
n-grams are counted without the white space between them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class Filter(Strict):
    """What every kind has. The two ends of a range are named ``min_x`` and ``max_x``."""

    @model_validator(mode="after")
    def _ranges_are_open(self) -> Self:
        values = dict(self)
        for name, low in values.items():
            high = values.get(f"max_{name[4:]}") if name.startswith("min_") else None
            if low is not None and high is not None and low > high:
                raise ValueError(f"{name}={low:,} is above max_{name[4:]}={high:,}; no text could be kept, swap them")
        return self


class Length(Filter):
    """Too short or too long."""

    kind: Literal["length"] = "length"
    min_chars: Count | None = None
    max_chars: Count | None = None
    min_words: Count | None = None  # separated by white space
    max_words: Count | None = None


class GopherQuality(Filter):
    """Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", A.1.1.

    The stop words are English; other languages need others, or null for `min_stop_words`.
    """

    kind: Literal["gopher_quality"] = "gopher_quality"
    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_chars: Amount | None = 3.0
    max_mean_word_chars: Amount | None = 10.0
    max_hashes_per_word: Amount | None = 0.1
    max_ellipses_per_word: Amount | None = 0.1
    max_bullet_line_fraction: Fraction | None = 0.9  # lines that begin with a bullet
    max_ellipsis_line_fraction: Fraction | None = 0.3  # lines that end in an ellipsis
    min_alphabetic_word_fraction: Fraction | None = 0.8  # words with a letter in them
    min_stop_words: Count | None = 2  # different ones
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    @model_validator(mode="after")
    def _stop_words_suffice(self) -> Self:
        different = len({word.lower() for word in self.stop_words})
        if self.min_stop_words is not None and self.min_stop_words > different:
            raise ValueError(
                f"min_stop_words={self.min_stop_words}, yet stop_words has {different} different ones; "
                "no text could be kept, list more or ask for fewer"
            )
        return self


class GopherRepetition(Filter):
    """The same paper's table A1: text that says the same again and again.

    Of equal lines, paragraphs or n-grams the first is no duplicate, the later ones are.
    """

    kind: Literal["gopher_repetition"] = "gopher_repetition"
    max_duplicate_line_fraction: Fraction | None = 0.30
    max_duplicate_paragraph_fraction: Fraction | None = 0.30
    max_duplicate_line_char_fraction: Fraction | None = 0.20
    max_duplicate_paragraph_char_fraction: Fraction | None = 0.20
    max_top_2_gram_char_fraction: Fraction | None = 0.20
    max_top_3_gram_char_fraction: Fraction | None = 0.18
    max_top_4_gram_char_fraction: Fraction | None = 0.16
    max_duplicate_5_gram_char_fraction: Fraction | None = 0.15
    max_duplicate_6_gram_char_fraction: Fraction | None = 0.14
    max_duplicate_7_gram_char_fraction: Fraction | None = 0.13
    max_duplicate_8_gram_char_fraction: Fraction | None = 0.12
    max_duplicate_9_gram_char_fraction: Fraction | None = 0.11
    max_duplicate_10_gram_char_fraction: Fraction | None = 0.10


class C4(Filter):
    """Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2.2.

    C4 strikes single lines out; texts are not edited here, so its rules about lines ask how many of a text's lines
    they would strike out, and are off by default. A curly bracket drops nearly all source code.
    """

    kind: Literal["c4"] = "c4"
    min_sentences: Count | None = 5
    max_lorem_ipsums: Count | None = 0
    max_curly_brackets: Count | None = 0  # opening ones
    min_terminal_line_fraction: Fraction | None = None  # lines that end in . ! ? or a closing double quotation mark
    max_javascript_line_fraction: Fraction | None = None  # lines that name it: mostly pleas to switch it on
    max_policy_line_fraction: Fraction | None = None  # lines about terms of use, privacy and cookies


class Language(Filter):
    """The most probable language, as the package py3langid (optional) judges it, is one of `keep`.

    Its codes are ISO 639-1, or 639-3 for languages without one there (`en`, `de`, `yue`).
    """

    kind: Literal["language"] = "language"
    keep: tuple[LanguageCode, ...] = Field(min_length=1)
    min_probability: float = Field(default=0.5, gt=0, le=1)
    max_chars: int = Field(default=10_000, ge=1)  # of the text's beginning are looked at


FilterSpec = Annotated[Length | GopherQuality | GopherRepetition | C4 | Language, Field(discriminator="kind")]
