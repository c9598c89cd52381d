"""Processes of a daemon, as stand-ins: what they print, how they end, and that none outlives the daemon."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unimiss_core.child import KEPT_LOGS, LOG_BYTES, LONGEST_LINE, Child, rotating

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc to see what runs")

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
"""Ignores SIGTERM; sleeps in the end."""


def started(code: str, folder: Path, log_bytes: int = LOG_BYTES) -> Child:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return Child.start([sys.executable, "-c", code], environment, folder, folder / "child.log", log_bytes)


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "not in time"
        time.sleep(0.02)


def printed(folder: Path) -> str:
    log = folder / "child.log"
    return log.read_text() if log.exists() else ""


def runs(pid: int) -> bool:
    """Whether it runs: a process that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_it_prints_stands_in_a_log_with_the_time(tmp_path: Path) -> None:
    child = started("print('hello'); import sys; print('trouble', file=sys.stderr); sys.exit(3)", tmp_path)
    until(child.how_it_ended)
    assert child.how_it_ended() == "exit code 3"
    until(lambda: "trouble" in printed(tmp_path))
    assert [line.split(maxsplit=2)[2] for line in printed(tmp_path).splitlines()] == ["hello", "trouble"]
    child.end(1.0)


@LINUX
def test_a_log_on_a_full_disk_loses_lines_and_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = rotating(Path("/dev/full"))
    for _ in range(2):
        log.emit(logging.makeLogRecord({"msg": "x" * 10_000}))
    log.close()
    assert capfd.readouterr().err == ""


def test_the_log_stays_small_whatever_is_printed(tmp_path: Path) -> None:
    child = started("for _ in range(2000): print('x' * 100)\nprint('y' * 300000)\nprint('end')", tmp_path, 10_000)
    until(lambda: printed(tmp_path).endswith(" end\n"))
    child.end(5.0)
    files = list(tmp_path.glob("child.log*"))
    assert len(files) == 1 + KEPT_LOGS
    assert sum(file.stat().st_size for file in files) < 6 * (10_000 + LONGEST_LINE)


def test_it_is_asked_to_end_before_it_is_made_to(tmp_path: Path) -> None:
    polite = started(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('signing off', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True); time.sleep(600)",
        tmp_path,
    )
    until(lambda: "ready" in printed(tmp_path))
    polite.end(20.0)
    assert polite.how_it_ended() == "exit code 0"
    until(lambda: "signing off" in printed(tmp_path))


@LINUX
def test_one_that_does_not_hear_is_killed_with_its_own_children(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys\nown = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"{STUBBORN}\nprint('own', own.pid, flush=True); time.sleep(600)"
    )
    child = started(code, tmp_path)
    until(lambda: "own" in printed(tmp_path))
    own = int(printed(tmp_path).split("own")[1].split()[0])
    child.end(0.2)
    assert child.how_it_ended() == "signal SIGKILL"
    until(lambda: not runs(own))


@LINUX
def test_a_daemon_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    """As the chain is: the gate watches its standard input, the second process the gate, as flower-superexec does."""
    gate = "from unimiss_core import tether; tether.watch(); import time; time.sleep(600)"
    second = (
        "import os, sys, time\nparent = int(sys.argv[1])\nwhile os.path.exists(f'/proc/{parent}'): time.sleep(0.05)"
    )
    daemon = (
        "import os, sys, time\nfrom pathlib import Path\nfrom unimiss_core.child import Child\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"gate = Child.start([sys.executable, '-c', {gate!r}], os.environ, folder, folder / 'gate.log')\n"
        f"command = [sys.executable, '-c', {second!r}, str(gate.pid)]\n"
        "second = Child.start(command, os.environ, folder, folder / 'second.log')\n"
        "print(gate.pid, second.pid, flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", daemon],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        pids = [int(word) for word in process.stdout.readline().split()]
    assert all(map(runs, pids))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(map(runs, pids)))
