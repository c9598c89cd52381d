"""One round: sites are asked, and their updates checked and folded in as they arrive."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from server.admission import admit
from server.coordinator_config import CoordinatorConfig
from server.exchange import Asked, Exchange, Reply, bytes_of, content_of, read_or_malformed, status_of
from server.global_state import GlobalState
from server.measured import measured
from server.quorum import too_few_updates
from server.requests import Requests
from server.roster import Roster
from server.round_sum import RoundSum, layout_for
from server.run_audit import RunAudit
from server.site_round import SiteRound
from server.slow_sites import SlowSites
from unimiss_core import progress
from unimiss_core.codec import Layout
from unimiss_core.collapse import signs_in_round
from unimiss_core.errors import WireError
from unimiss_core.groups import Group
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainReply, num_bytes

log = logging.getLogger(__name__)


class OneRound:
    """The round after `state`, in as many tries as it takes.

    layout, update_layout: what sites are sent, and what comes back of it (`unimiss_core.students`).
    lines: each site's line in the round's metrics. What counted in one try counts in the next; there, only others are
    asked.
    """

    def __init__(
        self,
        *,
        study: StudyConfig,
        run: str,
        config: CoordinatorConfig,
        layout: Layout,
        update_layout: Layout,
        roster: Roster,
        exchange: Exchange,
        slow: SlowSites,
        state: GlobalState,
        total: RoundSum,
        audit: RunAudit,
    ) -> None:
        self._study = study
        self._run = run
        self._digest = study.digest()
        self._patients_pay = study.privacy.mode == "patient"
        self._config = config
        self._layout = layout
        self._update_layout = update_layout
        self._roster = roster
        self._exchange = exchange
        self._slow = slow
        self._state = state
        self._round = state.round + 1
        self._requests = Requests(study, run, layout, state)
        self._total = total
        self._audit = audit
        self._taught: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        """Sites that were asked in this round, and the node that was last."""
        self._at_work_on: dict[str, int] = {}
        """Busy sites, and the earlier round of each."""
        self._sizes: list[float] = []
        self.lines: dict[str, SiteRound] = {}

    @property
    def counted(self) -> frozenset[str]:
        """The sites whose update is in the round's sum."""
        return frozenset(name for name, line in self.lines.items() if line.counts)

    def attempt(self, *, again: bool = False) -> tuple[GlobalState, dict[Group, float]]:
        """(state after the round, norm of what was added to each group of the student).

        again: an earlier try failed, so that nobody is set aside in this one. Raises TooFew: too few updates count.
        Then of the state only `attendance` has changed: who failed is remembered, until the run ends.
        """
        self._exchange.begin(self._round)
        self.lines = self._lines_of_try(again=again)
        self._ask_all()
        for asked, reply in self._exchange.replies(self._is_quorate):
            digest = self._audit.digest_of(reply)
            counts, reason = self._hear(asked, reply)
            self._audit.heard(
                digest,
                run=self._run,
                round=asked.round,
                site=asked.site.site,
                bytes=bytes_of(reply),
                reason=reason,
                counts=counts,
            )
            del reply  # as large as the model: not to be held while the next is pulled
        for name, line in self.lines.items():
            if deadline_passed := not line.reason and line.status == "absent":
                line.reason = "no_reply"
                self._tell(name, line)
            is_late = line.status != "refused" and line.reason in ("busy", "discounted")
            self._slow.note(name, self._round, late=deadline_passed or is_late)
            if line.bytes_down or line.counts:
                unanswered = line.reason == "no_reply"
                self._state.attendance.note(name, self._round, counted=line.counts, unanswered=unanswered)
        self._require_quorum()
        after, update_norm = self._total.applied_to(self._state, self._round)
        after.taught = self._state.taught | self._taught
        if self._study.aggregation.max_size_ratio is not None:  # else nobody asks, and no checkpoint tells
            after.attendance.note_sizes(self._round, self._sizes)
        return after, update_norm

    def _lines_of_try(self, *, again: bool) -> dict[str, SiteRound]:
        """One that has a reason from the start is not asked, nor is one that counted in an earlier try."""
        lines = self._lines_of_missing() | self._roster.unfit | self._lines_of_sites(again=again)
        for name, before in self.lines.items():
            if before.counts:
                lines[name] = before
            elif name in lines:
                lines[name].bytes_down, lines[name].bytes_up = before.bytes_down, before.bytes_up
            else:  # it left, but what it was sent was sent
                lines[name] = before
        return lines

    def _lines_of_missing(self) -> dict[str, SiteRound]:
        """Of sites that are registered or took part before; those that are there have lines in their stead."""
        missing = self._roster.registration.names | self._state.taught.keys()
        return {name: SiteRound("absent", "not_connected") for name in missing}

    def _lines_of_sites(self, *, again: bool) -> dict[str, SiteRound]:
        """Not asked: sites at work on an earlier round that may still count; and, in the first try, if there are
        others, those that keep failing, and, where patients pay for each answer, those whose last one is overdue:
        another would begin too late."""
        lines = {site.site: SiteRound(left_out=site.left_out) for site in self._roster.sites.values()}
        for name, round in self._sites_of(self._exchange.at_work):
            if round < self._round:
                lines[name].reason, self._at_work_on[name] = "busy", round
        free = [name for name, line in lines.items() if not line.reason]
        attendance, after = self._state.attendance, self._config.set_aside_after
        behind = dict(self._sites_of(self._exchange.too_late)) if self._patients_pay else {}
        aside = [
            name
            for name in free
            if name in behind or attendance.is_set_aside(name, self._round, after, patients_pay=self._patients_pay)
        ]
        if not again and len(free) - len(aside) >= self._config.min_replies:
            for name in aside:
                lines[name].reason = "busy" if name in behind else "set_aside"
            self._at_work_on |= behind
        return lines

    def _sites_of(self, rounds: Mapping[int, int]) -> Iterator[tuple[str, int]]:
        """rounds: by node; those of nodes that are not there any more are left out."""
        for node_id, round in rounds.items():
            if node_id in self._roster.sites:
                yield self._roster.sites[node_id].site, round

    def _ask_all(self) -> None:
        progress.report(progress.RoundStarted(self._round, self._study.schedule.rounds, tuple(self.lines)))
        for name, line in self.lines.items():
            if line.reason or line.counts:
                self._tell(name, line)
        at_work = self._exchange.at_work
        for node_id, site in self._roster.sites.items():
            line = self.lines[site.site]
            if not line.reason and not line.counts and node_id not in at_work:
                self._ask(node_id, site)

    def _ask(self, node_id: int, site: Introduction) -> None:
        self._state.attendance.meet_ledger(site.site, site.ledger)
        content, line = self._requests.for_site(site), self.lines[site.site]
        if self._exchange.ask(node_id, site, content):
            self._asked[site.site] = node_id
            line.bytes_down += (size := num_bytes(content))
            self._audit.asked(run=self._run, round=self._round, site=site.site, bytes=size)
            return
        line.reason = "no_reply"  # it left since it introduced itself
        self._tell(site.site, line)

    def _hear(self, asked: Asked, reply: Reply) -> tuple[bool, str]:
        """Fold the reply in where it may count; say in its site's line what became of it, and return whether it counts,
        and why not, or less."""
        site, left = asked.site, asked.node_id not in self._roster.sites
        line = self.lines.setdefault(site.site, SiteRound("absent", "not_connected"))
        if line.counts or self._asked.get(site.site, asked.node_id) != asked.node_id:
            return False, "stale_round"  # it came back as another node: one update of a site counts in a round
        try:
            answer = self._admitted(reply, site, asked.round, line)
        except WireError as error:
            if error.reason == "needs_whole" and asked.round == self._round and self._requests.holds_last(site):
                # It lost what it remembered. Once more, with whole tensors: no round is lost to a new disk.
                self._requests.note_loss(site)
                self._ask(asked.node_id, site)
                return False, error.reason
            if left and asked.round < self._round:
                return False, error.reason  # its line says already that it is not there
            line.status, line.reason = status_of(error.reason), error.reason
            log.warning("round=%d site=%s %s: %s", self._round, site.site, line.status, error)
            if error.reason == "too_large":  # how much so, only this side knows
                progress.report(progress.Note(f"{site.site}: {error.detail}"))
            self._roster.ask_again(asked.node_id)
        else:
            self._count(answer, line)
        self._tell(site.site, line)
        return line.counts, line.reason

    def _admitted(self, reply: Reply, site: Introduction, round: int, line: SiteRound) -> TrainReply:
        """The reply to the request of `round`, if it may count; `line` then says what it held. Raises WireError."""
        with read_or_malformed():
            content = content_of(reply)
            line.bytes_up += num_bytes(content)
            answer = TrainReply.unpack(content, layout_for(site.ranks, self._update_layout), self._study.wire.dtype)
            answer = replace(answer, update=measured(answer.update))
            self._roster.registration.check_counts(answer)
            size = admit(
                answer,
                asked=site,
                run=self._run,
                round=round,
                study=self._study,
                study_digest=self._digest,
                num_values=sum(spec.size for specs in layout_for(site.ranks, self._layout).values() for spec in specs),
                usual_size=self._state.attendance.usual_size(self._round),
            )
        self._sizes.append(size)
        self._state.attendance.note_ledger(site.site, answer.ledger)
        line.describe(answer)
        return answer

    def _count(self, answer: TrainReply, line: SiteRound) -> None:
        delay = self._round - answer.round
        if answer.seconds > 0:  # a private round does not tell
            self._slow.note_seconds(answer.site, answer.seconds)
        self._total.fold(answer, share=self._study.aggregation.late_weight**delay)
        self._taught[answer.site] = answer.round
        line.status, line.reason = ("late", "discounted") if delay else ("ok", "")
        self._warn_of_trouble(answer)

    def _tell(self, site: str, line: SiteRound) -> None:
        at_work_on = self._at_work_on.get(site) if line.reason == "busy" else None  # None: it says so, of another run
        progress.report(progress.SiteReplied(self._round, site, line.status, line.reason, at_work_on))

    def _warn_of_trouble(self, answer: TrainReply) -> None:
        """Of skipped batches and of collapse."""
        if skipped := answer.diagnostics.get("skipped_batches", 0.0):
            log.warning("round=%d site=%s skipped_batches=%g", answer.round, answer.site, skipped)
            progress.report(progress.Note(f"{answer.site}: {skipped:g} batches gave NaN or infinity and were skipped"))
        for sign in signs_in_round(self._study, answer.round, answer.diagnostics):
            log.warning("round=%d site=%s collapse: %s", answer.round, answer.site, sign)
            steps = answer.round * self._study.schedule.local_steps
            progress.report(progress.Collapsed(self._round, answer.site, sign, steps))

    def _is_quorate(self) -> bool:
        return len(self.counted) >= self._config.min_replies

    def _require_quorum(self) -> None:
        if not self._is_quorate():
            raise too_few_updates(self._round, self.lines, self._study, self._config)
