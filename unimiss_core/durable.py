"""Files that appear whole or not at all, also when the power fails."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Ending of a file or folder that is still being written; whatever bears it may be deleted."""


def write_bytes(path: Path, payload: bytes, *, private: bool = False) -> None:
    """Replace `path` by `payload`: after a crash it holds the old content or the new, never a mixture. It stays its
    owner's, and of its mode. private: nobody else may read it, at no time.

    Raises OSError: it holds the old content, and nothing half written takes room.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        if private:
            partial.unlink(missing_ok=True)  # of whatever mode an attempt before left it
        with open(partial, "wb", opener=_opened_for_owner if private else None) as file:
            _give_to_owner_of(path, file.fileno())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):  # a folder, say, that stands in its place
            partial.unlink()
        raise
    sync_folder(path.parent)


def _opened_for_owner(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)


def _give_to_owner_of(path: Path, descriptor: int) -> None:
    """What root writes for a daemon, by a command that mends something, the daemon must be able to read. Raises
    OSError."""
    try:
        replaced = path.stat()
    except OSError:  # it is new, or a link that leads nowhere, which is nobody's
        return
    if os.name == "posix" and os.geteuid() == 0:
        os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(replaced.st_mode))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def make_folder(path: Path, *, mode: int = 0o777) -> None:
    """Make `path` with `mode`, and those above it that are missing, each known to the disk; what is there is left as it
    is."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode, exist_ok=True)
        sync_folder(path.parent)


def append(file: BinaryIO, payload: bytes) -> None:
    """Add `payload` to the end of `file`, opened unbuffered to read and write; it is on the disk when this returns.

    Raises OSError: the file ends where it ended before, if it can still be cut there. After a crash it may hold a part
    of `payload`, or at its place anything of that length.
    """
    end = file.seek(0, os.SEEK_END)
    left = memoryview(payload)
    try:
        while left:
            left = left[os.write(file.fileno(), left) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


@contextmanager
def new_folder(path: Path, *, before: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `path` (replacing an older one) only when the block ends well. Where the block
    raises, or the disk does not take it all, nothing of it stays.

    before: done when all of it is on the disk, and nothing but its name is left to change.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for below in partial.rglob("*"):
            sync_folder(below) if below.is_dir() else sync(below)
        sync_folder(partial)
        before()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        sync(path)
