"""Rules under which a few hostile or broken sites cannot lead the others astray, one parameter group at a time.

`Trimmed` (median, trimmed mean) compares the sites coordinate by coordinate, so it needs all updates side by side;
what has come is spilled to files (`server.spill`) and read back in stripes of coordinates, so that memory stays flat.
In a round of n sites that costs 4 n bytes of disk for each parameter, written once and read once, and the time to
sort n values for each parameter. In both each site counts 1, however many scans it claims, because a claim costs
nothing: weights would sell a hostile site as many votes as it likes.

`NormBoundedMean` lets every site count by its weight, but only as far as the bound: a site moves the result by no more
than its share of the weights times the bound. Under `weighting: scans` that share is the site's own claim.
"""

import math
from collections.abc import Callable, Mapping
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from server.aggregation import GroupwiseAggregate, WeightedMean, group_norm, shortened
from server.spill import Spill
from unimiss_core.codec import Layout, split
from unimiss_core.groups import Group

_STRIPE = 2**21
"""Values of a stripe, over all sites: 8 MB."""


class Trimmed(GroupwiseAggregate):
    """Each coordinate's mean over the sites, without the `cut(n)` largest and smallest of its n values."""

    def __init__(self, layout: Layout, spill: Spill, cut: Callable[[int], int]) -> None:
        self._layout = layout
        self._spill = spill
        self._cut = cut

    def add(self, group: Group, update: Mapping[str, Tensor], weight: float) -> None:  # noqa: ARG002 - each counts 1
        self._spill.write(group, update)

    def result(self) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        for group in self._spill.groups:
            joined |= split(self._joined(group), self._layout[group])
        return joined

    def _joined(self, group: Group) -> Tensor:
        """The group's tensors end to end."""
        n, size = self._spill.count(group), sum(spec.size for spec in self._layout[group])
        cut, width = self._cut(n), max(1, _STRIPE // n)
        flat = torch.empty(size)
        for start in range(0, size, width):
            ordered = np.sort(self._spill.stripe(group, start, min(start + width, size)), axis=1)
            kept = ordered[:, cut : n - cut].mean(axis=1, dtype=np.float64)
            flat[start : start + width] = torch.from_numpy(kept)
        return flat


def median_cut(n: int) -> int:
    """What leaves the middle value, or the middle two.

    Coordinate-wise median: Yin et al. 2018 (arXiv:1803.01498), definition 1. Less than half of the sites can do no more
    than choose among what the others say.
    """
    return (n - 1) // 2


def trimmed_cut(n: int, share: float) -> int:
    """`share` of n, rounded up, but never so much that nothing is left.

    Coordinate-wise trimmed mean: Yin et al. 2018 (arXiv:1803.01498), definition 2. Rounded up, so that a share of 0.2
    does not mean none among four sites.
    """
    return min(median_cut(n), math.ceil(share * n - 1e-9))


class NormBoundedMean(GroupwiseAggregate):
    """The weighted mean of min(1, B / |delta_ig|) delta_ig with one bound B for the whole study.

    Norm thresholding: Sun et al. 2019 (arXiv:1911.07963). Folded in as updates come, nothing is kept.
    """

    def __init__(self, layout: Layout, mean: WeightedMean, bound: float) -> None:
        self._layout = layout
        self._mean = mean
        self._bound = bound

    def add(self, group: Group, update: Mapping[str, Tensor], weight: float) -> None:
        size = group_norm(update, self._layout[group])
        self._mean.add(group, update, weight, scale=shortened(size, self._bound))

    def result(self) -> dict[str, Tensor]:
        return self._mean.result()


class MedianBoundedMean(GroupwiseAggregate):
    """The same, with B = `times` the median of this round's norms of the group: the adaptive clipping of FLAME (Nguyen
    et al. 2022, arXiv:2101.02281), without its clustering and noise.

    Nobody knows beforehand how long an update is: that follows the learning rate's schedule and differs tenfold between
    groups. The median of the round itself fits every round from the first on, and less than half of the sites cannot
    lead it beyond the norms of the others; of an even number it is the lower middle one, for the same reason. The price
    is that the bound is known only when all have come: until then updates lie on disk, 4 bytes for each parameter and
    site, written once and read once. The bound of an earlier round would save that, but would be wrong in the warm-up,
    missing in the first round, and hostile sites could lead it on from round to round.
    """

    def __init__(self, layout: Layout, mean: WeightedMean, spill: Spill, times: float) -> None:
        self._layout = layout
        self._mean = mean
        self._spill = spill
        self._times = times
        self._seen: dict[Group, list[tuple[float, float]]] = {}
        """(norm, weight) in the order of the spill."""

    def add(self, group: Group, update: Mapping[str, Tensor], weight: float) -> None:
        self._spill.write(group, update)
        self._seen.setdefault(group, []).append((group_norm(update, self._layout[group]), weight))

    def result(self) -> dict[str, Tensor]:
        for group, seen in self._seen.items():
            bound = self._times * median_low([size for size, _ in seen])
            for index, (size, weight) in enumerate(seen):
                self._mean.add(group, self._spill.read(group, index), weight, scale=shortened(size, bound))
        return self._mean.result()
