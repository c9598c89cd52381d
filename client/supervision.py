"""Keeping a site's processes alive for weeks: what is started again, when, and what is told of it.

The gate (Flower's SuperNode) and flower-superexec live and end together: a ClientApp hangs on both. However one of them
ends - also with exit code 0, with which a SuperNode ends when its coordinator has forgotten it - both are started again
after a pause. The first pauses are shorter than the 60 s for which a coordinator holds a lost connection for live, the
later ones long enough not to be a burden on a coordinator that is being mended.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from client.health import LASTING, PROBLEMS, Contact, Health, Refused, State
from unimiss_core.errors import UnimissError

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
LOOK_EVERY_S = 1.0
LOST_AFTER_S = 60.0
"""A problem that passes sooner is a word between two networks, and no loss of the coordinator."""
PROCESSES = (("the gate", "gate.log"), ("flower-superexec", "training.log"))
"""Of a life, in the order in which they are to end: what each is called, and where it logs."""
PATIENCE_S = 15.0
"""For a process that was asked to end: the gate signs off at the coordinator, at which others then no longer wait."""

Note = Callable[[str, Mapping[str, str | int | float]], None]
Event = Literal["stopped", "connected", "lost"]
_IN_WORDS: Mapping[Event, str] = {
    "stopped": "the daemon has stopped",
    "connected": "the coordinator is there",
    "lost": "the coordinator is not there any more; it is asked again and again",
}


class Running(Protocol):
    """A process, as `unimiss_core.child.Child`."""

    def how_it_ended(self) -> str | None: ...
    def end(self, patience_s: float) -> None: ...


def pause_s(failures: int, problem: str | None) -> float:
    """Before the next try. failures: lives in a row that never reached the coordinator, and the one that just ended."""
    if problem in LASTING:
        return LONGEST_PAUSE_S
    return float(min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S))  # weeks of failures, too


@dataclass
class Supervision:
    """start: begins a life; its processes, in the order in which they are to end. contact: what the gate last heard.
    wait: sleeps, and says whether the daemon was asked to stop meanwhile. now: seconds since 1970. refused: what the
    site last refused."""

    pid: int
    start: Callable[[], Sequence[Running]]
    contact: Callable[[], Contact | None]
    tell: Callable[[Health], None]
    note: Note
    wait: Callable[[float], bool]
    now: Callable[[], float]
    refused: Callable[[], Refused | None] = lambda: None
    _said: str = ""
    """Of what was refused: once, however often it is asked for."""
    _since: float = 0.0
    _restarts: int = 0
    _ended: str | None = None
    _is_connected: bool = False

    def run(self) -> None:
        """Until the daemon is asked to stop. Raises what `note` does at the start, and nothing later."""
        self._since = self.now()
        self._tell("starting")  # before all else: whoever would stop the daemon finds its number there
        log.info("the daemon has started, as process %d", self.pid)
        self.note(
            "daemon", {"event": "started"}
        )  # a log that is damaged is a person's to look at, before anything runs
        failures = 0
        while True:
            began = self.now()
            ended = self._live(began)
            if ended is None:
                break
            contact = self._contact_of_life(began)
            failures = 1 if contact is not None and contact.connected is not None else failures + 1
            self._restarts, self._ended = self._restarts + 1, ended
            pause = pause_s(failures, contact.problem if contact else None)
            problem = PROBLEMS.get(contact.problem) if contact is not None and contact.problem is not None else None
            log.warning("ended: %s%s; the next try is in %.0f s", ended, f"; {problem}" if problem else "", pause)
            self._tell("waiting", next_try=self.now() + pause)
            if self._is_connected:
                self._is_connected = False
                self._record("lost")
            if self.wait(pause):
                break
            self._tell("starting")
        self._tell("stopped")
        self._record("stopped")

    def _live(self, began: float) -> str | None:
        """How one of the processes ended; None where the daemon was asked to stop."""
        try:
            processes = self.start()
        except OSError as error:
            return f"cannot be started ({error.strerror or 'unknown error'})"
        try:
            self._tell("running")
            while not self.wait(LOOK_EVERY_S):
                self._watch(began)
                self._say_what_was_refused()
                for process, (name, file) in zip(processes, PROCESSES, strict=True):
                    if (ended := process.how_it_ended()) is not None:
                        return f"{name}, {ended} (log/{file} in the state folder)"
            return None
        finally:
            for process in processes:
                process.end(PATIENCE_S)

    def _watch(self, began: float) -> None:
        """Note when the coordinator is found and lost."""
        contact = self._contact_of_life(began)
        if contact is None or contact.connected is None:
            return
        troubled_s = self.now() - contact.problem_since if contact.problem_since is not None else 0.0
        if contact.problem is None and not self._is_connected:
            self._is_connected = True
            self._record("connected")
        elif troubled_s > LOST_AFTER_S and self._is_connected:
            self._is_connected = False
            self._record("lost")

    def _say_what_was_refused(self) -> None:
        if (refused := self.refused()) is not None and refused.words != self._said:
            self._said = refused.words
            log.warning("refused, with the reason `%s`: %s", refused.reason, refused.words)

    def _contact_of_life(self, began: float) -> Contact | None:
        """What the gate of this life has heard; not what one before it left in the file."""
        contact = self.contact()
        if contact is None:
            return None
        heard = (contact.connected, contact.answered, contact.problem_since)
        return contact if max((at for at in heard if at is not None), default=0.0) >= began else None

    def _tell(self, state: State, next_try: float | None = None) -> None:
        self.tell(
            Health(
                pid=self.pid,
                state=state,
                since=self._since,
                restarts=self._restarts,
                ended=self._ended,
                next_try=next_try,
            )
        )

    def _record(self, event: Event) -> None:
        """A log that cannot be written to keeps replies from leaving (`client.app`), and need not end the daemon."""
        log.info("%s", _IN_WORDS[event])
        try:
            self.note("daemon", {"event": event})
        except (OSError, UnimissError) as error:
            log.warning("%s cannot be noted: %s", event, type(error).__name__)
