"""How long a node is waited for until it says who it is: it may have an archive to read first, or be dead.

What is remembered goes by name. A node that has a registered key, or a name that Flower was told, keeps that when it
starts again; a nameless one is another node to Flower then, so that of such nodes only those that are there are
remembered one by one, and the others are counted.
"""

import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

AGAIN_S = 30.0
"""How long a node that introduced itself before is waited for when it is asked again, for it has read its archive; and
how long after a node could not take part it is asked again, while others are waited for: twice as long each time, for
what it is asked costs it work, and lines of its audit log."""

LONGEST_AGAIN_S = 960.0

MOST_UNHEARD = 3
"""How often a node may leave before it answered, or let its time pass, and still be waited for as if it were new."""


class Called(NamedTuple):
    """What people call a node. lasts: whether it is still called that when it starts again."""

    name: str
    lasts: bool

    @property
    def counted_as(self) -> str:
        """All nodes whose name does not last are counted as one."""
        return self.name if self.lasts else ""


class Patience:
    """What nodes did when they were asked who they are, and how long each is waited for therefore."""

    def __init__(self, introduction_s: float) -> None:
        self._introduction_s = introduction_s
        self._began = time.monotonic()
        self._silent: set[str] = set()
        """Let their time to answer pass, and have not answered since."""
        self._known: set[str] = set()
        """Introduced themselves once."""
        self._refused: dict[str, tuple[int, float]] = {}
        """Answered in this gathering, and could not take part: how often, and when it is asked again."""
        self._unheard: Counter[str] = Counter()
        self._passing: set[str] = set()
        """Names that do not last, of nodes that are there."""

    def begin(self) -> None:
        """The sites of another round are gathered."""
        self._began = time.monotonic()
        self._refused.clear()

    def until(self, node: Called) -> float:
        """Until when, by the monotonic clock, a node that is asked now is waited for."""
        now, often = time.monotonic(), self._unheard[node.counted_as] >= MOST_UNHEARD
        if not node.lasts:
            self._passing.add(node.name)
        if node.name in self._silent or node.name in self._refused or (often and node.lasts):
            return now
        if often:  # it may be any of those that came and went: all together cost a round no more than this
            return min(self._began + AGAIN_S, now + self._introduction_s)
        return now + (min(self._introduction_s, AGAIN_S) if node.name in self._known else self._introduction_s)

    def note_introduced(self, node: Called) -> None:
        self._known.add(node.name)
        self._silent.discard(node.name)
        self._unheard.pop(node.name, None)

    def note_refused(self, node: Called) -> None:
        often, _ = self._refused.get(node.name, (0, 0.0))
        pause_s = min(AGAIN_S * 2.0**often, LONGEST_AGAIN_S)
        self._refused[node.name] = often + 1, time.monotonic() + pause_s

    def is_put_off(self, node: Called) -> bool:
        """Whether it said a short while ago that it cannot take part."""
        return node.name in self._refused and time.monotonic() < self._refused[node.name][1]

    def note_silent(self, node: Called) -> None:
        """It let its time to answer pass."""
        self.note_left(node)
        self._silent.add(node.name)

    def note_left(self, node: Called) -> None:
        """It left before it answered."""
        self._unheard[node.counted_as] += node.name not in self._silent

    def forget_all_but(self, nodes: Iterable[Called]) -> set[str]:
        """Forget nodes whose name does not last that are not among those that are there; what they were called."""
        gone = self._passing - {node.name for node in nodes}
        for names in (self._passing, self._silent, self._known):
            names -= gone
        for name in gone & self._refused.keys():
            del self._refused[name]
        return gone
