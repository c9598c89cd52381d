"""What a site may make of Flower's PushMessages against the others: the attack on Flower's own database, its end."""

import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from server.exchange import pulled
from server.front_answers import announced
from server.front_rules import Refused

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator")
"""Of Flower's database migrations."""


@dataclass
class SuperLink:
    """Flower's own state of a run at work, with two sites."""

    state: LinkState
    run: int
    victim: int
    attacker: int

    def message(self, *, src: int, dst: int, reply_to: str = "", site: str = "nobody") -> Message:
        content = RecordDict({"facts": ConfigRecord({"site": site, "nonce": secrets.token_hex(8)})})
        told = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=src,
            dst_node_id=dst,
            reply_to_message_id=reply_to,
            group_id="1",
            created_at=time.time(),
            ttl=60.0 if reply_to else 600.0,  # a reply may not outlive its question
            message_type="train",
        )
        message = make_message(told, content)
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def asks(self, node: int) -> str:
        """The coordinator's question to a site; its id."""
        question = self.message(src=SUPERLINK_NODE_ID, dst=node)
        session = self.state.start_session(self.run)
        assert self.state.store_message_and_object_tree(question, get_object_tree(question), session)[0]
        return str(question.metadata.message_id)

    def pushes(self, node: int, message: Message) -> bytes:
        """As a site with its own key may: SuperLink compares `node` with it, and nothing else. The request's bytes."""
        request = PushMessagesRequest(
            node=Node(node_id=node),
            messages_list=[message_to_proto(message)],
            message_object_trees=[get_object_tree(message)],
        )
        fleet_handlers.push_messages(request, self.state)
        return bytes(request.SerializeToString())

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        """What the ServerApp is given: as Flower's grid, without the content, which comes in pieces."""
        (task,) = self.state.get_tasks()
        answer = runtime_handlers.pull_messages(PullAppMessagesRequest(message_ids=message_ids), self.state, task)
        return [self._of(found.metadata) for found in answer.messages_list]

    def _of(self, told: object) -> Message:
        site = "forged" if not told.reply_to_message_id else "honest"  # type: ignore[attr-defined]
        return self.message(src=1, dst=1, reply_to=told.reply_to_message_id, site=site)  # type: ignore[attr-defined]


@pytest.fixture
def superlink(tmp_path: Path) -> SuperLink:
    database = str(tmp_path / "superlink.db")
    state = LinkStateFactory(database, NoOpFederationManager(), ObjectStoreFactory(database)).state()
    run = state.create_run("a/b", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, "<id:none>", TaskType.SERVER_APP)
    (task,) = state.get_tasks()
    assert state.claim_task(task.task_id)
    assert state.activate_task(task.task_id)
    nodes = [state.create_node("", "", name, 1e9) for name in (b"victim", b"attacker")]
    assert all(state.activate_node(node, 60.0) for node in nodes)
    return SuperLink(state, run, *nodes)


def test_flower_gives_the_coordinator_what_nobody_was_asked_for(superlink: SuperLink) -> None:
    """The reason for `server.front_answers`: where this fails, a newer Flower may have mended it."""
    question = superlink.asks(superlink.victim)
    superlink.pushes(superlink.attacker, superlink.message(src=1, dst=1, site="victim"))
    assert [told.metadata.reply_to_message_id for told in superlink.pull_messages([question])] == [""]


def test_flower_believes_what_an_object_is_announced_to_be_made_of(superlink: SuperLink) -> None:
    """The reason for `server.front_replies`, as above: the coordinator could then not send its own message."""
    question = superlink.message(src=SUPERLINK_NODE_ID, dst=superlink.victim)
    own, (content,) = get_object_tree(question), get_object_tree(question).children
    poison = superlink.message(
        src=superlink.attacker, dst=SUPERLINK_NODE_ID, reply_to=superlink.asks(superlink.attacker)
    )
    content.CopyFrom(ObjectTree(object_id=content.object_id, children=[ObjectTree(object_id="e" * 64)]))
    request = PushMessagesRequest(
        node=Node(node_id=superlink.attacker),
        messages_list=[message_to_proto(poison)],
        message_object_trees=[ObjectTree(object_id=poison.object_id, children=[content])],
    )
    fleet_handlers.push_messages(request, superlink.state)
    session = superlink.state.start_session(superlink.run)
    with pytest.raises(ValueError, match="different children"):
        superlink.state.store_message_and_object_tree(question, own, session)


def test_the_coordinator_waits_on_for_the_reply_that_it_asked_for(superlink: SuperLink) -> None:
    question = superlink.asks(superlink.victim)
    superlink.pushes(superlink.attacker, superlink.message(src=1, dst=1, site="victim"))
    assert pulled(superlink, question) is None  # type: ignore[arg-type]
    superlink.pushes(superlink.victim, superlink.message(src=superlink.victim, dst=1, reply_to=question))
    reply = pulled(superlink, question)  # type: ignore[arg-type]
    assert reply is not None
    assert reply.message is not None
    assert reply.message.metadata.reply_to_message_id == question


def test_the_front_lets_an_own_answer_by_and_no_forged_one(superlink: SuperLink) -> None:
    """By the requests that Flower itself writes, and takes."""
    question = superlink.asks(superlink.victim)
    for forged in (
        superlink.message(src=1, dst=1),
        superlink.message(src=1, dst=superlink.victim),
        superlink.message(src=superlink.victim, dst=1, reply_to=question),
    ):
        with pytest.raises(Refused, match="forged"):
            announced(superlink.pushes(superlink.attacker, forged), most=256)
    own = superlink.pushes(superlink.victim, superlink.message(src=superlink.victim, dst=1, reply_to=question))
    assert len(announced(own, most=256).objects) == 3  # the message, its content, and the facts in that
    with pytest.raises(Refused, match="length"):
        announced(own, most=2)
