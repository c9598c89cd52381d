"""A federation as its operators start it, on loopback: a coordinator and sites, each of several processes of its own.

Everything is done by the commands that people type: `unimiss-server init, approve, run` and `unimiss-site init, join,
run`. What is added is only what keeps it small and on one machine: ports, made-up scans, one thread each. The sites
reach the coordinator by a proxy, so that a measure can cut the line.

All processes of an operator carry the operator's folder in their environment; by that they are found.
"""

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks import confined
from benchmarks.deploy_files import COORDINATOR_UNIT, ROOT, SITE_UNIT, Places, Service, of_container, of_unit
from client.phantoms import PhantomConfig, write_hospital
from server.home import Home

KINDS: Mapping[str, Literal["cr", "ct", "mixed"]] = {"alpha": "cr", "beta": "ct", "gamma": "mixed"}
"""A site's name -> what scans it has."""
COORDINATOR, IN_CONTAINER = "coordinator", "alpha"
"""Where all is started as deploy/ does, that site is a container."""
PATIENTS = 3
STUDY: Mapping[str, Any] = {
    "name": "toy",
    "model": {"prototypes": 16},
    "plan": {"volume_spacing_mm": [8.0, 8.0, 8.0], "image_longest_side": 64},
    "views": {"image_size": [33, 40], "volume_size": [13, 33, 36]},
    "schedule": {"rounds": 2, "local_steps": 2},
    "batch": {"images": 4, "volumes": 2},
    "optimiser": {"warmup_steps": 1},
}
START_S = 240.0
"""How long processes may take to come up; some ten seconds on a machine with nothing else to do."""
POLL_S = 0.5
"""Between two looks whether what is waited for has come; some of them read the whole of /proc."""
TAIL = 1500
"""Characters of each log that a failure shows."""


class DeploymentError(Exception):
    """Something did not happen in time, or a command failed."""


@dataclass
class Operator:
    """Somebody who types commands in one folder. variable: of the environment, names that folder."""

    module: str
    variable: str
    home: Path
    extra: dict[str, str] = field(default_factory=dict)
    """More of the environment."""
    process: "subprocess.Popen[bytes] | None" = None

    def types(self, *words: str | Path, codes: Sequence[int] = (0,)) -> str:
        """Run a command to its end, in this process, which has imported everything; what it printed.

        Raises DeploymentError: it ended with another code than one of `codes`.
        """
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told), _environment(self.variable, self.home):
            code = importlib.import_module(self.module).main([*map(str, words)])
        if code not in codes:
            raise DeploymentError(f"{self.module} {words[0]} ended with {code}: {told.getvalue()}")
        return told.getvalue()

    def starts(self, *words: str | Path) -> None:
        """Start a command that stays; what it prints goes to the folder's run.log."""
        self._begins([sys.executable, "-m", self.module, *map(str, words)])

    def boots(self, service: Service) -> None:
        """Start what deploy/ starts on this machine, left what it is left there."""
        self._begins(confined.command_of(service, self.home.parent, self._own))

    def tries(self, service: Service) -> str:
        """Run such a command to its end; what it printed. Raises DeploymentError: it did not end with 0."""
        command = confined.command_of(service, self.home.parent, self._own)
        done = subprocess.run(
            command, cwd=ROOT.parent, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise DeploymentError(f"{' '.join(service.command[2:])} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def _begins(self, command: Sequence[str]) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT.parent,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.home.with_name(f"{self.home.name}.log")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self._own}

    @property
    def _own(self) -> dict[str, str]:
        """What its processes have in their environment beside their user's."""
        paths = [*filter(None, [self.extra.get("PYTHONPATH")]), str(ROOT)]
        told = {self.variable: str(self.home), "OMP_NUM_THREADS": "1", **self.extra}
        return {**told, "PYTHONPATH": os.pathsep.join(paths)}

    def processes(self, name: str = "") -> list[int]:
        """Those of this operator that run now, whoever started them; of a name, those that stand in the command."""
        mark, found = f"{self.variable}={self.home}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is another user's
                is_ours = mark in (folder / "environ").read_bytes().split(b"\0")
                if is_ours and name.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def loses_power(self) -> None:
        """All its processes are killed at once, and none has a word to say."""
        while found := self.processes():  # again, for one may have started another
            for number in found:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            if self.process is not None:
                self.process.wait(20)
            time.sleep(0.05)

    def ends(self, *, within_s: float = 120.0) -> int:
        """SIGTERM, as systemd does; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(within_s)

    def logs(self) -> str:
        """The end of what each of its processes wrote."""
        files = [self.log, *sorted(self.home.rglob("*.log"))]
        told = [(path, path.read_text(errors="replace")[-TAIL:]) for path in files if path.exists()]
        return "\n".join(f"--- {path.parent.name}/{path.name}\n{text}" for path, text in told)


def coordinator_at(home: Path) -> Operator:
    return Operator("server.server_command", "UNIMISS_SERVER_HOME", home)


def site_at(home: Path) -> Operator:
    return Operator("client.site_command", "UNIMISS_SITE_HOME", home)


@dataclass
class Deployment:
    """folder: of everything. public: where sites reach the coordinator; behind it is the front's own port."""

    folder: Path
    coordinator: Operator
    sites: dict[str, Operator]
    line: "Line"
    study: Mapping[str, Any]

    @property
    def home(self) -> Home:
        return Home(self.coordinator.home)

    @property
    def run_folder(self) -> Path:
        return self.home.run(str(self.study["name"]))

    def runs(self) -> None:
        """`unimiss-server run`, in the background."""
        self.coordinator.starts("run", self.folder / "study.yaml", "--verbose")

    def boots(self, name: str) -> None:
        """A machine starts, and with it what deploy/ has for it. name: a site's, or COORDINATOR."""
        self.operator(name).boots(self.service(name))

    def operator(self, name: str) -> Operator:
        return self.coordinator if name == COORDINATOR else self.sites[name]

    def service(self, name: str) -> Service:
        """The coordinator and all sites but one are units of systemd; that one is a container."""
        if name == COORDINATOR:
            study = str(self.study["name"])
            (self.coordinator.home / f"{study}.yaml").write_text(yaml.safe_dump(dict(self.study)))
            return of_unit(COORDINATOR_UNIT, {"/var/lib/unimiss-server": self.coordinator.home}, study)
        places = self._places(name)
        return of_container("site", places) if name == IN_CONTAINER else of_unit(SITE_UNIT, places)

    def check(self, name: str) -> Service:
        """`unimiss-site check`, left what the site's daemon is left."""
        if name == IN_CONTAINER:
            return of_container("check", self._places(name))
        daemon = self.service(name)
        return replace(daemon, command=["check" if word == "run" else word for word in daemon.command])

    def _places(self, name: str) -> Places:
        home, scans = self.sites[name].home, self.folder / f"{name}-scans"
        as_unit = {"/etc/unimiss/site": home, "/var/lib/unimiss-site": home / "state"}
        return as_unit | {"/home/site": home, "/state": home / "state", "/archive": scans}

    def rounds(self) -> list[dict[str, Any]]:
        """The metrics of the rounds that are finished."""
        path = self.run_folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        done = {int(folder.name[-4:]) for folder in (self.run_folder / "checkpoints").glob("round-*[0-9]")}
        return [row for row in map(json.loads, lines) if row["round"] in done]

    def set_coordinator(self, **settings: object) -> None:
        """Of coordinator.yaml."""
        _change(self.home.coordinator, settings)

    def set_site(self, name: str, **settings: object) -> None:
        """Of the site file."""
        _change(self.sites[name].home / "site.yaml", settings)

    def set_study(self, **settings: object) -> None:
        self.study = {**self.study, **settings}
        (self.folder / "study.yaml").write_text(yaml.safe_dump(dict(self.study)))

    def until(self, condition: Callable[[], object], what: str, *, within_s: float = START_S) -> float:
        """Wait; the seconds that it took. Raises DeploymentError, with the logs."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > within_s:
                raise DeploymentError(f"not within {within_s:g} s: {what}\n{self.logs()}")
            time.sleep(POLL_S)
        return time.monotonic() - began

    def until_ended(self, *, within_s: float = 600.0) -> int:
        """The exit code of `unimiss-server run`."""
        process = self.coordinator.process
        assert process is not None
        self.until(lambda: process.poll() is not None, "the run ends", within_s=within_s)
        return process.returncode

    def is_training(self, name: str) -> bool:
        """Whether a site is at work on a round that is not finished: by what it was asked last, and its processes."""
        path = self.sites[name].home / "state" / "contact.json"
        with suppress(OSError, ValueError):
            asked = json.loads(path.read_text())["round"] or 0
            return asked > len(self.rounds()) and bool(self.sites[name].processes("clientapp"))
        return False

    def logs(self) -> str:
        return "\n".join(one.logs() for one in (self.coordinator, *self.sites.values()))


@contextmanager
def deployed(folder: Path, names: Sequence[str] = tuple(KINDS), **study: object) -> Iterator[Deployment]:
    """A coordinator and its sites, initialised, approved and joined; nothing runs yet. Ends what was started.

    study: settings other than STUDY's.
    """
    public, front, superlink = (free_port() for _ in range(3))
    coordinator, line = coordinator_at(folder / "coordinator"), Line(public, front)
    coordinator.types("init", coordinator.home, "--address", f"127.0.0.1:{public}")
    one = Deployment(folder, coordinator, {}, line, STUDY)
    one.set_study(**study)
    patience = {"pause_s": 5.0, "longest_s": 30.0, "tries": 6}
    local = {"listen": "127.0.0.1", "listen_port": front, "superlink_port": superlink, "patience": patience}
    _change(one.home.server, local)
    one.set_coordinator(min_sites=len(names), min_replies=len(names), wait_s=START_S, deadline_s=START_S, retry_s=2.0)
    for name in names:
        one.sites[name] = _joined(folder, name, coordinator, one.home)
    try:
        line.opens()
        yield one
    finally:
        for operator in (coordinator, *one.sites.values()):
            operator.loses_power()
        line.closes()


def _joined(folder: Path, name: str, coordinator: Operator, home: Home) -> Operator:
    site = site_at(folder / name)
    site.types("init", site.home, "--name", name)
    coordinator.types("approve", name, "--key", site.home / f"{name}.join.yaml")
    site.types("join", home.welcome(name))
    shape = {"volume_shape": (16, 32, 36), "volume_spacing_mm": (16.0, 10.0, 10.0)}
    config = PhantomConfig.model_validate(
        {"kind": KINDS.get(name, "cr"), "patients": PATIENTS, "seed": len(name), **shape}
    )
    write_hospital(config, folder / f"{name}-scans")
    settings = {"data": [{"folder": f"../{name}-scans"}], "devices": "cpu", "threads": 1, "workers": 1}
    _change(site.home / "site.yaml", {**settings, "policy": {"studies": None}, "privacy": {}})
    return site


class Line:
    """What lies between sites and coordinator: passes bytes from one port of loopback to another, and can be cut."""

    def __init__(self, port: int, onward: int) -> None:
        self.port, self._onward = port, onward
        self._listener: socket.socket | None = None
        self._ends: set[socket.socket] = set()

    def opens(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def closes(self) -> None:
        """Whatever was connected is cut off, and nobody is let in."""
        listener, self._listener = self._listener, None
        for end in [*filter(None, [listener]), *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._onward), timeout=5.0)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=[source, sink], daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        self._ends.add(source)
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.discard(source)
        source.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def audit_of(operator: Operator, *study: str) -> list[dict[str, Any]]:
    """An operator's audit log as its own command prints it, which verifies it first. study: of a coordinator's run."""
    told = operator.types("audit", *study, "--json")
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


@contextmanager
def _environment(name: str, value: Path) -> Iterator[None]:
    """Of this process, within."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _change(path: Path, settings: Mapping[str, object]) -> None:
    """Settings of a YAML file, replaced or added."""
    path.write_text(yaml.safe_dump({**(yaml.safe_load(path.read_text()) or {}), **settings}))
