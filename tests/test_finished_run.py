"""A run is finished when all that comes after its last round is done, too, and says so last of all."""

from pathlib import Path

import pytest

from server import run_command
from server.composition import compose
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.coordinator_home import home_of_alpha, write_study
from tests.federation import saved_checkpoint, small_study, stub_app
from tests.test_rounds import xray
from unimiss_core.errors import AuditError, RunFolderError


def federate(out: Path, *, resume: bool = False, report: object = lambda _: None) -> None:
    config = CoordinatorConfig(study=Path("unused"), out=out, wait_s=0.1, retry_s=0.0)
    with LocalGrid(stub_app({"xray": xray()}), {"xray": {"name": "xray"}}, run_config={}, workers=1) as grid:
        Federation(grid, small_study(2), config, report=report).run(resume=resume)  # type: ignore[arg-type]


@pytest.mark.usefixtures("narrow")
def test_a_run_is_finished_after_its_report(tmp_path: Path) -> None:
    folder, seen = RunFolder(tmp_path), []
    federate(tmp_path, report=lambda _: seen.append(folder.is_finished))
    assert seen == [False]
    assert folder.is_finished
    federate(tmp_path, resume=True, report=lambda _: seen.append(folder.is_finished))
    assert seen == [False, False]
    assert folder.is_finished


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kill", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_whose_model_was_not_written_is_not_finished(
    tmp_path: Path, kill: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise kill

    with monkeypatch.context() as patch:
        patch.setattr("server.rounds.release_model", killed)
        with pytest.raises((KeyboardInterrupt, RunFolderError)):
            federate(tmp_path)
    folder = RunFolder(tmp_path)
    assert folder.checkpoint_of(2).is_dir()
    assert not folder.is_finished
    federate(tmp_path, resume=True)
    assert folder.is_finished


@pytest.mark.usefixtures("narrow")
def test_a_run_whose_last_release_was_not_written_down_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, round: int, **__: object) -> None:
        if round == 2:
            raise AuditError("the disk is full")

    monkeypatch.setattr("server.run_audit.RunAudit.released", fails)
    with pytest.raises(AuditError):
        federate(tmp_path)
    assert RunFolder(tmp_path).checkpoint_of(2).is_dir()
    assert not RunFolder(tmp_path).is_finished


@pytest.mark.usefixtures("narrow")
def test_a_run_without_its_report_is_not_finished(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    federate(tmp_path, report=full)
    assert not RunFolder(tmp_path).is_finished


@pytest.mark.parametrize("is_finished", [False, True])
def test_run_goes_on_with_a_run_that_is_not_finished_though_its_rounds_are(
    tmp_path: Path, is_finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = home_of_alpha(tmp_path / "home")
    composed = compose(home, study_file := write_study(tmp_path / "study.yaml"))
    (folder := composed.folder).begin(composed.study, resume=False)
    saved_checkpoint(folder.checkpoint_of(2), round=2)
    if is_finished:
        folder.note_finished(2)
    begun: list[object] = []
    monkeypatch.setattr(run_command, "_with_children", lambda *rest: begun.append(rest))
    monkeypatch.setattr(run_command.superlink, "prepare", lambda *_: None)
    run_command.run(home, study_file)
    assert len(begun) == (0 if is_finished else 1)
