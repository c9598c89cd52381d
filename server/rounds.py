"""The coordinator's loop: ask, fold in replies as they arrive, step, save; numbered for ever, resumable at any round.

Flower's `Strategy.start` always begins at round 1, ends the run when one reply is odd, and keeps all replies in
memory; so the loop is ours, over Flower's `Grid`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
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
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.network import build_network
from unimiss_core.scan import Rank
from unimiss_core.schedule import teacher_retention, trained_steps
from unimiss_core.study import StudyConfig
from unimiss_core.teacher import advance_teacher
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply, TrainRequest, num_bytes

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Pause between two looks for replies; between machines each look is a request."""


Probe = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
"""The teacher's tensors -> figures by task."""

_STATUS = {"failed": "error", "no_reply": "absent"}
"""Reason -> status; every other reason is a refusal."""

_NO_REPLY = {3, 4, 5}
"""Flower's error codes for a message, a reply or a node that is not available (any more)."""


@dataclass(frozen=True)
class _Hello:
    """A node that was asked who it is."""

    node_id: int
    node_name: str
    wait_until: float
    expires_at: float


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
    left_out: int = 0
    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


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
        self._group_of = {spec.name: group for group, specs in self._layout.items() for spec in specs}
        self._initial = {name: parameter.detach() for name, parameter in network.named_parameters()}
        self._sites: dict[int, Introduction] = {}
        """Node -> who it is, for the sites that can take part."""
        self._unfit: dict[str, SiteRound] = {}
        """Nodes that could not introduce themselves, and why."""
        self._hellos: dict[str, _Hello] = {}
        """Message -> the node that has not answered it yet."""
        self._silent: set[int] = set()
        """Nodes that once let their time to answer pass."""
        self._hello = Hello(study).pack()
        self._packed: dict[tuple[frozenset[Rank], bool], RecordDict] = {}
        """This round's requests, by what they hold."""
        self._probe = probe

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
        """Ask every node that is not known who it is; begin when all have said so and `min_sites` are there.

        A node that is asked for the first time is waited for `introduction_s`, because it may have an archive to read;
        one that stayed silent is asked in every round, and no longer waited for. Raises RoundError.
        """
        give_up = time.monotonic() + self._config.wait_s
        self._unfit = {}
        while True:
            self._greet_new_nodes()
            self._hear_introductions()
            reading = any(time.monotonic() < hello.wait_until for hello in self._hellos.values())
            if not reading and len(self._sites) >= self._config.min_sites:
                break
            if not reading and time.monotonic() > give_up:
                told = "".join(f"; {name}: {line.reason}" for name, line in sorted(self._unfit.items()))
                raise RoundError(
                    f"{len(self._sites)} of at least {self._config.min_sites} sites are there{told}. "
                    "Mend the sites or lower min_sites, then resume"
                )
            time.sleep(POLL_S)
        for message_id, hello in list(self._hellos.items()):
            self._mark_unfit(hello.node_name, SiteRound("absent", "no_introduction"))
            self._silent.add(hello.node_id)
            if time.monotonic() >= hello.expires_at:
                del self._hellos[message_id]

    def _greet_new_nodes(self) -> None:
        nodes = {node.node_id: node.name or f"node-{node.node_id}" for node in self._grid.get_nodes()}
        for gone in self._sites.keys() - nodes.keys():
            del self._sites[gone]
        waiting = {hello.node_id for hello in self._hellos.values()}
        for node_id, name in nodes.items():
            if node_id not in self._sites and node_id not in waiting and name not in self._unfit:
                message = Message(self._hello, node_id, "query", ttl=self._config.introduction_s)
                (message_id,) = self._grid.push_messages([message])
                expires_at = time.monotonic() + self._config.introduction_s
                wait_until = 0.0 if node_id in self._silent else expires_at
                self._hellos[message_id] = _Hello(node_id, name, wait_until, expires_at)

    def _hear_introductions(self) -> None:
        for reply in self._grid.pull_messages(list(self._hellos)):
            hello = self._hellos.pop(reply.metadata.reply_to_message_id)
            try:
                introduction = _introduction(reply)
                if introduction.site in {site.site for site in self._sites.values()}:
                    raise WireError("name_taken", "another connected site goes by the same name")
            except WireError as error:
                self._mark_unfit(hello.node_name, SiteRound(_STATUS.get(error.reason, "refused"), error.reason))
            else:
                self._sites[hello.node_id] = introduction
                self._silent.discard(hello.node_id)

    def _mark_unfit(self, name: str, line: SiteRound) -> None:
        self._unfit[name] = line
        log.warning("site=%s status=%s reason=%s", name, line.status, line.reason)
        progress.report(progress.Note(f"{name} cannot take part: {line.reason}"))

    # -- one round --------------------------------------------------------------------------------------------------

    def _run_round(self, state: GlobalState, round: int) -> GlobalState:
        began = time.monotonic()
        rounds = self._study.schedule.rounds
        lines = {**self._unfit, **{site.site: SiteRound(left_out=site.left_out) for site in self._sites.values()}}
        progress.report(progress.RoundStarted(round, rounds, tuple(lines)))
        for name, unfit in self._unfit.items():
            progress.report(progress.SiteReplied(round, name, unfit.status, unfit.reason))
        mean = WeightedMean(self._layout)
        retention = _MeanRetention()
        self._packed.clear()
        exchange = _Exchange(self._grid, self._config.deadline_s)
        for node_id, request in self._requests(state, round, lines).items():
            exchange.ask(node_id, request)
        for node_id, reply in exchange:
            site = self._sites[node_id]
            line = lines[site.site]
            try:
                answer = self._admitted(reply, site, round, line)
            except WireError as error:
                if error.reason == "needs_teacher" and state.taught.pop(site.site, None) is not None:
                    # It lost what it remembered. Once more, with the teacher: no round is lost to a new disk.
                    exchange.ask(node_id, self._request(state, round, node_id, line))
                    continue
                line.status, line.reason = _STATUS.get(error.reason, "refused"), error.reason
                log.warning("round=%d site=%s %s: %s", round, site.site, line.status, error)
                del self._sites[node_id]  # it may have changed, by new scans say: it is asked again who it is
            else:
                trained = trained_steps(site.ranks, self._study.schedule, round)
                groups = [group for group, steps in trained.items() if steps > 0]
                weights = group_weights(answer.scans, groups, self._study.aggregation.weighting)
                mean.fold(answer.update, weights)
                retention.fold(weights, teacher_retention(self._study, site.ranks, round))
                state.taught[site.site] = round
                self._warn_of_trouble(answer)
            progress.report(progress.SiteReplied(round, site.site, line.status, line.reason))
        self._require_quorum(round, lines)
        after, step = self._step(state, round, mean, retention)
        self._close(after, step, lines, time.monotonic() - began)
        return after

    def _requests(self, state: GlobalState, round: int, lines: Mapping[str, SiteRound]) -> dict[int, Message]:
        return {node: self._request(state, round, node, lines[site.site]) for node, site in self._sites.items()}

    def _request(self, state: GlobalState, round: int, node_id: int, line: SiteRound) -> Message:
        """Only the groups that the site trains, and the teacher only where the site cannot rebuild it.

        Sites that need the same bytes share them, so that memory does not grow with the number of sites.
        """
        site = self._sites[node_id]
        holds_teacher = round == 1 or state.taught.get(site.site) == round - 1
        if (key := (site.ranks, holds_teacher)) not in self._packed:
            self._packed[key] = TrainRequest(
                study=self._study,
                round=round,
                student=released(state.student, self._study.wire.dtype),
                teacher=None if holds_teacher else state.teacher,
                teacher_retention=state.retention,
            ).pack(self._layout_of(site))
        content = self._packed[key]
        line.bytes_down += num_bytes(content)
        return Message(content, node_id, "train", ttl=self._config.deadline_s, group_id=str(round))

    def _admitted(self, reply: Message, site: Introduction, round: int, line: SiteRound) -> TrainReply:
        """The reply, if it may count; `line` then says what it held. Raises WireError."""
        content = _content(reply)
        line.bytes_up = num_bytes(content)
        try:
            answer = TrainReply.unpack(content, self._layout_of(site), self._study.wire.dtype)
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
        if self._probe is not None and state.round == self._study.schedule.rounds:
            row["global"]["probe"] = self._probe(state.teacher)
        self._folder.append_metrics(row)
        self._save(state)
        self._folder.prune_checkpoints(state.round, self._config.keep_checkpoints)
        means = {name: mean_cross_entropy(line.losses) for name, line in lines.items()}
        losses = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        progress.report(progress.RoundDone(state.round, self._study.schedule.rounds, took, losses))

    # -- small parts ------------------------------------------------------------------------------------------------

    def _layout_of(self, site: Introduction) -> Layout:
        return {group: self._layout[group] for group in GROUPS if group in groups_of_ranks(site.ranks)}

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


class _Exchange:
    """Questions to nodes and their replies as they arrive, until all replied or the deadline passed."""

    def __init__(self, grid: Grid, deadline_s: float) -> None:
        self._grid = grid
        self._give_up = time.monotonic() + deadline_s
        self._waiting: dict[str, int] = {}

    def ask(self, node_id: int, message: Message) -> None:
        (message_id,) = self._grid.push_messages([message])
        self._waiting[message_id] = node_id

    def __iter__(self) -> Iterator[tuple[int, Message]]:
        """(node, reply); more may be asked meanwhile."""
        while self._waiting and time.monotonic() < self._give_up:
            arrived = list(self._grid.pull_messages(list(self._waiting)))
            for reply in arrived:
                if (node_id := self._waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                    yield node_id, reply
            if not arrived:
                time.sleep(POLL_S)


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
        reason = "no_reply" if reply.error.code in _NO_REPLY else "failed"
        raise WireError(reason, f"Flower error code {reply.error.code}")
    if (refusal := Refusal.found_in(reply.content)) is not None:
        raise WireError(refusal.reason, "the site says so")
    return reply.content


def _introduction(reply: Message) -> Introduction:
    introduction = Introduction.unpack(_content(reply))
    if not introduction.ranks:
        raise WireError("no_usable_scans", "the site introduced itself with no scan")
    return introduction
