"""What the front refused, from whom, how often: told to the audit log at a pace that no scan of ports can raise."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from unimiss_core.errors import where

log = logging.getLogger(__name__)

Note = Callable[[str, Mapping[str, str | int | float]], None]
"""kind, fields: writes one line of an audit log."""

EVERY_S = 60.0
"""Of one reason and peer, one line in this time; the next says how many there were since."""
MOST_PEERS = 500
"""Pairs of reason and peer that are told apart at a time; all others are one."""
OTHERS = "others"


@dataclass
class _Kept:
    told_at: float
    untold: int = 0


class Refusals:
    """Counts refusals by reason, and notes each reason and peer at its first and then at most once in `EVERY_S`."""

    def __init__(self, note: Note, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._note = note
        self._clock = clock
        self._kept: dict[tuple[str, str], _Kept] = {}
        self.counts: dict[str, int] = {}
        """Reason -> how often since this process began."""
        self._writer: ThreadPoolExecutor | None = None

    def add(self, reason: str, peer: str) -> None:
        """peer: a site's name, or an IP address where no key was shown."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if (reason, peer) not in self._kept and len(self._kept) >= MOST_PEERS:
            peer = OTHERS
        if (kept := self._kept.get((reason, peer))) is None:
            self._kept[reason, peer] = _Kept(self._clock())
            self._tell(reason, peer, 1)
        else:
            kept.untold += 1

    def tell_due(self, *, all_of_them: bool = False) -> None:
        """Note what was counted since it was last noted, where that is long enough ago; to be called now and then."""
        now = self._clock()
        for (reason, peer), kept in list(self._kept.items()):
            if not all_of_them and now - kept.told_at < EVERY_S:
                continue
            if kept.untold == 0:
                del self._kept[reason, peer]
                continue
            self._tell(reason, peer, kept.untold)
            self._kept[reason, peer] = _Kept(now)

    @contextmanager
    def told_in_background(self) -> Iterator[None]:
        """Within, lines are written in a thread of their own: no peer waits for a disk. At the end all are written."""
        with ThreadPoolExecutor(max_workers=1) as self._writer:
            yield
        self._writer = None

    def _tell(self, reason: str, peer: str, count: int) -> None:
        facts: dict[str, str | int | float] = {"reason": reason, "peer": peer, "count": count}
        if self._writer is None:
            self._write(facts)
        else:
            self._writer.submit(self._write, facts)

    def _write(self, facts: Mapping[str, str | int | float]) -> None:
        try:
            self._note("peer_refused", facts)
        except Exception as error:  # a full disk, say: the refusal stands, and the public side goes on
            log.error("a refusal could not be noted: %s", where(error))
