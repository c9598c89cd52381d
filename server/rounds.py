"""The coordinator's loop: ask, fold in replies as they arrive, step, save; numbered for ever, resumable at any round.

Flower's `Strategy.start` always begins at round 1, ends the run when one reply is odd, and keeps all replies in
memory; so the loop is ours, over Flower's `Grid`.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from server.admission import admit
from server.aggregation import WeightedMean, group_weights, norm
from server.coordinator_config import CoordinatorConfig
from server.run_folder import RunFolder
from unimiss_core import checkpoint, progress
from unimiss_core.codec import Layout, layout_of, released
from unimiss_core.collapse import signs_of_collapse
from unimiss_core.errors import RoundError, WireError
from unimiss_core.groups import GROUPS, Group, groups_of_ranks
from unimiss_core.network import build_network
from unimiss_core.schedule import teacher_retention, trained_steps
from unimiss_core.study import StudyConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply, TrainRequest, num_bytes

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Pause between two looks for replies."""


@dataclass
class GlobalState:
    """What the coordinator holds after `round` rounds.

    student: float32 masters. teacher: the EMA of the released students, per group. retention: what was left
    of the teacher in the last round. taught: site -> the last round whose teacher it holds on its disk.
    """

    round: int
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    retention: dict[Group, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))
    taught: dict[str, int] = field(default_factory=dict)


@dataclass
class SiteRound:
    """One site's line in the metrics of a round; docs/artefacts.md names the fields."""

    status: str = "absent"
    reason: str = ""
    scans: dict[str, int] = field(default_factory=lambda: {"2d": 0, "3d": 0})
    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


class Federation:
    """One study, run over a grid of sites, into one folder."""

    def __init__(self, grid: Grid, study: StudyConfig, config: CoordinatorConfig) -> None:
        self._grid = grid
        self._study = study
        self._digest = study.digest()
        self._config = config
        self._folder = RunFolder(config.out)
        network = build_network(study.model, seed=study.seed)
        self._layout = layout_of(network)
        self._group_of = {spec.name: group for group, specs in self._layout.items() for spec in specs}
        self._initial = {name: parameter.detach() for name, parameter in network.named_parameters()}
        self._sites: dict[int, Introduction] = {}
        """Node -> who it is, for the sites that can take part."""
        self._unfit: dict[str, SiteRound] = {}
        """Sites that could not introduce themselves, and why."""

    def run(self, *, resume: bool = False) -> GlobalState:
        """All rounds that are not done yet; the state after the last.

        Raises ConfigError (the folder is not this run's), CheckpointError, and RoundError where too few sites came or
        replied: what was finished is saved, and a resumed run goes on from there.
        """
        state = self._restore_or_start(resume=resume)
        for round in range(state.round + 1, self._study.schedule.rounds + 1):
            self._gather_sites()
            state = self._run_round(state, round)
        return state

    def _restore_or_start(self, *, resume: bool) -> GlobalState:
        if (found := self._folder.begin(self._study, resume=resume)) is not None:
            progress.report(progress.Note(f"resuming after round {found.manifest.round}"))
            book = json.loads(found.server_json)
            return GlobalState(
                found.manifest.round, dict(found.student), dict(found.teacher), book["retention"], book["taught"]
            )
        state = GlobalState(0, self._initial, released(self._initial, self._study.wire.dtype))
        self._save(state)
        return state

    # -- who takes part ---------------------------------------------------------------------------------------------

    def _gather_sites(self) -> None:
        """Ask every node that has not introduced itself who it is; wait until `min_sites` have. Raises RoundError."""
        give_up = time.monotonic() + self._config.wait_s
        self._unfit, asked = {}, set(self._sites)
        while True:
            new = {node.node_id: node.name for node in self._grid.get_nodes() if node.node_id not in asked}
            self._greet(new)
            asked |= new.keys()
            if len(self._sites) >= self._config.min_sites:
                return
            if time.monotonic() > give_up:
                reasons = "".join(f"; {name}: {line.reason}" for name, line in sorted(self._unfit.items()))
                raise RoundError(
                    f"{len(self._sites)} of at least {self._config.min_sites} sites are there{reasons}. "
                    "Mend the sites or lower min_sites, then resume"
                )
            time.sleep(1.0)

    def _greet(self, nodes: Mapping[int, str]) -> None:
        content = Hello(self._study).pack()
        asked = {node_id: Message(content, node_id, "query", ttl=self._config.deadline_s) for node_id in nodes}
        absent = set(nodes)
        for node_id, reply in self._replies(asked):
            absent.discard(node_id)
            try:
                self._sites[node_id] = _introduction(reply)
            except WireError as error:
                self._mark_unfit(nodes[node_id] or f"node-{node_id}", SiteRound("refused", error.reason))
        for node_id in absent:
            self._mark_unfit(nodes[node_id] or f"node-{node_id}", SiteRound("absent", "no_introduction"))

    def _mark_unfit(self, name: str, line: SiteRound) -> None:
        self._unfit[name] = line
        log.warning("site=%s status=%s reason=%s", name, line.status, line.reason)
        progress.report(progress.Note(f"{name} cannot take part: {line.reason}"))

    # -- one round --------------------------------------------------------------------------------------------------

    def _run_round(self, state: GlobalState, round: int) -> GlobalState:
        began = time.monotonic()
        rounds = self._study.schedule.rounds
        names = tuple(site.site for site in self._sites.values())
        progress.report(progress.RoundStarted(round, rounds, names))
        lines = {**self._unfit, **{name: SiteRound() for name in names}}
        mean = WeightedMean(self._layout)
        retention = _MeanRetention()
        requests = self._requests(state, round, lines)
        for node_id, reply in self._replies(requests):
            site = self._sites[node_id]
            line = lines[site.site]
            try:
                answer = self._admitted(reply, site, round, line)
            except WireError as error:
                line.status, line.reason = ("error" if error.reason == "failed" else "refused"), error.reason
                log.warning("round=%d site=%s refused: %s", round, site.site, error)
            else:
                trained = trained_steps(site.ranks, self._study.schedule, round)
                groups = [group for group, steps in trained.items() if steps > 0]
                weights = group_weights(answer.scans, groups, self._study.aggregation.weighting)
                mean.fold(answer.update, weights)
                retention.fold(weights, teacher_retention(self._study, site.ranks, round))
                state.taught[site.site] = round
                self._warn_of_collapse(answer)
            progress.report(progress.SiteReplied(round, site.site, line.status, line.reason))
        self._require_quorum(round, lines)
        after, step = self._step(state, round, mean, retention)
        self._close(after, step, lines, time.monotonic() - began)
        return after

    def _requests(self, state: GlobalState, round: int, lines: Mapping[str, SiteRound]) -> dict[int, Message]:
        """Node -> request; each site gets only the groups that it trains."""
        student = released(state.student, self._study.wire.dtype)
        requests = {}
        for node_id, site in self._sites.items():
            layout = self._layout_of(site)
            holds_teacher = round == 1 or state.taught.get(site.site) == round - 1
            request = TrainRequest(
                study=self._study,
                round=round,
                student=student,
                teacher=None if holds_teacher else state.teacher,
                teacher_retention=state.retention,
            ).pack(layout)
            lines[site.site].bytes_down = num_bytes(request)
            requests[node_id] = Message(request, node_id, "train", ttl=self._config.deadline_s, group_id=str(round))
        return requests

    def _admitted(self, reply: Message, site: Introduction, round: int, line: SiteRound) -> TrainReply:
        """The reply, if it may count; `line` then says what it held. Raises WireError."""
        content = _content(reply)
        line.bytes_up = num_bytes(content)
        answer = TrainReply.unpack(content, self._layout_of(site), self._study.wire.dtype)
        admit(answer, asked=site, round=round, study=self._study, study_digest=self._digest)
        line.status = "ok"
        line.scans = {f"{rank}d": count for rank, count in answer.scans.items()}
        line.steps = answer.steps
        line.losses = dict(answer.losses)
        line.diagnostics = dict(answer.diagnostics)
        line.seconds = round_s(answer.seconds)
        return answer

    def _warn_of_collapse(self, answer: TrainReply) -> None:
        """After the warm-up: a young network's targets are alike too."""
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

    def _step(
        self, state: GlobalState, round: int, mean: WeightedMean, retention: "_MeanRetention"
    ) -> tuple[GlobalState, dict[str, Tensor]]:
        """(state after the round, what was added to the student)."""
        step = mean.result()
        student = {name: tensor + step[name] if name in step else tensor for name, tensor in state.student.items()}
        left = retention.result()
        teacher = advance_teacher(
            state.teacher,
            released(student, self._study.wire.dtype),
            {name: left[group] for name, group in self._group_of.items()},
        )
        return GlobalState(round, student, teacher, left, state.taught), step

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
        self._folder.append_metrics(row)
        self._save(state)
        self._folder.prune_checkpoints(state.round)
        losses = {name: sum(line.losses.values()) / len(line.losses) for name, line in lines.items() if line.losses}
        progress.report(progress.RoundDone(state.round, self._study.schedule.rounds, took, losses))

    # -- small parts ------------------------------------------------------------------------------------------------

    def _layout_of(self, site: Introduction) -> Layout:
        return {group: self._layout[group] for group in GROUPS if group in groups_of_ranks(site.ranks)}

    def _replies(self, asked: Mapping[int, Message]) -> Iterator[tuple[int, Message]]:
        """(node, reply) as they arrive, until all did or the deadline passed."""
        waiting = dict(zip(self._grid.push_messages(asked.values()), asked, strict=True))
        give_up = time.monotonic() + self._config.deadline_s
        while waiting and time.monotonic() < give_up:
            arrived = list(self._grid.pull_messages(list(waiting)))
            for reply in arrived:
                if (node_id := waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                    yield node_id, reply
            if not arrived:
                time.sleep(POLL_S)

    def _save(self, state: GlobalState) -> None:
        checkpoint.save(
            self._folder.checkpoint_of(state.round),
            origin="federation",
            round=state.round,
            study_digest=self._digest,
            model=self._study.model,
            plan=self._study.plan,
            student=state.student,
            teacher=state.teacher,
            server_json=json.dumps({"retention": state.retention, "taught": state.taught}, sort_keys=True),
        )


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


def round_s(seconds: float) -> float:
    """Seconds as they stand in the metrics: to the millisecond."""
    return round(seconds, 3)


def _content(reply: Message) -> Any:
    """What a site sent. Raises WireError with its reason where it did not do what was asked."""
    if reply.has_error():
        # Flower's own text may quote an exception of the site; its code alone says what happened.
        raise WireError("failed", f"Flower error code {reply.error.code}")
    if (refusal := Refusal.found_in(reply.content)) is not None:
        raise WireError(refusal.reason, "the site says so")
    return reply.content


def _introduction(reply: Message) -> Introduction:
    introduction = Introduction.unpack(_content(reply))
    if not introduction.ranks:
        raise WireError("no_usable_scans", "the site introduced itself with no scan")
    return introduction
