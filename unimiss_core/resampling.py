"""Figures of labelled scans whose intervals come from their patients: two scans of one patient are not two witnesses.

Legend of shapes: N scans, R weightings of them. A weighting says how often each scan counts, so that a draw of patients
needs no copy of the scans.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 1000
"""Of patients, for one interval."""


def as_they_are(scans: int) -> Floats:
    """(1, N): each scan once."""
    return np.ones((1, scans))


def drawn_by_patient(patients: Sequence[str] | NDArray[np.str_], seed: int = 0) -> Floats:
    """(DRAWS, N): as many patients as there are, drawn with replacement, each with all of its scans."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    chosen = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    return chosen[:, owner].astype(np.float64)


def interval_95(drawn: Floats) -> tuple[float, float] | None:
    """From a figure of each draw, (R,): its 2.5th and 97.5th percentile; a draw for which it is not defined is left
    out. None: it is defined for no draw."""
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def pairs_in_order(score: Floats, positive: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """Of all pairs (positive, negative), (R,) each: how many the score, (N,), puts in the right order, ties counting
    half, and how many there are. By sorting, so that memory holds no pairs: what lies below a group of equal scores,
    and half of itself."""
    order = np.argsort(score, kind="stable")
    starts = group_starts(score[order])
    up = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    down = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    right = (up * (np.cumsum(down, axis=1) - down / 2)).sum(1)
    return right, up.sum(1) * down.sum(1)


def group_starts(ordered: Floats) -> NDArray[np.intp]:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def divided(above: Floats, below: Floats) -> Floats:
    """above / below; nan where there is nothing below."""
    return np.asarray(np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0))
