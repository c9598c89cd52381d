"""Processes that the daemon runs: each in a session of its own, with what it prints in a log of bounded size."""

import logging
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

LOG_BYTES = 10 << 20
KEPT_LOGS = 4
"""Files of LOG_BYTES beside the one that is written to."""
LONGEST_LINE = 1 << 16


class Child:
    """A process and whatever it starts itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> Self:
        """Run `command` in `folder`. Its standard input stays open until this process ends, however that ends.

        Raises OSError: it cannot be started.
        """
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the daemon, which then ends those it started, in order
        )
        assert process.stdout is not None
        threading.Thread(target=_keep, args=(process.stdout, rotating(log)), daemon=True).start()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def how_it_ended(self) -> str | None:
        """In words; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self, patience_s: float) -> None:
        """Ask it to end, wait, and end what is left of it and of its own children by force."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group that is gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def end_with_the_daemon(patience_s: float = 15.0) -> None:
    """In a child: end when the process that started it does, however that ends. Only then its standard input closes."""

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def rotating(log: Path) -> logging.Handler:
    """Lines with the time before them, in a file of bounded size; a full disk loses lines and ends nothing."""
    handler = _Rotating(log, maxBytes=LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler


class _Rotating(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say nothing: the place to say it is full, or gone."""


def _plain(line: bytes) -> str:
    """Without colours, and without what could move a terminal: some of it is told by a coordinator."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", line.decode("utf-8", errors="replace"))
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()


def _keep(printed: IO[bytes], handler: logging.Handler) -> None:
    """Until the last process that can print there has ended."""
    with printed:
        while line := printed.readline(LONGEST_LINE):
            if text := _plain(line):
                handler.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))
    handler.close()
