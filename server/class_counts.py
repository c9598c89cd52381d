"""How many labelled scans are of each class, for screen and report."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

MOST_NAMED = 20
"""Classes that are told by name."""


def class_counts(labels: Iterable[str], patients: Iterable[str]) -> dict[str, int] | None:
    """Label -> scans, in their order as texts. None where there are too many to name, or most are of one patient each:
    then it may be that they are patients."""
    owners: dict[str, set[str]] = defaultdict(set)
    counts = Counter[str]()
    for label, patient in zip(labels, patients, strict=True):
        owners[label].add(patient)
        counts[label] += 1
    alone = sum(len(whose) == 1 for whose in owners.values())
    if len(owners) > MOST_NAMED or 2 * alone > len(owners):
        return None
    return dict(sorted(counts.items()))


def counts_in_words(counts: Mapping[str, int]) -> str:
    """-1.0 12, 0.0 100"""
    return ", ".join(f"{label} {count}" for label, count in counts.items())
