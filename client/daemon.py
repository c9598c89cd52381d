"""The site's daemon: `unimiss-site run`. It opens no port to a network; all it does begins with a question of its own.

    daemon ── gate (Flower's SuperNode, client/gate.py) ══ TLS, outbound ══▶ coordinator
          └── flower-superexec ── flwr-clientapp, one for each message: the installed code reads scans and trains

The gate's Runtime API, by which these find each other, listens on 127.0.0.1 and wants a secret made anew at each start.
Nothing outlives the daemon, not even where it is killed: the gate ends when its standard input closes, flower-superexec
when the gate is gone, a ClientApp when flower-superexec is, and its workers when it is.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from client.health import CONTACT, HEALTH, NOISE_ALONE, REFUSED, read_contact, read_refused, write
from client.home import Home
from client.site_config import SiteConfig, load_site
from client.supervision import Note, Supervision
from client.tls import tls_of
from client.watch import ONE_MESSAGE
from unimiss_core import keys, locks
from unimiss_core.child import Child, rotating
from unimiss_core.errors import ConfigError

log = logging.getLogger(__name__)

LOCK = "daemon.lock"
"""In the state folder; held as long as a daemon runs."""

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
QUIET: Mapping[str, str] = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # of several processes on the same cores, none spins while it waits
    "PYTHONSAFEPATH": "1",  # no code is taken from where a process happens to be started
    "PYTHONUNBUFFERED": "1",
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
}
"""Flower asks its makers for newer versions, tells them of its use, and installs packages, unless told not to; and of
several devices that train together, the processes would listen for each other on the machine's own address."""


def run(home: Home, note: Note) -> None:
    """Run the site until SIGTERM or Ctrl-C. Raises ConfigError: the site's file or keys are not as they must be, or
    another daemon of this site runs."""
    if not locks.EXIST:
        raise ConfigError("this system has no file locks and no groups of processes; run the daemon on Linux or macOS")
    os.umask(0o077)  # whatever is written from here on is for this user alone
    site = load_site(home.site)
    tls_of(home)
    with _alone(site):
        folders = _prepare(site)
        logging.getLogger().addHandler(rotating(folders.log / "daemon.log"))
        stop = _stop_at_signals()
        Supervision(
            pid=os.getpid(),
            start=lambda: _start(home, folders),
            contact=lambda: read_contact(site.state),
            tell=lambda health: write(site.state / HEALTH, health),
            note=note,
            wait=stop.wait,
            now=time.time,
            refused=lambda: read_refused(site.state),
        ).run()


def is_running(state: Path) -> bool:
    """Whether a daemon holds this state folder. Raises PermissionError: this user may not look."""
    try:
        with (state / LOCK).open("rb") as file, locks.locked(file, shared=True, wait=False):
            return False
    except BlockingIOError:
        return True
    except PermissionError:
        raise
    except OSError:
        return False


@contextmanager
def _alone(site: SiteConfig) -> Iterator[None]:
    """Raises ConfigError: another daemon has the state folder, or it cannot be written to."""
    file: BinaryIO
    try:
        site.state.mkdir(parents=True, exist_ok=True)
        file = (site.state / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(
            f"site '{site.name}': key 'state': the folder cannot be written to ({error.strerror})"
        ) from None
    with file:
        try:
            with locks.locked(file, wait=False):
                yield
        except BlockingIOError:
            raise ConfigError(
                f"site '{site.name}': a daemon runs already with this state folder; see `unimiss-site status`"
            ) from None


class _Folders:
    """Of the state folder. flower: FLWR_HOME. empty: where processes are started. log: what they print."""

    def __init__(self, state: Path) -> None:
        self.flower = state / "flower"
        self.empty = self.flower / "empty"
        self.log = state / "log"
        self.secret = self.flower / "superexec-secret"


def _prepare(site: SiteConfig) -> _Folders:
    """Raises ConfigError: the disk is full, say."""
    folders = _Folders(site.state.absolute())
    try:
        # The first names a process, whose number is another's by now.
        for told_before in (HEALTH, CONTACT, REFUSED, NOISE_ALONE):
            (site.state / told_before).unlink(missing_ok=True)
        shutil.rmtree(folders.flower, ignore_errors=True)  # nothing in it outlives a daemon
        folders.empty.mkdir(parents=True)
        folders.log.mkdir(exist_ok=True)
        keys.write_private(folders.secret, secrets.token_hex(32).encode())
    except OSError as error:
        raise ConfigError(f"site '{site.name}': key 'state': cannot be written to ({error.strerror})") from None
    return folders


def _start(home: Home, folders: _Folders) -> Sequence[Child]:
    """The gate and flower-superexec, in the order in which they are to end: the gate signs off at the coordinator.

    Raises OSError.
    """
    environment = environment_of(folders.flower)
    port = _free_port()
    at = ["--home", str(home.path), "--port", str(port), "--secret", str(folders.secret)]
    command = [sys.executable, "-m", "client.gate", *at]
    gate = Child.start(command, environment, folders.empty, folders.log / "gate.log")
    command = [
        str(Path(sys.executable).with_name("flower-superexec")),
        *("--runtime-api-address", f"127.0.0.1:{port}", "--insecure", "--superexec-auth-secret-file"),
        *(str(folders.secret), "--parent-pid", str(gate.pid)),
    ]
    try:
        return gate, Child.start(command, environment, folders.empty, folders.log / "training.log")
    except OSError:
        gate.end(1.0)
        raise


def environment_of(flower: Path) -> dict[str, str]:
    """For processes of Flower's, of whom each ClientApp is for one message: quiet, with a home of their own, and this
    program's own code first."""
    loopback = [*filter(None, os.environ.get("NO_PROXY", "").split(",")), "127.0.0.1", "localhost"]
    return {
        **os.environ,
        **QUIET,
        ONE_MESSAGE: "1",
        "FLWR_HOME": str(flower),
        "NO_PROXY": ",".join(dict.fromkeys(loopback)),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop_at_signals() -> threading.Event:
    stop = threading.Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop
