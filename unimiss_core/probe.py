"""How well labelled scans separate by an encoder's features: linear probe and nearest neighbours, with intervals.

Legend of shapes: N scans, T of them scored, E features, K classes, R weightings of the scans.

Every scan is scored by a model that saw no scan of its patient, and intervals come from drawing patients, not scans,
with replacement: two scans of one patient are not two witnesses. Scores of different folds come from different models,
so only scans of one fold are compared; pooling the folds would push a useless feature's AUC below one half (LeDell et
al. 2015, doi:10.1214/15-EJS1035).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from unimiss_core.resampling import Floats, as_they_are, divided, drawn_by_patient, interval_95, pairs_in_order

RIDGE = 0.1
"""Inverse strength of the penalty (scikit-learn's C); fixed, so that no test label chooses it."""
FOLDS = 5
LEAST_PATIENTS = 5
"""Of each class, below which there is no figure."""
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.07
_AT_ONCE = 1024
"""Scans whose neighbours are looked for together."""


@dataclass(frozen=True)
class Probe:
    """Held-out scores of labelled scans; none, with a reason, where the set cannot be probed."""

    labels: NDArray[np.int64]
    """(N,), numbers into `classes`."""
    patients: NDArray[np.str_]
    """(N,), numbered as they first appear: what they are called, which a site's secret decides, must not deal them to
    other folds or draws."""
    classes: tuple[str, ...]
    scores: Floats | None = None
    """(N, K)"""
    folds: NDArray[np.int64] | None = None
    """(N,): scores of one fold can be compared."""
    reason: str = ""

    def auc(self) -> float | None:
        """Area under the ROC curve; with more than two classes the mean over classes, each against the rest."""
        return None if self.scores is None else float(self.aucs(as_they_are(len(self.labels)))[0])

    def interval(self, seed: int = 0) -> tuple[float, float] | None:
        """95% interval of `auc` over patients."""
        return None if self.scores is None else interval_95(self.aucs(drawn_by_patient(self.patients, seed)))

    def aucs(self, weights: Floats) -> Floats:
        """(R,): `auc` with scan n counted weights[r, n] times, for weights (R, N); nan where nothing is to compare."""
        assert self.scores is not None
        assert self.folds is not None
        positive = [1] if len(self.classes) == 2 else range(len(self.classes))
        each = [_weighted_auc(self.labels == k, self.scores[:, k], self.folds, weights) for k in positive]
        return np.asarray(np.mean(each, axis=0))


def probe(
    features: NDArray[np.float32],
    labels: NDArray[np.str_],
    patients: NDArray[np.str_],
    *,
    seed: int = 0,
    scored: NDArray[np.bool_] | None = None,
) -> Probe:
    """Ridge-penalised logistic regression on standardised features: features (N, E), labels (N,), patients (N,).

    scored: (N,), the scans that are judged, by a model of all others; None judges each by a model of other patients.
    """
    found = _unscored(features, labels, patients)
    if found.reason:
        return found
    if scored is None:
        splits = StratifiedGroupKFold(n_splits=FOLDS, shuffle=True, random_state=seed)
        parts = list(splits.split(features, found.labels, found.patients))
    else:
        parts = [(np.flatnonzero(~scored), np.flatnonzero(scored))]
    scores, folds = np.zeros((len(labels), len(found.classes))), np.zeros(len(labels), dtype=np.int64)
    for fold, (train, test) in enumerate(parts):
        if len(np.unique(found.labels[train])) < len(found.classes):
            return _refused(found, "too few patients to leave some out of every class")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=RIDGE, max_iter=2000))
        model.fit(features[train].astype(np.float64), found.labels[train])
        scores[test], folds[test] = model.predict_proba(features[test].astype(np.float64)), fold
    return _scored(found, scores, folds, scored)


def neighbours(
    features: NDArray[np.float32],
    labels: NDArray[np.str_],
    patients: NDArray[np.str_],
    *,
    scored: NDArray[np.bool_] | None = None,
) -> Probe:
    """Vote of the ten scans of other patients with the most similar features, weighted by exp(cosine / 0.07).

    The k-NN evaluation of DINO (arXiv:2104.14294), without a model to fit; arguments as of `probe`: where some scans
    are `scored`, the others alone are neighbours.
    """
    found = _unscored(features, labels, patients)
    if found.reason:
        return found
    directions = features.astype(np.float64)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    judged = np.arange(len(labels)) if scored is None else np.flatnonzero(scored)
    pool = np.arange(len(labels)) if scored is None else np.flatnonzero(~scored)
    scores = np.zeros((len(labels), len(found.classes)))
    for start in range(0, len(judged), _AT_ONCE):
        some = judged[start : start + _AT_ONCE]
        similar = directions[some] @ directions[pool].T
        similar[patients[some, None] == patients[pool]] = -np.inf
        nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
        weights = np.exp((np.take_along_axis(similar, nearest, 1) - 1) / NEIGHBOUR_TEMPERATURE)
        votes = np.eye(len(found.classes))[found.labels[pool[nearest]]]  # (T, neighbours, K)
        scores[some] = (weights[..., None] * votes).sum(1) / np.maximum(weights.sum(1, keepdims=True), 1e-300)
    return _scored(found, scores, np.zeros(len(labels), dtype=np.int64), scored)


def gain(before: Probe, after: Probe, seed: int = 0) -> tuple[float, tuple[float, float]] | None:
    """(AUC after minus before, its 95% interval), for the same scans in the same order; None where either has none.

    Both are taken on the same draws of patients: the pairing takes out their luck.
    """
    if before.scores is None or after.scores is None:
        return None
    if not (np.array_equal(before.labels, after.labels) and np.array_equal(before.patients, after.patients)):
        raise ValueError("before and after were not probed on the same scans")
    once, draws = as_they_are(len(before.labels)), drawn_by_patient(before.patients, seed)
    interval = interval_95(after.aucs(draws) - before.aucs(draws))
    return None if interval is None else (float((after.aucs(once) - before.aucs(once))[0]), interval)


def plane(features: NDArray[np.float32]) -> Floats:
    """features (N, E) -> (N, 2): the two directions of largest variance of the standardised features.

    The largest entry of a direction is positive, so that the picture does not flip from run to run. Where there is
    only one direction, or none, the rest is 0.
    """
    x = features.astype(np.float64)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 1e-12, spread, 1)
    _, _, directions = np.linalg.svd(x, full_matrices=False)
    directions = directions[:2]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    placed = x @ (directions * np.where(largest < 0, -1, 1)).T
    return np.pad(placed, ((0, 0), (0, 2 - placed.shape[1])))


def _unscored(features: NDArray[np.float32], labels: NDArray[np.str_], patients: NDArray[np.str_]) -> Probe:
    """The set by class numbers, with the reason why it cannot be probed where there is one."""
    classes, numbers = np.unique(labels, return_inverse=True)
    found = Probe(numbers.astype(np.int64), _in_order_of_appearance(patients), tuple(str(c) for c in classes))
    if not np.isfinite(features).all():
        return _refused(found, "features are not finite: the training diverged")
    if len(classes) < 2:
        return _refused(found, "all scans have the same label" if len(classes) else "there are no scans")
    fewest = min(len(np.unique(patients[numbers == k])) for k in range(len(classes)))
    if fewest < LEAST_PATIENTS:
        patients_of = "1 patient" if fewest == 1 else f"{fewest} patients"
        return _refused(found, f"a class has only {patients_of}, at least {LEAST_PATIENTS} are needed")
    return found


def _in_order_of_appearance(names: NDArray[np.str_]) -> NDArray[np.str_]:
    """Equal names -> equal numbers, as text, of which the first name has the lowest."""
    number: dict[str, int] = {}
    return np.array([f"{number.setdefault(str(name), len(number)):09}" for name in names], dtype=np.str_)


def _scored(found: Probe, scores: Floats, folds: NDArray[np.int64], scored: NDArray[np.bool_] | None) -> Probe:
    """The scans that were judged, with their scores."""
    kept = slice(None) if scored is None else scored
    return Probe(found.labels[kept], found.patients[kept], found.classes, scores[kept], folds[kept])


def _refused(found: Probe, reason: str) -> Probe:
    return Probe(found.labels, found.patients, found.classes, reason=reason)


def _weighted_auc(positive: NDArray[np.bool_], score: Floats, folds: NDArray[np.int64], weights: Floats) -> Floats:
    """(R,): share of pairs (positive, negative) of one fold that stand in the right order."""
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        inside = folds == fold
        in_order, all_of_fold = pairs_in_order(score[inside], positive[inside], weights[:, inside])
        right += in_order
        pairs += all_of_fold
    return divided(right, pairs)
