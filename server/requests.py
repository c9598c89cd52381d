"""What a site is sent: only the groups it trains, and only what it cannot rebuild from the round before."""

from flwr.app import RecordDict

from server.global_state import GlobalState
from server.round_sum import layout_for
from unimiss_core.codec import Layout, released
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainRequest


class Requests:
    """The requests of one round. Sites that need the same bytes share them, so that memory does not grow with the
    number of sites."""

    def __init__(self, study: StudyConfig, run: str, layout: Layout, state: GlobalState) -> None:
        """state: after the round before."""
        self._study = study
        self._run = run
        self._layout = layout
        self._state = state
        self._packed: dict[tuple[frozenset[Rank], bool], RecordDict] = {}

    def holds_teacher(self, site: Introduction) -> bool:
        """Whether the site can rebuild the teacher from what it holds, as far as the coordinator knows."""
        return self._state.round == 0 or self._state.taught.get(site.site) == self._state.round

    def for_site(self, site: Introduction, *, with_teacher: bool = False) -> RecordDict:
        """The content of its request; with the teacher where asked, or where the site cannot rebuild it."""
        state = self._state
        holds_teacher = self.holds_teacher(site) and not with_teacher
        if (key := (site.ranks, holds_teacher)) not in self._packed:
            self._packed[key] = TrainRequest(
                study=self._study,
                run=self._run,
                round=state.round + 1,
                student=released(state.student, self._study.wire.dtype),
                teacher=None if holds_teacher else state.teacher,
                teacher_retention=state.retention,
            ).pack(layout_for(site.ranks, self._layout))
        return self._packed[key]
