"""What the cache remembers beside its scans, and when that is forgotten.

A line of built.jsonl says what became of one scan under one plan; library-*.json and private-*.json, what one plan made
of the folders. All of it can be made anew from the scans: what patients have cost stands in the ledger, and nowhere
here. So what a plan left goes 90 days after its last use, and lines that tell of no prepared scan go as well.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from unimiss_core import durable, locks
from unimiss_core.json_text import object_in
from unimiss_core.study import PlanConfig

KEPT_DAYS = 90.0
"""A plan is forgotten when it was not used in these days."""
_JOURNAL, _LOCK = "built.jsonl", "built.lock"


@dataclass(frozen=True)
class Record:
    """One line of built.jsonl: a prepared scan, or the reason why there is none."""

    stamp: str
    key: str = ""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    offset: int = 0
    reason: str = ""
    decoders: str = ""
    """Those that were there when a reason was found."""
    plan: str = ""
    """As of `plan_digest`."""

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class Journal:
    """built.jsonl, open to be added to. records: by stamp, in the order in which they were written last."""

    def __init__(self, file: BinaryIO, records: dict[str, Record]) -> None:
        self._file, self.records = file, records
        self._file.write(b"\n")  # ends a line that a crash may have cut

    def note(self, record: Record) -> None:
        """Raises OSError."""
        self._file.write(record.line().encode())


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """Nobody tidies it meanwhile; others may add to it. Raises OSError."""
    with _held(folder, shared=True):
        records, _ = _read(folder / _JOURNAL)
        with (folder / _JOURNAL).open("ab", buffering=0) as file:
            yield Journal(file, records)


def tidy(folder: Path, plan: str, stamps: Collection[str]) -> None:
    """Write the journal anew without lines that are of no use, where these are most of it. plan: the one at hand, and
    the stamps of its candidates. On a full disk, or while another process has it open, it stays as it is."""
    with suppress(OSError), _held(folder, wait=False):
        records, lines = _read(folder / _JOURNAL)
        used = {file.stem.partition("-")[2] for file in _libraries(folder)} - {plan}
        present = {file.name.partition(".")[0] for file in folder.iterdir()}
        newest = {record.key: record.stamp for record in records.values()}  # a file that moved has another stamp
        wanted = set(stamps)

        def is_of_use(record: Record) -> bool:
            if record.stamp in wanted:
                return True
            if record.reason:
                return not record.plan or record.plan in used  # earlier versions named none
            return record.key in present and newest[record.key] == record.stamp

        kept = [record.line() for record in records.values() if is_of_use(record)]
        if 2 * len(kept) < lines:
            durable.write_text(folder / _JOURNAL, "".join(kept))


@contextmanager
def _held(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """The journal itself cannot be held: another file takes its place. Raises as `unimiss_core.locks.locked`."""
    with (folder / _LOCK).open("ab") as file, locks.locked(file, shared=shared, wait=wait):
        yield


def _read(path: Path) -> tuple[dict[str, Record], int]:
    """Records by stamp, and how many lines they are of. Those that were damaged are passed over: their scans are built
    again. Raises OSError."""
    records = dict[str, Record]()
    try:
        lines = list(filter(None, path.read_text(encoding="utf-8", errors="replace").splitlines()))
    except FileNotFoundError:
        return {}, 0
    for line in lines:
        try:
            raw = object_in(line)
            raw |= {name: tuple(raw[name]) for name in ("shape", "spacing_mm")}
            record = Record(**raw)
        except (ValueError, TypeError, KeyError):
            continue
        records.pop(record.stamp, None)
        records[record.stamp] = record
    return records, len(lines)


def plan_digest(plan: PlanConfig) -> str:
    return hashlib.sha256(plan.canonical().encode()).hexdigest()[:16]


def library_file(folder: Path, plan: PlanConfig, *, by_patient: bool) -> Path:
    return folder / f"{'private' if by_patient else 'library'}-{plan_digest(plan)}.json"


def note_use(file: Path) -> None:
    """Of a library file."""
    with suppress(OSError):
        os.utime(file)


def forget_unused(folder: Path) -> None:
    """Delete library files of plans that were not used for long."""
    for file in _libraries(folder):
        with suppress(FileNotFoundError):  # another process does the same
            if time.time() - file.stat().st_mtime > KEPT_DAYS * 86_400:
                file.unlink()


def _libraries(folder: Path) -> list[Path]:
    return [*folder.glob("library-*.json"), *folder.glob("private-*.json")]
