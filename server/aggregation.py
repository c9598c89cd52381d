"""Joining updates, one parameter group at a time.

For each group g:   new_g = old_g + optimiser(rule over the sites i that trained g of (delta_ig, w_ig)),
where w_ig counts what site i trained of g. A group that nobody trained keeps its value exactly. Averaging all sites
over all tensors would instead shrink the 3D step by the 2D-only sites' share.

This file holds the weights, `Aggregate`, which every rule is, and the mean; `server.robust` the rules that
bound what a hostile site can do, `server.site_level` the mean that hides any one site, `server.optimisers` what is made
of the result.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from torch import Tensor

from server.exact_sum import ExactSum, SpareMemory
from server.measured import measured
from unimiss_core.codec import Layout, TensorSpec
from unimiss_core.groups import Group
from unimiss_core.scan import Rank
from unimiss_core.study import AggregationConfig

Weighting = Literal["uniform", "sqrt", "scans"]


class Aggregate(ABC):
    """A rule at work in one round: every admitted update is folded in, then the result is taken, once."""

    @abstractmethod
    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        """Add one site's update, of any float type and finite. `weights`: w_ig of the groups that it trained; 0 is as
        if it had not trained the group."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """name -> what the sites' updates amount to, float32; a tensor that is not named stays as it is."""


class GroupwiseAggregate(Aggregate):
    """A rule that joins each group by itself; a group that nobody trained is not in its result."""

    def fold(self, update: Mapping[str, Tensor], weights: Mapping[Group, float]) -> None:
        for group, weight in weights.items():
            if weight > 0:
                self.add(group, update, weight)

    @abstractmethod
    def add(self, group: Group, update: Mapping[str, Tensor], weight: float) -> None:
        """Count the update's tensors of one group with this weight, which is above zero."""


def group_weights(scans: Mapping[Rank, int], groups: Collection[Group], weighting: Weighting) -> dict[Group, float]:
    """w_ig of one site: f(its volumes) for 3D tensors, f(its images and volumes) for all others it trained.

    A volume trains the 2D path too, by its slices. f is 1, the square root, or the count itself.
    """
    counts: dict[Group, int] = {group: scans[3] if group == "3d" else scans[2] + scans[3] for group in groups}
    if weighting == "uniform":
        return {group: float(count > 0) for group, count in counts.items()}
    return {group: math.sqrt(count) if weighting == "sqrt" else float(count) for group, count in counts.items()}


def largest_product(config: AggregationConfig) -> float:
    """Bound on |w_ig * value| over all updates that can be admitted; a study is refused above LARGEST_SUMMAND."""
    (weight,) = group_weights({2: config.max_scans, 3: 0}, ["2d"], config.weighting).values()
    return config.max_update_norm * weight


class WeightedMean(GroupwiseAggregate):
    """sum_i w_ig delta_ig / sum_i w_ig for each group, folded in as updates come: FedAvg (McMahan et al. 2017,
    arXiv:1602.05629, algorithm 1) on updates instead of models.

    Memory is 8 bytes for each parameter, and again for each size of update there is, however many sites there are; the
    result is the same to its last bit in whatever order they come (`server.exact_sum`). One site alone gives its own
    update.

    largest: see `largest_product`. spare: of earlier rounds.
    """

    def __init__(self, layout: Layout, *, largest: float, spare: SpareMemory | None = None) -> None:
        self._layout = layout
        self._weights: dict[Group, list[float]] = {}
        self._sums = ExactSum(largest, spare)

    def add(self, group: Group, update: Mapping[str, Tensor], weight: float, *, scale: float = 1.0) -> None:
        """scale: of the tensors, which count that many times."""
        self._weights.setdefault(group, []).append(weight)
        self._sums.add(measured(update, [spec.name for spec in self._layout[group]]), weight * scale)

    def result(self) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        for group, weights in self._weights.items():
            total = math.fsum(weights)
            joined |= {spec.name: self._sums.take(spec.name, total).view(spec.shape) for spec in self._layout[group]}
        return joined


def norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm of all values together, summed in float64; nan or inf where a value is."""
    return measured(tensors).norm()


def shortened(size: float, bound: float) -> float:
    """What an update of this norm is multiplied by, to be no longer than the bound."""
    return 1.0 if size <= bound else bound / size


def group_norm(update: Mapping[str, Tensor], specs: Iterable[TensorSpec]) -> float:
    """`norm` of an update's tensors of one group; 0 for those that it does not hold."""
    return measured(update, [spec.name for spec in specs if spec.name in update]).norm()
