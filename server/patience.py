"""How long a node is waited for until it says who it is: it may have an archive to read first, or be dead.

What is remembered goes by name. A node that has a registered key, or a name that Flower was told, keeps that when it
starts again; a nameless one is another node to Flower then, so that of such nodes only those that are there are
remembered one by one, and the others are counted.
"""

import time
from collections import Counter
from collections.abc import Iterable

from flwr.proto.node_pb2 import NodeInfo

from server.registration import Registration

AGAIN_S = 30.0
"""How long a node that introduced itself before is waited for when it is asked again, for it has read its archive; and
how long after a node could not take part it is asked again, while others are waited for."""

MOST_UNHEARD = 3
"""How often a node may leave before it answered, or let its time pass, and still be waited for as if it were new."""

_NAMELESS = ""
"""Under which all nodes without a name are counted."""


class Patience:
    """What nodes did when they were asked who they are, and how long each is waited for therefore."""

    def __init__(self, registration: Registration, introduction_s: float) -> None:
        self._name_of = registration.name_of
        self._has_name = registration.has_name
        self._introduction_s = introduction_s
        self._began = time.monotonic()
        self._silent: set[str] = set()
        """Let their time to answer pass, and have not answered since."""
        self._known: set[str] = set()
        """Introduced themselves once."""
        self._refused: set[str] = set()
        """Answered in this gathering, and could not take part."""
        self._unheard: Counter[str] = Counter()
        self._passing: set[str] = set()
        """What nodes without a name are called as long as they are there."""

    def begin(self) -> None:
        """The sites of another round are gathered."""
        self._began = time.monotonic()
        self._refused.clear()

    def until(self, node: NodeInfo) -> float:
        """Until when, by the monotonic clock, a node that is asked now is waited for."""
        name, now = self._remembered(node), time.monotonic()
        often = self._unheard[self._counted(node)] >= MOST_UNHEARD
        if name in self._silent | self._refused or (often and self._has_name(node)):
            return now
        if often:  # it may be any of those that came and went: all together cost a round no more than this
            return min(self._began + AGAIN_S, now + self._introduction_s)
        return now + (min(self._introduction_s, AGAIN_S) if name in self._known else self._introduction_s)

    def note_introduced(self, node: NodeInfo) -> None:
        name = self._remembered(node)
        self._known.add(name)
        self._silent.discard(name)
        self._unheard.pop(name, None)

    def note_refused(self, node: NodeInfo) -> None:
        self._refused.add(self._remembered(node))

    def note_silent(self, node: NodeInfo) -> None:
        """It let its time to answer pass."""
        name = self._remembered(node)
        self._unheard[self._counted(node)] += name not in self._silent
        self._silent.add(name)

    def note_left(self, node: NodeInfo) -> None:
        """It left before it answered."""
        self._unheard[self._counted(node)] += self._name_of(node) not in self._silent

    def forget_all_but(self, nodes: Iterable[NodeInfo]) -> set[str]:
        """Forget the nameless nodes that are not among those that are there; what they were called."""
        gone = self._passing - {self._name_of(node) for node in nodes}
        for names in (self._passing, self._silent, self._known, self._refused):
            names -= gone
        return gone

    def _remembered(self, node: NodeInfo) -> str:
        name = self._name_of(node)
        if not self._has_name(node):
            self._passing.add(name)
        return name

    def _counted(self, node: NodeInfo) -> str:
        return self._name_of(node) if self._has_name(node) else _NAMELESS
