"""How long the coordinator waits for one reply whose parts are still to come, and how much they may come to.

A site announces a reply, then sends its parts. Flower hands the announced reply to the ServerApp and waits there for
the parts, up to two hours, while no other reply is taken: one site that is slow, or wants to be, would so cost a round
all others' replies, whose time runs out meanwhile. Then Flower joins the parts as they say themselves, to whatever
size. Where our front stands before SuperLink, replies come whole (`server.front_replies`); elsewhere the wait is
bounded here. Flower has no setting for either, so that two names of its module are replaced; the version is pinned,
and tests/test_uploads.py holds it to what is relied upon.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.superlink.grid import http_grid

from server.exchange import GRACE
from unimiss_core.unfolding import bytes_in_memory

LEAST_S = 60.0
"""However short the deadline is."""
MOST_BYTES = 4 << 30
"""In memory, of one reply: its parts, and what they are joined to. An update of 200 million parameters takes half."""


def longest_upload_s(deadline_s: float) -> float:
    """Half of the grace that follows a round's deadline: after one such wait there is time for all other replies."""
    return max(LEAST_S, deadline_s * GRACE / 2)


def bound(deadline_s: float) -> None:
    """In this process, wait no longer than `longest_upload_s`; the site then counts as one that did not reply. And join
    no reply of more than MOST_BYTES, which then cannot be read (`server.exchange.pulled`)."""
    grid: Any = http_grid  # its names are not promised
    grid.pull_objects = partial(pull_objects, max_time=longest_upload_s(deadline_s))
    grid.inflate_object_from_contents = joined


def joined(object_id: str, parts: dict[str, bytes]) -> Any:
    """As Flower joins them. Raises ValueError: they would come to too much."""
    if (size := in_memory(parts)) > MOST_BYTES:
        raise ValueError(f"a reply would take {size} bytes of memory; expected {MOST_BYTES} at most")
    return inflate_object_from_contents(object_id, parts)


def in_memory(parts: Mapping[str, bytes]) -> int:
    """Raises ValueError."""
    return sum(map(bytes_in_memory, parts.values()))
