"""Lines that are only ever added, each bearing the digest of the one before: no entry is changed or lost unnoticed.

Beside `NAME.jsonl` lies `NAME.head`, the number and digest of the last line that counts. A line is written and brought
to the disk (fsync), then the head is, and only then is anything done that the line is a record of. So:

* lines up to the head must be whole and each continue the one before, or the log is refused;
* after it there may be one more, of a process that ended between the two writes. If whole, it counts from now on (it
  may only have cost too much); if torn, it is cut away, for nothing was done upon it;
* a head that is not among the lines tells that lines at the end are missing, or were put back to an older state.

Who can write to the folder can make up a chain that is whole. What such a person cannot change is a head that somebody
else keeps.

`writing` verifies the whole log and hands it out, for a log whose next line hangs on all before it; `append` verifies
its end alone, so that a log of years takes a line as fast as a new one, and leaves the rest to `read`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

from unimiss_core import durable
from unimiss_core.chain import BEGINNING, Head
from unimiss_core.config import Config
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.locks import locked

LONGEST_LINE = 4096
"""Bytes of a line, with its end, that `append` takes."""

_END = 4 * LONGEST_LINE
"""Bytes at the end of a log that hold its last counted line whole, whatever a crash left behind it."""


class Link(Config):
    """What every line holds."""

    seq: int
    """The line's number, from 1."""
    previous: str
    """sha256 of the line before; of the first, that of BEGINNING."""


LinkT = TypeVar("LinkT", bound=Link)


@dataclass
class Chain(Generic[LinkT]):
    """The lines of a log, verified; or those after one that is not looked at, which is believed."""

    entries: list[LinkT] = field(default_factory=list)
    heads: list[Head] = field(default_factory=lambda: [BEGINNING])
    """Before the first of `entries`, and after each."""

    @property
    def head(self) -> Head:
        return self.heads[-1]

    def holds(self, head: Head) -> bool:
        """Whether `head` was once the head of this chain."""
        place = head.seq - self.heads[0].seq
        return 0 <= place < len(self.heads) and self.heads[place] == head

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

    def append(self, make: Callable[..., LinkT], *, longest: int | None = None) -> LinkT:
        """Add `make(seq=, previous=)`; when this returns, it is on the disk and counts. Raises ConfigError: full disk;
        the line is not there, or counts from the next start on, and nothing may be done upon it. ValueError: its line
        has more than `longest` bytes."""
        head = self.chain.head
        entry = make(seq=head.seq + 1, previous=head.sha256)
        line = entry.canonical().encode()
        if longest is not None and len(line) >= longest:
            raise ValueError(f"a line of {len(line)} bytes is too long for this log")
        self.chain.add(entry, line)
        self._write(line + b"\n", self.chain.head)
        return entry


class ChainedLog(Generic[LinkT]):
    """The log at `path`."""

    def __init__(
        self, path: Path, decode: Callable[[bytes], LinkT], *, damaged: type[UnimissError], way_out: str
    ) -> None:
        """decode: a line's bytes to its entry; raises ValueError. damaged: what is raised where the log is. way_out:
        what a person does about it, at the end of that message."""
        self._path, self._decode, self._damaged, self._way_out = path, decode, damaged, way_out

    def read(self) -> Chain[LinkT]:
        """Its lines, for somebody who only looks: nothing is written, and a torn last line stays where it is.

        Raises `damaged`; ConfigError: it cannot be read.
        """
        with self._told():
            is_counted = self._head_file.exists()  # asked first: a log's first line is written before its head is
            if not self._path.exists():
                return self._verified(b"", Chain())[0] if is_counted else Chain()
            with self._path.open("rb") as file, locked(file, shared=True):
                return self._verified(file.read(), Chain())[0]

    def backwards(self, *, holding: bytes) -> Iterator[LinkT]:
        """Entries whose line holds these bytes, from the last back, each decoded as it is asked for: for a question to
        a log of years. Nothing is verified, and lines that are damaged are passed over. Raises ConfigError: it cannot
        be read."""
        with self._told():
            content = self._path.read_bytes() if self._path.exists() else b""
        for line in reversed(content.split(b"\n")):
            if holding in line:
                with suppress(ValueError):
                    yield self._decode(line)

    @contextmanager
    def writing(self) -> Iterator[Writing[LinkT]]:
        """Hold the log; every line of it counts for good then, and more may be added. Raises as `read`."""
        with self._told(), self._held() as file:
            file.seek(0)
            yield self._mended(file, file.read(), Chain())

    def append(self, make: Callable[..., LinkT]) -> LinkT:
        """Add `make(seq=, previous=)` after the last line, as `Writing.append` does. Raises as `read`, where the end of
        the log is damaged; what lies before that is not looked at. ValueError: a line above LONGEST_LINE."""
        with self._told(), self._held() as file:
            size = file.seek(0, os.SEEK_END)
            begin = file.seek(max(0, size - _END))
            content, begun = file.read(), Chain[LinkT]()
            if begin:
                content = content[content.find(b"\n") + 1 :]
                begun = self._begun_before(content)
            return self._mended(file, content, begun).append(make, longest=LONGEST_LINE)

    @contextmanager
    def _held(self) -> Iterator[BinaryIO]:
        durable.make_folder(self._path.parent, mode=0o700)
        with self._path.open("a+b", buffering=0) as file, locked(file, shared=False):
            yield cast(BinaryIO, file)

    def _begun_before(self, content: bytes) -> Chain[LinkT]:
        """A chain that goes on with the first line of `content`, by what that line says of the one before it."""
        try:
            first = self._decode(content[: content.index(b"\n")])
        except ValueError:
            return Chain()
        return Chain(heads=[Head(first.seq - 1, first.previous)])

    def _mended(self, file: BinaryIO, content: bytes, begun: Chain[LinkT]) -> Writing[LinkT]:
        """The log that ends with `content`, which goes on from `begun`, without what a crash left of a line."""
        chain, size, counted = self._verified(content, begun)
        if size < len(content):
            file.truncate(file.seek(0, os.SEEK_END) - len(content) + size)
        if chain.head != counted or size < len(content):
            # Another process may have ended after its write and before its fsync.
            os.fsync(file.fileno())
            self._let_count(chain.head)

        def write(line: bytes, head: Head) -> None:
            durable.append(file, line)
            self._let_count(head)

        return Writing(chain, write)

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
            raise self._damage(f"{self._name(self._head_file)} is damaged: it does not name a line")
        return Head(int(found[1]), found[2])

    def _verified(self, content: bytes, chain: Chain[LinkT]) -> tuple[Chain[LinkT], int, Head]:
        """(`chain` with the lines of `content`, bytes that they take, the head that was written): see the module.
        Raises `damaged`."""
        counted = self._counted()
        *lines, tail = content.split(b"\n")
        last, size = chain.head.seq + len(lines), 0
        for number, line in enumerate(lines, start=chain.head.seq + 1):
            try:
                chain.add(self._decode(line), line)
            except ValueError:
                if number == last == counted.seq + 1 and not tail:
                    tail = line + b"\n"  # the disk kept the line's end and not what is before it
                    break
                raise self._damage(
                    f"line {number} of {self._name(self._path)} is damaged: it, or the line before, was changed, or "
                    "lines between them are missing"
                ) from None
            size += len(line) + 1
        self._check_end(chain, counted, torn=bool(tail))
        return chain, size, counted

    def _check_end(self, chain: Chain[LinkT], counted: Head, *, torn: bool) -> None:
        name, lines = self._name(self._path), chain.head.seq
        if lines < counted.seq:
            raise self._damage(
                f"line {lines + 1} of {name} is damaged or missing: {self._name(self._head_file)} counts {counted.seq} "
                "lines"
            )
        if not chain.holds(counted):
            raise self._damage(
                f"line {counted.seq} of {name} is damaged: it was changed since {self._name(self._head_file)} was "
                "written"
            )
        if lines + torn > counted.seq + 1:
            raise self._damage(
                f"line {counted.seq + 2} of {name} should not be there: {self._name(self._head_file)} counts "
                f"{counted.seq} lines, and one of the two was put back to an older state"
            )

    def _damage(self, told: str) -> UnimissError:
        return self._damaged(f"{told}; {self._way_out}")

    def _name(self, path: Path) -> str:
        """A file of the log, without the folder that it lies in."""
        return f"'{path.name}'"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            mend = "make room on the disk that it lies on"
            if isinstance(error, PermissionError):
                mend = "give the folder that it lies in, and all that is in it, to the user whom this program runs as"
            elif isinstance(error, NotADirectoryError | FileExistsError):
                mend = "let the folder that it is to lie in be one"
            raise ConfigError(
                f"{self._name(self._path)} cannot be read or written: {error.strerror or 'unknown error'}; {mend}"
            ) from None
