"""What the cache remembers beside its scans, and when that is forgotten.

A line of built.jsonl says what became of one scan under one plan; library-*.json and private-*.json, what one plan made
of the folders. All of it can be made anew from the scans: what patients have cost stands in the ledger, and nowhere
here. So what a plan left goes 90 days after its last use, and lines that tell of no prepared scan go as well.
"""

import hashlib
import json
import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from unimiss_core import durable
from unimiss_core.study import PlanConfig

KEPT_DAYS = 90.0
"""A plan is forgotten when it was not used in these days."""
_JOURNAL = "built.jsonl"


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


@dataclass(frozen=True)
class Journal:
    """built.jsonl as it was read. records: by stamp, in the order in which they were written last."""

    path: Path
    records: dict[str, Record]
    lines: int

    def tidy(self, plan: str, stamps: Collection[str]) -> None:
        """Write the file anew without lines that are of no use, where these are most of it. plan: the one at hand, and
        the stamps of its candidates. On a full disk it stays as it is."""
        used = {file.stem.partition("-")[2] for file in _libraries(self.path.parent)} - {plan}
        present = {file.name.partition(".")[0] for file in self.path.parent.iterdir()}
        newest = {record.key: record.stamp for record in self.records.values()}  # a file that moved has another stamp
        wanted = set(stamps)

        def is_of_use(record: Record) -> bool:
            if record.stamp in wanted:
                return True
            if record.reason:
                return record.plan in used
            return record.key in present and newest[record.key] == record.stamp

        kept = [record.line() for record in self.records.values() if is_of_use(record)]
        if 2 * len(kept) < self.lines:
            with suppress(OSError):
                durable.write_text(self.path, "".join(kept))


def read_journal(folder: Path) -> Journal:
    """Lines that were damaged are passed over: their scans are built again. Raises OSError."""
    path, records = folder / _JOURNAL, dict[str, Record]()
    try:
        lines = list(filter(None, path.read_text(encoding="utf-8", errors="replace").splitlines()))
    except FileNotFoundError:
        return Journal(path, {}, 0)
    for line in lines:
        try:
            raw = json.loads(line)
            raw |= {name: tuple(raw[name]) for name in ("shape", "spacing_mm")}
            record = Record(**raw)
        except (ValueError, TypeError, KeyError):
            continue
        records.pop(record.stamp, None)
        records[record.stamp] = record
    return Journal(path, records, len(lines))


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
