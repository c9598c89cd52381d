"""Holding a file against other processes; the system lets go when a process ends, however it ends.

Windows has no such lock; there nothing is held, and sites take part in no patient-level study.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

EXIST = sys.platform != "win32"


@contextmanager
def locked(file: BinaryIO, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold `file`, together with others that hold it `shared`. Raises BlockingIOError: another does, and not `wait`."""
    if sys.platform != "win32":
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_UN)  # a child process that has the file, too, would hold it on
