"""Cleaning rules: each keeps and drops what it should, on the line too; normalize and n-grams have twins."""

from __future__ import annotations

import string
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.base import Strict
from configs.corpus import Cleaning
from configs.errors import UserError
from configs.filters import C4, FilterSpec, GopherQuality, GopherRepetition, Language, Length
from data_prep import rules
from data_prep.rules import RULES, Fault, View, first_fault, normalize, rule_names

KINDS: tuple[type[Any], ...] = get_args(get_args(FilterSpec)[0])
LETTERS = string.ascii_lowercase


def alone(kind: type[Any], **thresholds: float) -> Any:
    """A filter with these thresholds and no others."""
    off = dict.fromkeys(name for name in kind.model_fields if name.startswith(("min_", "max_")))
    return kind(**{**off, **thresholds})


def numbered(count: int, word: str = "w") -> str:
    return " ".join(f"{word}{number}" for number in range(count))


def halves(first: str, second: str, of_first: int, of_second: int) -> str:
    return "\n".join([first] * of_first + [second] * of_second)


def with_repeated(size: int, filler: int) -> str:
    """An n-gram of words of one letter twice, and as many other letters, none of them twice."""
    gram = " ".join(chr(0x4E00 + number) for number in range(size))
    return f"{gram} {' '.join(chr(0x5E00 + number) for number in range(filler))} {gram}"


# rule -> a filter with nothing but this rule, a text to keep, a text to drop, why. Texts to keep sit on the line
# where a line can be sat on.
CASES: dict[str, tuple[FilterSpec, str, str, str]] = {
    "length.chars": (alone(Length, min_chars=3, max_chars=5), "abcde", "abcdef", "6 characters; at most 5"),
    "length.words": (alone(Length, min_words=2), "a b", "a\n", "1 words; at least 2"),
    "gopher_quality.words": (
        alone(GopherQuality, min_words=50, max_words=100_000), numbered(50), numbered(49), "49 words; at least 50",
    ),
    "gopher_quality.mean_word_length": (
        alone(GopherQuality, min_mean_word_chars=3, max_mean_word_chars=10), "abc " * 5, "a" * 14 + " " + "b" * 15,
        "14.5 characters; at most 10",
    ),
    "gopher_quality.hashes": (
        alone(GopherQuality, max_hashes_per_word=0.1), "# " + numbered(9), "## " + numbered(9),
        "0.2 hash symbols a word; at most 0.1",
    ),
    "gopher_quality.ellipses": (
        alone(GopherQuality, max_ellipses_per_word=0.1), "…" + numbered(10), "…" + numbered(9) + "...",
        "0.2222 ellipses a word; at most 0.1",
    ),
    "gopher_quality.stop_words": (
        alone(GopherQuality, min_stop_words=2), "(The cat) and", "the the cat band", "1 stop words; at least 2",
    ),
    "gopher_quality.bullet_lines": (
        alone(GopherQuality, max_bullet_line_fraction=0.9), halves(" - a", "-a", 9, 1), halves("• a", "• b", 9, 1),
        "1 of lines; at most 0.9",
    ),
    "gopher_quality.ellipsis_lines": (
        alone(GopherQuality, max_ellipsis_line_fraction=0.3), halves("a… ", "a.", 3, 7), halves("a...", "a.", 4, 6),
        "0.4 of lines; at most 0.3",
    ),
    "gopher_quality.alphabetic_words": (
        alone(GopherQuality, min_alphabetic_word_fraction=0.8), "a 1b (c é 5", "a b c 4 5",
        "0.6 of words; at least 0.8",
    ),
    "gopher_repetition.duplicate_lines": (
        alone(GopherRepetition, max_duplicate_line_fraction=0.3), halves("a", numbered(6).replace(" ", "\n"), 4, 1),
        halves("a", numbered(5).replace(" ", "\n"), 5, 1), "0.4 of lines; at most 0.3",
    ),
    "gopher_repetition.duplicate_line_chars": (
        alone(GopherRepetition, max_duplicate_line_char_fraction=0.2), "ab\nab\n\ncdefgh", "ab\n ab \ncdefg",
        "0.2222 of the characters of lines; at most 0.2",
    ),
    "gopher_repetition.duplicate_paragraphs": (
        alone(GopherRepetition, max_duplicate_paragraph_fraction=0.3), "a\na\na\n\nb\n\nc", "a\nb\n\na\nb\n \n\nc",
        "0.3333 of paragraphs; at most 0.3",
    ),
    "gopher_repetition.duplicate_paragraph_chars": (
        alone(GopherRepetition, max_duplicate_paragraph_char_fraction=0.2), "a\n\na\n\nbcd", "a\n\na\n\nbc",
        "0.25 of the characters of paragraphs; at most 0.2",
    ),
    **{
        f"gopher_repetition.top_{n}_gram": (
            alone(GopherRepetition, **{f"max_top_{n}_gram_char_fraction": 0.2}), with_repeated(n, 8 * n),
            with_repeated(n, 3 * n), "0.4 of the characters of words; at most 0.2",
        )
        for n in (2, 3, 4)
    },
    **{
        f"gopher_repetition.duplicate_{n}_grams": (
            alone(GopherRepetition, **{f"max_duplicate_{n}_gram_char_fraction": 0.1}), with_repeated(n, 8 * n),
            with_repeated(n, 3 * n), "0.2 of the characters of words; at most 0.1",
        )
        for n in (5, 6, 7, 8, 9, 10)
    },
    "c4.sentences": (
        alone(C4, min_sentences=5), "A b. C? “D!” (E…) 五。", "e.g. a.b c, d.) f! .g", "3 sentences; at least 5",
    ),
    "c4.lorem_ipsums": (
        alone(C4, max_lorem_ipsums=0), "Lorem, ipsum", "so: Lorem Ipsum", "1 times 'lorem ipsum'; at most 0",
    ),
    "c4.curly_brackets": (alone(C4, max_curly_brackets=0), "a}", "{", "1 opening curly brackets; at most 0"),
    "c4.terminal_lines": (
        alone(C4, min_terminal_line_fraction=0.5), "a. \nb", "a.\nb\n\nc", "0.3333 of lines; at least 0.5",
    ),
    "c4.javascript_lines": (
        alone(C4, max_javascript_line_fraction=0.5), "Java script\nJavaScript", "a\nTurn on JavaScript!\njavascript",
        "0.6667 of lines; at most 0.5",
    ),
    "c4.policy_lines": (
        alone(C4, max_policy_line_fraction=0.0), "we use a cookie", "This site uses Cookies.",
        "1 of lines; at most 0",
    ),
    "language.probability": (
        Language(keep=("en", "fr")), "This is an ordinary sentence of the English language, not more.",
        "Dies ist ein ganz gewöhnlicher Satz der deutschen Sprache, nicht mehr.", "sure of en or fr, it looks like de",
    ),
}  # fmt: skip
EVERY_FILTER: tuple[FilterSpec, ...] = (
    Length(min_chars=1, max_words=10),
    GopherQuality(),
    GopherRepetition(),
    C4(min_terminal_line_fraction=0.5, max_javascript_line_fraction=0.5, max_policy_line_fraction=0.5),
    Language(keep=("en",)),
)


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_keeps_and_drops(rule: str) -> None:
    spec, keep, drop, why = CASES[rule]
    if spec.kind == "language":
        pytest.importorskip("py3langid")
    assert rule_names([spec]) == (rule,)
    assert first_fault(keep, [spec]) is None
    fault = first_fault(drop, [spec])
    assert fault is not None and fault.rule == rule and why in fault.detail


def test_every_rule_has_a_case() -> None:
    assert {spec.kind for spec in EVERY_FILTER} == RULES.keys() == {kind.model_fields["kind"].default for kind in KINDS}
    assert set(rule_names(EVERY_FILTER)) == CASES.keys()
    assert len(rule_names(EVERY_FILTER)) == sum(map(len, RULES.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_threshold_belongs_to_one_rule(kind: type[Any]) -> None:
    bounds = [bound for rule in RULES[kind.model_fields["kind"].default] for bound in (rule.low, rule.high) if bound]
    settings_of_measures = {"max_chars"} if kind is Language else set()
    thresholds = {name for name in kind.model_fields if name.startswith(("min_", "max_"))}
    assert sorted(bounds) == sorted(thresholds - settings_of_measures)


def test_a_range_has_two_ends() -> None:
    for spec, text in (
        (alone(Length, min_chars=3), "ab"),
        (alone(Length, max_words=1), "a b"),
        (alone(GopherQuality, max_words=50), numbered(51)),
        (alone(GopherQuality, min_mean_word_chars=3), "abc ab"),
    ):
        assert first_fault(text, [spec]) is not None


def test_a_rule_without_threshold_is_off() -> None:
    assert rule_names([Length()]) == ()
    assert rule_names([C4()]) == ("c4.curly_brackets", "c4.lorem_ipsums", "c4.sentences")
    assert first_fault("", [Length(), alone(GopherQuality), alone(GopherRepetition), alone(C4)]) is None


def test_names_come_in_the_order_of_application_once() -> None:
    filters = [alone(C4, min_sentences=1), alone(Length, min_words=2), alone(C4, max_curly_brackets=0, min_sentences=2)]
    assert rule_names(filters) == ("c4.sentences", "length.words", "c4.curly_brackets")
    assert first_fault("{", filters) == Fault("c4.sentences", "0 sentences; at least 1")
    assert first_fault("{.", filters) == Fault("length.words", "1 words; at least 2")


@pytest.mark.parametrize("text", ["", " \n\t\n", "\u3000\n"])
def test_nothing_is_no_repetition_yet_no_good_text(text: str) -> None:
    assert first_fault(text, [GopherRepetition()]) is None
    assert first_fault(text, [GopherQuality()]) == Fault("gopher_quality.words", "0 words; at least 50")
    assert first_fault(text, [C4()]) == Fault("c4.sentences", "0 sentences; at least 5")
    for rule in (rule for kind, rows in RULES.items() if kind != "language" for rule in rows):
        value, _ = rule.measure(View(text), GopherQuality())
        assert value == (len(text) if rule.name == "chars" else 0)


def test_ordinary_prose_passes_the_papers_thresholds() -> None:
    prose = (sys.copyright + "\n" + str(Strict.load.__doc__) + "\n" + str(dict.__doc__)).replace("{", "(")
    prose += " The words that have to be here are here. And that is all. Is it? It is! So we end with a full stop."
    assert first_fault(prose, [GopherQuality(), C4()]) is None
    assert first_fault(" ".join(prose.split()), [GopherRepetition()]) is None


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({"kind": "length", "min_words": 10, "max_words": 5}, "min_words=10 is above max_words=5"),
        ({"kind": "length", "min_chars": -1}, "greater than or equal to 0"),
        ({"kind": "gopher_quality", "min_mean_word_chars": 11}, "min_mean_word_chars=11.0 is above max_mean_word"),
        ({"kind": "gopher_quality", "stop_words": ["und", "Und"]}, "stop_words has 1 different"),
        ({"kind": "gopher_repetition", "max_top_2_gram_char_fraction": 1.5}, "less than or equal to 1"),
        ({"kind": "language", "keep": []}, "at least 1 item"),
        ({"kind": "language", "keep": ["English"]}, "match pattern"),
        ({"kind": "c4", "min_sentence": 1}, "did you mean 'min_sentences'"),
    ],
)
def test_filters_that_make_no_sense_are_refused(tree: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Cleaning.check({"filters": [tree]}, where="test")


# --- n-grams


def spans(words: Sequence[str], starts: Sequence[int], size: int) -> int:
    """Characters of the words that lie in any of these n-grams."""
    inside = {start + offset for start in starts for offset in range(size)}
    return sum(len(words[index]) for index in inside)


def grams_of(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def slow_duplicate_chars(words: Sequence[str], size: int) -> int:
    grams = grams_of(words, size)
    return spans(words, [start for start, gram in enumerate(grams) if gram in grams[:start]], size)


def slow_top_chars(words: Sequence[str], size: int) -> set[int]:
    """What may be answered: of n-grams that occur equally often and are equally long any may be taken."""
    grams = grams_of(words, size)
    counts = Counter(grams)
    best = max(((count, len("".join(gram))) for gram, count in counts.items()), default=(0, 0))
    if best[0] < 2:
        return {0}
    tops = [gram for gram, count in counts.items() if (count, len("".join(gram))) == best]
    return {spans(words, [start for start, gram in enumerate(grams) if gram == top], size) for top in tops}


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60), st.integers(2, 10))
@example(["a"] * 40, 10)
@example(["a", "bb"] * 20, 5)
@settings(max_examples=300, deadline=None)
def test_ngrams_agree_with_their_slow_twins(words: list[str], size: int) -> None:
    view, total, spec = View("  ".join(words)), sum(map(len, words)), GopherRepetition()
    duplicate = rules.duplicate_ngrams(view, spec, size=size).value
    assert round(duplicate * total) == slow_duplicate_chars(words, size)
    assert round(rules.top_ngram(view, spec, size=size).value * total) in slow_top_chars(words, size)
    assert rules.duplicate_ngrams(view, spec, size=size).value == duplicate  # asked again, after others


def test_a_long_text_is_judged_in_a_time_that_grows_with_it() -> None:
    """Loose: the square would take hours."""
    texts = ["a b " * 500_000, "ab" * 1_000_000, "\n " * 1_000_000, '."' * 1_000_000, "a" + "\u0301\u0316" * 500_000]
    filters = [alone(C4, min_sentences=0), alone(GopherQuality, min_alphabetic_word_fraction=0.0)]
    filters.append(GopherRepetition(**dict.fromkeys(set(GopherRepetition.model_fields) - {"kind"}, 1.0)))
    started = time.monotonic()
    for text in texts:
        assert first_fault(normalize(text, "nfc", "remove"), filters) is None
    assert time.monotonic() - started < 60


# --- normalize

# What normalize has to do with, more often than chance would give it.
AWKWARD = "\r\n\t\x00\x1f\x7f\x85\x9f\xa0\ufeff\ufffe\U0010ffff\ufdd0"
AWKWARD += "aeé\u0301\u0316\u0344\u0f73\u0f71\u1100\u1161\u11a8가😀"
TEXTS = st.text(st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=80)


def unwanted(character: str) -> bool:
    code = ord(character)
    nonchar = 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE
    return nonchar or code == 0xFEFF or (unicodedata.category(character) == "Cc" and character not in "\n\t")


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_normalize_is_idempotent_and_keeps_its_promises(text: str) -> None:
    clean = normalize(text, "nfc", "remove")
    assert normalize(clean, "nfc", "remove") == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(map(unwanted, clean))
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    assert clean == unicodedata.normalize("NFC", "".join(c for c in lines if not unwanted(c)))
    assert normalize(text, "keep", "keep") == text
    assert normalize(text, "nfc", "keep") == unicodedata.normalize("NFC", text)


@given(st.lists(st.sampled_from("a\u0301\u0316\u0344\u0345\u0f71\u0f73\u0f81\u0327😀"), min_size=30, max_size=200))
@settings(max_examples=200, deadline=None)
def test_sorting_long_runs_of_marks_changes_nothing(characters: list[str]) -> None:
    text = "e" + "".join(characters) + "n"
    assert normalize(text, "nfc", "keep") == unicodedata.normalize("NFC", text)


def test_every_mark_is_a_character_that_a_run_may_hold() -> None:
    def marks() -> Iterator[str]:
        for character in map(chr, range(0x110000)):
            if any(map(unicodedata.combining, unicodedata.normalize("NFD", character)[:1])):
                yield character

    assert all(rules._MARK_RUN.fullmatch(mark * 33) for mark in marks())


def test_normalize_on_examples() -> None:
    assert normalize("a\r\nb\rc\n\r\td\x0c\x00\x85", "nfc", "remove") == "a\nb\nc\n\n\td"
    assert normalize("\ufeffe\x00\u0301\ufffe\U0001ffff", "nfc", "remove") == "é"
    assert normalize("e\u0301\r\n", "keep", "remove") == "e\u0301\n"
    assert normalize("zero\u200dwidth\xa0space\u2028", "nfc", "remove") == "zero\u200dwidth\xa0space\u2028"
    assert normalize("\r\r\n\n", "nfc", "remove") == "\n\n\n"
    assert normalize("\x00\r", "keep", "keep") == "\x00\r"
    plain = LETTERS + "\n\t"
    assert normalize(plain, "nfc", "remove") is plain


# --- language


@pytest.fixture
def fresh_identifier() -> Iterator[None]:
    rules._identifier.cache_clear()
    yield
    rules._identifier.cache_clear()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, fresh_identifier: None) -> None:
    for module in ("py3langid", "py3langid.langid"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install py3langid"):
        first_fault("Hello", [Language(keep=("en",))])


def test_a_code_that_no_language_has_is_refused() -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(UserError, match=r"(?s)'eng'.*en,"):
        first_fault("This is an ordinary sentence of the English language.", [Language(keep=("eng",))])


def test_only_the_beginning_decides_and_always_alike(fresh_identifier: None) -> None:
    pytest.importorskip("py3langid")
    english, german = CASES["language.probability"][1:3]
    spec = Language(keep=("en",), max_chars=len(english))
    assert first_fault(english + german * 20, [spec]) is None
    first = first_fault(german, [spec])
    rules._identifier.cache_clear()
    assert first_fault(german, [spec]) == first
    assert first_fault("qx", [Language(keep=("en",), min_probability=0.99)]) is not None
