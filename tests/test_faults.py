"""What can go wrong in a federation, one case each: the run ends finished, with the model of those who did well."""

import dataclasses
import errno
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from torch import Tensor

from server.coordinator_config import CoordinatorConfig, RegisteredSite
from server.display import Tally
from server.global_state import GlobalState
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.federation import RUN, Answer, StubSite, good_answer, metric_rows, reply_with, small_study, stub_app
from unimiss_core import checkpoint, progress
from unimiss_core.errors import ConfigError
from unimiss_core.groups import group_of
from unimiss_core.study import StudyConfig
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")

ROUNDS = 3
BAD_ROUND = 2


class Grid(LocalGrid):
    """An in-process grid whose nodes come and go, and whose replies may arrive twice.

    takes: whether a message to the node of a name, of a type, is taken; Flower answers with an empty id where not.
    unreadable: whether the answer of the node of a name to a message of a type cannot be read: Flower then raises, and
    counts all that was asked for as delivered.
    """

    present: Callable[[str], bool] = staticmethod(lambda _: True)
    takes: Callable[[str, str], bool] = staticmethod(lambda *_: True)
    twice = False
    unreadable: Callable[[str, str, int], bool] = staticmethod(lambda *_: False)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        (message,) = messages
        name = self._names[message.metadata.dst_node_id]
        return super().push_messages([message]) if self.takes(name, message.metadata.message_type) else [""]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [node for node in super().get_nodes() if self.present(node.name)]

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            about = reply.metadata
            if self.unreadable(self._names[about.src_node_id], about.message_type, int(about.group_id or 0)):
                json.loads("{not json")
        return [*replies, *replies] if self.twice else replies


def federate(
    out: Path,
    sites: list[StubSite],
    study: StudyConfig | None = None,
    *,
    present: Callable[[str], bool] = lambda _: True,
    takes: Callable[[str, str], bool] = lambda *_: True,
    twice: bool = False,
    unreadable: Callable[[str, str, int], bool] = lambda *_: False,
    workers: int | None = None,
    **config: object,
) -> GlobalState:
    nodes = {site.name: {"name": site.name} for site in sites}
    settings = {"study": Path("unused"), "out": out, "wait_s": 0.1, "retry_s": 0.0, **config}
    app = stub_app({site.name: site for site in sites})
    with Grid(app, nodes, run_config={}, workers=workers or len(sites)) as grid:
        grid.present, grid.takes, grid.twice, grid.unreadable = present, takes, twice, unreadable
        return Federation(grid, study or exact_study(), CoordinatorConfig.model_validate(settings)).run()


def exact_study(rounds: int = ROUNDS, **aggregation: object) -> StudyConfig:
    return small_study(rounds, wire={"dtype": "fp32"}, aggregation=aggregation)


def site(name: str, answer: Answer | None = None) -> StubSite:
    return StubSite(name, {3: 6} if name.startswith("ct") else {2: 10}, answer)


def only_in_bad_round(fault: Answer) -> Answer:
    return lambda request, of: fault(request, of) if request.round == BAD_ROUND else good_answer(request, of)


def assert_is_model_of(state: GlobalState, out: Path, counted: dict[int, dict[str, float]]) -> None:
    """counted: round -> site -> weight of those whose update of that round must be in the model. An oracle of its own:
    the formula of DESIGN.md, tensor by tensor, in float64."""
    start = checkpoint.load(out / "checkpoints" / "round-0000").student
    for name, value in start.items():
        expected = value.double()
        for round, weights in counted.items():
            updates = {of: _update(of, round).get(name) for of in weights}
            held = {of: update.double() for of, update in updates.items() if update is not None}
            if held:
                total = sum(weights[of] * update for of, update in held.items())
                expected = expected + total / sum(weights[of] for of in held)
        torch.testing.assert_close(state.student[name].double(), expected, rtol=1e-5, atol=1e-6)


@functools.lru_cache(maxsize=64)
def _update(name: str, round: int) -> dict[str, Tensor]:
    of = site(name)
    request = TrainRequest(small_study(), run=RUN, round=round, student={}, teacher=None, teacher_retention={})
    return dict(good_answer(request, of).update)


def all_good(*names: str, but: str = "") -> dict[int, dict[str, float]]:
    """Everybody in every round, without `but` in the bad one."""
    return {
        round: {name: 1.0 for name in names if not (name == but and round == BAD_ROUND)}
        for round in range(1, ROUNDS + 1)
    }


# -- replies that must not count ---------------------------------------------------------------------------------------


def raises(_: TrainRequest, __: StubSite) -> TrainReply:
    raise RuntimeError("patient /archive/P123 is broken")


def not_a_number(request: TrainRequest, of: StubSite) -> TrainReply:
    reply = good_answer(request, of)
    next(iter(reply.update.values())).view(-1)[0] = float("nan")
    return reply


def huge(request: TrainRequest, of: StubSite) -> TrainReply:
    return reply_with({n: 1e6 * t for n, t in good_answer(request, of).update.items()}, request, of)


def eleven_times_as_large(request: TrainRequest, of: StubSite) -> TrainReply:
    return reply_with({n: 11 * t for n, t in good_answer(request, of).update.items()}, request, of)


def of_the_round_before(request: TrainRequest, of: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, of), round=request.round - 1)


def no_scans(request: TrainRequest, of: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, of), scans={2: 0, 3: 0})


def losses_that_overflow(request: TrainRequest, of: StubSite) -> TrainReply:
    return dataclasses.replace(good_answer(request, of), losses={"volume": 1e308, "slices_to_volume": 1e308})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raises, "failed"),
        (not_a_number, "not_finite"),
        (huge, "too_large"),
        (eleven_times_as_large, "too_large"),
        (of_the_round_before, "stale_round"),
        (no_scans, "counts"),
        (losses_that_overflow, "not_finite"),
    ],
)
def test_a_bad_reply_costs_its_site_one_round(tmp_path: Path, fault: Answer, reason: str) -> None:
    state = federate(tmp_path, [site("bad", only_in_bad_round(fault)), site("ct"), site("ct-2")])
    assert state.round == ROUNDS
    assert_is_model_of(state, tmp_path, all_good("bad", "ct", "ct-2", but="bad"))
    assert [row["sites"]["bad"]["reason"] for row in metric_rows(tmp_path)] == ["", reason, ""]
    assert all(row["sites"][name]["status"] == "ok" for row in metric_rows(tmp_path) for name in ("ct", "ct-2"))
    assert "P123" not in (tmp_path / "metrics.jsonl").read_text()


def one_value(content: RecordDict) -> RecordDict:
    """A group with a single value, which numpy would spread over the whole of it."""
    record = content.array_records["update"]
    old = record["shared"]
    record["shared"] = Array(dtype=old.dtype, shape=(1,), stype=old.stype, data=old.data[:4])
    return content


def transposed_claim(content: RecordDict) -> RecordDict:
    """The right number of bytes under another shape: only the number can tell, for values travel end to end."""
    record = content.array_records["update"]
    old = record["shared"]
    record["shared"] = Array(dtype=old.dtype, shape=(1, *old.shape), stype=old.stype, data=old.data + old.data[:4])
    return content


def arrays_beside_it(content: RecordDict) -> RecordDict:
    content["more"] = content.array_records["update"]
    return content


def another_group(content: RecordDict) -> RecordDict:
    record = content.array_records["update"]
    record["3d"] = record["2d"]
    return content


def nothing(content: RecordDict) -> RecordDict:
    content["update"] = ArrayRecord()
    return content


def without_update(content: RecordDict) -> RecordDict:
    del content["update"]
    return content


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (one_value, "wrong_size"),
        (transposed_claim, "wrong_size"),
        (another_group, "wrong_names"),
        (nothing, "wrong_names"),
        (without_update, "malformed"),
        (arrays_beside_it, "malformed"),
    ],
)
def test_a_malformed_reply_costs_its_site_one_round(
    tmp_path: Path, tamper: Callable[[RecordDict], RecordDict], reason: str
) -> None:
    bad = site("bad")
    bad.tamper = lambda content, round: tamper(content) if round == BAD_ROUND else content
    state = federate(tmp_path, [bad, site("ct")])
    assert_is_model_of(state, tmp_path, all_good("bad", "ct", but="bad"))
    assert [row["sites"]["bad"]["reason"] for row in metric_rows(tmp_path)] == ["", reason, ""]


@pytest.mark.parametrize("asked", ["query", "train"])
def test_a_reply_that_flower_cannot_read_costs_its_site_alone(tmp_path: Path, asked: str) -> None:
    def unreadable(name: str, message_type: str, round: int) -> bool:
        return name == "bad" and message_type == asked and (asked == "query" or round == BAD_ROUND)

    state = federate(tmp_path, [site("bad"), site("ct"), site("ct-2")], unreadable=unreadable)
    bad = [(row["sites"].get("bad") or {}).get("reason") for row in metric_rows(tmp_path)]
    if asked == "train":
        assert_is_model_of(state, tmp_path, all_good("bad", "ct", "ct-2", but="bad"))
        assert bad == ["", "malformed", ""]
    else:
        assert_is_model_of(state, tmp_path, {round: {"ct": 1.0, "ct-2": 1.0} for round in range(1, ROUNDS + 1)})
        assert bad == ["malformed"] * ROUNDS


def test_an_update_nine_times_as_large_as_usual_still_counts(tmp_path: Path) -> None:
    def larger(request: TrainRequest, of: StubSite) -> TrainReply:
        return reply_with({n: 9 * t for n, t in good_answer(request, of).update.items()}, request, of)

    federate(tmp_path, [site("large", only_in_bad_round(larger)), site("a"), site("b")])
    assert [row["sites"]["large"]["status"] for row in metric_rows(tmp_path)] == ["ok", "ok", "ok"]


def test_a_reply_that_arrives_twice_counts_once(tmp_path: Path) -> None:
    state = federate(tmp_path, [site("a"), site("ct")], twice=True)
    assert_is_model_of(state, tmp_path, all_good("a", "ct"))


def hanging_until_the_next_round() -> tuple[Answer, Answer]:
    """(a site's answer that hangs, another's that ends it once the bad round is over)."""
    over = threading.Event()

    def hangs(request: TrainRequest, of: StubSite) -> TrainReply:
        over.wait(20)
        return good_answer(request, of)

    def honest(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round > BAD_ROUND:
            over.set()
        return good_answer(request, of)

    return hangs, honest


# -- sites that are not there ------------------------------------------------------------------------------------------


def test_a_site_that_hangs_is_absent_and_asked_again(tmp_path: Path) -> None:
    hangs, honest = hanging_until_the_next_round()
    state = federate(tmp_path, [site("slow", only_in_bad_round(hangs)), site("ct", honest)], deadline_s=3.0)
    assert_is_model_of(state, tmp_path, all_good("slow", "ct", but="slow"))
    assert [row["sites"]["slow"]["status"] for row in metric_rows(tmp_path)] == ["ok", "absent", "ok"]
    assert metric_rows(tmp_path)[BAD_ROUND - 1]["sites"]["slow"]["reason"] == "no_reply"


@pytest.mark.parametrize("late_weight", [0.0, 0.5])
def test_a_late_reply_counts_with_the_share_that_the_study_gives_it(tmp_path: Path, late_weight: float) -> None:
    """It is for round 2 and arrives in round 3. Dropped, its time-to-live ends with the round."""
    begun, sent = threading.Event(), threading.Event()

    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        begun.wait(20)
        sent.set()
        return good_answer(request, of)

    def prompt(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == BAD_ROUND + 1:
            begun.set()
            sent.wait(20)
            time.sleep(1.0)  # until the other's reply has been fetched
        return good_answer(request, of)

    sites = [site("slow", only_in_bad_round(slow)), site("a", prompt)]
    events: list[progress.Event] = []
    with progress.listen(events.append):
        state = federate(tmp_path, sites, exact_study(late_weight=late_weight), deadline_s=4.0)
    counted = all_good("slow", "a", but="slow")
    slow_in_last = metric_rows(tmp_path)[-1]["sites"]["slow"]["status"]
    if late_weight == 0.0:
        assert_is_model_of(state, tmp_path, counted)
        assert slow_in_last == "ok"
        return
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0002").student
    ours, theirs = _update("a", 3), _update("slow", 2)
    for name, update in ours.items():
        expected = start[name].double() + (update.double() + 0.5 * theirs[name].double()) / 1.5
        torch.testing.assert_close(state.student[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert slow_in_last == "late"
    told = [event for event in events if isinstance(event, progress.SiteReplied) and event.site == "slow"]
    assert [(event.reason, event.at_work_on) for event in told if event.round == 3] == [
        ("busy", 2),
        ("discounted", None),
    ]
    assert [request.round for request in sites[0].requests] == [1, 2]  # in round 3 it was still at work


def test_a_round_in_which_all_sites_fail_is_tried_again(tmp_path: Path) -> None:
    def fails_once(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == BAD_ROUND and sum(r.round == BAD_ROUND for r in of.requests) == 1:
            return raises(request, of)
        return good_answer(request, of)

    state = federate(tmp_path, [site("a", fails_once), site("ct", fails_once)])
    assert_is_model_of(state, tmp_path, all_good("a", "ct"))
    assert [row["round"] for row in metric_rows(tmp_path)] == [1, 2, 3]


def test_what_counted_in_one_try_of_a_round_counts_in_the_next(tmp_path: Path) -> None:
    """An hour of training is not asked for twice because another site failed."""

    def fails_once(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == BAD_ROUND and sum(r.round == BAD_ROUND for r in of.requests) == 1:
            return raises(request, of)
        return good_answer(request, of)

    good, bad, tally = site("ct"), site("bad", fails_once), Tally(time.monotonic)
    with progress.listen(tally.count):
        state = federate(tmp_path, [good, bad], min_sites=2, min_replies=2)
    assert_is_model_of(state, tmp_path, all_good("bad", "ct"))
    assert [request.round for request in good.requests] == [1, 2, 3]
    assert [request.round for request in bad.requests] == [1, 2, 2, 3]
    in_bad_round, in_next = (metric_rows(tmp_path)[round]["sites"] for round in (BAD_ROUND - 1, BAD_ROUND))
    assert in_bad_round["bad"]["bytes_down"] > in_next["bad"]["bytes_down"]  # both requests
    assert in_bad_round["ct"]["bytes_down"] == in_next["ct"]["bytes_down"]
    assert "ct did not count" not in "".join(tally.summary())


def test_a_site_that_counted_and_left_is_not_missed_in_the_next_try(tmp_path: Path) -> None:
    def fails_once(request: TrainRequest, of: StubSite) -> TrainReply:
        return raises(request, of) if len(of.requests) == 1 else good_answer(request, of)

    bad, ct = site("bad", fails_once), site("ct")
    state = federate(
        tmp_path,
        [bad, ct],
        exact_study(rounds=1),
        present=lambda name: name == "bad" or len(bad.requests) == 0,
        min_sites=2,
        min_replies=2,
    )
    assert_is_model_of(state, tmp_path, {1: {"bad": 1.0, "ct": 1.0}})


def test_a_deadline_that_is_a_little_short_costs_no_training(tmp_path: Path) -> None:
    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        time.sleep(3.4 if request.round == BAD_ROUND else 0.0)
        return good_answer(request, of)

    slow_site = site("slow", slow)
    state = federate(tmp_path, [slow_site], deadline_s=3.0, round_tries=1)
    assert_is_model_of(state, tmp_path, all_good("slow"))
    assert [request.round for request in slow_site.requests] == [1, 2, 3]


def test_a_round_whose_free_sites_fail_waits_for_the_one_that_is_late(tmp_path: Path) -> None:
    begun = threading.Event()

    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        begun.wait(20)
        time.sleep(1.0)  # until the others' failure is known
        return good_answer(request, of)

    def fails(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round > BAD_ROUND:
            begun.set()
            return raises(request, of)
        return good_answer(request, of)

    sites = [site("slow", only_in_bad_round(slow)), site("a", fails)]
    federate(tmp_path, sites, exact_study(late_weight=0.5), deadline_s=3.0, round_tries=1)
    lines = metric_rows(tmp_path)[-1]["sites"]
    assert (lines["slow"]["status"], lines["a"]["status"]) == ("late", "error")


def test_a_site_that_joins_late_counts_from_then_on(tmp_path: Path) -> None:
    a = site("a")
    state = federate(tmp_path, [a, site("ct")], present=lambda name: name == "a" or len(a.requests) >= 1)
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0}, 2: {"a": 1.0, "ct": 1.0}, 3: {"a": 1.0, "ct": 1.0}})


def test_a_site_that_leaves_for_good_is_not_waited_for(tmp_path: Path) -> None:
    ct = site("ct")
    state = federate(tmp_path, [site("a"), ct], present=lambda name: name == "a" or len(ct.requests) < 1)
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0, "ct": 1.0}, 2: {"a": 1.0}, 3: {"a": 1.0}})
    for name, value in checkpoint.load(tmp_path / "checkpoints" / "round-0001").student.items():
        if group_of(name) == "3d":
            assert torch.equal(state.student[name], value)


def test_a_site_that_could_not_take_part_is_asked_again_while_too_few_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old node, which Flower takes for connected for a minute, had its name."""
    monkeypatch.setattr("server.patience.AGAIN_S", 0.3)
    old, new = {"name": "a", "node": "old"}, {"name": "a", "node": "new"}
    asked_of_new: list[float] = []

    def greets(name: str, message_type: str) -> bool:
        if name == "new" and message_type == "query":
            asked_of_new.append(time.monotonic())
        return True

    app = stub_app({"a": site("a"), "ct": site("ct")})
    config = CoordinatorConfig(
        study=Path("unused"), out=tmp_path, wait_s=30, min_sites=2, min_replies=2, introduction_s=5, retry_s=0
    )
    with Grid(app, {"old": old, "new": new, "ct": {"name": "ct"}}, run_config={}, workers=3) as grid:
        grid.takes = greets
        grid.present = lambda name: name != ("ct" if len(asked_of_new) < 2 else "old")
        state = Federation(grid, exact_study(rounds=1), config).run()
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0, "ct": 1.0}})


@pytest.mark.parametrize("left_before", ["query", "train"])
def test_sites_that_leave_while_others_are_asked_cost_themselves_alone(tmp_path: Path, left_before: str) -> None:
    """A SuperNode that is stopped leaves the SuperLink at once; a message to it then gets no id."""

    def takes(name: str, message_type: str) -> bool:
        return name == "a" or message_type != left_before

    state = federate(tmp_path, [site("ct"), site("a"), site("ct-2")], exact_study(rounds=1), takes=takes)
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0}})
    told = {name: (line["status"], line["reason"]) for name, line in metric_rows(tmp_path)[0]["sites"].items()}
    gone = {} if left_before == "query" else dict.fromkeys(("ct", "ct-2"), ("absent", "no_reply"))
    assert told == {"a": ("ok", ""), **gone}
    assert metric_rows(tmp_path)[0]["seconds"] < 30  # nobody waited for them


def test_a_site_that_keeps_failing_is_asked_less_and_less(tmp_path: Path) -> None:
    bad = site("bad", raises)
    federate(tmp_path, [bad, site("ct")], exact_study(rounds=12), set_aside_after=2)
    assert [request.round for request in bad.requests] == [1, 2, 4, 7, 12]
    assert [row["sites"]["bad"]["reason"] == "set_aside" for row in metric_rows(tmp_path)] == [
        round not in (1, 2, 4, 7, 12) for round in range(1, 13)
    ]


def test_a_site_that_works_again_is_asked_in_every_round(tmp_path: Path) -> None:
    def mended(request: TrainRequest, of: StubSite) -> TrainReply:
        return raises(request, of) if request.round < 4 else good_answer(request, of)

    bad = site("bad", mended)
    federate(tmp_path, [bad, site("ct")], exact_study(rounds=7), set_aside_after=2)
    assert [request.round for request in bad.requests] == [1, 2, 4, 5, 6, 7]


def test_a_failing_site_is_asked_where_the_quorum_needs_it(tmp_path: Path) -> None:
    def fails_once(request: TrainRequest, of: StubSite) -> TrainReply:
        return raises(request, of) if len(of.requests) == 1 else good_answer(request, of)

    bad = site("bad", fails_once)
    federate(tmp_path, [bad, site("ct")], min_sites=2, min_replies=2, set_aside_after=1)
    assert [request.round for request in bad.requests] == [1, 1, 2, 3]


def test_nobody_is_set_aside_in_a_round_that_is_tried_again(tmp_path: Path) -> None:
    """The one that kept failing works again; the other one, which always worked, now fails."""

    def mended(request: TrainRequest, of: StubSite) -> TrainReply:
        return raises(request, of) if request.round < 3 else good_answer(request, of)

    def breaks(request: TrainRequest, of: StubSite) -> TrainReply:
        return raises(request, of) if request.round >= 3 else good_answer(request, of)

    state = federate(tmp_path, [site("a", breaks), site("b", mended)], set_aside_after=2)
    assert state.round == ROUNDS
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0}, 2: {"a": 1.0}, 3: {"b": 1.0}})


def test_after_the_first_round_as_many_sites_suffice_as_must_reply(tmp_path: Path) -> None:
    ct = site("ct")
    state = federate(
        tmp_path, [site("a"), ct], present=lambda name: name == "a" or len(ct.requests) < 1, min_sites=2, min_replies=1
    )
    assert_is_model_of(state, tmp_path, {1: {"a": 1.0, "ct": 1.0}, 2: {"a": 1.0}, 3: {"a": 1.0}})
    assert [row["sites"]["ct"]["reason"] for row in metric_rows(tmp_path)] == ["", "not_connected", "not_connected"]


def test_registered_sites_that_never_came_stand_in_the_metrics(tmp_path: Path) -> None:
    registered = tuple(RegisteredSite(name=name) for name in ("a", "never-came"))
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, sites=registered)
    with Grid(stub_app({"a": site("a")}), {"a": {"name": "a"}}, run_config={}) as grid:
        Federation(grid, exact_study(rounds=1), config).run()
    line = metric_rows(tmp_path)[0]["sites"]["never-came"]
    assert (line["status"], line["reason"]) == ("absent", "not_connected")


def test_a_probe_that_fails_costs_no_round(tmp_path: Path) -> None:
    asked = []

    def broken(_: object, *, is_last: bool) -> dict[str, float]:
        asked.append(is_last)
        if len(asked) == 1:
            raise MemoryError
        return {"x": 0.5}

    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, probe=(Path("x"),), probe_every=2)
    with Grid(stub_app({"a": site("a")}), {"a": {"name": "a"}}, run_config={}) as grid:
        state = Federation(grid, exact_study(rounds=5), config, broken).run()
    assert state.round == 5
    assert [row["global"].get("probe") for row in metric_rows(tmp_path)] == [None, None, None, {"x": 0.5}, {"x": 0.5}]
    assert asked == [False, False, True]


def test_a_full_disk_is_told_and_what_was_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: RunFolder, row: dict[str, int]) -> None:
        if row["round"] == BAD_ROUND:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "append_metrics", full)
    with pytest.raises(ConfigError, match="No space left on device; make room, then resume"):
        federate(tmp_path, [site("a")])
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.name == "round-0001"
