"""The quality filter: it tells good text from bad where they differ, and the draw follows the law it names."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import roc_auc_score

from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep.pipeline import prepare
from data_prep.quality import FORMAT, Classifier, pareto_threshold, save_classifier
from tests.data_prep.mixed import pieces

MakeConfig = Callable[..., CorpusConfig]
TRAINED: dict[str, Any] = {
    "kind": "train_classifier", "curated": ["good"], "filter": ["web"], "sample_bytes": 10**6, "features": 4096,
}  # fmt: skip
KEYS = [int(key) for key in np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)]


def garbage(count: int, seed: int = 0) -> list[str]:
    """Words of made-up letters, as many as a piece of source text has."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2_000)]
    return [" ".join(draw.choices(words, k=100)) for _ in range(count)]


def write_lines(folder: Path, texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in some]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [{"kind": "jsonl", "name": name, "path": str(folder / f"{name}.jsonl")} for name in texts]


def filtered(make: MakeConfig, output: Path, sources: list[dict[str, Any]], spec: Any, **changes: Any) -> Path:
    """Run the stages up to `quality`; returns its folder."""
    prepare(make(output, sources=sources, quality=spec, **changes), until="quality")
    return output / "work" / "quality"


def left_out(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("*.rejects.jsonl")) for line in path.read_text().splitlines()]


def counts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "stage.json").read_bytes()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Good text, a web of which a third is of the same kind, and a source that is neither."""
    text = pieces("email")
    texts = {"good": text[::2], "web": text[1::4] + garbage(250), "apart": garbage(30, seed=1)}
    return write_lines(tmp_path_factory.mktemp("sources"), texts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, sources: list[dict[str, Any]]) -> Path:
    return filtered(make_config, tmp_path_factory.mktemp("trained") / "out", sources, TRAINED)


def test_separable_texts_are_told_apart(tmp_path: Path, make_config: MakeConfig) -> None:
    sources = write_lines(tmp_path, {"good": pieces("email"), "web": garbage(300)})
    folder = filtered(make_config, tmp_path / "out", sources, TRAINED)
    counts = counts_of(folder)
    assert counts["classifier"]["auc"] > 0.99
    assert counts["sources"]["web"]["kept"] < 0.05 * counts["sources"]["web"]["scored"]
    model = Classifier(folder / "classifier.safetensors")
    good, bad = model.scores(pieces("json")), model.scores(garbage(50, seed=2))
    assert good.min() > bad.max(), "also texts it never saw"
    assert {"self", "the"} & set(model.facts["words"]["curated"])


def test_texts_of_one_kind_are_not(tmp_path: Path, make_config: MakeConfig) -> None:
    """About 400 of each class are measured: by chance alone the AUC strays by 0.02 from one half."""
    texts = garbage(800)
    sources = write_lines(tmp_path, {"good": texts[::2], "web": texts[1::2]})
    found = counts_of(filtered(make_config, tmp_path / "out", sources, TRAINED))["classifier"]
    assert found["documents"] > 500 and 0.4 < found["auc"] < 0.6


def test_good_text_of_the_filtered_source_stays(trained: Path) -> None:
    """Although the classifiers were told it is bad: none judges what it was trained on."""
    counts = counts_of(trained)["sources"]["web"]
    good = counts["scored"] - 250
    assert good > 100 and counts["kept"] > 0.25 * good


def test_the_auc_is_that_of_documents_kept_from_training(trained: Path) -> None:
    """Made again from the samples on disk, with sklearn alone."""
    facts, model = counts_of(trained)["classifier"], Classifier(trained / "classifier.safetensors")
    texts, labels, keys = [], [], []
    for path in sorted(trained.glob("*.sample.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            texts.append(record["text"])
            labels.append(int(path.name.startswith("u0000000")))  # the unit of `good`
            keys.append(record["key"])
    label, odd = np.array(labels), np.array(keys, np.uint64) % np.uint64(2) == 1
    features, unseen = model._vectorizer.transform(texts), np.zeros(len(texts))
    for half in (odd, ~odd):
        again = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=10, tol=None, random_state=0)
        again.fit(features[half], label[half])
        unseen[~half] = again.predict_proba(features[~half])[:, 1]
    auc = roc_auc_score(label, unseen)
    assert facts["auc"] == pytest.approx(auc, abs=1e-3), "float32 weights may swap a pair of scores"
    np.testing.assert_allclose(model.scores(texts, keys), unseen, atol=1e-4)
    assert facts["auc"] == round(roc_auc_score(label, model.scores(texts, keys)), 6)
    assert facts["documents"] == len(texts) and sum(facts["histogram_curated"]) == int(label.sum())
    assert sum(facts["histogram_curated"]) + sum(facts["histogram_other"]) == len(texts)


def test_the_summary_tells_how_good_it_is(
    tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]], trained: Path
) -> None:
    summary = prepare(make_config(tmp_path / "out", sources=sources, quality={**TRAINED, "pareto_alpha": 2.0}))
    assert summary is not None and summary.classifier == counts_of(trained)["classifier"]
    model = Classifier(summary.output / "quality" / "classifier.safetensors")
    assert model.facts["auc"] == summary.classifier["auc"]
    assert json.loads((summary.output / "summary.json").read_bytes())["classifier"] == summary.classifier
    rejects = (summary.output / "rejects" / "quality.jsonl").read_text().splitlines()
    assert [row.low_quality for row in summary.sources] == [0, len(rejects), 0] and len(rejects) > 100


@pytest.mark.parametrize("alpha", [1.0, 9.0])
@pytest.mark.parametrize("score", [0.0, 0.3, 0.7, 0.95])
def test_draws_follow_the_law(score: float, alpha: float) -> None:
    """A share of (2 - s)^-alpha stays; with 20,000 keys it strays by sqrt(p (1 - p) / 20,000), of which four."""
    kept = np.mean([score >= pareto_threshold(key, alpha) for key in KEYS])
    share = (2 - score) ** -alpha
    assert abs(kept - share) < 4 * np.sqrt(share * (1 - share) / len(KEYS))
    assert kept > 0, "also the lowest scores have a chance"


def test_a_perfect_score_always_stays_and_a_better_one_never_goes() -> None:
    for key in [*KEYS, 0, 2**64 - 1]:
        threshold = pareto_threshold(key, 9.0)
        assert threshold <= 1 and threshold == pareto_threshold(key, 9.0)
        assert pareto_threshold(key, 3.0) <= threshold, "a heavier tail keeps more"
    assert all(pareto_threshold(key, 1e-6) <= 1 for key in KEYS), "a tail too heavy for a number keeps all"
    neighbours = [pareto_threshold(key, 9.0) for key in range(2_000)]
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 4 / np.sqrt(2_000), "keys draw on their own"


def test_scores_and_fates_are_those_of_each_document(trained: Path) -> None:
    """Document by document, in the slow way."""
    model = Classifier(trained / "classifier.safetensors")
    clean = trained.with_name("clean")
    expected = []
    for unit in ("u0000000", "u0000001", "u0000002"):
        rows = np.load(clean / f"{unit}.rows.npy")
        fates = np.load(trained / f"{unit}.fates.npy")
        if unit != "u0000001":
            assert not fates.any(), "only sources named in `filter` are filtered"
            continue
        path = Path(json.loads((clean.with_name("read") / f"{unit}.unit.json").read_bytes())["files"][0][1])
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        keys = [int(row["order"]) for row in rows]
        scores = [float(model.scores([text], [key])[0]) for text, key in zip(texts, keys)]
        np.testing.assert_allclose(np.load(trained / f"{unit}.scores.npy"), scores, rtol=1e-6)
        for number, (score, row, fate) in enumerate(zip(scores, rows, fates)):
            assert fate == (score < pareto_threshold(int(row["order"]), 9.0))
            if fate:
                line = {"source": "web", "origin": f"{path}:{number + 1}", "rule": "quality"}
                expected.append({**line, "reason": f"score {score:.4f}"})
        counts = counts_of(trained)["sources"]["web"]
        assert counts["scored"] == len(texts) == counts["kept"] + int(fates.sum())
        assert counts["bytes"] == int(rows["bytes"][fates == 0].sum())
        assert counts["kept_below_half"] == sum(score < 0.5 and not fate for score, fate in zip(scores, fates))
        histogram = np.histogram(scores, 50, (0, 1))[0].tolist()
        assert list(counts["histogram"].values()) == histogram
    assert [json.loads(line) for line in left_out(trained)] == expected and len(expected) > 100


def test_some_low_scores_stay(tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]]) -> None:
    """With alpha 1 a half of those with score 0 do."""
    folder = filtered(make_config, tmp_path / "out", sources, {**TRAINED, "pareto_alpha": 1.0})
    counts = counts_of(folder)["sources"]["web"]
    low = sum(count for bin_, count in counts["histogram"].items() if int(bin_) < 25)
    assert low > 200 and abs(counts["kept_below_half"] / low - 0.5) < 4 * np.sqrt(0.25 / low) + 0.05


def test_curated_sources_lose_nothing(trained: Path) -> None:
    counts = counts_of(trained)["sources"]
    for name in ("good", "apart"):
        assert counts[name]["scored"] == 0 and counts[name]["kept"] > 0
    dedup = json.loads((trained.with_name("dedup") / "stage.json").read_bytes())["sources"]
    assert all(counts[name][key] == dedup[name][key] for name in ("good", "apart") for key in ("kept", "bytes"))
    assert {json.loads(line)["source"] for line in left_out(trained)} == {"web"}


@pytest.mark.parametrize("changes", [{}, {"workers": 2}, {"unit_bytes": 20_000}], ids=["again", "workers", "units"])
def test_a_classifier_is_the_same_bytes_however_it_is_trained(
    tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]], trained: Path, changes: dict[str, int]
) -> None:
    folder = filtered(make_config, tmp_path / "out", sources, TRAINED, **changes)
    assert (folder / "classifier.safetensors").read_bytes() == (trained / "classifier.safetensors").read_bytes()
    assert left_out(folder) == left_out(trained)


def test_another_seed_learns_another_classifier(
    tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]], trained: Path
) -> None:
    folder = filtered(make_config, tmp_path / "out", sources, TRAINED, seed=1)
    assert (folder / "classifier.safetensors").read_bytes() != (trained / "classifier.safetensors").read_bytes()
    assert counts_of(folder)["classifier"]["auc"] == pytest.approx(counts_of(trained)["classifier"]["auc"], abs=0.2)


def test_a_classifier_brought_along_gives_the_same_fates(
    tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]], trained: Path
) -> None:
    spec = {"kind": "classifier_file", "path": str(trained / "classifier.safetensors"), "filter": ["web"]}
    folder = filtered(make_config, tmp_path / "out", sources, spec)
    assert left_out(folder) == left_out(trained)
    assert counts_of(folder)["sources"] == counts_of(trained)["sources"]
    assert counts_of(folder)["classifier"]["auc"] == counts_of(trained)["classifier"]["auc"]


def test_bad_classifiers_are_refused(tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]]) -> None:
    weight, bias = np.ones((2, 256), np.float32), np.zeros(2, np.float32)
    header = json.dumps({"format": FORMAT})
    good = {"weight": weight, "bias": bias}
    save_classifier(tmp_path / "good", weight, bias, {})
    assert Classifier(tmp_path / "good").scores(["some words"]).shape == (1,)
    whole = (tmp_path / "good").read_bytes()
    for name, data in (("empty", b""), ("cut", whole[:-9]), ("text", b"not a classifier\n" * 9)):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    of_format = {
        "none": None, "foreign": {"format": "pt"}, "list": {"classifier": "[]"}, "number": {"classifier": "7"},
        "words": {"classifier": '["a"]'}, "broken": {"classifier": "{"}, "old": {"classifier": '{"format": "0"}'},
    }  # fmt: skip
    for name, metadata in of_format.items():
        save_file(good, tmp_path / name, metadata)
    nan = np.where(np.arange(512).reshape(2, 256) == 7, np.float32(np.nan), weight)
    tensors = {
        "no bias": {"weight": weight}, "no weight": {"bias": bias}, "bias of one": {**good, "bias": np.zeros(1)},
        "square": {**good, "weight": np.ones((16, 16))}, "nothing": {**good, "weight": np.zeros((2, 0), np.float32)},
        "nan": {**good, "weight": nan}, "infinite": {**good, "bias": np.full(2, np.inf)},
    }  # fmt: skip
    for name, tree in tensors.items():
        save_file(tree, tmp_path / name, {"classifier": header})
    for name in ("missing", "empty", "cut", "text", "folder", *of_format, *tensors):
        with pytest.raises(UserError, match=r"remedy: +name a classifier.safetensors") as met:
            Classifier(tmp_path / name)
        assert str(tmp_path / name) in met.value.found
    spec = {"kind": "classifier_file", "path": str(tmp_path / "cut"), "filter": ["web"]}
    with pytest.raises(UserError, match="cut"):
        filtered(make_config, tmp_path / "out", sources, spec)
    assert not (tmp_path / "out").exists(), "told before any work"


def test_too_few_documents_to_learn_from_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    sources = write_lines(tmp_path, {"good": pieces("json")[:1], "web": garbage(40)})
    with pytest.raises(UserError, match="1 documents of curated sources"):
        filtered(make_config, tmp_path / "out", sources, TRAINED)


def test_samples_are_as_large_as_asked(tmp_path: Path, make_config: MakeConfig, sources: list[dict[str, Any]]) -> None:
    """A hash decides, document by document: of about 140 that are drawn of each class, give or take 12."""
    folder = filtered(make_config, tmp_path / "out", sources, {**TRAINED, "sample_bytes": 60_000})
    sizes = [json.loads(path.read_bytes())["bytes"] for path in sorted(folder.glob("*.sample.json"))]
    assert len(sizes) == 2 and all(0.6 < size / 60_000 < 1.4 for size in sizes)
