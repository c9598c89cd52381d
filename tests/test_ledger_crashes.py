"""However a process of a site ends, its ledger hides no charge, and no charge pays for two releases."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.ledger import Asked, Ledger
from tests.federation import RUN
from tests.test_ledger import (
    OTHER_RUN,
    ROUND_COST,
    asked,
    charge,
    go_through,
    ledger_in,
    releases,
    rounds_charged,
    spent,
)
from unimiss_core.errors import PrivacyBudgetError, WireError


class Crash(BaseException):
    """The process is gone: nothing that handles errors runs."""


@contextmanager
def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Before the given call that writes; of a line only half reaches the file. Yields the calls until then."""
    made: list[str] = []
    write, fsync, replace = os.write, os.fsync, Path.replace

    def counted(name: str) -> bool:
        made.append(name)
        return len(made) == call

    def writing(descriptor: int, payload: bytes) -> int:
        if counted("write"):
            write(descriptor, payload[: len(payload) // 2])
            raise Crash
        return write(descriptor, payload)

    def syncing(descriptor: int) -> None:
        if counted("fsync"):
            raise Crash
        fsync(descriptor)

    def replacing(path: Path, target: Path) -> Path:
        if counted("replace"):
            raise Crash
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", writing)
        patched.setattr(os, "fsync", syncing)
        patched.setattr(Path, "replace", replacing)
        yield made


def test_a_crash_at_every_write_hides_no_charge_and_releases_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds: epsilon never falls, what left is what is sent again, and at the end both were charged once."""
    crashes = 0
    for call in range(1, 100):
        folder = tmp_path / str(call)
        go_through(ledger_in(folder), asked(1), b"1")
        charged = rounds_charged(folder)
        known = ledger_in(folder).head
        left = None
        try:
            with crash_at(call, monkeypatch) as made:
                with (ledger := ledger_in(folder)).alone(RUN):
                    reservation = ledger.reserve(asked(2), releases())
                    charged += 1
                    ledger.record_reply(reservation, left_if_recorded := b"first attempt")
                left = left_if_recorded
        except Crash:
            crashes += 1
        assert spent(folder) >= charged * ROUND_COST
        ledger_in(folder).check_known(known)
        again = go_through(ledger_in(folder), asked(2), b"second attempt")
        assert left in (None, again)
        assert rounds_charged(folder) == 2
        if left is not None:
            break
    assert crashes == len(made) > 10


class ForgetfulDisk:
    """What is on it if the power fails: of each file what was last synced, under the name that its folder had for it
    when that was last synced; nothing else. Files that were there before count as synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = {path: path.stat().st_ino for path in folder.rglob("*")}
        self._contents = {path.stat().st_ino: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self._kept = [path.open("rb") for path in folder.rglob("*") if path.is_file()]  # no number is given out again

    def sync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            self._contents[path.stat().st_ino] = path.read_bytes()
            self._kept.append(path.open("rb"))
            return
        gone = [name for name in self._names if name.parent == path and not name.exists()]
        for name in gone:
            del self._names[name]
        self._names |= {name: name.stat().st_ino for name in path.iterdir()}

    def lose_power(self) -> None:
        for file in self._kept:
            file.close()
        found = {path: self._contents.get(number) for path, number in self._names.items() if path.parent.is_dir()}
        folders = {path for path in self._names if path.is_dir()} | {self._folder}
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if path.is_file():
                path.unlink()
            elif path not in folders:
                path.rmdir()
        for path, content in found.items():
            if path not in folders and path.parent in folders:
                path.write_bytes(content or b"")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to know which file is synced")
def test_a_power_failure_at_every_write_hides_no_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in range(1, 100):
        folder = tmp_path / str(call)
        go_through(ledger_in(folder), asked(1), b"1")
        disk, charged, left = ForgetfulDisk(folder), 1, None
        with monkeypatch.context() as patched:
            fsync = os.fsync
            patched.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), disk.sync(descriptor)))  # noqa: B023
            try:
                with crash_at(call, monkeypatch), (ledger := ledger_in(folder)).alone(RUN):
                    reservation = ledger.reserve(asked(2), releases())
                    charged = 2
                    ledger.record_reply(reservation, b"first attempt")
                    left = b"first attempt"
            except Crash:
                pass
        disk.lose_power()
        assert rounds_charged(folder) >= charged
        assert left in (None, go_through(ledger_in(folder), asked(2), b"second attempt"))
        assert rounds_charged(folder) == 2
        if left is not None:
            break
    assert left is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # a child here starts no thread and ends by _exit
def test_processes_killed_at_any_instant_hide_no_charge(tmp_path: Path) -> None:
    """A child goes through rounds and says which are charged and replied to; SIGKILL at a random instant. The next
    one begins with the last that was charged."""
    draw = random.Random(0)
    charged: set[int] = set()
    for _ in range(20):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            _go_through_rounds(tmp_path, max(charged, default=1), writes)
        os.close(writes)
        with os.fdopen(reads, "rb") as told:
            first = b"".join(told.read(len(b"charged-001 ")) for _ in range(draw.randint(3, 8)))
            time.sleep(draw.uniform(0, 0.005))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said = (first + told.read()).split()
        charged |= {int(word.split(b"-")[1]) for word in said if word.startswith(b"charged")}
        assert len(charged) <= rounds_charged(tmp_path) <= len(charged) + 1
        left = [int(word.split(b"-")[1]) for word in said if word.startswith(b"replied")]
        assert all(ledger_in(tmp_path).reply_of(asked(round)) == b"reply %d" % round for round in left[-1:])
    assert len(charged) > 20  # each child has gone through a round at least


def _go_through_rounds(folder: Path, first: int, writes: int) -> None:
    """In the child, which ends here."""
    try:
        ledger = ledger_in(folder)
        for round in range(first, 10_000):
            with ledger.alone(RUN):
                if ledger.reply_of(asked(round)) is not None:
                    continue
                reservation = ledger.reserve(asked(round), releases())
                os.write(writes, b"charged-%03d " % round)
                ledger.record_reply(reservation, b"reply %d" % round)
                os.write(writes, b"replied-%03d " % round)
    finally:
        os._exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
@pytest.mark.parametrize("other", [RUN, OTHER_RUN])
def test_a_site_is_at_work_on_one_round_at_a_time(tmp_path: Path, other: str) -> None:
    with ledger_in(tmp_path).alone(RUN), pytest.raises(WireError, match="busy"), ledger_in(tmp_path).alone(other):
        pass
    with ledger_in(tmp_path).alone(other):
        pass


def charge_in_turn(ledger: Ledger, what: Asked) -> None:
    """One round of a site at a time: asked for again until it is free, as a coordinator does."""
    while True:
        try:
            return charge(ledger, what)
        except WireError:
            time.sleep(0.001)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # a child here starts no thread and ends by _exit
def test_processes_that_charge_at_once_lose_nothing_and_do_not_overspend(tmp_path: Path) -> None:
    """Four, each of a run of its own, twenty rounds each: the site's limit allows fifty."""
    limit, children = 50 * ROUND_COST, []
    for number in range(4):
        if (child := os.fork()) == 0:
            try:
                for round in range(1, 21):
                    try:
                        charge_in_turn(ledger_in(tmp_path, limit), asked(round, run=f"{number:016x}"))
                    except PrivacyBudgetError:
                        os._exit(7)
            finally:
                os._exit(1)
        children.append(child)
    endings = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert endings.count(7) >= 2
    assert (rounds_charged(tmp_path), spent(tmp_path)) == (50, limit)
