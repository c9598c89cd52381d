"""What a ServerApp says to whoever watches, kept for `unimiss-server run`, which is another process.

    OUT/said.jsonl      a line for each, in their order:
                        {"note": "best by what sites measured ...: round 7, ..."}
                        {"round": 7, "sign": "volume: all targets are alike, ...", "site": "hill-ct"}

What else a round came to, `server.watching` tells by the metrics. Signs of collapse could be told by them, too, but by
code that loads torch, which that process does without.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unimiss_core import progress
from unimiss_core.progress import Collapsed, Event, Note

_FILE = "said.jsonl"


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Write down what the block says. What cannot be written is lost, and costs no round."""

    def keep(event: Event) -> None:
        match event:
            case Note(text):
                line = {"note": text}
            case Collapsed():
                line = vars(event)
            case _:
                return
        with suppress(OSError), (folder / _FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")

    with progress.listen(keep):
        yield


class Said:
    """What was said of a run's folder since this was made."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        self._read = self._path.stat().st_size if self._path.exists() else 0
        """Bytes that were read, or were there before."""

    def new(self) -> list[Note | Collapsed]:
        """Each once; a line that is being written waits until it is whole."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._read += len(whole) + len(end)
        return [event for line in whole.splitlines() if (event := _event_of(line)) is not None]


def _event_of(line: bytes) -> Note | Collapsed | None:
    """None of what a crash tore."""
    try:
        told = json.loads(line)
        if "note" in told:
            return Note(str(told["note"]))
        return Collapsed(int(told["round"]), str(told["site"]), str(told["sign"]))
    except (ValueError, KeyError, TypeError):
        return None
