"""Duplicates: who goes is what comparing all pairs says, and nearly equal texts meet as often as the theory has it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.corpus import CorpusConfig, NearDuplicates
from data_prep import dedup
from data_prep.dedup import band_keys
from data_prep.pipeline import prepare

MakeConfig = Callable[..., CorpusConfig]
Fates = dict[str, tuple[str, str]]  # origin -> rule, reason: of those that go
Corpus = list[list[list[str]]]  # sources, files, texts
BOTH: dict[str, Any] = {"exact": True, "near": {"ngram_words": 2, "bands": 4, "rows": 2}}
WORDS = [f"w{number}" for number in range(10_000)]


def write_sources(folder: Path, corpus: Corpus) -> list[dict[str, Any]]:
    """A source is a folder of JSON lines; blank lines and garbage in between count as lines, not as documents."""
    sources = []
    for number, files in enumerate(corpus):
        path = folder / f"s{number}"
        path.mkdir(parents=True)
        for index, texts in enumerate(files):
            lines = [json.dumps({"text": text}) for text in texts]
            (path / f"{index}.jsonl").write_text("\n".join(["garbage", *lines[:2], "", *lines[2:]]) + "\n")
        sources.append({"kind": "jsonl", "name": f"s{number}", "path": str(path)})
    return sources


def documents_of(folder: Path, corpus: Corpus) -> list[tuple[str, str]]:
    """(origin, text), in the order that decides."""
    found = []
    for number, files in enumerate(corpus):
        for index, texts in enumerate(files):
            path = folder / f"s{number}" / f"{index}.jsonl"
            found += [(f"{path}:{2 + at + (at >= 2)}", text) for at, text in enumerate(texts)]
    return found


def fates_of(make: MakeConfig, folder: Path, output: Path, spec: dict[str, Any], sources: Any, **more: Any) -> Fates:
    """Run the stages up to `dedup`, and read what it put aside."""
    config = make(output, sources=sources, deduplicate=spec, **more)
    prepare(config, until="dedup")
    counts = json.loads((output / "work/dedup/stage.json").read_bytes())["sources"]
    fates: Fates = {}
    seen: Counter[tuple[str, str]] = Counter()
    for path in sorted((output / "work/dedup").glob("*.rejects.jsonl")):
        for line in path.read_text().splitlines():
            reject = json.loads(line)
            fates[reject["origin"]] = (reject["rule"], reject["reason"])
            seen[reject["source"], reject["rule"]] += 1
            assert f"/{reject['source']}/" in reject["origin"]
    assert seen == +Counter({(s, f"{k}_duplicate"): counts[s][k] for s in counts for k in ("exact", "near")})
    return fates


def fates_by_pairs(documents: list[tuple[str, str]], spec: dict[str, Any]) -> Fates:
    """The slow twin: every document against every earlier one."""
    near = None if spec["near"] is None else NearDuplicates(**spec["near"])
    folded = [text.lower().split() for _, text in documents]
    bands = [set(band_keys(words, near)) if near else set() for words in folded]
    fates: Fates = {}
    for later, (origin, _) in enumerate(documents):
        equal = [i for i in range(later) if spec["exact"] and folded[i] == folded[later]]
        alike = [i for i in range(later) if bands[i] & bands[later]]
        if equal or alike:
            rule = "exact_duplicate" if equal else "near_duplicate"
            fates[origin] = (rule, f"like {documents[(equal or alike)[0]][0]}")
    return fates


# Few words, so that many texts are equal or alike; case and white space differ.
TEXTS = st.lists(st.sampled_from(["one", "Two", "three"]), min_size=1, max_size=5).flatmap(
    lambda words: st.sampled_from([" ".join(words), "\n ".join(words), " ".join(words).upper(), " " + "\t".join(words)])
)
CORPORA = st.lists(st.lists(st.lists(TEXTS, min_size=1, max_size=8), min_size=1, max_size=2), min_size=1, max_size=2)


@settings(max_examples=15, deadline=None)
@given(corpus=CORPORA, exact=st.booleans(), near=st.booleans(), unit_bytes=st.sampled_from([100, 10**6]))
def test_who_goes_is_what_all_pairs_say(
    tmp_path_factory: pytest.TempPathFactory,
    make_config: MakeConfig,
    corpus: Corpus,
    exact: bool,
    near: bool,
    unit_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    spec = {"exact": exact, "near": BOTH["near"] if near else None}
    sources = write_sources(folder, corpus)
    found = fates_of(make_config, folder, folder / "out", spec, sources, unit_bytes=unit_bytes)
    assert found == fates_by_pairs(documents_of(folder, corpus), spec)
    assert exact or near or not found


def variants(seed: int, count: int) -> list[str]:
    """Texts of which many are equal or alike."""
    rng = np.random.default_rng(seed)
    bases = [rng.choice(WORDS, 100).tolist() for _ in range(count // 4)]
    texts = []
    for _ in range(count):
        words = list(bases[rng.integers(len(bases))])
        at, changed = int(rng.integers(100)), int(rng.choice([0, 1, 4, 8, 60]))
        words[at : at + changed] = rng.choice(WORDS, changed).tolist()
        texts.append(" ".join(words))
    return texts


def test_cuts_and_ranges_of_keys_change_nothing(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [[variants(0, 50), variants(0, 30)], [variants(1, 40) + variants(0, 20)], [variants(1, 10)]]
    sources, spec = write_sources(tmp_path, corpus), {"exact": True, "near": {}}
    expected = fates_by_pairs(documents_of(tmp_path, corpus), spec)
    assert {rule for rule, _ in expected.values()} == {"exact_duplicate", "near_duplicate"}
    for unit_bytes in (10**6, 10_000):
        for entries in (10**6, 400, 60):  # of keys in a range: one range, some, many
            monkeypatch.setattr(dedup, "_RANGE_BYTES", entries * 16)
            output = tmp_path / f"out-{unit_bytes}-{entries}"
            assert fates_of(make_config, tmp_path, output, spec, sources, unit_bytes=unit_bytes) == expected
            met = [np.load(path).size for path in (output / "work/dedup").glob("r*.later.npy")]
            assert len(met) == -(-150 * 15 // entries)
            assert max(met) < 3 * sum(met) / len(met) + 10, "each range holds about as many keys"


def test_the_order_of_sources_and_files_says_which_copy_stays(tmp_path: Path, make_config: MakeConfig) -> None:
    text, other = "The same words in two sources", "words of its own"
    first, second = write_sources(tmp_path, [[[text], [other, text]], [[text.upper()]]])
    a, b, c = (tmp_path / name for name in ("s0/0.jsonl:2", "s0/1.jsonl:3", "s1/0.jsonl:2"))
    for name, sources, kept, gone in (("1", [first, second], a, (b, c)), ("2", [second, first], c, (a, b))):
        found = fates_of(make_config, tmp_path, tmp_path / name, BOTH, sources)
        assert found == {str(origin): ("exact_duplicate", f"like {kept}") for origin in gone}


def test_what_a_rule_left_out_takes_nothing_with_it(tmp_path: Path, make_config: MakeConfig) -> None:
    short, long = "to be", "to be or not to be"
    first, second = write_sources(tmp_path, [[[short, long]], [[short, long]]])
    first["filters"] = [{"kind": "length", "min_words": 3}]
    found = fates_of(make_config, tmp_path, tmp_path / "out", BOTH, [first, second])
    assert found == {f"{tmp_path}/s1/0.jsonl:3": ("exact_duplicate", f"like {tmp_path}/s0/0.jsonl:3")}


def test_case_and_white_space_do_not_matter_but_words_do(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = ["Ünder the\tsea", "  ünder\n\nTHE sea\n", "ÜNDER the\u00a0SEA", "under the sea", "ünder thesea"]
    sources = write_sources(tmp_path, [[texts]])
    found = fates_of(make_config, tmp_path, tmp_path / "out", {"exact": True, "near": None}, sources)
    assert list(found) == [f"{tmp_path}/s0/0.jsonl:{line}" for line in (3, 5)]
    near = fates_of(make_config, tmp_path, tmp_path / "near", {"exact": False, "near": {}}, sources)
    assert {origin: "near_duplicate" for origin in found} == {origin: rule for origin, (rule, _) in near.items()}
    assert fates_of(make_config, tmp_path, tmp_path / "off", {"exact": False, "near": None}, sources) == {}


def test_an_edited_passage_goes_and_an_unrelated_text_stays(tmp_path: Path, make_config: MakeConfig) -> None:
    """2% of 500 words in one place: 14 of 496 word 5-grams, similarity 482 / 510 = 0.945, so one in 10^5 is missed."""
    rng = np.random.default_rng(0)
    originals = [rng.choice(WORDS, 500).tolist() for _ in range(30)]
    edited = []
    for words in originals:
        at = int(rng.integers(0, 490))
        edited.append(words[:at] + [f"new{n}" for n in range(10)] + words[at + 10 :])
    unrelated = [rng.choice(WORDS, 500).tolist() for _ in range(30)]
    texts = [" ".join(words) for words in originals + edited + unrelated]
    sources = write_sources(tmp_path, [[texts[:30]], [texts[30:]]])
    found = fates_of(make_config, tmp_path, tmp_path / "out", {"exact": True, "near": {}}, sources)
    origins = [origin for origin, _ in documents_of(tmp_path, [[texts[:30]], [texts[30:]]])]
    pairs = zip(origins[30:60], origins[:30])
    assert found == {late: ("near_duplicate", f"like {early}") for late, early in pairs}


def test_scattered_changes_meet_at_the_rate_promised() -> None:
    """2% of 500 words here and there: about 50 of 496 word 5-grams, similarity 0.82, so about 0.96 of them meet."""
    rng, spec = np.random.default_rng(1), NearDuplicates()
    met, promised, pairs = 0, 0.0, 300
    for _ in range(pairs):
        words = rng.choice(WORDS, 500).tolist()
        edited = list(words)
        for at in rng.choice(500, 10, replace=False):
            edited[at] = "new"
        a, b = (set(zip(*(text[n:] for n in range(5)))) for text in (words, edited))
        promised += 1 - (1 - (len(a & b) / len(a | b)) ** 8) ** 14
        met += bool(set(band_keys(words, spec)) & set(band_keys(edited, spec)))
    assert 0.9 < promised / pairs < 0.98
    assert abs(met - promised) < 4 * np.sqrt(promised * (pairs - promised) / pairs)  # four deviations


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.65, 0.75, 0.85, 0.95])
def test_meetings_follow_the_law_of_banding(similarity: float) -> None:
    """1 - (1 - s^8)^14, each word a shingle of its own. Pairs are independent, so the rate found strays by
    sqrt(p (1 - p) / pairs): four of that, and 0.01 for hashing that is only nearly min-wise independent."""
    spec, rng, pairs, size = NearDuplicates(ngram_words=1), np.random.default_rng(2), 500, 200
    shared = round(size * similarity)
    met = 0
    for _ in range(pairs):
        words = [str(word) for word in rng.integers(0, 2**62, size)]
        half = shared + (size - shared) // 2
        one, other = words[:half], words[:shared] + words[half:]
        assert len(set(one) & set(other)) / len(set(one) | set(other)) == shared / size
        met += bool(set(band_keys(one, spec)) & set(band_keys(other, spec)))
    rate = 1 - (1 - (shared / size) ** 8) ** 14
    assert abs(met / pairs - rate) < 4 * np.sqrt(rate * (1 - rate) / pairs) + 0.01


def test_signatures_see_the_set_of_ngrams_alone() -> None:
    """Neither their order nor how often they come; a text shorter than one n-gram is one."""
    spec = NearDuplicates(ngram_words=1)
    words = [f"w{number}" for number in range(50)]
    assert band_keys(words, spec) == band_keys(words[::-1] + words[:9], spec)
    assert len(band_keys(words, spec)) == len(set(band_keys(words, spec))) == 14
    fives = NearDuplicates()
    assert band_keys(["a", "b"], fives) == band_keys(["a", "b"], NearDuplicates(ngram_words=2))
    assert not set(band_keys(["a", "b"], fives)) & set(band_keys(["a", "c"], fives))


def test_long_documents_are_signed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    words, spec = [str(number % 997) for number in range(5_000)], NearDuplicates()
    whole = band_keys(words, spec)
    for some in (1, 7, 4_996):
        monkeypatch.setattr(dedup, "_SHINGLES_AT_ONCE", some)
        assert band_keys(words, spec) == whole
