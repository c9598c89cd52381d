"""What `unimiss-server run` does every second, against a SuperLink and processes of a few lines."""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from server import app, run_command, superlink
from server.children import ChildError
from server.composition import Composed, compose
from server.control import Control, ControlError, RunState
from server.home import VARIABLE, Home
from server.registry import Registry
from server.run_command import Interrupted, Stop
from server.running import status
from server.server_config import ServerConfig
from server.submission import Submission
from tests.coordinator_home import home_of_alpha, server_certificate_ends, write_study
from unimiss_core import progress
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.keys import pem_of_public, site_public_key


@dataclass
class Link:
    """A SuperLink that is asked for nothing but runs and nodes. is_silent: it does not answer, for so many seconds."""

    is_silent: bool = False
    silent: float = 0.0
    nodes: Mapping[bytes, str] = field(default_factory=dict)

    def stop_all(self) -> None:
        if self.is_silent:
            raise ControlError("SuperLink does not answer")

    def agree_on_nodes(self, approved: Mapping[bytes, str]) -> None:
        self.stop_all()
        self.nodes = approved

    def silent_s(self) -> float:
        return self.silent

    def submit(self, _run_config: Mapping[str, str | bool]) -> int:
        return 1

    def state(self, _run: int) -> RunState:
        return RunState(is_finished=False, how="", details="")


@dataclass
class Processes:
    """Of a coordinator. ended: in this order. ran: for so many seconds."""

    ended: list[str] = field(default_factory=list)
    ran: float = 0.0
    members: tuple[Any, ...] = ()

    def runs_s(self, name: str) -> float:
        return self.ran if name == "superlink" else 0.0

    def end_one(self, name: str) -> None:
        self.ended.append(name)

    def look_after(self) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return home_of_alpha(tmp_path / "home")


@pytest.fixture
def composed(home: Home, tmp_path: Path) -> Composed:
    return compose(home, write_study(tmp_path / "study.yaml"))


def loop_of(home: Home, composed: Composed, link: Link, processes: Processes) -> Any:
    submission = Submission(link, composed.folder, 2)
    return run_command._Loop(home, composed, processes, link, Registry(home), submission)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("silent", "ran", "ended"),
    [(181.0, 181.0, ["superlink"]), (181.0, 179.0, []), (179.0, 1000.0, []), (1000.0, 0.0, [])],
    ids=["hangs", "is starting", "is busy", "does not run"],
)
def test_a_superlink_that_hangs_is_started_again(
    home: Home, composed: Composed, silent: float, ran: float, ended: list[str]
) -> None:
    processes = Processes(ran=ran)
    loop_of(home, composed, Link(is_silent=True, silent=silent), processes)._step()
    assert processes.ended == ended


def test_a_superlink_that_hangs_for_ever_ends_the_run(
    home: Home, composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_command, "NODES_S", 0.0)
    link, processes = Link(is_silent=True, silent=181.0), Processes(ran=181.0)
    loop = loop_of(home, composed, link, processes)
    for _ in range(run_command.HANGS):
        loop._step()
    link.is_silent, link.silent = False, 0.0
    loop._step()  # it answers once: they are no more in a row
    link.is_silent, link.silent = True, 181.0
    for _ in range(run_command.HANGS):
        loop._step()
    assert len(processes.ended) == 2 * run_command.HANGS
    with pytest.raises(ChildError, match=r"superlink\.log"):
        loop._step()


def test_a_certificate_that_runs_out_ends_the_run_and_says_which(
    home: Home, composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[object] = []
    monkeypatch.setattr(run_command, "DATES_S", 0.0)
    loop = loop_of(home, composed, Link(), Processes())
    server_certificate_ends(home, datetime.now(UTC) + timedelta(days=12.5))
    with progress.listen(notes.append):
        for _ in range(3):
            loop._look_at_dates()
    server_certificate_ends(home, datetime.now(UTC))
    with pytest.raises(ConfigError) as error:
        loop.until_the_end(iter([False, True]).__next__)  # who does not look is stopped, which is another error
    assert "server.crt: has run out; `unimiss-server renew`" in str(error.value)
    assert error.value.resumes
    (note,) = notes  # once a day, not at each look
    assert isinstance(note, progress.Note)
    assert "the server's certificate lasts 12 days" in note.text
    assert "server.crt: has run out" in (composed.folder.why_it_stopped() or "")


def test_a_certificate_that_cannot_be_read_for_a_moment_ends_nothing(
    home: Home, composed: Composed, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody puts back a backup; SuperLink has read it."""
    home.server_certificate.write_text("")
    loop_of(home, composed, Link(), Processes())._look_at_dates()
    assert "server.crt: expected one certificate" in caplog.text


def test_a_control_knows_how_long_nothing_has_answered(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        control = Control(taken.getsockname()[1], home.authority_certificate)
        assert control.silent_s() == 0.0
        for _ in range(2):
            with pytest.raises(ControlError, match="does not answer"):
                control.state(1)
            time.sleep(0.05)
        assert control.silent_s() >= 0.1
        control.close()


def test_a_full_disk_is_told_once_until_there_is_room(
    home: Home, composed: Composed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, is_full = loop_of(home, composed, Link(), Processes()), True
    monkeypatch.setattr(run_command, "WRITE_S", 0.0)

    def write(_path: Path, _text: str) -> None:
        if is_full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.running.durable.write_text", write)
    for _ in range(3):
        loop._write()
    assert len(caplog.messages) == 1
    is_full = False
    loop._write()
    is_full = True
    loop._write()
    assert len(caplog.messages) == 2


def test_a_run_that_is_stopped_says_so_afterwards(home: Home, composed: Composed) -> None:
    stop = Stop()
    stop.is_set = True
    with pytest.raises(Interrupted):
        loop_of(home, composed, Link(), Processes()).until_the_end(stop)
    told = json.loads((composed.folder.path / "stopped.json").read_text())
    assert told == {"round": 1, "error": "its operator stopped it", "sites": {}}
    assert "toy: 0 of 2 rounds finished; stopped: its operator stopped it" in status(
        home, at_work=False, now=datetime.now(UTC)
    )


def test_why_the_round_at_work_was_given_up_is_not_written_over(home: Home, composed: Composed) -> None:
    stop = Stop()
    stop.is_set = True
    composed.folder.note_stop({"round": 1, "error": "it was interrupted", "sites": {}})
    with pytest.raises(Interrupted):
        loop_of(home, composed, Link(), Processes()).until_the_end(stop)
    assert composed.folder.why_it_stopped() == "it was interrupted"


def test_the_front_opens_when_superlink_knows_the_approved_sites(home: Home) -> None:
    """Else a site that comes in between hears that it is unknown, and starts over."""
    link = Link(is_silent=True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = load(ServerConfig, home.server).model_copy(update={"superlink_port": listening.getsockname()[1]})
        registry = Registry(home)
        family = superlink.family(home, config, lambda: run_command._knows_sites(link, registry))  # type: ignore[arg-type]
        begins = {member.recipe.name: member.recipe for member in family.members}["superlink"]
        assert not begins.is_ready()
        link.is_silent = False
        assert begins.is_ready()
    (site,) = registry.approved()
    assert link.nodes == {pem_of_public(site_public_key(site.public_key, "alpha")): "alpha"}


def test_the_server_app_finds_the_run_by_the_studys_name(
    home: Home, composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run is submitted with, every site is told: a name, and no path of the coordinator's."""
    for name, value in superlink.environment(home).items():
        monkeypatch.setenv(name, value)
    named = Context(1, 1, {}, RecordDict(), {"coordinator": "toy"})
    assert app.coordinator_file(None, named) == composed.file  # type: ignore[arg-type]
    monkeypatch.delenv(VARIABLE)
    assert app.coordinator_file(None, named) == Path("toy")  # type: ignore[arg-type]
