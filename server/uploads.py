"""How long the coordinator waits for one reply whose parts are still to come.

A site announces a reply, then sends its parts. Flower hands the announced reply to the ServerApp and waits there for
the parts, up to two hours, while no other reply is taken: one site that is slow, or wants to be, would so cost a round
all others' replies, whose time runs out meanwhile. Flower has no setting for it, so that one name of its module is
replaced; the version is pinned, and tests/test_uploads.py holds it to what is relied upon.
"""

from functools import partial
from typing import Any

from flwr.superlink.grid import http_grid

from server.exchange import GRACE

LEAST_S = 60.0
"""However short the deadline is."""


def longest_upload_s(deadline_s: float) -> float:
    """Half of the grace that follows a round's deadline: after one such wait there is time for all other replies."""
    return max(LEAST_S, deadline_s * GRACE / 2)


def bound(deadline_s: float) -> None:
    """In this process, wait no longer than `longest_upload_s`; the site then counts as one that did not reply."""
    grid: Any = http_grid
    grid.pull_objects = partial(_waiting_long(grid.pull_objects), max_time=longest_upload_s(deadline_s))


def _waiting_long(pull_objects: Any) -> Any:
    """Flower's own function, also where it was bounded before."""
    return pull_objects.func if isinstance(pull_objects, partial) else pull_objects
