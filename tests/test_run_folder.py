"""A run's folder: what the run is called, which holds as long as the folder does."""

import re
import threading
from pathlib import Path

import pytest

from server.run_folder import RunFolder
from tests.federation import StubSite, good_answer, small_study
from tests.test_rounds import federate
from unimiss_core import checkpoint
from unimiss_core.config import RUN
from unimiss_core.errors import ConfigError
from unimiss_core.wire import TrainReply, TrainRequest


def site(asked: list[str]) -> StubSite:
    """It notes the run of every request."""

    def answer(request: TrainRequest, stub: StubSite) -> TrainReply:
        asked.append(request.run)
        return good_answer(request, stub)

    return StubSite("a", {2: 3}, answer)


def test_every_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = []
    for number in range(20):
        folder = RunFolder(tmp_path / str(number))
        folder.begin(small_study(), resume=False)
        names.append(folder.run)
    assert len(set(names)) == 20
    assert all(re.fullmatch(RUN, name) for name in names)


def test_a_run_that_is_started_twice_is_refused_the_second_time(tmp_path: Path) -> None:
    """Submitted again while its coordinator lives, say; one that has ended, or was killed, holds nothing."""
    begun: list[str] = []

    def start_again(request: TrainRequest, stub: StubSite) -> TrainReply:
        with pytest.raises(ConfigError, match="another coordinator is at work in it"):
            federate(tmp_path, [site([])], small_study(), resume=True)
        begun.append(request.run)
        return good_answer(request, stub)

    federate(tmp_path, [StubSite("a", {2: 3}, start_again)], small_study())
    assert len(begun) == small_study().schedule.rounds
    federate(tmp_path, [site([])], small_study(), resume=True)


def test_who_holds_a_folder_may_hold_it_again_and_lets_go_at_the_end_alone(tmp_path: Path) -> None:
    """A simulation prepares a run, then begins it; between the two no other may begin."""
    folder = RunFolder(tmp_path)
    refused: list[str] = []

    def begin_elsewhere() -> None:
        try:
            with RunFolder(tmp_path).alone():
                pass
        except ConfigError as error:
            refused.append(str(error))

    def in_another_thread() -> bool:
        thread = threading.Thread(target=begin_elsewhere)
        thread.start()
        thread.join()
        return bool(refused) and bool(refused.pop())

    with folder.alone():
        with RunFolder(tmp_path).alone():
            assert in_another_thread()
        assert in_another_thread()
    assert not in_another_thread()


def test_a_resumed_run_keeps_its_name_and_tells_it_in_every_request(tmp_path: Path) -> None:
    asked: list[str] = []
    study = small_study(rounds=3)
    failing = StubSite("a", {2: 3}, lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    federate(tmp_path / "whole", [site(asked)], study)
    name = RunFolder(tmp_path / "whole").run
    assert asked == [name] * 3
    with pytest.raises(Exception, match="round 1 could not be completed"):
        federate(tmp_path / "cut", [failing], study)
    begun = RunFolder(tmp_path / "cut").run
    asked.clear()
    federate(tmp_path / "cut", [site(asked)], study, resume=True)
    assert asked == [begun] * 3
    assert begun == RunFolder(tmp_path / "cut").run != name


def test_a_run_that_lost_its_name_goes_on_under_a_new_one(tmp_path: Path) -> None:
    study, folder = small_study(), RunFolder(tmp_path)
    federate(tmp_path, [site([])], study)
    lost = folder.run
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match="does not name the run"):
        _ = folder.run
    folder.begin(study, resume=True)
    assert re.fullmatch(RUN, folder.run)
    assert folder.run != lost


DEEP = pytest.param("[" * 50_000, id="deep")


@pytest.mark.parametrize("damaged", ["", "{}", '{"run": 7}', '{"run": "../../x"}', '["run"]', '{"run": "0123', DEEP])
def test_a_damaged_name_is_told_with_the_way_out(tmp_path: Path, damaged: str) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(small_study(), resume=False)
    (tmp_path / "run.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r"run\.json: does not name the run; delete it"):
        _ = folder.run


@pytest.mark.parametrize("damaged", ["", "{}", "[1]", "null", "\0", DEEP])
def test_a_damaged_note_counts_as_none(tmp_path: Path, damaged: str) -> None:
    for name in ("start.json", "stopped.json", "ended.json"):
        (tmp_path / name).write_text(damaged)
    folder = RunFolder(tmp_path)
    assert (folder.was_taught(), folder.why_it_stopped(), folder.why_its_last_try_ended()) == (None, "", "")
    assert folder.how_it_ended(1) == {}


def test_pruned_checkpoints_are_out_of_the_way_at_once_and_soon_deleted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(6):
        folder.checkpoint_of(number).mkdir(parents=True)
        (folder.checkpoint_of(number) / "student.safetensors").write_bytes(bytes(1000))
    with folder.alone():
        folder.prune_checkpoints(newest=5, keep=2)
        assert sorted(checkpoint.numbered(folder.checkpoints)) == [0, 4, 5]
    assert not (tmp_path / "pruned.partial").exists()


def test_what_a_killed_coordinator_was_deleting_is_deleted_when_the_run_goes_on(tmp_path: Path) -> None:
    federate(tmp_path, [site([])], small_study())
    (left := tmp_path / "pruned.partial" / "round-0001").mkdir(parents=True)
    federate(tmp_path, [site([])], small_study(), resume=True)
    assert not left.exists()
