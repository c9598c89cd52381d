"""Questions to nodes and their replies: sent, waited for within a deadline, and told apart by what went wrong."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from unimiss_core.errors import WireError
from unimiss_core.wire import Introduction, Refusal

AT_ONCE = 4
"""Replies that are taken in at a time. All that are ready could be as many as there are sites, and each is as large as
the model."""

POLL_S = 0.2
"""Pause between two looks for replies; between machines each look is a request."""

_NO_REPLY = {3, 4, 5}
"""Flower's error codes for a message, a reply or a node that is not available (any more)."""

_STATUS = {"failed": "error", "no_reply": "absent"}
"""Reason -> status; every other reason is a refusal."""


@dataclass(frozen=True)
class Asked:
    """A request that a node has not answered yet."""

    node_id: int
    round: int
    expires_at: float


class Exchange:
    """Training requests and their replies, over all rounds of a run.

    deadline_s: how long a try of a round waits. late_count: whether a reply is still of use when its round was closed.

    Messages live twice as long as the deadline, after which Flower neither delivers them nor takes a reply: what comes
    a little late is then there for the round's next try, or for the next round.
    """

    def __init__(self, grid: Grid, *, deadline_s: float, late_count: bool) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._time_to_live_s = 2 * deadline_s
        self._late_count = late_count
        self._round = 0
        self._give_up = 0.0
        self._waiting: dict[str, Asked] = {}

    def begin(self, round: int) -> None:
        """A try of the round: its deadline runs from now; requests whose time is over are forgotten."""
        now = time.monotonic()
        self._round, self._give_up = round, now + self._deadline_s
        self._waiting = {key: asked for key, asked in self._waiting.items() if now < asked.expires_at}

    @property
    def busy(self) -> dict[int, int]:
        """Node -> the round that it may still answer in time to count; another request would only queue behind it."""
        return {asked.node_id: asked.round for asked in self._waiting.values() if self._is_of_use(asked)}

    def ask(self, node_id: int, content: RecordDict) -> bool:
        """Send this round's request; False where the node is not there any more, so that no reply is waited for."""
        message = Message(content, node_id, "train", ttl=self._time_to_live_s, group_id=str(self._round))
        if (message_id := pushed(self._grid, message)) is None:
            return False
        self._waiting[message_id] = Asked(node_id, self._round, time.monotonic() + self._time_to_live_s)
        return True

    def replies(self, enough: Callable[[], bool]) -> Iterator[tuple[Asked, Message]]:
        """Replies of use as they arrive, until all of this round replied - and, where those are not `enough`, late ones
        of earlier rounds too - or the deadline passed; more may be asked meanwhile."""
        while self._is_waited_for(enough) and time.monotonic() < self._give_up:
            waiting, some_arrived = list(self._waiting), False
            for start in range(0, len(waiting), AT_ONCE):
                arrived = list(self._grid.pull_messages(waiting[start : start + AT_ONCE]))
                some_arrived = some_arrived or bool(arrived)
                while arrived:
                    asked = self._waiting.pop(arrived[0].metadata.reply_to_message_id, None)
                    if asked is None or not self._is_of_use(asked):
                        del arrived[0]
                    else:
                        yield asked, arrived.pop(0)  # bound to no name, or it would be held while the next is pulled
            if not some_arrived:
                time.sleep(POLL_S)

    def _is_of_use(self, asked: Asked) -> bool:
        return self._late_count or asked.round == self._round

    def _is_waited_for(self, enough: Callable[[], bool]) -> bool:
        rounds = self.busy.values()
        return self._round in rounds or (bool(rounds) and not enough())


def pushed(grid: Grid, message: Message) -> str | None:
    """Send a message; its id, or None where Flower does not take it: a node that was stopped or unregistered leaves the
    SuperLink at once, perhaps while the nodes before it were being asked."""
    return next(iter(grid.push_messages([message])), None) or None


def content_of(reply: Message) -> Any:
    """What a site sent. Raises WireError with its reason where it did not do what was asked."""
    if reply.has_error():
        # Flower's own text may quote an exception of the site; its code alone says what happened.
        reason = "no_reply" if reply.error.code in _NO_REPLY else "failed"
        raise WireError(reason, f"Flower error code {reply.error.code}")
    if (refusal := Refusal.found_in(reply.content)) is not None:
        raise WireError(refusal.reason, "the site says so")
    return reply.content


def introduction_of(reply: Message) -> Introduction:
    """Who a node says it is. Raises WireError."""
    introduction = Introduction.unpack(content_of(reply))
    if not introduction.ranks:
        raise WireError("no_usable_scans", "the site introduced itself with no scan")
    return introduction


def status_of(reason: str) -> str:
    """How a site stands in the metrics that did not count for this reason."""
    return _STATUS.get(reason, "refused")
