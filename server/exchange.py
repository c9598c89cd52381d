"""Questions to nodes and their replies: sent, waited for within a deadline, and told apart by what went wrong."""

import time
from collections.abc import Iterator
from typing import Any

from flwr.app import Message
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


class Exchange:
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
            waiting, some_arrived = list(self._waiting), False
            for start in range(0, len(waiting), AT_ONCE):
                arrived = list(self._grid.pull_messages(waiting[start : start + AT_ONCE]))
                some_arrived = some_arrived or bool(arrived)
                while arrived:
                    node_id = self._waiting.pop(arrived[0].metadata.reply_to_message_id, None)
                    if node_id is None:
                        del arrived[0]
                    else:
                        yield node_id, arrived.pop(0)  # bound to no name, or it would be held while the next is pulled
            if not some_arrived:
                time.sleep(POLL_S)


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
