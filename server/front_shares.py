"""What each peer may take of the public side, so that one cannot take it all."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from server.front_rules import Refused

Key = TypeVar("Key")

HOUR_S = 3600.0
OBJECT_BYTES = 1_000_000
"""That an announced object counts for: SuperLink's database is busy with it for some milliseconds."""


@contextmanager
def counted(counter: Counter[Key], key: Key, most: int) -> Iterator[None]:
    """Count one more of `key` within the block. Raises Refused: there are as many already."""
    if counter[key] >= most:
        raise Refused("busy")
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


class Allowance:
    """Bytes that each site may send in an hour: SuperLink keeps them on disk until they are asked for."""

    def __init__(self, most: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._hour = -1
        self._taken: Counter[str] = Counter()

    def take(self, site: str, length: int) -> None:
        """Raises Refused: not that much is left; in the next hour it is."""
        if (hour := int(self._clock() // HOUR_S)) != self._hour:
            self._hour = hour
            self._taken.clear()
        if self._taken[site] + length > self._most:
            raise Refused("busy")
        self._taken[site] += length
