"""What `unimiss-server run`, `status` and `stop` make of a coordinator's folder, without any process of Flower."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import superlink
from server.approval import revoke
from server.children import Children
from server.composition import compose
from server.contacts import Contacts
from server.coordinator_config import load_coordinator
from server.founding import found
from server.home import Home
from server.run_command import alone, run, runner, stop
from server.running import Running, children_of, status
from server.said import kept
from server.server_command import main
from server.server_config import ServerConfig
from tests.coordinator_home import approved_site, found_home, write_study
from tests.federation import random_tensors, saved_checkpoint, whole_layout
from tests.run_artefacts import round_records
from unimiss_core import progress
from unimiss_core.config import load
from unimiss_core.errors import ConfigError, UnimissError

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = found_home(tmp_path / "home", min_sites=1, start="weights")
    approved_site(home, "alpha")
    return home


def test_the_coordinator_file_names_the_approved_sites_and_their_keys(home: Home, tmp_path: Path) -> None:
    approved_site(home, "beta")
    approved_site(home, "gone")
    revoke(home, "gone")
    composed = compose(home, write_study(tmp_path / "study.yaml"))
    config = load_coordinator(composed.file)
    assert config.file_in_words == "coordinator.yaml"
    assert [site.name for site in config.sites] == ["alpha", "beta"]
    assert all(site.public_key and site.public_key.startswith("ecdsa-sha2-nistp384 ") for site in config.sites)
    assert config.identity == "proved"
    assert config.out == home.run("toy") == composed.folder.path
    assert config.start == home.path / "weights"  # from the folder of the operator's file
    assert config.signing_key == home.signing_key


def test_a_study_that_is_edited_later_is_run_as_it_was_asked_for(home: Home, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.yaml")
    composed = compose(home, study)
    study.write_text("name: other")
    assert load_coordinator(composed.file).study.read_text() != "name: other"


def test_a_study_that_was_changed_since_its_run_began_is_told_a_way_that_there_is(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` takes no folder: it is called as the study is."""
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    (folder.path / "study.yaml").write_text((tmp_path / "study.yaml").read_text())
    monkeypatch.setattr("server.run_folder.checkpoint.latest", lambda found: found / "round-0001")
    changed = write_study(tmp_path / "study.yaml", schedule={"rounds": 5, "local_steps": 2})
    assert main(["run", str(changed), "--home", str(home.path)]) == 2
    told = capsys.readouterr().err
    assert "holds a run of another study (different: schedule.rounds)" in told
    assert "or give this one another `name:`, which its sites must allow, too" in told
    assert "new folder" not in told


@pytest.mark.parametrize("key", ["study", "out", "sites", "signing_key"])
def test_what_run_adds_is_not_the_operators_to_write(home: Home, tmp_path: Path, key: str) -> None:
    home.coordinator.write_text(yaml.safe_dump({key: "x"}))
    with pytest.raises(ConfigError, match=f"remove '{key}'"):
        compose(home, write_study(tmp_path / "study.yaml"))


def test_without_an_approved_site_nothing_is_run(home: Home, tmp_path: Path) -> None:
    """A coordinator file without sites would ask every node."""
    revoke(home, "alpha")
    with pytest.raises(ConfigError, match="no site is approved"):
        compose(home, write_study(tmp_path / "study.yaml"))


def test_a_wrong_setting_is_told_by_the_operators_own_file(home: Home, tmp_path: Path) -> None:
    home.coordinator.write_text("min_sites: 2")
    with pytest.raises(ConfigError, match=r"home/coordinator\.yaml: .*\n.*min_sites=2"):
        compose(home, write_study(tmp_path / "study.yaml"))


@pytest.mark.parametrize(
    ("address", "settings", "host", "told"),
    [
        ("unimiss.example.org:443", {}, "0.0.0.0", "every IPv4 address of this machine, port 443"),
        ("192.0.2.7:443", {"listen": "192.0.2.7", "listen_port": 9443}, "192.0.2.7", "192.0.2.7, port 9443"),
        ("127.0.0.1:9443", {}, "127.0.0.1", "127.0.0.1, port 9443"),
        ("localhost:9443", {}, "127.0.0.1", "127.0.0.1, port 9443"),
        ("[::1]:9443", {}, "::1", "::1, port 9443"),
        ("127.0.0.1:9443", {"listen": "::"}, "::", "every address of this machine, port 9443"),
    ],
)
def test_a_trial_on_one_machine_is_open_to_that_machine_alone(
    address: str, settings: dict[str, Any], host: str, told: str
) -> None:
    config = ServerConfig(address=address, **settings)
    assert (config.host, config.bound) == (host, told)


@pytest.mark.parametrize(
    ("address", "listen"), [("127.0.0.1:9443", "127.0.0.1"), ("unimiss.example.org:443", "0.0.0.0")]
)
def test_init_writes_down_what_is_bound_and_how_that_is_changed(tmp_path: Path, address: str, listen: str) -> None:
    home = found(tmp_path / "home", address, now=NOW)
    assert f'# listen: "{listen}" ' in home.server.read_text()
    assert load(ServerConfig, home.server).host == listen


def test_run_says_what_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unstarted:
        def start(self, _stop: object) -> None:
            raise ConfigError("not today")

        def end(self) -> None:
            pass

    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        port, superlink_port = (one.getsockname()[1] for one in (first, second))
    home = found_home(tmp_path / "home", port=port, superlink_port=superlink_port, min_sites=1)
    approved_site(home, "alpha")
    monkeypatch.setattr(superlink, "family", lambda *_: Unstarted())
    heard: list[progress.Event] = []
    with progress.listen(heard.append), pytest.raises(ConfigError, match="not today"):
        run(home, write_study(tmp_path / "study.yaml"))
    assert any(f"the public side (127.0.0.1, port {port})" in getattr(event, "text", "") for event in heard)


@pytest.mark.parametrize("key", ["superlink_port", "address"])
def test_a_port_that_is_taken_is_told_before_anything_begins(home: Home, key: str) -> None:
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        ports = {"superlink_port": free.getsockname()[1], "address": taken.getsockname()[1]}
        if key == "superlink_port":
            ports = dict(zip(ports, reversed(ports.values()), strict=True))
        free.close()
        config = ServerConfig(
            address=f"localhost:{ports['address']}", listen="127.0.0.1", superlink_port=ports["superlink_port"]
        )
        with pytest.raises(ConfigError, match=f"'{key}': 127.0.0.1 port .* cannot be opened"):
            superlink.prepare(home, config)


def test_what_was_on_its_way_in_a_run_before_is_gone(home: Home) -> None:
    """Updates in plain form, for a SuperLink that expects none of them any more."""
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (first, second)]
    (home.passage / "alpha" / "answer").mkdir(parents=True)
    (home.passage / "alpha" / "answer" / "part").write_text("of an update")
    config = ServerConfig(address=f"localhost:{ports[0]}", listen="127.0.0.1", superlink_port=ports[1])
    superlink.prepare(home, config)
    assert not (home.passage / "alpha" / "answer").exists()


def test_flwr_commands_find_the_superlink(home: Home) -> None:
    """As Flower documents its config.toml; tests/test_superlink.py uses it."""
    told = tomllib.loads(superlink.connection(home, load(ServerConfig, home.server)))
    assert told["superlink"]["default"] == "unimiss"
    assert told["superlink"]["unimiss"] == {
        "address": "127.0.0.1:8000",
        "root-certificates": str(home.authority_certificate),
    }


def test_superlink_is_started_on_loopback_with_its_defences(home: Home) -> None:
    family = superlink.family(home, load(ServerConfig, home.server))
    link, exec_, front = (child.recipe.command for child in family.members)
    assert "--host 127.0.0.1" in " ".join(link)
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(link)
    assert "--isolation process --superexec-auth-secret-file" in " ".join(link)
    assert not {"--insecure", "--simulation"} & {*link, *exec_, *front}
    secret = home.superexec_secret.read_text()
    assert not any(secret in word for word in (*link, *exec_, *front, *family.environment.values()))
    assert family.environment["FLWR_TELEMETRY_ENABLED"] == "0"


def holder(home: Home) -> "subprocess.Popen[str]":
    """A process that holds the folder as `run` does, until SIGTERM."""
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from server.run_command import alone; from server.home import Home\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        f"with alone(Home(Path({str(home.path)!r}))):\n    print('held', flush=True); signal.pause()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def test_stop_ends_the_process_that_holds_the_folder(home: Home) -> None:
    process = holder(home)
    assert runner(home) == process.pid
    with pytest.raises(ConfigError, match="is at work here already"), alone(home):
        pass
    assert stop(home)
    assert process.wait() == 0
    assert runner(home) is None
    assert not stop(home)


def test_a_run_that_was_killed_holds_nothing(home: Home) -> None:
    """Whoever has its process number now is not meant."""
    process = holder(home)
    process.send_signal(signal.SIGKILL)
    process.wait()
    home.lock.write_text(str(os.getpid()))
    assert not stop(home)
    with alone(home):
        assert runner(home) == os.getpid()


def test_status_tells_of_runs_processes_sites_and_clocks(home: Home, tmp_path: Path) -> None:
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    for row in round_records(1):
        folder.append_metrics(row)
    approved_site(home, "gamma")
    contacts = Contacts()
    contacts.heard("alpha", NOW - timedelta(seconds=3), 0.1)
    contacts.heard("beta", NOW - timedelta(minutes=4), -400.0)
    home.front_status.write_text(contacts.as_text({"no_certificate": 12}, NOW))
    family = Children([], home.flower, home.workplace, {}, 1_000_000)
    Running("toy", 2, NOW.timestamp() - 60, True, 0, children_of(family)).write(home.running)
    assert list(status(home, at_work=True, now=NOW)) == [
        "running toy for 1 min 00 s",
        "toy: 1 of 2 rounds finished, the last with alpha-xray, beta-ct, gamma-mixed",
        "alpha: heard 3.0 s ago",
        "beta: heard 4 min 00 s ago; its clock is 6 min 40 s behind, so that nothing of it is taken: "
        "at most 305 s behind or 5 s ahead is allowed",
        "gamma: not heard since the public side began",
        "refused at the public side since it began: no_certificate 12",
    ]


SEEN = '{{"at": "2026-03-01T11:00:00+00:00", "refused": {}, "sites": {{"alpha": {}}}}}'


@pytest.mark.parametrize(
    "kept",
    [
        "[" * 50_000,
        "[]",
        SEEN.format("{}", '{"seen": 5, "clock_ahead_s": 0.1}'),
        SEEN.format("{}", '{"seen": "2026-03-01T11:00:00", "clock_ahead_s": 0.1}'),
        SEEN.format("{}", '{"seen": "2026-03-01T11:00:00+00:00", "clock_ahead_s": "x"}'),
        SEEN.format('{"path": 1e999}', "{}"),
        '{"study": 5, "rounds": "x", "since": 1e999, "submitted": 1, "fruitless": "z", "children": []}',
        '{"study": "toy", "rounds": 2, "since": 1e999, "submitted": true, "fruitless": 0, "children": []}',
    ],
    ids=["deep", "list", "seen", "no zone", "clock", "refused", "running", "endless"],
)
def test_status_tells_the_rest_where_what_others_keep_is_damaged(home: Home, tmp_path: Path, kept: str) -> None:
    compose(home, write_study(tmp_path / "study.yaml"))
    home.front_status.write_text(kept)
    home.running.write_text(kept)
    assert list(status(home, at_work=True, now=NOW)) == [
        "a run is starting",
        "toy: 0 of 2 rounds finished",
        "alpha: not heard since the public side began",
    ]


def test_status_tells_who_is_waited_for_and_until_when(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    Running("toy", 2, NOW.timestamp() - 900, True, 0, ()).write(home.running)
    monkeypatch.setattr("server.said.time.time", lambda: NOW.timestamp() - 600)
    with kept(folder.path):
        progress.report(progress.RoundStarted(1, 2, ("alpha", "beta", "gamma", "delta")))
        progress.report(progress.SiteReplied(1, "delta", "ok", ""))
        progress.report(progress.SiteReplied(1, "gamma", "refused", "policy"))
    told = list(status(home, at_work=True, now=NOW))
    place = told.index("  round 1, asked for 10 min 00 s ago: delta counted")
    waits = told[place + 2]
    assert told[place + 1] == "    gamma did not count: refused policy"
    assert waits.startswith("    waits for alpha, beta (revoked), until 2026-03-01 ")
    with kept(folder.path):
        progress.report(progress.RoundDone(1, 2, 700.0))
    assert not any("waits for" in line for line in status(home, at_work=True, now=NOW))


def test_status_tells_why_the_last_try_ended_until_a_round_is_finished(home: Home, tmp_path: Path) -> None:
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    folder.note_end(1, UnimissError("1 of at least 2 sites are there; beta: policy"))
    said = "; its last try ended: 1 of at least 2 sites are there; beta: policy"
    assert f"toy: 0 of 2 rounds finished{said}" in status(home, at_work=False, now=NOW)
    Running("toy", 2, NOW.timestamp() - 60, False, 1, ()).write(home.running)
    assert f"toy: 0 of 2 rounds finished{said}" in status(home, at_work=True, now=NOW)
    (row,) = round_records(1)
    folder.append_metrics(row)
    assert any("its last try" in line for line in status(home, at_work=True, now=NOW))  # it may be cut off here
    saved_checkpoint(folder.checkpoint_of(1), round=1)
    assert not any("its last try" in line for line in status(home, at_work=True, now=NOW))


def test_status_tells_it_in_the_next_try_too(home: Home, tmp_path: Path) -> None:
    """Whether that begins with whole metrics, or takes away a line whose checkpoint was never written."""
    composed = compose(home, write_study(tmp_path / "study.yaml"))
    (folder := composed.folder).begin(composed.study, resume=False)
    saved_checkpoint(folder.checkpoint_of(1), round=1, study=composed.study, **weights())
    first, second = round_records(2)
    folder.append_metrics(first)
    for cut_off in (False, True):
        if cut_off:
            folder.append_metrics(second)
        folder.note_end(1, UnimissError("no room"))
        assert _line_of_toy(home).endswith("; its last try ended: no room")
        folder.begin(composed.study, resume=True)
        assert "toy: 1 of 2 rounds finished, the last with " in (line := _line_of_toy(home))
        assert line.endswith("; its last try ended: no room")
    folder.append_metrics(second)
    saved_checkpoint(folder.checkpoint_of(2), round=2, study=composed.study, **weights())
    assert "its last try" not in _line_of_toy(home)


def test_status_tells_nothing_of_a_try_before_the_run_came_to_its_end(home: Home, tmp_path: Path) -> None:
    """The last round was done then, so that no further one is."""
    composed = compose(home, write_study(tmp_path / "study.yaml"))
    (folder := composed.folder).begin(composed.study, resume=False)
    for row in round_records(2):
        folder.append_metrics(row)
    saved_checkpoint(folder.checkpoint_of(2), round=2, study=composed.study, **weights())
    folder.note_end(1, UnimissError("no room"))
    assert _line_of_toy(home).endswith("; its last try ended: no room")
    folder.note_finished(2)
    assert "its last try" not in _line_of_toy(home)


def _line_of_toy(home: Home) -> str:
    (line,) = [line for line in status(home, at_work=False, now=NOW) if line.startswith("toy: ")]
    return line


def weights() -> dict[str, object]:
    """Of a model of the study, as a checkpoint to resume from holds them."""
    tensors = random_tensors(whole_layout(), 0)
    return {"student": tensors, "teacher": tensors, "server_json": "{}"}


def test_status_tells_why_a_run_was_stopped(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    folder.note_stop({"error": "too few replied\x1b[2J", "round": 1, "sites": {}})
    assert main(["status", "--home", str(home.path)]) == 0
    said = capsys.readouterr().out
    assert "no run is at work" in said
    assert "toy: 0 of 2 rounds finished; stopped: too few replied\N{REPLACEMENT CHARACTER}[2J" in said


def test_status_keeps_the_lines_of_what_is_stored(home: Home, tmp_path: Path) -> None:
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    folder.note_stop({"error": "2 sites sent nothing:\nalpha: policy\nbeta: \x1b[2J\n", "round": 1, "sites": {}})
    told = list(status(home, at_work=False, now=NOW))
    first = told.index("toy: 0 of 2 rounds finished; stopped: 2 sites sent nothing:")
    assert told[first + 1 : first + 3] == ["    alpha: policy", "    beta: \N{REPLACEMENT CHARACTER}[2J"]


def test_status_tells_a_run_that_was_killed_from_one_that_is_finished(home: Home, tmp_path: Path) -> None:
    """Nobody wrote down how either ended."""
    folder = compose(home, write_study(tmp_path / "study.yaml")).folder
    first, second = round_records(2)
    folder.append_metrics(first)
    way_on = "  not at work; unimiss-server run STUDY.yaml goes on with it"
    told = list(status(home, at_work=False, now=NOW))
    assert told[1].startswith("toy: 1 of 2 rounds finished")
    assert told[2] == way_on
    assert way_on not in status(home, at_work=True, now=NOW)  # it may be the one that is starting
    Running("another", 2, NOW.timestamp(), True, 0, ()).write(home.running)
    assert way_on in status(home, at_work=True, now=NOW)
    folder.append_metrics(second)
    told = list(status(home, at_work=False, now=NOW))
    assert told[1].startswith("toy: 2 of 2 rounds finished")
    assert told[2] == "  its model, audit log or report may lack; unimiss-server run STUDY.yaml brings it to its end"
    folder.note_finished(2)
    assert not any("STUDY.yaml" in line for line in list(status(home, at_work=False, now=NOW))[1:])


def test_running_survives_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "running.json").write_text(json.dumps({"study": "toy"}))
    assert Running.read(tmp_path / "running.json") is None
