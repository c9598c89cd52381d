"""The coordinator's loop: ask, fold in replies as they arrive, step, save; numbered for ever, resumable at any round.

Flower's `Strategy.start` always begins at round 1, ends the run when one reply is odd, and keeps all replies in
memory; so the loop is ours, over Flower's `Grid`.
"""

import errno
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from flwr.serverapp import Grid
from torch import Tensor

from server.aggregation import Aggregate
from server.beginning import first_student, is_taught
from server.coordinator_config import CoordinatorConfig
from server.exact_sum import SpareMemory
from server.exchange import Exchange, Reply, bytes_of
from server.global_state import GlobalState
from server.known_ledgers import KnownLedgers, furthest
from server.one_round import OneRound
from server.quorum import TooFew
from server.released_rounds import record_of
from server.roster import Roster
from server.round_sum import RoundSum
from server.rules import opened_aggregate
from server.run_audit import RunAudit
from server.run_folder import folder_of
from server.site_level import check_site_level, what_it_is_worth, who_is_believed
from server.site_round import SiteRound, round_s
from server.slow_sites import SlowSites
from server.task_release import release_model
from server.validation import Best, best_in, figure_of
from unimiss_core import progress
from unimiss_core.adaptation import check_adaptation
from unimiss_core.errors import AuditDiskError, PrivacyBudgetError, RoundError, RunFolderError, where
from unimiss_core.groups import Group
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.students import travelling_layout, update_layout
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello

log = logging.getLogger(__name__)


class Probe(Protocol):
    """What tells how good a teacher is."""

    def __call__(self, teacher: Mapping[str, Tensor], *, is_last: bool) -> Mapping[str, Any]:
        """Figures by task. is_last: of the last round's teacher, which the report shows."""


class Federation:
    """One study, run over a grid of sites, into one folder.

    probe: measures the last round's teacher, and others as the config says; its figures stand in the round's metrics.
    report: writes the report of a run's folder, while no other coordinator is at work in it.
    """

    def __init__(
        self,
        grid: Grid,
        study: StudyConfig,
        config: CoordinatorConfig,
        probe: Probe | None = None,
        report: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """Raises ConfigError: the study promises a privacy that this coordinator would not keep, or a registered key or
        the signing key cannot be read."""
        check_site_level(study, config)
        self._study = study
        self._config = config
        self._folder = folder_of(config)
        self._record = record_of(config.out, study)
        self._ledgers = KnownLedgers(config.ledgers)
        self._layout = travelling_layout(study)
        self._update_layout = update_layout(study)
        self._roster = Roster(grid, config, self._note_refused)
        late_count = study.aggregation.late_weight > 0
        self._exchange = Exchange(grid, deadline_s=config.deadline_s, late_count=late_count)
        self._slow = SlowSites(config.deadline_s)
        self._spare = SpareMemory()
        self._audit = RunAudit(self._folder.audit, study.digest())
        self._probe = probe
        self._report = report

    def run(self, *, resume: bool = False) -> GlobalState:
        """All rounds that are not done yet; the state after the last.

        Raises ConfigError (the folder is not this run's, or another coordinator is at work in it), CheckpointError, and
        RoundError where too few sites came, or too few replied in all tries of a round: what was finished is saved, and
        a resumed run goes on from there. PrivacyBudgetError: under site-level privacy, rounds were released so often
        that another would cost sites more than the study promises.
        """
        with self._as_config_error(), self._folder.alone():
            try:
                state = self._to_the_last_round(resume=resume)
            finally:
                is_reported = self._write_report()
            if is_reported:
                self._folder.note_finished(state.round)
        return state

    def _to_the_last_round(self, *, resume: bool) -> GlobalState:
        state = self._restore_or_start(resume=resume)
        self._recall_ledgers(state)
        if state.round == 0 and self._study.task == "pretrain":
            check_adaptation(self._folder.load(0))
        self._tell_of_site_level()
        self._probe_where_due(state)
        hello = Hello(self._study, self._folder.run)
        while state.round < self._study.schedule.rounds:
            state = self._next_round(state, hello)
        release_model(self._folder, self._study, round=state.round, from_start=self._config.start is not None)
        if (best := self._best()) is not None:
            held = self._folder.checkpoint_of(best.round)
            where = held if held.is_dir() else "its checkpoint is gone, as where the run went back to an earlier one"
            progress.report(progress.Note(f"{best.in_words()}: {where}"))
        return state

    def _tell_of_site_level(self) -> None:
        for told in (what_it_is_worth(self._study, self._update_layout), who_is_believed(self._study, self._config)):
            if told is not None:
                progress.report(progress.Note(told))

    def _next_round(self, state: GlobalState, hello: Hello) -> GlobalState:
        """The state after another round, which is saved."""
        with opened_aggregate(self._study, self._update_layout, self._folder.scratch, self._spare) as aggregate:
            work = self._round_after(state, aggregate)
            with self._stop_noted(work, state.round + 1):
                if self._record is not None:
                    self._record.require_budget(state.round + 1)
                after, update_norm, took = self._completed(work, state.round + 1, hello)
                self._audit.settle()
        self._close(after, update_norm, work.lines, took)
        self._probe_where_due(after)
        return after

    def _completed(self, work: OneRound, round: int, hello: Hello) -> tuple[GlobalState, dict[Group, float], float]:
        """What a round came to in the first or a further try, and the seconds since its first request. TooFew."""
        pause_s = self._config.retry_s
        least = self._config.min_sites if round == 1 else self._config.min_replies
        began = None
        for tried in range(self._config.round_tries):
            try:
                self._roster.gather(hello, least=least, counted=work.counted)
                began = began or time.monotonic()
                return *work.attempt(again=tried > 0), time.monotonic() - began
            except TooFew as error:
                if error.lasting or tried == self._config.round_tries - 1:
                    raise
                log.warning("%s; trying again in %g s", str(error).splitlines()[0], pause_s)
                when = f"in {pause_s:g} s" if pause_s else "at once"
                told = f"round {round} is tried again {when}: too few sites or updates"
                progress.report(progress.Note(told))
            time.sleep(pause_s)
            pause_s *= 2
        raise AssertionError  # round_tries is at least 1

    @contextmanager
    def _as_config_error(self) -> Iterator[None]:
        """The folder's OSErrors, with the way out; not those of the network. Where the disk has no room for a line of
        the audit log, the run may be gone on with, too."""
        try:
            yield
        except AuditDiskError as error:
            error.resumes = True  # of an `init`, say, that is not true
            raise
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            mend = "make room" if error.errno == errno.ENOSPC else "mend that"
            raise RunFolderError(
                f"{self._folder.path}: cannot be written to: {error.strerror or type(error).__name__}; {mend}, then "
                "resume: what was finished is saved"
            ) from None

    @contextmanager
    def _stop_noted(self, work: OneRound, round: int) -> Iterator[None]:
        """Where the round ends the run: keep why, and how each site stood, for the report."""
        try:
            yield
        except (RoundError, PrivacyBudgetError, KeyboardInterrupt) as error:
            sites = {name: vars(line) for name, line in (self._roster.lines | work.lines).items()}
            told = str(error) or "it was interrupted"
            with suppress(OSError):  # the disk may be full; what ended the run must be told all the same
                self._folder.note_stop({"round": round, "error": told, "sites": sites})
            raise

    def _write_report(self) -> bool:
        """However the run ends; whether it could be. A report that fails hides no other failure."""
        try:
            if (self._folder.path / "study.yaml").exists():  # else it is no run's
                self._report(self._folder.path)
        except OSError as error:
            log.error("the report could not be written: %s", where(error))
            progress.report(progress.Note("the report could not be written; what was finished is saved"))
            return False
        return True

    def _restore_or_start(self, *, resume: bool) -> GlobalState:
        if (found := self._folder.begin(self._study, resume=resume)) is not None:
            progress.report(progress.Note(f"resuming after round {found.manifest.round}"))
            self._note_release_gone_on_with(found.manifest.round)
            return GlobalState.restored(found, self._study, self._layout)
        if resume:
            progress.report(progress.Note("there was no finished round to resume: a new run begins"))
        if (told := _untrained_for_ever(self._study, self._config)) is not None:
            progress.report(progress.Note(told))
        state = GlobalState.initial(first_student(self._study, self._config), self._study, self._layout)
        taught = None if self._config.start is None else is_taught(self._config)
        self._folder.note_start(taught_by_labels=taught)
        state.save(self._folder, self._study)
        return state

    def _recall_ledgers(self, state: GlobalState) -> None:
        """What this run's checkpoint and all other runs know of them, but of those that were begun anew."""
        forgotten, own = self._config.forget_ledgers, state.attendance.ledgers
        for site in forgotten:
            own.pop(site, None)
        self._ledgers.note(own, forgotten=forgotten)
        own.update(furthest(own, self._ledgers.read()))

    def _note_release_gone_on_with(self, round: int) -> None:
        if round > 0:
            self._audit.gone_on_with(run=self._folder.run, round=round, manifest=self._folder.manifest_of(round))

    def _note_refused(self, site: str, introduction: Reply, reason: str) -> None:
        """In the run's audit log, where an introduction is of round 0."""
        self._audit.heard(
            self._audit.digest_of(introduction),
            run=self._folder.run,
            round=0,
            site=site,
            bytes=bytes_of(introduction),
            reason=reason,
            counts=False,
        )

    def _round_after(self, state: GlobalState, aggregate: Aggregate) -> OneRound:
        return OneRound(
            study=self._study,
            run=self._folder.run,
            config=self._config,
            layout=self._layout,
            update_layout=self._update_layout,
            roster=self._roster,
            exchange=self._exchange,
            slow=self._slow,
            state=state,
            total=RoundSum(self._study, aggregate),
            audit=self._audit,
        )

    def _best(self) -> Best | None:
        """By what sites measured so far; None where the study holds out nobody."""
        figure = figure_of(self._study)
        return None if figure is None else best_in(self._folder.metric_rows(), figure)

    def _probe_where_due(self, state: GlobalState) -> None:
        """Measure the teacher of a finished round, where that is due and not done yet: a round whose probe fails, or is
        cut off, is not lost for that, and a run that is gone on with makes up for the newest one."""
        rounds = self._study.schedule.rounds
        if self._probe is None or not self._config.is_probed(state.round, rounds):
            return
        if not any(row["round"] == state.round and "probe" not in row["global"] for row in self._folder.metric_rows()):
            return  # the initial weights have no line
        try:
            figures = self._probe(state.teacher, is_last=state.round == rounds)
            self._folder.add_to_metrics(state.round, {"probe": figures})
        except Exception as error:
            log.error("the probe failed: %s", where(error))
            progress.report(
                progress.Note(f"the probe of round {state.round} failed; the log says where. Nothing is lost")
            )

    def _close(
        self, state: GlobalState, update_norm: Mapping[Group, float], lines: Mapping[str, SiteRound], took: float
    ) -> None:
        """Write the round's checkpoint and metrics; from here on it is done.

        Under site-level privacy it is counted as released before anybody can see anything of it, and after the disk has
        taken its checkpoint: a disk that is full costs nothing.
        """
        row: dict[str, Any] = {
            "round": state.round,
            "seconds": round_s(took),
            "sites": {name: vars(line) for name, line in sorted(lines.items())},
            "global": {"update_norm": update_norm},
        }

        def count_and_tell() -> None:
            if self._record is not None:
                self._record.note(state.round)
                row["global"]["site_epsilon"] = self._record.epsilon()
            self._folder.append_metrics(row)

        state.save(self._folder, self._study, before=count_and_tell)
        self._ledgers.note(state.attendance.ledgers)
        self._audit.released(run=self._folder.run, round=state.round, manifest=self._folder.manifest_of(state.round))
        best = self._best()
        self._folder.prune_checkpoints(state.round, self._config.keep_checkpoints, best=best.round if best else None)
        means = {name: mean_cross_entropy(line.losses) for name, line in lines.items()}
        losses = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        progress.report(progress.RoundDone(state.round, self._study.schedule.rounds, took, losses))


def _untrained_for_ever(study: StudyConfig, config: CoordinatorConfig) -> str | None:
    """A warning for whoever begins a study that trains a part of the model from no start: the rest is random."""
    privacy = study.privacy
    if config.start is not None or privacy.mode != "patient" or privacy.trained == "all":
        return None
    alone = privacy.trained.replace("_", " ")
    return (
        f"WARNING: study '{study.name}' trains {alone} alone (privacy.trained), and the run begins from random "
        "weights: all others stay random, patients pay all the same, and nothing useful can come of it. Stop it, and "
        f"give the {config.file_in_words} a `start:`, a checkpoint of this model that was trained on public scans "
        "(docs/federation.md, 'What a run begins from')"
    )
