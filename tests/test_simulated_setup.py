"""Sites of a simulation that cannot take part: told of all at once, unless the file's quorum goes on without them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from client.pictures import write_png
from server import simulated_overlap, simulated_setup
from server.run_folder import RunFolder
from server.simulate import prepare, read_simulation
from server.simulate_command import main
from unimiss_core import progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.study import StudyConfig

PRIVATE = {
    "privacy": {"mode": "patient", "max_epsilon": 50.0, "noise_multiplier": 2.0, "centre_noise": 5.0},
    "schedule": {"rounds": 1, "local_steps": 2},
    "optimiser": {"warmup_steps": 1},
    "objective": {"centre_momentum": 0.999999},
}


def source(folder: str, **more: object) -> dict[str, object]:
    return {"folder": folder, **more}


GOOD = {"name": "good", "data": [source("scans")]}
GONE = {"name": "gone", "data": [source("nowhere")]}
WRONG_COLUMN = {"name": "wrong-column", "data": [source("scans", table={"path": "t.csv", "file": "Paht"})]}
NO_CARD = {"name": "no-card", "data": [source("nowhere")], "devices": ["cuda:0"]}
ARRAYS = {"name": "arrays", "data": [source("npz")]}


@pytest.fixture
def _without_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def written(tmp_path: Path, *sites: object, **more: object) -> Path:
    """A simulation's file, beside a folder of pictures with its table, and one that holds arrays alone."""
    (tmp_path / "scans").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (4, 40, 44), dtype=np.uint8)
    for number, picture in enumerate(noise):
        write_png(tmp_path / "scans" / f"{number}.png", picture)
    (tmp_path / "t.csv").write_text("Path,ill\n0.png,y\n1.png,n\n")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "JANE.npz", x=noise)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"name": "toy"}))
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump({"study": "study.yaml", "sites": list(sites), **more}))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as failure:
        prepare(read_simulation(path), path.parent / "out", resume=False)
    return str(failure.value)


@pytest.mark.usefixtures("_without_cards")
def test_all_that_files_show_is_told_of_all_sites_before_a_scan_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = {"name": "p", "rank": 2, "label": "il", "data": [source("scans", table={"path": "t.csv", "file": "Path"})]}
    path = written(tmp_path, GOOD, WRONG_COLUMN, GONE, NO_CARD, probe=[probe])
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "3 of 4 sites cannot take part, and no round was begun. Mend them, or take them out of `sites`" in told
    assert "  - wrong-column: table " in told
    assert "no column 'Paht' (did you mean 'Path'?)" in told
    assert "  - gone: its file names what is not there\n      - 'data.0.folder': " in told
    assert "  - no-card: its file names what is not there\n" in told  # all of one site's, too
    assert "  - no-card: key 'devices': device cuda:0 is not on this machine, which has cpu" in told
    assert "  - probe 'p': table " in told
    assert "no column 'il' (did you mean 'ill'?)" in told
    assert "good" not in told
    assert not [*(tmp_path / "out").rglob("cache"), *(tmp_path / "out").rglob("*.npz")]


def test_sites_without_a_usable_scan_are_told_of_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = refused(written(tmp_path, GOOD, ARRAYS, {"name": "empty", "data": [source("empty")]}))
    assert "2 of 3 sites cannot take part, and no round was begun" in told
    assert "  - arrays: no usable scan in 1 data folder(s): 1 not_an_image" in told
    assert "  - empty: no usable scan in 1 data folder(s): the folders are empty" in told
    assert "JANE" not in told


def test_why_a_table_leads_to_no_scan_is_told_too(tmp_path: Path) -> None:
    path = written(tmp_path, {"name": "n", "data": [source("scans", table={"path": "t.csv", "file": "Path"})]})
    (tmp_path / "t.csv").write_text("Path,ill\nscans/0.png,y\nscans/1.png,n\n")
    told = refused(path)
    assert "  - n: no usable scan in 1 data folder(s): 2 missing_file" in told
    assert "they begin with 'scans', the folder's own name: let `folder` be the one above it" in told


def test_once_mended_the_same_command_begins(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GONE)
    assert "gone" in refused(path)
    (tmp_path / "scans").rename(tmp_path / "nowhere")
    (tmp_path / "nowhere" / "more").mkdir()
    path.write_text(path.read_text().replace("folder: scans", "folder: nowhere"))
    assert prepare(read_simulation(path), tmp_path / "out", resume=False).is_file()


@pytest.mark.parametrize(("least", "said"), [(1, True), (3, False)])
def test_a_quorum_in_the_file_goes_on_without_them_and_says_so(tmp_path: Path, least: int, said: bool) -> None:
    path, heard = written(tmp_path, GOOD, GONE, ARRAYS, quorum={"min_sites": least}), list[str]()
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        assert prepare(read_simulation(path), tmp_path / "out", resume=False).is_file()
    assert ("going on without arrays and gone, as the file's quorum allows" in heard) == said


def test_a_run_that_was_begun_goes_on_though_a_site_is_broken_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs of earlier versions did from the first."""
    simulation, out = read_simulation(written(tmp_path, GOOD, GONE)), tmp_path / "out"
    begun = out / "checkpoints" / "round-0003"
    monkeypatch.setattr(RunFolder, "check", lambda folder, *_, **__: begun if folder.path == out else None)
    said: list[str] = []
    with progress.listen(lambda event: said.append(event.text) if isinstance(event, progress.Note) else None):
        prepare(simulation, out, resume=True)
    assert "going on without gone, as the run was begun before" in said
    with pytest.raises(ConfigError, match="gone"):
        prepare(simulation, tmp_path / "new", resume=True)


def test_a_quorum_does_not_excuse_a_probe_that_cannot_be_read(tmp_path: Path) -> None:
    probe = {"name": "p", "rank": 2, "label": "ill", "data": [source("scans")]}
    told = refused(written(tmp_path, GOOD, GONE, quorum={"min_sites": 1}, probe=[probe]))
    assert "probe 'p': its folder needs a table with the column 'ill'" in told


def test_nothing_tells_whom_a_site_of_a_patient_level_study_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_overlap, "load_site", lambda _: pytest.fail("looked at"))
    study = parse(StudyConfig, {"name": "x", **PRIVATE}, where="study")
    assert list(simulated_overlap.shared_patients([], [], {"north": tmp_path}, study)) == []


def test_a_site_that_refuses_the_study_by_its_own_policy_is_not_broken(tmp_path: Path) -> None:
    """Nor are its scans read for it: the run tells why it takes no part, as between hospitals."""
    path = written(tmp_path, GOOD, {**ARRAYS, "policy": {"studies": []}})
    assert prepare(read_simulation(path), tmp_path / "out", resume=False).is_file()


def test_a_private_site_that_cannot_tell_whose_its_scans_are_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private round would answer with a code alone. That it may hold no scan at all is no matter: it sends noise."""
    from client import accounting

    monkeypatch.setattr(accounting, "check_study", lambda _: None)
    monkeypatch.setattr(simulated_setup, "check_may_come", lambda *_: None)
    holds = {"privacy": {"holds": ["images"]}}
    told = refused(written(tmp_path, {**GOOD, **holds}, {**ARRAYS, **holds}, overrides=PRIVATE))
    assert "1 of 2 sites cannot take part" in told
    assert "  - good: a patient-level study counts patients, and nothing says whose these files are" in told
