"""A fresh Python interpreter that runs one of our modules and hears only from this process.

Never a fork, because this process runs threads; and not `multiprocessing`, whose children run the parent's main script
again.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

KILLED_WITHIN_S = 10.0
"""A killed process is gone at once, but for one that waits in a device's driver: no signal reaches it there."""


def leave_no_core_file() -> None:
    """Of this process, wherever it crashes: the file would hold pixels."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@dataclass(frozen=True)
class Interpreter:
    """The process, and this side of the channel to it."""

    process: subprocess.Popen[bytes]
    channel: Connection

    @classmethod
    def start(cls, module: str, environment: Mapping[str, str], *, log: Path | None = None) -> "Interpreter":
        """Run `module` as a script, its argument the number of the channel's file.

        environment: variables beside this process's own. log: takes what it and its libraries print, else dropped.
        """
        ours, theirs = Pipe()
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open(log or os.devnull, "wb", opener=_for_us_alone) as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env={**os.environ, **paths, **environment},
                start_new_session=True,  # Ctrl-C is for this process, which then stops those it started
            )
        theirs.close()
        return cls(process, ours)

    def stop(self) -> bool:
        """End it at once, whatever it is doing. Whether nothing of it is left: where it waits in a driver, it ends when
        that lets go of it, and nobody waits for that."""
        self.channel.close()
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=KILLED_WITHIN_S)
        return self.process.returncode is not None
