"""What loss terms are called, so that their names tell how to read them.

A *cross-entropy* is named by the representations that it compares. It is measured in nats, and log K, for K
prototypes, is its level for a model that tells nothing apart; of labels it is called `cross_entropy`. A
*reconstruction* is the mean squared error of intensities in [0, 1]. `dice` is 1 - Dice.
"""

import math
from collections.abc import Mapping
from statistics import fmean

CROSS_ENTROPY = "cross_entropy"
"""Of labels (`unimiss_core.supervised`)."""

DICE = "dice"

_RECONSTRUCTION = "_reconstruction"


def cross_entropy_name(student: str, teacher: str) -> str:
    """`volume` where both look the same way, else `slices_to_volume`: from the student's to the teacher's."""
    return student if student == teacher else f"{student}_to_{teacher}"


def reconstruction_name(representation: str) -> str:
    return representation + _RECONSTRUCTION


def is_reconstruction(name: str) -> bool:
    return name.endswith(_RECONSTRUCTION)


def mean_cross_entropy(terms: Mapping[str, float]) -> float:
    """The mean over the cross-entropies among `terms`; NaN where there is none.

    One number for people to watch: images, with one of them, and volumes, with three or four, show on one scale.
    """
    found = [value for name, value in terms.items() if not (is_reconstruction(name) or name == DICE)]
    return fmean(found) if found else math.nan
