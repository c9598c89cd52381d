"""How many scans are of each label, for screens and reports; and when none is named, for labels may be patients."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

MOST_NAMED = 20
"""Labels that are told by name; more are counted."""


def of_one_patient(labels: Iterable[str], patients: Iterable[str]) -> int:
    """Labels that one patient alone has."""
    owners: dict[str, set[str]] = defaultdict(set)
    for label, patient in zip(labels, patients, strict=True):
        owners[label].add(patient)
    return sum(len(whose) == 1 for whose in owners.values())


def class_counts(labels: Iterable[str], patients: Iterable[str]) -> dict[str, int] | None:
    """Label -> scans, in their order as texts. None where there are too many to name, or most are of one patient each:
    then it may be that they are patients."""
    counts = Counter(labels := list(labels))
    if len(counts) > MOST_NAMED or 2 * of_one_patient(labels, patients) > len(counts):
        return None
    return dict(sorted(counts.items()))


def counts_in_words(counts: Mapping[str, int]) -> str:
    """-1.0 12, 0.0 100"""
    return ", ".join(f"{label} {count}" for label, count in counts.items())
