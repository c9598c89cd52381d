"""How good a classification is: figures with 95% intervals over patients. Plain numpy.

Legend of shapes: N scans, K classes, R weightings of the scans.

Each figure takes weights, and its interval comes from drawing patients (`unimiss_core.resampling`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unimiss_core.resampling import (
    Floats,
    as_they_are,
    divided,
    drawn_by_patient,
    group_starts,
    interval_95,
    pairs_in_order,
)
from unimiss_core.task_config import UNKNOWN

Figure = Mapping[str, float | None]
"""`value`, and `low` and `high` of its interval; None where it is not defined."""
_Ranking = Callable[[Floats, NDArray[np.bool_], Floats], Floats]

BINS = 15
"""Of the calibration error: equally wide."""


def of_classes(
    scores: Floats,
    target: NDArray[np.int64],
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    folds: NDArray[np.int64] | None = None,
) -> dict[str, Figure]:
    """One class of several. scores: probabilities (N, K). target: (N,), numbers of classes.

    auc and ap: of the last class of two; of more the mean over classes, each against the rest (`auc/NAME` is one's).
    accuracy and balanced_accuracy: of the likeliest class. ece: of its probability.
    folds: (N,), where several models were asked: scores of different ones are not compared.
    """
    chosen = scores.argmax(1)
    told = [1] if len(classes) == 2 else list(range(len(classes)))
    positive = np.stack([target == k for k in told], 1)
    figures = _one_against_rest(scores[:, told], positive, [classes[k] for k in told], np.ones(positive.shape), folds)
    figures |= {
        "accuracy": lambda w: _mean(chosen == target, w),
        "balanced_accuracy": lambda w: np.mean(
            [_mean(chosen == target, w * (target == k)) for k in range(len(classes))], axis=0
        ),
        "ece": lambda w: calibration_error(scores.max(1), chosen == target, w),
    }
    return with_intervals(figures, patients)


def of_labels(
    scores: Floats,
    target: NDArray[np.int64],
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    folds: NDArray[np.int64] | None = None,
) -> dict[str, Figure]:
    """Several labels that may each be there. scores: probabilities (N, K). target: (N, K), 0, 1 or UNKNOWN.

    Each figure is the mean over labels, each over the scans of which it is known; a label counts as told where its
    probability is one half or more. folds: as of `of_classes`.
    """
    known = (target != UNKNOWN).astype(np.float64)
    right = (scores >= 0.5) == (target == 1)
    labels = range(len(classes))
    figures = _one_against_rest(scores, target == 1, classes, known, folds)
    figures |= {
        "accuracy": lambda w: np.mean([_mean(right[:, k], w * known[:, k]) for k in labels], axis=0),
        "balanced_accuracy": lambda w: np.mean(
            [_mean(right[:, k], w * (target[:, k] == there)) for k in labels for there in (0, 1)], axis=0
        ),
        "ece": lambda w: np.mean(
            [calibration_error(scores[:, k], target[:, k] == 1, w * known[:, k]) for k in labels], axis=0
        ),
    }
    return with_intervals(figures, patients)


def mean_over_patients(values: Sequence[float | None], patients: Sequence[str]) -> Figure:
    """The mean of one number per scan, None where a scan has none, with its interval."""
    known = [i for i, value in enumerate(values) if value is not None and np.isfinite(value)]
    if not known:
        return {"value": None, "low": None, "high": None}
    numbers = np.array([values[i] for i in known], dtype=np.float64)
    return with_intervals({"mean": lambda w: _mean(numbers, w)}, [patients[i] for i in known])["mean"]


def auc(score: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """(R,): chance that a positive scan scores above a negative one, ties counting half; nan without a pair.

    score, positive: (N,). weights: (R, N).
    """
    return divided(*pairs_in_order(score, positive, weights))


def average_precision(score: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """(R,): precision at each threshold, weighted by the recall that it adds; nan without a positive scan."""
    order = np.argsort(-score, kind="stable")
    starts = group_starts(score[order])
    hits = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    told = np.cumsum(np.add.reduceat(weights[:, order], starts, axis=1), axis=1)
    precision = np.divide(np.cumsum(hits, axis=1), told, out=np.zeros_like(told), where=told > 0)
    return divided((hits * precision).sum(1), hits.sum(1))


def calibration_error(confidence: Floats, right: NDArray[np.bool_], weights: Floats) -> Floats:
    """(R,): how far confidence and share of right answers lie apart, on average over 15 bins of confidence.

    The expected calibration error of Guo et al. 2017 (arXiv:1706.04599), eq. 5.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = weights * (confidence - right)
    apart = sum(np.abs(gaps[:, bins == b].sum(1)) for b in range(BINS))
    return divided(np.asarray(apart), weights.sum(1))


def _one_against_rest(
    scores: Floats,
    positive: NDArray[np.bool_],
    names: Sequence[str],
    counts: Floats,
    folds: NDArray[np.int64] | None,
) -> dict[str, Callable[[Floats], Floats]]:
    """Figures of ranking: the mean over columns, and each by its name where there are several. counts: (N, K), 1 where
    it is known whether a scan is positive, else 0."""
    figures: dict[str, Callable[[Floats], Floats]] = {}
    for figure, of in {"auc": auc, "ap": average_precision}.items():
        each = [partial(of_column, of, scores[:, k], positive[:, k], counts[:, k], folds) for k in range(len(names))]
        figures[figure] = partial(_mean_of, each)
        if len(names) > 1:
            figures |= {f"{figure}/{name}": one for name, one in zip(names, each, strict=True)}
    return figures


def of_column(
    of: _Ranking,
    score: Floats,
    positive: NDArray[np.bool_],
    counts: Floats,
    folds: NDArray[np.int64] | None,
    weights: Floats,
) -> Floats:
    """(R,): `auc` or `average_precision` of one column, over scans that count. Of several folds the mean, each by what
    it ranks: pairs of an AUC, positive scans of a precision."""
    counted = weights * counts
    if folds is None:
        return of(score, positive, counted)
    above, below = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        inside = folds == fold
        own, there = counted[:, inside], positive[inside]
        share = (own * there).sum(1) * ((own * ~there).sum(1) if of is auc else 1)
        above += share * np.nan_to_num(of(score[inside], there, own))
        below += share
    return divided(above, below)


def _mean_of(figures: Sequence[Callable[[Floats], Floats]], weights: Floats) -> Floats:
    return np.asarray(np.mean([figure(weights) for figure in figures], axis=0))


def with_intervals(figures: Mapping[str, Callable[[Floats], Floats]], patients: Sequence[str]) -> dict[str, Figure]:
    """Each figure of all scans, with its interval; every call for the same patients draws the same of them.

    figures: name -> what it is for weightings (R, N). A difference of two figures is a figure: the pairing takes out
    the luck of the draw. patients: of each of the N scans.
    """
    once, draws = as_they_are(len(patients)), drawn_by_patient(patients)
    found: dict[str, Figure] = {}
    for name, figure in figures.items():
        value, interval = float(figure(once)[0]), interval_95(figure(draws))
        low, high = (None, None) if interval is None else interval
        found[name] = {"value": value if np.isfinite(value) else None, "low": low, "high": high}
    return found


def _mean(values: NDArray[np.bool_] | Floats, weights: Floats) -> Floats:
    return divided((weights * values).sum(1), weights.sum(1))
