"""The coordinator's loop: ask, fold in replies as they arrive, step, save; numbered for ever, resumable at any round.

Flower's `Strategy.start` always begins at round 1, ends the run when one reply is odd, and keeps all replies in
memory; so the loop is ours, over Flower's `Grid`.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from server.admission import admit
from server.aggregation import norm
from server.coordinator_config import CoordinatorConfig
from server.exchange import Exchange, content_of, status_of
from server.global_state import GlobalState
from server.requests import Requests
from server.roster import Roster
from server.round_sum import RoundSum, layout_for
from server.run_folder import RunFolder
from server.site_round import SiteRound
from unimiss_core import progress
from unimiss_core.codec import layout_of
from unimiss_core.collapse import signs_of_collapse
from unimiss_core.errors import RoundError, WireError
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.network import build_network
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainReply, num_bytes

log = logging.getLogger(__name__)

Probe = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
"""The teacher's tensors -> figures by task."""


class Federation:
    """One study, run over a grid of sites, into one folder.

    probe: measures the last round's teacher; its figures stand in that round's metrics.
    """

    def __init__(
        self,
        grid: Grid,
        study: StudyConfig,
        config: CoordinatorConfig,
        probe: Probe | None = None,
    ) -> None:
        self._grid = grid
        self._study = study
        self._digest = study.digest()
        self._config = config
        self._folder = RunFolder(config.out)
        network = build_network(study.model, seed=study.seed)
        self._layout = layout_of(network)
        self._initial = {name: parameter.detach() for name, parameter in network.named_parameters()}
        self._roster = Roster(grid, study, config)
        self._probe = probe

    def run(self, *, resume: bool = False) -> GlobalState:
        """All rounds that are not done yet; the state after the last.

        Raises ConfigError (the folder is not this run's), CheckpointError, and RoundError where too few sites came or
        replied: what was finished is saved, and a resumed run goes on from there.
        """
        state = self._restore_or_start(resume=resume)
        for round in range(state.round + 1, self._study.schedule.rounds + 1):
            self._roster.gather()
            state = self._run_round(state, round)
        return state

    def _restore_or_start(self, *, resume: bool) -> GlobalState:
        if (found := self._folder.begin(self._study, resume=resume)) is not None:
            progress.report(progress.Note(f"resuming after round {found.manifest.round}"))
            return GlobalState.restored(found, self._study, self._layout)
        state = GlobalState.initial(self._initial, self._study, self._layout)
        state.save(self._folder, self._study)
        return state

    # -- one round --------------------------------------------------------------------------------------------------

    def _run_round(self, state: GlobalState, round: int) -> GlobalState:
        began = time.monotonic()
        rounds, roster = self._study.schedule.rounds, self._roster
        lines = {**roster.unfit, **{site.site: SiteRound(left_out=site.left_out) for site in roster.sites.values()}}
        progress.report(progress.RoundStarted(round, rounds, tuple(lines)))
        for name, unfit in roster.unfit.items():
            progress.report(progress.SiteReplied(round, name, unfit.status, unfit.reason))
        requests = Requests(self._study, self._layout, state)
        total = RoundSum(self._study, self._layout)
        exchange = Exchange(self._grid, self._config.deadline_s)
        for node_id, site in roster.sites.items():
            self._ask(exchange, node_id, requests.for_site(site), round, lines[site.site])
        for node_id, reply in exchange:
            site = roster.sites[node_id]
            line = lines[site.site]
            try:
                answer = self._admitted(reply, site, round, line)
            except WireError as error:
                if error.reason == "needs_whole" and state.taught.pop(site.site, None) is not None:
                    # It lost what it remembered. Once more, with whole tensors: no round is lost to a new disk.
                    self._ask(exchange, node_id, requests.for_site(site), round, line)
                    continue
                line.status, line.reason = status_of(error.reason), error.reason
                log.warning("round=%d site=%s %s: %s", round, site.site, line.status, error)
                roster.ask_again(node_id)
            else:
                total.fold(answer)
                state.taught[site.site] = round
                self._warn_of_trouble(answer)
            progress.report(progress.SiteReplied(round, site.site, line.status, line.reason))
        self._require_quorum(round, lines)
        after, step = total.applied_to(state, round)
        self._close(after, step, lines, time.monotonic() - began)
        return after

    def _ask(self, exchange: Exchange, node_id: int, content: RecordDict, round: int, line: SiteRound) -> None:
        line.bytes_down += num_bytes(content)
        exchange.ask(node_id, Message(content, node_id, "train", ttl=self._config.deadline_s, group_id=str(round)))

    def _admitted(self, reply: Message, site: Introduction, round: int, line: SiteRound) -> TrainReply:
        """The reply, if it may count; `line` then says what it held. Raises WireError."""
        content = content_of(reply)
        line.bytes_up = num_bytes(content)
        try:
            answer = TrainReply.unpack(content, layout_for(site.ranks, self._layout), self._study.wire.dtype)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
            raise WireError("malformed", "the reply cannot be read") from None
        admit(answer, asked=site, round=round, study=self._study, study_digest=self._digest)
        line.status = "ok"
        line.scans = {f"{rank}d": count for rank, count in answer.scans.items()}
        line.steps = answer.steps
        line.losses = dict(answer.losses)
        line.diagnostics = dict(answer.diagnostics)
        line.seconds = round_s(answer.seconds)
        return answer

    def _warn_of_trouble(self, answer: TrainReply) -> None:
        """Of skipped batches; and of collapse, but only after the warm-up: a young network's targets are alike too."""
        if skipped := answer.diagnostics.get("skipped_batches", 0.0):
            log.warning("round=%d site=%s skipped_batches=%g", answer.round, answer.site, skipped)
            progress.report(progress.Note(f"{answer.site}: {skipped:g} batches gave NaN or infinity and were skipped"))
        if answer.round * self._study.schedule.local_steps <= self._study.optimiser.warmup_steps:
            return
        for sign in signs_of_collapse(answer.diagnostics, self._study.model.prototypes):
            log.warning("round=%d site=%s collapse: %s", answer.round, answer.site, sign)
            progress.report(progress.Note(f"{answer.site}: {sign}"))

    def _require_quorum(self, round: int, lines: Mapping[str, SiteRound]) -> None:
        if (counted := sum(line.status == "ok" for line in lines.values())) >= self._config.min_replies:
            return
        told = "; ".join(f"{name}: {line.status} {line.reason}".rstrip() for name, line in sorted(lines.items()))
        raise RoundError(
            f"round {round} could not be completed: {counted} of at least {self._config.min_replies} updates count "
            f"({told}). Mend the sites, then resume; rounds up to {round - 1} are saved"
        )

    def _close(
        self, state: GlobalState, step: Mapping[str, Tensor], lines: Mapping[str, SiteRound], took: float
    ) -> None:
        """Write the round's metrics, then its checkpoint; from here on it is done."""
        update_norm = {
            group: norm({spec.name: step[spec.name] for spec in specs if spec.name in step})
            for group, specs in self._layout.items()
        }
        row: dict[str, Any] = {
            "round": state.round,
            "seconds": round_s(took),
            "sites": {name: vars(line) for name, line in sorted(lines.items())},
            "global": {"update_norm": update_norm},
        }
        if self._probe is not None and state.round == self._study.schedule.rounds:
            row["global"]["probe"] = self._probe(state.teacher)
        self._folder.append_metrics(row)
        state.save(self._folder, self._study)
        self._folder.prune_checkpoints(state.round, self._config.keep_checkpoints)
        means = {name: mean_cross_entropy(line.losses) for name, line in lines.items()}
        losses = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        progress.report(progress.RoundDone(state.round, self._study.schedule.rounds, took, losses))


def round_s(seconds: float) -> float:
    """Seconds as they stand in the metrics: to the millisecond."""
    return round(seconds, 3)
