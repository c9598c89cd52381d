"""How long a round waits for nodes that do not say who they are, and what is remembered of those that come and go."""

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo

from server.coordinator_config import CoordinatorConfig, RegisteredSite
from server.local_grid import LocalGrid
from server.patience import AGAIN_S, MOST_UNHEARD, Called, Patience
from server.registration import Registration
from server.roster import Roster
from tests.federation import RUN, small_study, stub_app
from unimiss_core import progress
from unimiss_core.wire import Hello

INTRODUCTION_S = 3600.0


def patience() -> Patience:
    return Patience(INTRODUCTION_S)


def waits_s(held: Patience, node: Called) -> float:
    return round(held.until(node) - time.monotonic())


def test_a_named_node_that_starts_again_is_known_by_its_name() -> None:
    held = patience()
    assert waits_s(held, Called("a", lasts=True)) == INTRODUCTION_S
    held.note_introduced(Called("a", lasts=True))
    assert waits_s(held, Called("a", lasts=True)) == AGAIN_S
    held.note_silent(Called("a", lasts=True))
    assert waits_s(held, Called("a", lasts=True)) == 0.0


def test_a_node_that_keeps_leaving_before_it_answers_is_at_last_not_waited_for() -> None:
    held = patience()
    for _ in range(MOST_UNHEARD):
        assert waits_s(held, Called("a", lasts=True)) == INTRODUCTION_S
        held.note_left(Called("a", lasts=True))
    assert waits_s(held, Called("a", lasts=True)) == 0.0
    held.note_introduced(Called("a", lasts=True))
    assert waits_s(held, Called("a", lasts=True)) == AGAIN_S


def test_nameless_nodes_that_came_and_went_cost_a_round_half_a_minute_together(monkeypatch: pytest.MonkeyPatch) -> None:
    held = patience()
    for number in range(MOST_UNHEARD):
        held.note_left(Called(f"node-{number}", lasts=False))
    began = time.monotonic()
    held.begin()
    later = began + AGAIN_S - 5
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert held.until(Called("node-100", lasts=False)) == pytest.approx(began + AGAIN_S, abs=1.0)
    assert held.until(Called("new", lasts=True)) == later + INTRODUCTION_S


def test_of_nameless_nodes_only_those_that_are_there_are_remembered() -> None:
    held = patience()
    for number in range(50):
        node = Called(f"node-{number}", lasts=False)
        held.until(node)
        held.note_refused(node)
        held.note_silent(node)
        held.note_introduced(node)
        gone = held.forget_all_but([node, Called("a", lasts=True)])
        assert gone == ({f"node-{number - 1}"} if number else set())
    assert held._known == held._refused.keys() == held._passing == {"node-49"}


def test_who_goes_on_refusing_is_asked_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a day of a gathering 96 times, not 2,880; in the next gathering at once."""
    held, node, now = patience(), Called("a", lasts=True), [0.0]
    monkeypatch.setattr("server.patience.time.monotonic", lambda: now[0])
    asked = []
    while now[0] < 86_400.0:
        if not held.is_put_off(node):
            asked.append(now[0])
            held.note_refused(node)
        now[0] += 1.0
    assert asked[:6] == [0.0, 30.0, 90.0, 210.0, 450.0, 930.0]
    assert len(asked) < 100
    held.begin()
    assert not held.is_put_off(node)


class Flapping(LocalGrid):
    """A nameless node without a key is there under another id at each look, and answers nothing."""

    ids = itertools.count(1)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=next(self.ids))]

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        return [f"message-{message.metadata.dst_node_id}" for message in messages]


def test_a_node_that_comes_back_under_new_ids_is_not_waited_for_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.patience.AGAIN_S", 0.1)
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, introduction_s=20.0)
    roster, began = Roster(Flapping(stub_app({}), {}, run_config={}), config), time.monotonic()
    for _ in range(3):
        roster.gather(Hello(small_study(), RUN), least=1, counted=frozenset({"a"}))
    assert time.monotonic() - began < 10
    assert len(roster._told) <= 1


def test_nameless_strangers_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = (RegisteredSite(name="a"),)
    heard: list[progress.Event] = []
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, sites=registered, introduction_s=20.0)
    roster = Roster(Flapping(stub_app({}), {}, run_config={}), config)
    monkeypatch.setattr(Registration, "may_ask", lambda *_: False)
    with progress.listen(heard.append):
        for _ in range(3):
            roster.gather(Hello(small_study(), RUN), least=1, counted=frozenset({"a"}))
    assert len([event for event in heard if isinstance(event, progress.Note)]) == 1
