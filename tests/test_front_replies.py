"""What a site sends through the front, and what it may have of SuperLink's: its own answers whole, its own messages."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from tests.front_peers import SITES_NODE, Authority, Call, Identity, Running, StubSuperLink, request, running_front

ANNOUNCE, PART = b"/v1/fleet/push-messages", b"/v1/fleet/push-object"
TOLD = b"HTTP/1.1 %d x\r\ncontent-type: application/protobuf\r\ncontent-length: %d\r\n\r\n%s"


@dataclass
class Link(StubSuperLink):
    """A SuperLink that takes answers, and gives a message. says: path -> status, where it is not 200."""

    says: dict[bytes, int] = field(default_factory=dict)
    gives: PullMessagesResponse = field(default_factory=PullMessagesResponse)
    answers: list[PushMessagesRequest] = field(default_factory=list)
    parts: dict[str, bytes] = field(default_factory=dict)

    def answered(self, path: bytes, body: bytes) -> bytes:
        if (status := self.says.get(path, 200)) != 200:
            return TOLD % (status, 0, b"")
        told = {ANNOUNCE: self._announced, PART: self._stored, b"/v1/fleet/pull-messages": self._given}.get(path)
        content = told(body) if told else b""
        return TOLD % (200, len(content), content)

    def _announced(self, body: bytes) -> bytes:
        self.answers.append(request := PushMessagesRequest.FromString(body))
        names = [node.object_id for node in nodes(request.message_object_trees[0])]
        return bytes(PushMessagesResponse(objects_to_push=names, session_id="at SuperLink").SerializeToString())

    def _stored(self, body: bytes) -> bytes:
        part = PushObjectRequest.FromString(body)
        assert part.session_id == "at SuperLink"
        self.parts[part.object_id] = part.object_content
        return bytes(PushObjectResponse(stored=True).SerializeToString())

    def _given(self, _body: bytes) -> bytes:
        return bytes(self.gives.SerializeToString())


def nodes(tree: ObjectTree) -> list[ObjectTree]:
    return [tree, *(below for child in tree.children for below in nodes(child))]


class Reply:
    """An answer as Flower cuts it into parts. changed: of the announcement's tree."""

    def __init__(self) -> None:
        facts = ConfigRecord({"nonce": secrets.token_hex(8)})
        content = RecordDict({"facts": facts, "update": ArrayRecord()})
        told = Metadata(7, "", SITES_NODE, 1, "a" * 64, "1", 0.0, 60.0, "train")
        message: Message = make_message(told, content)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.name = str(message.object_id)
        self.tree = get_object_tree(message)
        self.parts = {name: bytes(part.deflate()) for name, part in get_all_nested_objects(message).items()}
        self._message = message

    def announcement(self) -> bytes:
        return bytes(
            PushMessagesRequest(
                node=Node(node_id=SITES_NODE),
                messages_list=[message_to_proto(self._message)],
                message_object_trees=[self.tree],
            ).SerializeToString()
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def sites(authority: Authority) -> tuple[Identity, Identity]:
    return authority.issue("alpha"), authority.issue("beta")


Talk = Callable[[Running], Awaitable[None]]


@pytest.fixture
def talk(tmp_path: Path, authority: Authority, sites: Sequence[Identity]) -> Callable[..., None]:
    """Runs a conversation with a front before `link`."""

    def run(conversation: Talk, link: Link) -> None:
        async def conversed() -> None:
            async with running_front(tmp_path, authority, link=link) as front:
                front.approved.sites.update({site.pem: site.name for site in sites})
                await conversation(front)

        asyncio.run(asyncio.wait_for(conversed(), 60))

    return run


async def announce(call: Call, site: Identity, reply: Reply) -> PushMessagesResponse:
    status, told = await call.ask(request(site, path=ANNOUNCE, body=reply.announcement()))
    assert status == 200
    return PushMessagesResponse.FromString(told)


async def push(call: Call, site: Identity, session: str, name: str, content: bytes) -> tuple[int, bool]:
    part = PushObjectRequest(
        node=Node(node_id=SITES_NODE), run_id=7, session_id=session, object_id=name, object_content=content
    )
    status, told = await call.ask(request(site, path=PART, body=part.SerializeToString()))
    return status, status == 200 and PushObjectResponse.FromString(told).stored


def refused(front: Running) -> list[str]:
    return [str(line["reason"]) for line in front.noted]


def test_an_answer_is_announced_when_it_is_whole(talk: Callable[..., None], sites: Sequence[Identity]) -> None:
    """Before that SuperLink hears nothing of it, so that nobody waits for its parts."""
    link, reply = Link(), Reply()

    async def conversation(front: Running) -> None:
        call = await front.connect(sites[0])
        told = await announce(call, sites[0], reply)
        assert set(told.objects_to_push) == reply.parts.keys()
        *first, last = reply.parts.items()
        for name, content in first:
            assert await push(call, sites[0], told.session_id, name, content) == (200, True)
        assert not link.answers
        for _ in range(2):  # the second, of a site that did not hear the first
            assert await push(call, sites[0], told.session_id, *last) == (200, True)
        assert [answer.SerializeToString() for answer in link.answers] == [reply.announcement()]
        assert link.parts == reply.parts

    talk(conversation, link)


def test_a_part_is_what_it_was_announced_as(talk: Callable[..., None], sites: Sequence[Identity]) -> None:
    """Another content, or one that Flower would join from other parts: else SuperLink believes the announcement, and
    refuses the same object to the coordinator."""
    link = Link()

    async def conversation(front: Running) -> None:
        reply = Reply()
        session = (await announce(await front.connect(sites[0]), sites[0], reply)).session_id
        name = next(iter(reply.parts))
        wrong = (name, reply.parts[name] + b"x"), (reply.name, reply.parts[name]), ("e" * 64, b"x")
        for part in wrong:
            assert await push(await front.connect(sites[0]), sites[0], session, *part) == (403, False)
        poison = Reply()
        poison.tree.children[0].children.append(ObjectTree(object_id="f" * 64))
        session = (await announce(await front.connect(sites[0]), sites[0], poison)).session_id
        content = poison.tree.children[0].object_id
        part = content, poison.parts[content]
        assert await push(await front.connect(sites[0]), sites[0], session, *part) == (403, False)
        assert not link.answers
        assert set(refused(front)) == {"forged"}

    talk(conversation, link)


def test_a_front_that_is_started_again_goes_on(talk: Callable[..., None], sites: Sequence[Identity]) -> None:
    link, reply, sessions = Link(), Reply(), []
    *first, last = reply.parts.items()

    async def before(front: Running) -> None:
        call = await front.connect(sites[0])
        sessions.append((await announce(call, sites[0], reply)).session_id)
        for name, content in first:
            await push(call, sites[0], sessions[0], name, content)

    async def after(front: Running) -> None:
        call = await front.connect(sites[0])
        assert await push(call, sites[0], "another session", *last) == (200, False)
        assert await push(call, sites[0], sessions[0], *last) == (200, True)
        assert link.parts == reply.parts

    talk(before, link)
    talk(after, link)


def test_a_site_hears_at_once_that_its_run_is_over(talk: Callable[..., None], sites: Sequence[Identity]) -> None:
    """Before it sends a gigabyte."""
    link = Link(says={b"/v1/fleet/get-run": 403})

    async def conversation(front: Running) -> None:
        call = await front.connect(sites[0])
        assert (await call.ask(request(sites[0], path=ANNOUNCE, body=Reply().announcement())))[0] == 403

    talk(conversation, link)


@pytest.mark.parametrize("says", [500, 503])
def test_what_superlink_did_not_get_is_passed_on_again(
    talk: Callable[..., None], sites: Sequence[Identity], says: int
) -> None:
    link, reply = Link(says={PART: says}), Reply()

    async def conversation(front: Running) -> None:
        call = await front.connect(sites[0])
        session = (await announce(call, sites[0], reply)).session_id
        told = [await push(call, sites[0], session, *part) for part in reply.parts.items()]
        assert told[-1] == (503, False)
        link.says.clear()
        assert await push(call, sites[0], session, *list(reply.parts.items())[-1]) == (200, True)
        assert link.parts == reply.parts

    talk(conversation, link)


def test_a_site_has_what_it_was_given_and_no_more(talk: Callable[..., None], sites: Sequence[Identity]) -> None:
    """Also from a front that was started since."""
    message = Reply()
    given = PushMessagesRequest.FromString(message.announcement())
    link = Link(
        gives=PullMessagesResponse(messages_list=given.messages_list, message_object_trees=given.message_object_trees)
    )
    asked = [
        *((b"/v1/fleet/pull-object", PullObjectRequest(object_id=name)) for name in message.parts),
        (b"/v1/fleet/confirm-message-received", ConfirmMessageReceivedRequest(message_object_id=message.name)),
    ]

    async def conversation(front: Running) -> None:
        for path, body in asked:
            call = await front.connect(sites[1])
            assert (await call.ask(request(sites[1], path=path, body=body.SerializeToString())))[0] == 403
        call = await front.connect(sites[0])
        status, told = await call.ask(request(sites[0], path=b"/v1/fleet/pull-messages"))
        assert (status, told) == (200, link.gives.SerializeToString())
        for path, body in asked:
            assert (await call.ask(request(sites[0], path=path, body=body.SerializeToString())))[0] == 200
        other = request(sites[0], path=asked[0][0], body=PullObjectRequest(object_id="e" * 64).SerializeToString())
        assert (await call.ask(other))[0] == 403
        assert set(refused(front)) == {"not_given"}

    async def later(front: Running) -> None:
        call = await front.connect(sites[0])
        for path, body in asked:
            assert (await call.ask(request(sites[0], path=path, body=body.SerializeToString())))[0] == 200

    talk(conversation, link)
    talk(later, link)
