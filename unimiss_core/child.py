"""Processes that a daemon or a coordinator runs: each leads a session of its own, what it prints stands in a log of
bounded size, and none outlives the process that started it (`unimiss_core.tether`)."""

import logging
import logging.handlers
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

LOG_BYTES = 10 << 20
KEPT_LOGS = 4
"""Older files beside the one that is written to, each as large."""
LONGEST_LINE = 1 << 16


class Child:
    """A process and whatever it starts itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        log_bytes: int = LOG_BYTES,
    ) -> Self:
        """Run `command` in `folder`. Its standard input is the tether: it stays open until this process ends, however
        that ends. log_bytes: of the file `log`, beside which KEPT_LOGS older ones are kept.

        Raises OSError: it cannot be started.
        """
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the one that started it, which then ends its children in order
        )
        assert process.stdout is not None
        threading.Thread(target=_keep, args=(process.stdout, rotating(log, log_bytes)), daemon=True).start()
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """That it ended with, below 0 a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> None:
        """Until it ends."""
        self._process.wait()

    def how_it_ended(self) -> str | None:
        """In words; None while it runs."""
        code = self.code
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


def rotating(log: Path, log_bytes: int = LOG_BYTES) -> logging.Handler:
    """Lines with the time before them, in a file of bounded size; a full disk loses lines and ends nothing."""
    handler = _Rotating(log, maxBytes=log_bytes, backupCount=KEPT_LOGS, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler


class _Rotating(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say nothing: the place to say it is full, or gone."""

    def close(self) -> None:
        with suppress(OSError):  # what was not written yet, and cannot be
            super().close()


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
