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
MOST_STRANGERS = 50
"""Pairs of reason and address that are told apart at a time; all others are one. So whoever has many addresses adds 20
MB a day to the log at most. Sites are always told apart: they are few, and known."""
OTHERS = "others"


@dataclass
class _Kept:
    told_at: float
    is_stranger: bool
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

    def add(self, reason: str, peer: str, *, is_stranger: bool = False) -> None:
        """peer: a site's name, or of a stranger, who showed no certificate, the IP address."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if is_stranger and (reason, peer) not in self._kept and self._is_full():
            peer = OTHERS
        if (kept := self._kept.get((reason, peer))) is None:
            self._kept[reason, peer] = _Kept(self._clock(), is_stranger)
            self._tell(reason, peer, 1)
        else:
            kept.untold += 1

    def _is_full(self) -> bool:
        return sum(kept.is_stranger for kept in self._kept.values()) >= MOST_STRANGERS

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
            self._kept[reason, peer] = _Kept(now, kept.is_stranger)

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
