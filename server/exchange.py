"""Questions to nodes and their replies: sent, waited for within a deadline, and told apart by what went wrong."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from unimiss_core.errors import WireError, where
from unimiss_core.wire import Introduction, Refusal, num_bytes

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.02
"""First pause after looking for replies in vain. It doubles until one arrives: rounds take minutes, and between
machines each look for each reply is a request."""

LONGEST_PAUSE_S = 2.0
"""And never longer than a quarter of the grace, in which a reply may come that decides about the round."""

GRACE = 0.25
"""How much longer than its deadline a round waits where too few updates count, as a share of it."""

_REASONS = dict.fromkeys((3, 4, 5), "no_reply") | {7: "bundle"}
"""Flower's error codes for a message, a reply or a node that is not available (any more), and for code that a site does
not run; any other is a failure of the program there."""

_STATUS = {"failed": "error", "no_reply": "absent"}
"""Reason -> status; every other reason is a refusal."""


@dataclass(frozen=True)
class Asked:
    """A request that a node has not answered yet. site: who the node said it was, when it was asked."""

    node_id: int
    site: Introduction
    round: int
    expires_at: float


@dataclass(frozen=True)
class Reply:
    """What a node answered. message: None where it cannot be read."""

    message: Message | None


class Exchange:
    """Training requests and their replies, over all rounds of a run.

    deadline_s: how long a round waits; where too few updates count by then, GRACE of it longer. late_count: whether a
    reply is still of use when its round was closed.

    Messages live until then - until twice the deadline, where late replies count - after which Flower neither delivers
    them nor takes a reply. What the request was made of, SuperLink is then told to drop.
    """

    def __init__(self, grid: Grid, *, deadline_s: float, late_count: bool) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._late_count = late_count
        self._time_to_live_s = deadline_s * (2.0 if late_count else 1.0 + GRACE)
        self._round = 0
        self._deadline = 0.0
        self._waiting: dict[str, Asked] = {}

    def begin(self, round: int) -> None:
        """A try of the round: its deadline runs from now; requests whose time is over are forgotten."""
        now = time.monotonic()
        self._round, self._deadline = round, now + self._deadline_s
        for message_id in [key for key, asked in self._waiting.items() if now >= asked.expires_at]:
            del self._waiting[message_id]
            dropped(self._grid, message_id)

    @property
    def at_work(self) -> dict[int, int]:
        """Node -> the round that it may still answer in time to count; another request would only queue behind it."""
        return {asked.node_id: asked.round for asked in self._waiting.values() if self._is_of_use(asked)}

    @property
    def too_late(self) -> dict[int, int]:
        """Node -> the earlier round that it may still be at work on, though its answer is of no use any more."""
        return {asked.node_id: asked.round for asked in self._waiting.values() if not self._is_of_use(asked)}

    def ask(self, node_id: int, site: Introduction, content: RecordDict) -> bool:
        """Send `site` this round's request; False where its node is not there any more: no reply is waited for then."""
        message = Message(content, node_id, "train", ttl=self._time_to_live_s, group_id=str(self._round))
        if (message_id := pushed(self._grid, message)) is None:
            return False
        self._waiting[message_id] = Asked(node_id, site, self._round, time.monotonic() + self._time_to_live_s)
        return True

    def replies(self, enough: Callable[[], bool]) -> Iterator[tuple[Asked, Reply]]:
        """Replies of use as they arrive, until all of this round replied or its deadline passed; where those are not
        `enough`, until all that may still come have come, late ones of earlier rounds too, or their time is over. More
        may be asked meanwhile."""
        pause_s, longest_s = FIRST_PAUSE_S, min(LONGEST_PAUSE_S, GRACE * self._deadline_s / 4)
        while self._is_waited_for(enough):
            some_arrived = False
            for message_id in list(self._waiting):
                if (reply := pulled(self._grid, message_id)) is None:
                    continue
                some_arrived = True
                if reply.message is None or reply.message.has_error():  # by SuperLink, perhaps, of a node that is gone
                    dropped(self._grid, message_id)
                if self._is_of_use(asked := self._waiting.pop(message_id)):
                    yield asked, reply
                del reply  # or it would be held while the next is pulled
            pause_s = FIRST_PAUSE_S if some_arrived else min(2 * pause_s, longest_s)
            if not some_arrived:
                time.sleep(pause_s)

    def _is_of_use(self, asked: Asked) -> bool:
        return self._late_count or asked.round == self._round

    def _is_waited_for(self, enough: Callable[[], bool]) -> bool:
        now = time.monotonic()
        rounds = {asked.round for asked in self._waiting.values() if self._is_of_use(asked) and now < asked.expires_at}
        return (now < self._deadline and self._round in rounds) or (bool(rounds) and not enough())


def pushed(grid: Grid, message: Message) -> str | None:
    """Send a message; its id, or None where Flower does not take it: a node that was stopped or unregistered leaves the
    SuperLink at once, perhaps while the nodes before it were being asked."""
    return next(iter(grid.push_messages([message])), None) or None


def pulled(grid: Grid, message_id: str) -> Reply | None:
    """The reply to a message, once; None where there is none yet.

    One at a time: all that are ready could be as many as there are sites, each as large as the model. And Flower reads
    what a node sent before we can check it, gives up at the first reply that it cannot read, and counts all that it was
    asked for as delivered. With the reply it hands over whatever else was pushed for the coordinator, by any node, in
    any name: of that nothing is looked at.
    """
    try:
        given = grid.pull_messages([message_id])
        found = next((reply for reply in given if reply.metadata.reply_to_message_id == message_id), None)
    except (OSError, httpx.HTTPError):
        raise  # the SuperLink is out of reach
    except Exception as error:
        log.warning("a reply cannot be read: %s", where(error))
        return Reply(None)
    return None if found is None else Reply(found)


def dropped(grid: Grid, message_id: str) -> None:
    """Let SuperLink forget what a message was made of, the whole model of a round among it: it does so when the node
    confirms the message, and else keeps it, long after the message itself, until the run ends.

    The confirmation, sent in the node's place, is no public interface of Flower's: the version is pinned, and
    tests/test_dropped_requests.py holds it to this. A grid in this process has nothing to drop.
    """
    if not isinstance(grid, HttpGrid):
        return
    request = ConfirmMessageReceivedRequest(node=grid.node, run_id=grid.run.run_id, message_object_id=message_id)
    try:
        grid._runtime_client.ConfirmMessageReceived(request)
    except (OSError, httpx.HTTPError) as error:  # it costs room on the disk, and must not cost the round
        log.warning("SuperLink keeps a request that nobody fetched: %s", where(error))


@contextmanager
def read_or_malformed() -> Iterator[None]:
    """For what is made of one site's reply before any of it counts: whatever that raises costs the site its round, and
    never the run. The log says where, and nothing that the site wrote. Raises WireError."""
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        log.warning("a reply cannot be read: %s", where(error))
        raise WireError("malformed", "the reply cannot be read") from None


def content_of(reply: Reply) -> Any:
    """What a site sent. Raises WireError with its reason where it did not do what was asked."""
    message = reply.message
    if message is None:
        raise WireError("malformed", "the reply cannot be read")
    if message.has_error():
        # Flower's own text may quote an exception of the site; its code alone says what happened.
        raise WireError(_REASONS.get(message.error.code, "failed"), f"Flower error code {message.error.code}")
    if (refusal := Refusal.found_in(message.content)) is not None:
        raise WireError(refusal.reason, "the site says so")
    return message.content


def bytes_of(reply: Reply) -> int:
    """Of the arrays that a site sent, whatever they are."""
    return num_bytes(reply.message.content) if reply.message is not None and reply.message.has_content() else 0


def introduction_of(reply: Reply) -> Introduction:
    """Who a node says it is. Raises WireError."""
    introduction = Introduction.unpack(content_of(reply))
    if not introduction.ranks:
        raise WireError("no_usable_scans", "the site introduced itself with no scan")
    return introduction


def status_of(reason: str) -> str:
    """How a site stands in the metrics that did not count for this reason."""
    return _STATUS.get(reason, "refused")
