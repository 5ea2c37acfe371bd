"""Stage `quality`: GLaM's filter (Du et al. 2021, section 3).

A linear classifier over hashed words learns to tell curated sources from the others; its score, the probability of
"curated", decides with a Pareto draw which documents of the filtered sources stay (GPT-3's form, Brown et al. 2020,
appendix A: keep if pareto(9) > 1 - score, which keeps everything at a score of 1 and 1 in 512 at a score of 0).

    sample    a unit's share of the training texts
    train     one task: two classifiers, each of half of the sample, and how well they tell the other half (AUC)
    score     a unit's documents: scores and fates
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from configs.corpus import QualityTraining
from configs.errors import UserError
from data_prep.documents import KEPT, Job, left_documents, reject_line
from data_prep.stages import Counts
from data_prep.storage import save_array, write_atomically, written_atomically

CLASSIFIER = "classifier.safetensors"
FORMAT = "glam quality classifier 2"
DROPPED = 1  # a fate
SCORE_BINS = 50
# Each document of the sample belongs to a fold and is scored, and measured, by the classifier trained on the other:
# a classifier would know the texts it was trained on by heart, and find none of the filtered ones good.
FOLDS = 2
_TEXT_CHARACTERS = 20_000  # of a document that are looked at: a classifier of words needs no more
_BATCH = 512
_EPOCHS = 10
_WORDS_SHOWN = 40


def sample_task(job: Job, fraction: float) -> Counts:
    """Draw documents with this probability, by a hash of their text, into `sample.jsonl`."""
    limit, rows = int(fraction * 2**64), job.rows()
    drawn = [xxhash.xxh3_64_intdigest(order.tobytes(), seed=1) < limit for order in rows["order"]]
    sampled = 0
    with written_atomically(job.path("quality", "sample.jsonl")) as file:
        for number, text, _ in left_documents(job, rows, job.left() & np.array(drawn, bool)):
            part = text[:_TEXT_CHARACTERS]
            file.write(orjson.dumps({"key": int(rows["order"][number]), "text": part}) + b"\n")
            sampled += len(part.encode("utf-8"))
    return {"bytes": sampled}


def train_task(spec: QualityTraining, seed: int, curated: list[Path], other: list[Path], folder: Path) -> Counts:
    """Train on each half of the samples and measure on the other; writes `classifier.safetensors`."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import roc_auc_score

    texts, labels, folds = _load_samples(curated, other)
    for label, name in ((1, "curated"), (0, "filtered")):
        for fold in range(FOLDS):
            if not np.any((labels == label) & (folds == fold)):
                raise UserError(
                    f"quality: {int((labels == label).sum())} documents of {name} sources to learn from",
                    "some to train on and some to measure on",
                    "raise quality.sample_bytes, add documents, or set quality=null",
                )
    features = _vectorizer(spec.features).transform(texts)
    weight, bias = np.zeros((FOLDS, spec.features), np.float32), np.zeros(FOLDS, np.float32)
    for fold in range(FOLDS):
        # Stochastic descent in one order with a fixed number of passes: the same numbers on any number of cores.
        model = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=_EPOCHS, tol=None, random_state=seed % 2**32)
        model.fit(features[folds != fold], labels[folds != fold])
        weight[fold], bias[fold] = model.coef_[0], model.intercept_[0]
    scores = _probability(_logits(features, weight, bias)[np.arange(len(folds)), folds])
    facts = {
        "auc": round(float(roc_auc_score(labels, scores)), 6),
        "documents": len(texts),
        "histogram_curated": _histogram(scores[labels == 1]),
        "histogram_other": _histogram(scores[labels == 0]),
        "words": _telling_words(texts, spec.features, weight.mean(0)),
    }
    save_classifier(folder / CLASSIFIER, weight, bias, facts)
    return {key: facts[key] for key in ("auc", "documents", "histogram_curated", "histogram_other")}


def _load_samples(
    curated: list[Path], other: list[Path]
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    texts, labels, folds = [], [], []
    for label, paths in ((1, curated), (0, other)):
        for path in paths:
            with path.open("rb") as file:
                for line in file:
                    record = orjson.loads(line)
                    texts.append(record["text"])
                    labels.append(label)
                    folds.append(record["key"] % FOLDS)
    return texts, np.array(labels, np.int64), np.array(folds, np.int64)


def _vectorizer(features: int) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=features, alternate_sign=False, norm="l2", token_pattern=r"(?u)\b\w+\b")


def _telling_words(texts: list[str], features: int, weight: npt.NDArray[np.float32]) -> dict[str, list[str]]:
    """The common words of the sample that speak most for and against: what hashing alone could not tell a reader."""
    counts = Counter(word for text in texts for word in set(text.lower().split()) if word.isalpha())
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20_000]  # ties in an order of their own
    words = sorted(word for word, count in common if count >= 5)
    if not words:
        return {"curated": [], "other": []}
    where = _vectorizer(features).transform(words)
    order = np.argsort(where @ weight, kind="stable")
    return {
        "curated": [words[i] for i in order[::-1][:_WORDS_SHOWN]],
        "other": [words[i] for i in order[:_WORDS_SHOWN]],
    }


def save_classifier(
    path: Path, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], facts: dict[str, Any]
) -> None:
    """A safetensors file: `weight` [FOLDS, features], `bias` [FOLDS], and in its header what is known of them."""
    from safetensors.numpy import save

    # One entry, as the order of several in the header would change from run to run.
    header = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    write_atomically(path, save({"weight": weight, "bias": bias}, {"classifier": header}))


class Classifier:
    """A classifier from its file.

    Attributes:
        facts: AUC, sample sizes, histograms, telling words.

    Raises:
        UserError: the file is missing or is none.
    """

    def __init__(self, path: Path | str) -> None:
        from safetensors import SafetensorError, safe_open

        remedy = "name a classifier.safetensors made by `glam prep`"
        try:
            with safe_open(str(path), "numpy") as file:
                self.facts = dict(json.loads((file.metadata() or {}).get("classifier", "{}")))
                if self.facts.get("format") != FORMAT:
                    raise UserError(f"{path} is of format {self.facts.get('format')}", FORMAT, remedy)
                self.weight, self.bias = file.get_tensor("weight"), file.get_tensor("bias")
            shapes = self.weight.shape, self.bias.shape
            if self.weight.ndim != 2 or not self.weight.size or (len(self.weight), *shapes[1]) != (FOLDS, FOLDS):
                raise ValueError(f"weight of shape {shapes[0]} and bias of shape {shapes[1]}")
            if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
                raise ValueError("a weight is not finite")
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {error}", "a quality classifier", remedy) from None
        self._vectorizer = _vectorizer(self.weight.shape[1])

    def scores(self, texts: list[str], keys: list[int] | None = None) -> npt.NDArray[np.float64]:
        """The probability of "curated" of each text: [texts].

        Args:
            keys: the documents' `order`, so that each is scored by the half that was not trained on it; without, by
                both.
        """
        features = self._vectorizer.transform([text[:_TEXT_CHARACTERS] for text in texts])
        logits = _logits(features, self.weight, self.bias)
        if keys is None:
            return _probability(logits.mean(1))
        return _probability(logits[np.arange(len(texts)), [key % FOLDS for key in keys]])


def _logits(features: Any, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[documents, FOLDS]. One product a fold: a sparse matrix times a vector adds up in one order on any machine."""
    return np.stack([np.asarray(features @ weight[fold] + bias[fold]) for fold in range(FOLDS)], axis=1)


def pareto_threshold(key: int, alpha: float) -> float:
    """1 - a Pareto (Lomax) draw made of a document's own hash: scores from it on stay."""
    uniform = (xxhash.xxh3_64_intdigest(key.to_bytes(8, "little"), seed=2) >> 11) / 2**53  # never 1
    exponent = -math.log1p(-uniform) / alpha
    return 2 - math.exp(exponent) if exponent < 700 else -math.inf  # beyond, a float64 cannot tell


def score_task(job: Job, classifier: Path, alpha: float) -> Counts:
    """Score a unit's documents and draw their fates."""
    rows, model = job.rows(), Classifier(classifier)
    scores, fates = np.full(len(rows), np.nan, np.float32), np.zeros(len(rows), np.uint8)
    histogram = np.zeros(SCORE_BINS, np.int64)
    kept = kept_bytes = low = 0
    with written_atomically(job.path("quality", "rejects.jsonl")) as rejects:
        for numbers, texts in _batches(job):
            found = model.scores(texts, [int(key) for key in rows["order"][numbers]])
            histogram += np.array(_histogram(found))
            for number, score in zip(numbers, found.tolist()):
                row = rows[number]
                scores[number] = score
                if score >= pareto_threshold(int(row["order"]), alpha):
                    kept, kept_bytes, low = kept + 1, kept_bytes + int(row["bytes"]), low + (score < 0.5)
                    continue
                fates[number] = DROPPED
                place = int(row["file"]), int(row["record"])
                rejects.write(reject_line(job.config, job.unit, place, "quality", f"score {score:.4f}"))
    save_array(job.path("quality", "scores.npy"), scores)
    save_array(job.path("quality", "fates.npy"), fates)
    dropped = int((fates != KEPT).sum())
    return {
        "scored": kept + dropped, "kept": kept, "bytes": kept_bytes, "kept_below_half": low,
        "histogram": {str(n): int(count) for n, count in enumerate(histogram)},
    }  # fmt: skip


def pass_task(job: Job) -> Counts:
    """A unit of a source that is not filtered: every document stays."""
    rows, left = job.rows(), job.left()
    save_array(job.path("quality", "fates.npy"), np.zeros(len(rows), np.uint8))
    return {"scored": 0, "kept": int(left.sum()), "bytes": int(rows["bytes"][left].sum()), "kept_below_half": 0}


def _batches(job: Job) -> Iterator[tuple[list[int], list[str]]]:
    numbers: list[int] = []
    texts: list[str] = []
    for number, text, _ in left_documents(job, job.rows(), job.left()):
        numbers.append(number)
        texts.append(text[:_TEXT_CHARACTERS])
        if len(texts) == _BATCH:
            yield numbers, texts
            numbers, texts = [], []
    if texts:
        yield numbers, texts


def _probability(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.asarray(logits, np.float64))))


def _histogram(scores: npt.NDArray[Any]) -> list[int]:
    return [int(n) for n in np.histogram(scores, SCORE_BINS, (0.0, 1.0))[0]]
