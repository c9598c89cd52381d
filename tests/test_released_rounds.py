"""Site-level privacy: every release is counted before it is made, also of a round that is done again."""

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from server.global_state import GlobalState
from server.released_rounds import ReleasedRounds
from server.run_folder import RunFolder
from tests import test_rounds
from tests.federation import metric_rows, small_study
from tests.test_site_level import federate, site_study, xray
from unimiss_core import checkpoint, durable
from unimiss_core.errors import CheckpointError, PrivacyBudgetError, RunFolderError
from unimiss_core.gaussian_privacy import gaussian_epsilon
from unimiss_core.study import StudyConfig

Z = 2.0


def paid(releases: int) -> float:
    """By the closed form alone."""
    return gaussian_epsilon(Z, releases, 1e-5)


def study_of(rounds: int, *, affords: int = 50) -> StudyConfig:
    """Its limit lies between the cost of `affords` releases and of one more."""
    limit = (paid(affords) + paid(affords + 1)) / 2 if affords < 50 else 90.0
    promise = {"mode": "site", "max_epsilon": limit, "noise_multiplier": Z, "clip_norm": 0.7, "sites": 2}
    return site_study(rounds, privacy=promise)


def run(out: Path, study: StudyConfig, *, resume: bool = False) -> GlobalState:
    return federate(out, study, [xray("a"), xray("b")], resume=resume)


def recorded(out: Path) -> Sequence[int]:
    book = json.loads((out / "released.json").read_text())
    assert book.keys() == {"rounds", "study"}
    return [int(round) for round in book["rounds"]]


def charged(out: Path) -> dict[int, float]:
    return {row["round"]: row["global"]["site_epsilon"] for row in metric_rows(out)}


def lose(out: Path, *rounds: int) -> None:
    for round in rounds:
        shutil.rmtree(out / "checkpoints" / checkpoint.folder_name(round))


def test_an_unbroken_run_releases_each_round_once(tmp_path: Path) -> None:
    run(tmp_path, study_of(3, affords=3))
    assert recorded(tmp_path) == [1, 2, 3]
    assert charged(tmp_path) == {1: paid(1), 2: paid(2), 3: paid(3)}


def test_a_round_that_is_done_again_from_an_older_checkpoint_is_paid_for_again(tmp_path: Path) -> None:
    study = study_of(3)
    first = run(tmp_path, study)
    lose(tmp_path, 3, 2)
    again = run(tmp_path, study, resume=True)
    assert recorded(tmp_path) == [1, 2, 3, 2, 3]
    assert charged(tmp_path) == {1: paid(1), 2: paid(4), 3: paid(5)}
    assert any((first.student[name] != again.student[name]).any() for name in first.student)  # another draw of noise


def test_where_the_budget_does_not_bear_it_the_run_ends_before_a_site_is_asked(tmp_path: Path) -> None:
    study, sites = study_of(3, affords=4), [xray("a"), xray("b")]
    federate(tmp_path, study, sites)
    lose(tmp_path, 3, 2)
    for site in sites:
        site.requests.clear()
    told = (
        r"^round 3 of study 'toy' is not begun: with it sites would pay epsilon [0-9.]+ at delta 1e-05, above "
        r"privacy\.max_epsilon=[0-9.]+; it has released round 2 2 times\. The model after round 2 is this study's last$"
    )
    for _ in range(2):
        with pytest.raises(PrivacyBudgetError, match=told):
            federate(tmp_path, study, sites, resume=True)
        assert recorded(tmp_path) == [1, 2, 3, 2]
        assert charged(tmp_path) == {1: paid(1), 2: paid(4)}
    assert {request.round for site in sites for request in site.requests} == {2}
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["round"] == 3
    assert stopped["error"].startswith("round 3 of study 'toy' is not begun")


def test_a_copy_brings_its_record_with_it(tmp_path: Path) -> None:
    study = study_of(2)
    run(tmp_path / "run", study)
    lose(tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run(tmp_path / "copy", study, resume=True)
    assert recorded(tmp_path / "copy") == [1, 2, 2]


def test_a_run_that_begins_anew_in_its_folder_goes_on_paying(tmp_path: Path) -> None:
    study = study_of(2)
    run(tmp_path, study)
    shutil.rmtree(tmp_path / "checkpoints")
    run(tmp_path, study)
    assert recorded(tmp_path) == [1, 2, 1, 2]
    assert charged(tmp_path) == {1: paid(3), 2: paid(4)}


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, what: type, name: str, out: Path, study: StudyConfig) -> None:
    """The coordinator dies instead of doing this for a round after the first checkpoint."""
    whole: Callable[..., object] = getattr(what, name)

    def die(*arguments: object, **named: object) -> object:
        if (out / "checkpoints" / "round-0000").exists():
            raise Killed
        return whole(*arguments, **named)

    monkeypatch.setattr(what, name, die)
    with pytest.raises(Killed):
        run(out, study)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("what", "name", "counted"),
    [
        (GlobalState, "save", []),  # nothing of the round was written
        (ReleasedRounds, "note", []),  # nor can anything be seen of it
        (RunFolder, "append_metrics", [1]),
        (Path, "rename", [1]),  # that of the checkpoint
    ],
)
def test_a_release_is_counted_before_anything_of_it_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: type, name: str, counted: list[int]
) -> None:
    study = study_of(1)
    killed_at(monkeypatch, what, name, tmp_path, study)
    assert recorded(tmp_path) == counted
    run(tmp_path, study, resume=True)
    assert recorded(tmp_path) == [*counted, 1]
    assert charged(tmp_path) == {1: paid(len(counted) + 1)}


def test_a_disk_too_full_for_a_checkpoint_costs_nothing_however_often_it_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `unimiss-server run` tries, by itself; the study affords no release more than it has rounds."""
    study, whole = study_of(3, affords=3), durable.sync

    def full(path: Path) -> None:
        if path.parent.name.startswith("round-0002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path)

    monkeypatch.setattr(durable, "sync", full)
    for attempt in range(6):
        with pytest.raises(RunFolderError, match="No space left on device; make room, then resume"):
            run(tmp_path, study, resume=attempt > 0)
        assert recorded(tmp_path) == [1]
        assert charged(tmp_path) == {1: paid(1)}
    monkeypatch.undo()
    run(tmp_path, study, resume=True)
    assert recorded(tmp_path) == [1, 2, 3]
    assert charged(tmp_path) == {1: paid(1), 2: paid(2), 3: paid(3)}


def test_what_a_killed_coordinator_left_of_a_checkpoint_is_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    """It holds noise that nobody paid for."""
    run(tmp_path, study_of(1))
    (left := tmp_path / "checkpoints" / "round-0002.partial").mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    RunFolder(tmp_path).begin(study_of(1), resume=True)
    assert not left.exists()


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (None, "is missing"),
        ("", "is damaged"),
        ("[1, 2]", "is damaged"),
        ('{"rounds": [1, "2"], "study": "%s"}', "is damaged"),
        ('{"rounds": [1, 2, 0], "study": "%s"}', "is damaged"),
        ('{"rounds": 2, "study": "%s"}', "is damaged"),
        ('{"rounds": [1, 2], "study": "0000"}', "is of another study"),
        ('{"rounds": [1], "study": "%s"}', "does not hold round 2, which was released"),
        ('{"rounds": [2, 2], "study": "%s"}', "does not hold round 1, which was released"),
    ],
)
def test_a_record_that_cannot_be_right_is_refused(tmp_path: Path, record: str | None, told: str) -> None:
    study = study_of(3)
    if record is not None:
        (tmp_path / "released.json").write_text(record.replace("%s", study.digest()))
    with pytest.raises(RunFolderError, match=f"record of what was released {told}.*; put back the file as it was, or"):
        ReleasedRounds(tmp_path, study).begin(2, anew=False)


def test_a_run_does_not_go_on_without_its_record(tmp_path: Path) -> None:
    run(tmp_path, study_of(2))
    lose(tmp_path, 2)
    (tmp_path / "released.json").unlink()
    with pytest.raises(RunFolderError, match="is missing"):
        run(tmp_path, study_of(2), resume=True)


@pytest.mark.parametrize("kept", [1, 0])
def test_a_record_that_was_lost_is_missed_wherever_the_run_would_begin_again(tmp_path: Path, kept: int) -> None:
    """From its initial weights, or from none: its rounds were released all the same."""
    run(tmp_path, study_of(2))
    lose(tmp_path, 2)
    lose(tmp_path, 1)
    if not kept:
        shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "released.json").unlink()
    with pytest.raises(RunFolderError, match="is missing"):
        run(tmp_path, study_of(2), resume=bool(kept))


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """It would begin with the other's releases, or forget them."""
    run(tmp_path, study_of(1))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunFolderError, match="is of another study"):
        run(tmp_path, study_of(2))
    assert recorded(tmp_path) == [1]


@pytest.mark.parametrize(("affords", "ends"), [(5, True), (6, False)])
def test_the_advice_to_delete_a_damaged_checkpoint_says_what_that_costs(
    tmp_path: Path, affords: int, ends: bool
) -> None:
    """Of four rounds three were released; with the third and fourth to come there are 3 + 2 releases, and one more
    where the third was done again already."""
    study = study_of(4, affords=affords)
    run(tmp_path, study)
    lose(tmp_path, 4)
    spoiled = tmp_path / "checkpoints" / "round-0003" / "student.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    told = (
        rf"or delete .*round-0003 to go on from the round before it; round 3 is then released a second time, and sites "
        rf"pay for both: epsilon {paid(6):.3g} at delta 1e-05 after the last round, where privacy\.max_epsilon is "
    )
    with pytest.raises(CheckpointError, match=told) as caught:
        run(tmp_path, study, resume=True)
    assert str(caught.value).endswith("so that the run will end before its last round") == ends


def test_without_site_level_privacy_nothing_is_recorded_nor_told(tmp_path: Path) -> None:
    study = small_study(1)
    assert test_rounds.federate(tmp_path, [xray("a")], study).round == 1
    assert not (tmp_path / "released.json").exists()
    with pytest.raises(ValueError, match="mode is none, not site"):
        ReleasedRounds(tmp_path, study)
    spoiled = tmp_path / "checkpoints" / "round-0001" / "student.safetensors"
    spoiled.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"to go on from the round before it$"):
        RunFolder(tmp_path).begin(study, resume=True)
