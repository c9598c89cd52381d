"""What a site is sent: only the groups it trains, and only what it cannot rebuild from the round before."""

from flwr.app import RecordDict

from server.global_state import GlobalState
from server.round_sum import layout_for
from unimiss_core.codec import Layout
from unimiss_core.objectives import has_teacher
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainRequest, with_ledger


class Requests:
    """The requests of one round. Sites that need the same bytes share them, so that memory does not grow with the
    number of sites."""

    def __init__(self, study: StudyConfig, run: str, layout: Layout, state: GlobalState) -> None:
        """state: after the round before."""
        self._study = study
        self._run = run
        self._layout = layout
        self._state = state
        self._has_teacher = has_teacher(study)
        self._packed: dict[tuple[frozenset[Rank], bool], RecordDict] = {}
        self._forgetful: set[str] = set()

    def holds_last(self, site: Introduction) -> bool:
        """Whether the site holds what the last round began with, as far as is known."""
        return site.site not in self._forgetful and self._state.taught.get(site.site) == self._state.round

    def note_loss(self, site: Introduction) -> None:
        """The site says that it does not hold it."""
        self._forgetful.add(site.site)

    def for_site(self, site: Introduction) -> RecordDict:
        """The content of its request: whole tensors where the site cannot rebuild them, and where its ledger was last
        seen. Before round 1 the teacher is the student."""
        content, head = self._shared(site), self._state.attendance.ledgers.get(site.site)
        return content if head is None else with_ledger(content, head)

    def _shared(self, site: Introduction) -> RecordDict:
        """By all sites that need the same."""
        state, release = self._state, self._state.release
        holds_last = self.holds_last(site)
        if (key := (site.ranks, holds_last)) not in self._packed:
            by_step = release.is_step and holds_last
            anew = release.is_step and not by_step  # whole students travel in another format then
            self._packed[key] = TrainRequest(
                study=self._study,
                run=self._run,
                round=state.round + 1,
                student=release.held() if anew else None,
                teacher=None if holds_last or state.round == 0 or not self._has_teacher else state.teacher,
                teacher_retention=state.retention,
            ).pack(
                layout_for(site.ranks, self._layout),
                {} if anew else {"student_step" if by_step else "student": release.payloads},
            )
        return self._packed[key]
