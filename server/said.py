"""What a ServerApp says of its rounds as they go, kept for other processes: `unimiss-server run` and `status`.

OUT/said.jsonl      an event of `unimiss_core.progress` a line, with the time at which it was said:
                    {"at": 1795745000.1, "event": "SiteReplied", "round": 7, "site": "hill-ct", "status": "ok", ...}
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from unimiss_core import progress
from unimiss_core.json_text import object_in
from unimiss_core.progress import Collapsed, Event, Note, RoundDone, RoundStarted, SiteReplied

_FILE = "said.jsonl"
_KEPT = {kind.__name__: kind for kind in (RoundStarted, SiteReplied, Collapsed, RoundDone, Note)}
_TAIL = 1 << 20
"""Bytes at the file's end, in which the running round is looked for."""


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Write down what the block says. What cannot be written is lost, and costs no round."""

    def keep(event: Event) -> None:
        if (name := type(event).__name__) in _KEPT:
            line = {"at": time.time(), "event": name, **asdict(event)}
            with suppress(OSError), (folder / _FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True) + "\n")

    with progress.listen(keep):
        yield


class Said:
    """What another process says of the run in a folder from now on, shown as a simulation is."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._read = self._path.stat().st_size if self._path.exists() else 0
        """Bytes that were read, or were there before."""

    def say_again(self) -> None:
        """Tell `unimiss_core.progress` what is new, each once; to be called now and then."""
        for event in self._new(time.time()):
            progress.report(event)

    def _new(self, now: float) -> list[Event]:
        """A line that is being written waits until it is whole. now: seconds since 1970."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read += len(whole) + len(end)
        told = filter(None, map(_event_of, whole.splitlines()))
        return [
            replace(event, ago_s=max(0.0, now - at)) if isinstance(event, RoundStarted) else event for at, event in told
        ]


@dataclass
class AtWork:
    """A round that sites were asked for and that is not done. since: of the last try, seconds since 1970."""

    round: int
    since: float
    sites: tuple[str, ...]
    replied: dict[str, SiteReplied] = field(default_factory=dict)

    @property
    def silent(self) -> list[str]:
        """Who was asked, and has not answered."""
        return [site for site in self.sites if site not in self.replied]


def at_work(folder: Path) -> AtWork | None:
    """The round that is at work in a run's folder, or was when its coordinator ended."""
    found = None
    for at, event in filter(None, map(_event_of, _tail(folder / _FILE).splitlines())):
        match event:
            case RoundStarted():
                found = AtWork(event.round, at, event.sites)
            case SiteReplied() if found is not None:
                found.replied[event.site] = event
            case RoundDone():
                found = None
    return found


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read()
    except OSError:
        return b""


def _event_of(line: bytes) -> tuple[float, Event] | None:
    """When it was said, and what; None of what a crash tore."""
    try:
        told = object_in(line)
        at, kind = float(told.pop("at")), _KEPT[told.pop("event")]
        if kind is RoundStarted:
            told["sites"] = tuple(told["sites"])
        return at, kind(**told)
    except (ValueError, KeyError, TypeError):
        return None
