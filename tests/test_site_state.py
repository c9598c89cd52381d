"""A site's memory: of one run of one study, forgotten only when that run has long ended; which states are kept, and
what a damaged file or a full disk costs."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.site_state import KEPT_DAYS, KEPT_RUNS, Remembered, SiteState, forget_old_runs
from client.trainer import run_round
from tests.federation import RUN, small_study
from tests.test_trainer import assert_same_reply, first_round, request_of, site_with_pictures
from unimiss_core.errors import ConfigError, WireError

DAY = 86_400.0
NOW = 2e9
OTHER_RUN = "f" * 16


def state_of(
    folder: Path, run: str = RUN, study_digest: str = "a" * 64, tell: Callable[[str], object] = lambda _: None
) -> SiteState:
    return SiteState(folder, run=run, study_digest=study_digest, tell=tell)


def after(round: int, value: float = 0.5) -> Remembered:
    return Remembered(round, {"x": torch.full((3, 2), value)}, {"y": value})


def test_what_is_remembered_is_found_again_by_the_same_run_alone(tmp_path: Path) -> None:
    state_of(tmp_path).remember(after(4))
    state_of(tmp_path).remember_unfinished(after(5, 0.7))
    found, unfinished = state_of(tmp_path).before(5), state_of(tmp_path).unfinished(5)
    assert found is not None
    assert unfinished is not None
    assert (found.round, found.facts, unfinished.facts) == (4, {"y": 0.5}, {"y": 0.7})
    assert torch.equal(found.tensors["x"], after(4).tensors["x"])
    for stranger in (state_of(tmp_path, OTHER_RUN), state_of(tmp_path, study_digest="b" * 64)):
        assert stranger.before(5) is None
        assert stranger.unfinished(5) is None
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [RUN]


def test_two_runs_of_one_study_at_one_site_share_nothing(tmp_path: Path) -> None:
    """Each trains as at a site that never saw the other: in no order does one's state enter the other's rounds."""
    study = small_study(2, batch={"images": 2})
    first, second = first_round(study), request_of(2, study=study, student=first_round(study, seed=3).student)
    both = {run: site_with_pictures(tmp_path / "both", study, run=run) for run in (RUN, OTHER_RUN)}
    with pytest.raises(WireError, match="needs_whole"):
        run_round(both[RUN], second)
    replies = {}
    for run, site in both.items():
        replies[run] = [run_round(site, first)]
    for run, site in reversed(both.items()):
        replies[run].append(run_round(site, second))
    alone = site_with_pictures(tmp_path / "alone", study)
    expected = [run_round(alone, first), run_round(alone, second)]
    for answers in replies.values():
        for answer, known in zip(answers, expected, strict=True):
            assert_same_reply(answer, known)
    with pytest.raises(WireError, match="needs_whole"):
        run_round(site_with_pictures(tmp_path / "both", study, run="0" * 16), second)


def runs_touched(folder: Path, days_ago: list[float]) -> list[Path]:
    """The folders of runs with something in them, each last touched so many days before NOW."""
    made = []
    for number, days in enumerate(days_ago):
        path = folder / f"{number:016x}"
        path.mkdir(parents=True)
        (path / "round-0001.safetensors").write_bytes(b"x")
        os.utime(path, (NOW - days * DAY, NOW - days * DAY))
        made.append(path)
    return made


def left(paths: list[Path]) -> list[bool]:
    return [path.exists() for path in paths]


def test_the_newest_runs_are_kept_however_old(tmp_path: Path) -> None:
    paths = runs_touched(tmp_path, [1000.0 + number for number in range(KEPT_RUNS + 3)])
    forget_old_runs(tmp_path, now=NOW)
    assert left(paths) == [True] * KEPT_RUNS + [False] * 3


def test_runs_touched_lately_are_kept_however_many(tmp_path: Path) -> None:
    paths = runs_touched(tmp_path, [number % (KEPT_DAYS - 1) for number in range(5 * KEPT_RUNS)])
    forget_old_runs(tmp_path, now=NOW)
    assert all(left(paths))


def test_the_rule_holds_to_the_day_and_a_clock_that_was_ahead_keeps_more(tmp_path: Path) -> None:
    paths = runs_touched(tmp_path, [*[0.0] * KEPT_RUNS, KEPT_DAYS - 0.01, KEPT_DAYS + 0.01, -400.0])
    forget_old_runs(tmp_path, now=NOW)
    assert left(paths) == [True] * (KEPT_RUNS + 1) + [False, True]


def test_nothing_but_runs_is_deleted(tmp_path: Path) -> None:
    runs_touched(tmp_path, [0.0] * KEPT_RUNS)
    (outside := tmp_path.parent / f"{tmp_path.name}-outside").mkdir()
    (outside / "kept.txt").write_text("x")
    for name in ("notes", "F" * 16, "0" * 15):
        (tmp_path / name).mkdir()
    (tmp_path / ("b" * 16)).write_text("a file")
    (tmp_path / ("c" * 16)).symlink_to(outside)
    before = sorted(path.name for path in tmp_path.iterdir())
    forget_old_runs(tmp_path, now=time.time() + 10_000 * DAY)
    assert set(before) - {path.name for path in tmp_path.iterdir()} <= {f"{n:016x}" for n in range(KEPT_RUNS)}
    assert (tmp_path / "notes").is_dir()
    assert (tmp_path / ("b" * 16)).is_file()
    assert (outside / "kept.txt").exists()


def test_a_new_run_forgets_old_ones_and_a_run_at_work_none(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    old = runs_touched(runs, [0.0] * (KEPT_RUNS + 1))
    for path in old:
        os.utime(path, (DAY, DAY))  # in 1970
    going_on = old[0]
    state_of(tmp_path, run=going_on.name).remember(after(7))
    assert all(left(old))
    state_of(tmp_path, run=OTHER_RUN).remember(after(1))
    assert left(old).count(False) == 2
    assert going_on.exists()
    assert state_of(tmp_path, run=going_on.name).before(8) is not None
    assert state_of(tmp_path, run=OTHER_RUN).before(2) is not None


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/archive/DOE^JANE")

    monkeypatch.setattr(os, "fsync", refuse)


def test_the_last_two_rounds_are_kept_and_nothing_unfinished(tmp_path: Path) -> None:
    memory = state_of(tmp_path)
    for round in (1, 2, 3):
        memory.remember_unfinished(after(round))
        memory.remember(after(round))
    assert files(tmp_path) == {"round-0002.safetensors", "round-0003.safetensors"}
    assert memory.unfinished(3) is None
    assert memory.before(1) is memory.before(2) is None
    for asked, found in ((3, 2), (4, 3), (9, 3)):
        state = memory.before(asked)
        assert state is not None
        assert (state.round, state.facts) == (found, {"y": 0.5})
        assert torch.equal(state.tensors["x"], after(found).tensors["x"])


@pytest.mark.parametrize("damaged", [b"", b"\x08", b"not a file of tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_passed_over_for_an_older_one(tmp_path: Path, damaged: bytes) -> None:
    memory = state_of(tmp_path)
    for round in (1, 2):
        memory.remember(after(round))
    (newest,) = tmp_path.rglob("round-0002.safetensors")
    newest.write_bytes(damaged)
    (state, newer) = (memory.before(3), memory.unfinished(2))
    assert state is not None
    assert (state.round, newer) == (1, None)


def with_header(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put another header before the same values."""
    content = path.read_bytes()
    values = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8:values]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[values:])


def metadata(**changed: str) -> Callable[[Path], None]:
    return lambda path: with_header(path, lambda header: header | {"__metadata__": header["__metadata__"] | changed})


def tensor_named(name: str, **changed: Any) -> Callable[[Path], None]:
    return lambda path: with_header(path, lambda header: {name: header.pop("x") | changed, **header})


def one_value_off(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        one_value_off,
        metadata(facts='{"y": 0.25}'),
        metadata(facts="["),
        tensor_named("x", shape=[2, 3]),
        tensor_named("x", dtype="I32"),
        tensor_named("z"),
    ],
    ids=["value", "facts", "no facts", "shape", "dtype", "name"],
)
def test_content_that_was_spoilt_counts_as_none_and_is_told(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    told: list[str] = []
    memory = state_of(tmp_path, tell=told.append)
    for round in (1, 2):
        memory.remember(after(round))
    memory.remember_unfinished(after(3))
    assert memory.before(3) is not None
    assert memory.unfinished(3) is not None
    assert told == []
    for name in ("round-0002", "unfinished"):
        damage(next(tmp_path.rglob(f"{name}.safetensors")))
    found = memory.before(3)
    assert found is not None
    assert (found.round, memory.unfinished(3)) == (1, None)
    assert told == [
        "what it remembers of round 2 cannot be read whole, and counts as none",
        "what was saved in the middle of a round cannot be read whole, and counts as none",
    ]


def test_what_an_older_version_remembered_counts(tmp_path: Path) -> None:
    told: list[str] = []
    memory = state_of(tmp_path, tell=told.append)
    memory.remember(after(1))

    def older(header: dict[str, Any]) -> dict[str, Any]:
        del header["__metadata__"]["sha256"]
        return header

    with_header(next(tmp_path.rglob("round-0001.safetensors")), older)
    assert memory.before(2) is not None
    assert told == []


def test_a_sum_covers_tensors_of_every_kind(tmp_path: Path) -> None:
    kinds = (torch.bfloat16, torch.bool, torch.int64, torch.float64)
    tensors = {str(kind): torch.ones(2, 3, dtype=kind) for kind in kinds}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "turned": torch.arange(6.0).view(2, 3).T}
    state_of(tmp_path).remember(Remembered(1, tensors, {}))
    found = state_of(tmp_path).before(2)
    assert found is not None
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_round_on_spoilt_memory_asks_for_the_whole_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And does not fail at each try, nor train on values that nobody sent."""
    study = small_study(2, batch={"images": 2})
    first, site = first_round(study), site_with_pictures(tmp_path, study)
    second = request_of(2, study=study, student=first_round(study, seed=3).student)
    run_round(site, first)

    def turned(header: dict[str, Any]) -> dict[str, Any]:
        return {
            name: told | {"shape": told["shape"][::-1]} if "shape" in told else told for name, told in header.items()
        }

    with_header(next(tmp_path.rglob("round-0001.safetensors")), turned)
    for _ in range(2):
        with pytest.raises(WireError, match="needs_whole"):
            run_round(site_with_pictures(tmp_path, study), second)
    assert sum("what it remembers of round 1 cannot be read whole" in one for one in caplog.messages) == 1


def test_rounds_that_the_coordinator_has_undone_are_dropped(tmp_path: Path) -> None:
    """It went back to its checkpoint of round 4, and this site then misses round 6."""
    for round in (5, 6):
        state_of(tmp_path).remember(after(round))
    state_of(tmp_path).remember(after(5, 0.25))
    found = state_of(tmp_path).before(7)
    assert found is not None
    assert (found.round, found.facts) == (5, {"y": 0.25})


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_with_a_way_out_and_without_a_path(tmp_path: Path) -> None:
    memory = state_of(tmp_path)
    for write in (memory.remember, memory.remember_unfinished):
        with pytest.raises(ConfigError, match=r"No space left on device; make room, or point 'state' to") as error:
            write(after(1))
        assert "DOE" not in str(error.value)
    assert files(tmp_path) == set()  # what was half written would keep the disk full


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    memory = state_of(tmp_path)
    memory.remember(after(1))
    request.getfixturevalue("full_disk")
    with pytest.raises(ConfigError):
        memory.remember(after(1))
    state = memory.before(2)
    assert state is not None
    assert state.round == 1
