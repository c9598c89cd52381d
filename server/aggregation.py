"""Joining updates, one parameter group at a time.

For each group g:   new_g = old_g + sum_i w_ig delta_ig / sum_i w_ig,
where w_ig counts what site i trained of g. A group that nobody trained keeps its value exactly. Averaging all sites
over all tensors would instead shrink the 3D step by the 2D-only sites' share.
"""

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from unimiss_core.codec import Layout
from unimiss_core.groups import Group
from unimiss_core.scan import Rank

Weighting = Literal["uniform", "sqrt", "scans"]


def group_weights(scans: Mapping[Rank, int], groups: Collection[Group], weighting: Weighting) -> dict[Group, float]:
    """w_ig of one site: f(its volumes) for 3D tensors, f(its images and volumes) for all others it trained.

    A volume trains the 2D path too, by its slices. f is 1, the square root, or the count itself.
    """
    counts: dict[Group, int] = {group: scans[3] if group == "3d" else scans[2] + scans[3] for group in groups}
    if weighting == "uniform":
        return {group: float(count > 0) for group, count in counts.items()}
    return {group: math.sqrt(count) if weighting == "sqrt" else float(count) for group, count in counts.items()}


class WeightedMean:
    """The running weighted mean of updates, per group; memory does not grow with the number of sites.

    Sums are in float64, so that the order of arrival does not show after rounding to float32, but for rare last bits.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._weights: dict[Group, float] = {}
        self._sums: dict[str, Tensor] = {}

    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        """Add one site's update; `weights` names the groups that the site trained."""
        for group, weight in weights.items():
            if weight <= 0:
                continue
            self._weights[group] = self._weights.get(group, 0.0) + weight
            for spec in self._layout[group]:
                total = self._sums.setdefault(spec.name, torch.zeros(spec.shape, dtype=torch.float64))
                total.add_(update[spec.name].double(), alpha=weight)

    @property
    def weights(self) -> Mapping[Group, float]:
        """Total weight of each group that somebody trained."""
        return self._weights

    def result(self) -> dict[str, Tensor]:
        """name -> mean update, float32, for the tensors of the groups that somebody trained."""
        return {
            spec.name: (self._sums[spec.name] / weight).float()
            for group, weight in self._weights.items()
            for spec in self._layout[group]
        }


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all values together, summed in float64; nan or inf where a value is."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
