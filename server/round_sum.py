"""From the updates of a round to the next global student and teacher."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from server.aggregation import WeightedMean, group_weights
from server.global_state import GlobalState
from server.release import Release
from unimiss_core.codec import Layout
from unimiss_core.groups import GROUPS, Group, group_of, groups_of_ranks
from unimiss_core.scan import RANKS, Rank
from unimiss_core.schedule import teacher_retention, trained_steps
from unimiss_core.study import StudyConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import TrainReply


def layout_for(ranks: frozenset[Rank], layout: Layout) -> Layout:
    """The part of a network's layout that a site with scans of `ranks` receives and sends."""
    return {group: layout[group] for group in GROUPS if group in groups_of_ranks(ranks)}


class RoundSum:
    """The admitted updates of one round, folded in as they arrive."""

    def __init__(self, study: StudyConfig, layout: Layout) -> None:
        self._study = study
        self._layout = layout
        self._mean = WeightedMean(layout)
        self._retention = _MeanRetention()

    def fold(self, answer: TrainReply, *, share: float = 1.0) -> None:
        """Add one site's update, by what the site trained of each group in its round.

        share: of its weight; less than 1 for an update that comes late.
        """
        study = self._study
        ranks = frozenset(rank for rank in RANKS if answer.scans[rank] > 0)
        trained = trained_steps(ranks, study.schedule, answer.round)
        groups = [group for group, steps in trained.items() if steps > 0]
        whole = group_weights(answer.scans, groups, study.aggregation.weighting)
        weights = {group: share * weight for group, weight in whole.items()}
        self._mean.fold(answer.update, weights)
        self._retention.fold(weights, teacher_retention(study, ranks, answer.round))

    def applied_to(self, state: GlobalState, round: int) -> tuple[GlobalState, dict[str, Tensor]]:
        """(state after the round, what was added to the student). Groups that nobody trained keep their bits."""
        step = self._mean.result()
        student = {name: tensor + step[name] if name in step else tensor for name, tensor in state.student.items()}
        dtype = self._study.wire.dtype
        release = Release.of(student, before=state.release.student, layout=self._layout, dtype=dtype)
        left = self._retention.result()
        teacher = advance_teacher(state.teacher, release.student, {name: left[group_of(name)] for name in student})
        return replace(state, round=round, student=student, release=release, teacher=teacher, retention=left), step


class _MeanRetention:
    """What is left of the global teacher in a round: per group the weighted mean over the sites' steps.

    Site i's teacher ends a round at m_i T + (1 - m_i) S, so the mean of the sites' teachers has m = mean of m_i.
    """

    def __init__(self) -> None:
        self._weights: dict[Group, float] = {}
        self._sums: dict[Group, float] = {}

    def fold(self, weights: Mapping[Group, float], retention: Mapping[Group, float]) -> None:
        for group, weight in weights.items():
            self._weights[group] = self._weights.get(group, 0.0) + weight
            self._sums[group] = self._sums.get(group, 0.0) + weight * retention[group]

    def result(self) -> dict[Group, float]:
        """1 - the teacher stays - for a group that nobody trained."""
        return {
            group: self._sums[group] / self._weights[group] if self._weights.get(group, 0.0) > 0 else 1.0
            for group in GROUPS
        }
