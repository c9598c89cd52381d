"""Lines that are only ever added, each bearing the digest of the one before: no entry is changed or lost unnoticed.

Beside `NAME.jsonl` lies `NAME.head`, the number and digest of the last line that counts. A line is written and brought
to the disk (fsync), then the head is, and only then is anything done that the line is a record of. So:

* lines up to the head must be whole and each continue the one before, or the log is refused;
* after it there may be one more, of a process that ended between the two writes. If whole, it counts from now on (it
  may only have cost too much); if torn, it is cut away, for nothing was done upon it;
* a head that is not among the lines tells that lines at the end are missing, or were put back to an older state.

Who can write to the folder can make up a chain that is whole. What such a person cannot change is a head that somebody
else keeps.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from client.locks import locked
from unimiss_core import durable
from unimiss_core.chain import BEGINNING, Head
from unimiss_core.config import Config
from unimiss_core.errors import ConfigError, LedgerError

WAY_OUT = "docs/privacy.md, 'The ledger', says what to do"


class Link(Config):
    """What every line holds."""

    seq: int
    """The line's number, from 1."""
    previous: str
    """sha256 of the line before; of the first, that of BEGINNING."""


LinkT = TypeVar("LinkT", bound=Link)


@dataclass
class Chain(Generic[LinkT]):
    """The lines of a log, verified."""

    entries: list[LinkT] = field(default_factory=list)
    heads: list[Head] = field(default_factory=lambda: [BEGINNING])
    """After each number of lines, from none."""

    @property
    def head(self) -> Head:
        return self.heads[-1]

    def holds(self, head: Head) -> bool:
        """Whether `head` was once the head of this chain."""
        return 0 <= head.seq < len(self.heads) and self.heads[head.seq] == head

    def add(self, entry: LinkT, line: bytes) -> None:
        """line: the bytes of `entry`, without the line's end. Raises ValueError: it does not continue the chain."""
        if (entry.seq, entry.previous) != (self.head.seq + 1, self.head.sha256):
            raise ValueError("does not continue the line before")
        self.entries.append(entry)
        self.heads.append(Head(entry.seq, hashlib.sha256(line).hexdigest()))


class Writing(Generic[LinkT]):
    """A log that is held by this process alone: its lines, and the right to add one."""

    def __init__(self, chain: Chain[LinkT], write: Callable[[bytes, Head], None]) -> None:
        self.chain = chain
        self._write = write

    def append(self, make: Callable[..., LinkT]) -> LinkT:
        """Add `make(seq=, previous=)`; when this returns, it is on the disk and counts. Raises ConfigError: full disk;
        the line is not there, or counts from the next start on, and nothing may be done upon it."""
        head = self.chain.head
        entry = make(seq=head.seq + 1, previous=head.sha256)
        line = entry.canonical().encode()
        self.chain.add(entry, line)
        self._write(line + b"\n", self.chain.head)
        return entry


class ChainedLog(Generic[LinkT]):
    """The log at `path`. decode: a line's bytes to its entry; raises ValueError."""

    def __init__(self, path: Path, decode: Callable[[bytes], LinkT]) -> None:
        self._path, self._decode = path, decode

    def read(self) -> Chain[LinkT]:
        """Its lines, for somebody who only looks: nothing is written, and a torn last line stays where it is.

        Raises LedgerError: the log is damaged; ConfigError: it cannot be read.
        """
        with self._told():
            if not self._path.exists():
                return self._verified(b"")[0]
            with self._path.open("rb") as file, locked(file, shared=True):
                return self._verified(file.read())[0]

    @contextmanager
    def writing(self) -> Iterator[Writing[LinkT]]:
        """Hold the log; every line of it counts for good then, and more may be added. Raises as `read`."""
        with self._told():
            durable.make_folder(self._path.parent)
            with self._path.open("a+b", buffering=0) as file, locked(file, shared=False):
                file.seek(0)
                chain, size, counted = self._verified(content := file.read())
                if size < len(content):
                    file.truncate(size)
                if chain.head != counted or size < len(content):
                    # Another process may have ended after its write and before its fsync.
                    os.fsync(file.fileno())
                    self._let_count(chain.head)

                def write(line: bytes, head: Head) -> None:
                    durable.append(file, line)
                    self._let_count(head)

                yield Writing(chain, write)

    @property
    def _head_file(self) -> Path:
        return self._path.with_suffix(".head")

    def _let_count(self, head: Head) -> None:
        durable.write_text(self._head_file, json.dumps(head._asdict()) + "\n")

    def _counted(self) -> Head:
        """The head that was written beside the log."""
        try:
            text = self._head_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return BEGINNING
        except UnicodeDecodeError:
            text = ""
        if not (found := re.fullmatch(r'\{"seq": ([1-9][0-9]*), "sha256": "([0-9a-f]{64})"\}\n', text)):
            raise LedgerError(f"{self._name(self._head_file)} is damaged: it does not name a line; {WAY_OUT}")
        return Head(int(found[1]), found[2])

    def _verified(self, content: bytes) -> tuple[Chain[LinkT], int, Head]:
        """(lines, bytes that they take, the head that was written): see the module. Raises LedgerError."""
        counted = self._counted()
        *lines, tail = content.split(b"\n")
        chain: Chain[LinkT] = Chain()
        size = 0
        for number, line in enumerate(lines, start=1):
            try:
                chain.add(self._decode(line), line)
            except ValueError:
                if number == len(lines) == counted.seq + 1 and not tail:
                    tail = line + b"\n"  # the disk kept the line's end and not what is before it
                    break
                raise LedgerError(
                    f"line {number} of {self._name(self._path)} is damaged: it, or the line before, was changed, or "
                    f"lines between them are missing; {WAY_OUT}"
                ) from None
            size += len(line) + 1
        self._check_end(chain, counted, torn=bool(tail))
        return chain, size, counted

    def _check_end(self, chain: Chain[LinkT], counted: Head, *, torn: bool) -> None:
        name, lines = self._name(self._path), chain.head.seq
        if lines < counted.seq:
            raise LedgerError(
                f"line {lines + 1} of {name} is damaged or missing: {self._name(self._head_file)} counts {counted.seq} "
                f"lines; {WAY_OUT}"
            )
        if not chain.holds(counted):
            raise LedgerError(
                f"line {counted.seq} of {name} is damaged: it was changed since {self._name(self._head_file)} was "
                f"written; {WAY_OUT}"
            )
        if lines + torn > counted.seq + 1:
            raise LedgerError(
                f"line {counted.seq + 2} of {name} should not be there: {self._name(self._head_file)} counts "
                f"{counted.seq} lines, and one of the two was put back to an older state; {WAY_OUT}"
            )

    def _name(self, path: Path) -> str:
        """A file of the log, without the folder that it lies in."""
        return f"'{path.name}'"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._name(self._path)} cannot be read or written: {error.strerror or 'unknown error'}; make room "
                "on the disk of the state folder, and see that this program may write there"
            ) from None
