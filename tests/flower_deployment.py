"""Flower as tests start it: an installation of a test's own, and in it a SuperLink and SuperNodes on loopback.

Whatever is started here, and whatever Flower starts by itself, carries the installation's folder in its environment
(FLWR_HOME): by that it is found, killed where a test asks for it, and ended when the test is over.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
START_S = 120.0
"""How long a process may take to come up; some seconds on a machine with nothing else to do."""
SUPERNODE = """
from flwr.supernode import fleet_http_connection
fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 15
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""
"""`flower-supernode` with twice as many heartbeats: SuperLink takes one that was killed for gone after two of them."""
LOOK_S = 2.0
"""Between two looks whether a run has ended: each goes through all folders of an installation for its logs."""
TAIL = 3000
"""Characters of each log that a failure shows."""


class Flower:
    """A Flower installation in `folder`: a home and an empty working folder of its own, and no calls home.

    Working folder: a SuperLink that starts in a project's folder makes later runs of other copies use that folder's
    code. Use `opened`, which ends everything that was started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home = folder / "flwr"
        self._home.mkdir(parents=True)
        (folder / "empty").mkdir()
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            **_quiet(),
            "HOME": str(folder),
            "FLWR_HOME": str(self._home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator["Flower"]:
        flower = cls(folder)
        try:
            yield flower
        finally:
            flower._end_all()

    def submit(self, run_config: Mapping[str, str | bool], *, project: Path = ROOT, sites: int | None = None) -> int:
        """`flwr run`; the id of the run, which goes on by itself. sites: how many Flower's simulation engine plays."""
        engine = f"num-supernodes={sites} client-resources-num-cpus=1 init-args-num-cpus=1"
        told = self._told(
            *("run", str(project), "--run-config", " ".join(f"{k}={json.dumps(v)}" for k, v in run_config.items())),
            *([] if sites is None else ["--federation-config", engine]),
        )
        return int(told["run-id"])

    def status(self, run: int) -> str:
        """As `flwr ls` tells it, which is the only one to tell: `flwr run` ends with code 0 whatever happened."""
        return str(self._told("ls", "--run-id", str(run))["runs"][0]["status"])

    def has_ended(self, run: int) -> bool:
        """Whether the SuperLink has logged so."""
        return any(tells_end_of(run, path.read_text(errors="replace")) for path in self._log_files())

    def kill(self, name: str) -> None:
        """SIGKILL to the processes of this installation that go by `name`, and to what they started; fails where there
        is none."""
        found = list(self._processes(name))
        assert found, f"no process {name} to kill\n{self.logs()}"
        for number in found:
            _kill_family(number)

    def wait_until(
        self,
        condition: Callable[[], bool],
        what: str,
        *,
        timeout_s: float,
        run: int | None = None,
        poll_s: float = 0.2,
    ) -> None:
        """Fails, with the logs, when time is over, and soon where `run` has ended without the condition."""
        now = time.monotonic()
        give_up, looks_at = now + timeout_s, now
        while not condition():
            if run is not None and now >= looks_at:
                looks_at = now + LOOK_S
                if self.has_ended(run) and not condition():
                    pytest.fail(f"run {run} ended without: {what}\n{self._log_of_run(run)}\n{self.logs()}")
            if (now := time.monotonic()) > give_up:
                pytest.fail(f"not within {timeout_s:g} s: {what}\n{self.logs()}")
            time.sleep(poll_s)

    def logs(self) -> str:
        """The end of what each process wrote."""
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-TAIL:]}" for path in self._log_files())

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command of this installation in the empty folder; what it writes goes to the file `log`."""
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(command[0]), *command[1:]],
                cwd=self.folder / "empty",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def start_superlink(self) -> str:
        """A SuperLink without TLS on a free port of loopback, which `flwr` commands then go to; its address."""
        port = free_port()
        address = f"127.0.0.1:{port}"
        self.start("superlink.log", "flower-superlink", "--insecure", "--port", str(port))
        self.wait_until(lambda: _listens(port), "the SuperLink listens", timeout_s=START_S)
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(connection)
        return address

    def _log_files(self) -> list[Path]:
        return sorted([*self.folder.glob("*.log"), *self._home.rglob("*.log")])

    def _log_of_run(self, run: int) -> str:
        return self._flwr("log", str(run), "--show").stdout[-TAIL:]

    def _told(self, *command: str) -> dict[str, Any]:
        done = self._flwr(*command, "--format", "json")
        assert done.returncode == 0, f"flwr {command[0]}: {done.stdout}{done.stderr}\n{self.logs()}"
        told: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        assert told["success"], f"flwr {command[0]}: {told}\n{self.logs()}"
        return told

    def _flwr(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("flwr"), *command],
            cwd=self.folder / "empty",
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=START_S,
        )

    def _processes(self, name: str = "") -> Iterator[int]:
        """Running processes of this installation, by the name that the kernel has of them."""
        mark = f"FLWR_HOME={self._home}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = mark in (folder / "environ").read_bytes().split(b"\0")
                if ours and (folder / "comm").read_text().startswith(name):
                    yield int(folder.name)
            except OSError:
                continue  # it ended meanwhile, or is another user's

    def _end_all(self) -> None:
        for deadly, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 20.0)):
            give_up = time.monotonic() + patience_s
            while (found := list(self._processes())) and time.monotonic() < give_up:
                for number in found:  # again and again, because one that is ended may have started another
                    _signal(number, deadly)
                time.sleep(0.5)
        for process in self._started:
            process.wait(timeout=20)
        assert not found, f"left running: {found}\n{self.logs()}"


class Deployment:
    """A SuperLink on loopback, and SuperNodes, each for a site file."""

    def __init__(self, flower: Flower) -> None:
        self.flower = flower
        self._address = flower.start_superlink()
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_sites(self, files: Mapping[str, Path]) -> None:
        """A SuperNode for each site file; returns when all have joined."""
        for site, file in files.items():
            config = ["--node-config", f'site="{file}"', "--port", str(free_port())]
            command = ["python", "-c", SUPERNODE, "--insecure", "--superlink", self._address, *config]
            self._nodes[site] = self.flower.start(_log_of(site), *command)
        for site in files:
            self.flower.wait_until(
                lambda site=site: "SuperNode ID" in self.heard_by(site), f"{site} joins", timeout_s=START_S
            )  # type: ignore[misc]

    def heard_by(self, site: str) -> str:
        """What the site's SuperNode has logged."""
        return (self.flower.folder / _log_of(site)).read_text(errors="replace")

    def kill_site(self, site: str) -> None:
        """As a power cut would: the SuperNode and all that it started, at once and without a word to anybody."""
        node = self._nodes.pop(site)
        _kill_family(node.pid)
        node.wait(timeout=20)


def tells_end_of(run: int, log: str) -> bool:
    """Whether a SuperLink's log says that a run has ended; to ask it takes a process that imports Flower, seconds."""
    return re.search(rf"Finished task \d+ of run {run}\b", log) is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet() -> dict[str, str]:
    lines = (ROOT / "configs" / "flower.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _log_of(site: str) -> str:
    return f"site-{site}.log"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _kill_family(number: int) -> None:
    for one in [number, *_descendants(number)]:
        _signal(one, signal.SIGKILL)


def _descendants(number: int) -> Iterator[int]:
    try:
        children = [path.read_text() for path in Path(f"/proc/{number}/task").glob("*/children")]
    except OSError:  # it ended meanwhile
        return
    for child in map(int, " ".join(children).split()):
        yield child
        yield from _descendants(child)


def _signal(number: int, deadly: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, deadly)
