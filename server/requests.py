"""What a site is sent: only the groups it trains, and only what it cannot rebuild from the round before."""

from flwr.app import RecordDict

from server.global_state import GlobalState
from server.round_sum import layout_for
from unimiss_core.codec import Layout
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainRequest


class Requests:
    """The requests of one round. Sites that need the same bytes share them, so that memory does not grow with the
    number of sites."""

    def __init__(self, study: StudyConfig, layout: Layout, state: GlobalState) -> None:
        """state: after the round before."""
        self._study = study
        self._layout = layout
        self._state = state
        self._packed: dict[tuple[frozenset[Rank], bool], RecordDict] = {}

    def for_site(self, site: Introduction) -> RecordDict:
        """The content of its request: steps where `state.taught` says that the site holds what they start from, else
        whole tensors. Before round 1 the teacher is the student."""
        state, release = self._state, self._state.release
        holds_last = state.taught.get(site.site) == state.round
        if (key := (site.ranks, holds_last)) not in self._packed:
            step = release.step if holds_last else None
            self._packed[key] = TrainRequest(
                study=self._study,
                round=state.round + 1,
                student=release.student if step is None else None,
                student_step=step,
                teacher=None if holds_last or state.round == 0 else state.teacher,
                teacher_retention=state.retention,
            ).pack(layout_for(site.ranks, self._layout))
        return self._packed[key]
