"""What deploy/ starts, and what it is left: the command and environment of the files, and nowhere else to write to."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import confined
from benchmarks.deploy_files import COORDINATOR_UNIT, SITE_UNIT, Service, of_container, of_unit

APART = pytest.mark.skipif(not confined.is_possible(), reason="no mount namespace of one's own may be made here")
TOUCH = "for folder in {}; do touch $folder/mine 2>/dev/null && echo $folder; done; true"


def places(folder: Path) -> Mapping[str, Path]:
    """Folders of a site and of a coordinator, in the place of the files'."""
    own = {"/etc/unimiss/site": "site", "/home/site": "site", "/archive": "scans"}
    own |= {"/state": "state", "/var/lib/unimiss-site": "state", "/var/lib/unimiss-server": "coordinator"}
    for name in own.values():
        (folder / name).mkdir(exist_ok=True)
    return {path: folder / name for path, name in own.items()}


def services(folder: Path) -> Mapping[str, Service]:
    own = places(folder)
    return {
        "site": of_unit(SITE_UNIT, own),
        "coordinator": of_unit(COORDINATOR_UNIT, own, "ward"),
        "container": of_container("site", own),
    }


def test_a_program_is_started_as_the_files_say(tmp_path: Path) -> None:
    begun = {name: [*service.command, service.environment["HOME"]] for name, service in services(tmp_path).items()}
    site = [sys.executable, "-m", "client.site_command", "run", "--home", f"{tmp_path}/site", f"{tmp_path}/state"]
    folder = f"{tmp_path}/coordinator"
    run = [sys.executable, "-m", "server.server_command", "run", f"{folder}/ward.yaml", "--home", folder, folder]
    assert begun == {"site": site, "coordinator": run, "container": site}


def test_a_path_that_a_measure_has_nothing_for_is_named() -> None:
    with pytest.raises(ValueError, match=r"names /var/lib/unimiss-server/ward\.yaml, and this measure has nothing"):
        of_unit(COORDINATOR_UNIT, {}, "ward")


@APART
@pytest.mark.parametrize(
    ("name", "writable"),
    [
        ("site", ["{}/state", "/tmp", "/var/tmp"]),
        ("coordinator", ["{}/coordinator", "/tmp", "/var/tmp"]),
        ("container", ["{}/state", "/tmp"]),
    ],
)
def test_nothing_but_its_state_and_its_own_tmp_can_be_written_to(
    tmp_path: Path, name: str, writable: list[str]
) -> None:
    own = [f"{tmp_path}/{folder}" for folder in ("site", "scans", "state", "coordinator")]
    tried = [*own, str(tmp_path), "/tmp", "/var/tmp", "/", "/etc", "/usr", "/var/lib", "/home", str(Path.cwd())]
    written = inside(services(tmp_path)[name], tmp_path, TOUCH.format(" ".join(tried))).split()
    assert written == [folder.format(tmp_path) for folder in writable]


@APART
def test_it_has_no_rights_and_nothing_of_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "1")
    told = inside(services(tmp_path)["site"], tmp_path, "grep -E 'CapEff|NoNewPrivs' /proc/self/status; env; pwd")
    assert told.split()[:4] == ["CapEff:", "0" * 16, "NoNewPrivs:", "1"]
    assert "OF_THE_CALLER" not in told
    assert told.splitlines()[-1] == "/"


@APART
def test_a_tmp_of_its_own_holds_nothing_of_others(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as of_another:
        told = inside(services(tmp_path)["site"], tmp_path, f"ls {of_another.name} || ls -d {tmp_path}/state")
    assert told == f"{tmp_path}/state\n"


def inside(service: Service, folder: Path, script: str) -> str:
    """What a shell prints in the service's place."""
    shell = replace(service, command=["/bin/sh", "-c", script])
    return subprocess.run(
        confined.command_of(shell, folder), capture_output=True, text=True, check=True, timeout=60
    ).stdout
