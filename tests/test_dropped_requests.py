"""What SuperLink's database keeps of requests: nothing, once they are answered or their time is over.

The state, the database and the answers are those of the Flower that is installed; only HTTP between it and its grid is
left out.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from server.exchange import Exchange

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class SuperLink:
    """Its state in a database, and a grid that speaks with it."""

    def __init__(self, database: Path) -> None:
        objects = ObjectStoreFactory(str(database))
        self.state: Any = LinkStateFactory(str(database), NoOpFederationManager(), objects).state()
        self.run = self.state.create_run(
            "a/b", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, "<id:none>", TaskType.SERVER_APP
        )
        (self.task,) = self.state.get_tasks()
        self.state.claim_task(self.task.task_id)
        self.state.activate_task(self.task.task_id)
        self.grid = HttpGrid(token="t")
        (run,) = self.state.get_run_info(run_ids=[self.run])
        self.grid.set_run(run)
        self.grid._client = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        """Of Flower's client for SuperLink, whose methods are called as the messages are."""
        handler = {
            "PushMessages": runtime_handlers.push_messages,
            "PushObject": runtime_handlers.push_object,
            "PullMessages": runtime_handlers.pull_messages,
            "PullObject": runtime_handlers.pull_object,
            "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
        }[name]
        return lambda request: handler(request, self.state, self.task)

    def node(self, key: bytes, online_s: float = 60.0) -> int:
        number: int = self.state.create_node("", "", key, 1e9)
        self.state.activate_node(number, online_s)
        return number

    def fetch(self, node: int) -> str:
        """As a SuperNode does with what it is asked."""
        given = fleet_handlers.pull_messages(
            PullMessagesRequest(node=Node(node_id=node)), self.state, self.state.object_store
        )
        (message,) = given.messages_list
        name = str(message.metadata.message_id)
        self.confirm(node, name)
        return name

    def confirm(self, node: int, name: str) -> None:
        told = ConfirmMessageReceivedRequest(node=Node(node_id=node), run_id=self.run, message_object_id=name)
        fleet_handlers.confirm_message_received(told, self.state, self.state.object_store)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> SuperLink:
    """Of all tests, since Flower takes a second to make a database; each leaves it empty."""
    return SuperLink(tmp_path_factory.mktemp("superlink") / "superlink.db")


@pytest.fixture(autouse=True)
def as_the_server_app(link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskIdentity, "_run_id", link.run)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)
    monkeypatch.setattr(TaskIdentity, "_task_id", link.task.task_id)


def model(round: int) -> RecordDict:
    return RecordDict({"student": ArrayRecord({"shared": Array(np.full(1000, round, np.float32))})})


def exchange(link: SuperLink, deadline_s: float) -> Exchange:
    return Exchange(link.grid, deadline_s=deadline_s, late_count=False)


SITE: Any = SimpleNamespace()


def test_a_request_that_nobody_fetched_is_dropped_when_its_time_is_over(
    link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("server.exchange.time", SimpleNamespace(monotonic=lambda: clock.now))
    good, silent = link.node(b"good"), link.node(b"silent")
    asking = exchange(link, 60.0)
    for round in range(1, 4):
        asking.begin(round)
        assert len(link.state.object_store) == 0
        for node in (good, silent):
            assert asking.ask(node, SITE, model(round))
        link.fetch(good)
        clock.now += 70.0  # a quarter of its deadline it lives longer
        asking.begin(round)
        assert len(link.state.object_store) > 0
        clock.now += 10.0
    asking.begin(4)
    assert len(link.state.object_store) == 0


def test_what_is_still_waited_for_stays(link: SuperLink) -> None:
    """A site that comes back in time fetches it whole; and what two were asked stays while one of them has it not."""
    one, two = link.node(b"one"), link.node(b"two")
    asking = exchange(link, 60.0)
    asking.begin(1)
    for node in (one, two):
        assert asking.ask(node, SITE, model(1))
    link.fetch(one)
    kept = len(link.state.object_store)
    assert kept > 0
    asking.begin(2)
    assert len(link.state.object_store) == kept
    link.fetch(two)
    assert len(link.state.object_store) == 0


def test_a_request_to_a_node_that_is_gone_is_dropped_with_the_answer_that_says_so(link: SuperLink) -> None:
    gone, there = link.node(b"gone", 0.01), link.node(b"there")
    asking = exchange(link, 60.0)
    asking.begin(1)
    for node in (gone, there):
        assert asking.ask(node, SITE, model(1))
    ((asked, reply),) = [next(asking.replies(lambda: True))]
    assert asked.node_id == gone
    assert reply.message is not None
    assert reply.message.has_error()
    assert len(link.state.object_store) > 0  # the other's
    link.fetch(there)
    assert len(link.state.object_store) == 0
