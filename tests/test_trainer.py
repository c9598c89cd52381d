"""A site's part of a round: which scans a batch holds, which teacher the round begins with, what a small site does."""

import errno
import gc
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from client import trainer
from client.batches import Batch, Batches, sample
from client.cache import CachedScan
from client.drawing import _done_on
from client.pictures import write_png
from client.site import Site
from client.site_config import DataSource, SiteConfig
from client.site_state import Remembered, SiteState
from client.trainer import BATCH_TRIES, _round_student, _round_teacher, _take_step, run_round
from tests.federation import RUN, small_study
from unimiss_core import durable, progress
from unimiss_core.errors import DeviceError, NonFiniteLossError, WireError
from unimiss_core.groups import group_of
from unimiss_core.model import ARCHITECTURES
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import BatchConfig, StudyConfig
from unimiss_core.wire import TrainReply, TrainRequest


def held(patient: str, number: int) -> CachedScan:
    return CachedScan(f"{patient}{number}", patient, "XR", (1, 9, 7), (1.0, 1.0), Path("none"), 0)


SCANS = [*(held("many", number) for number in range(9)), held("one", 0), held("two", 0), held("two", 1)]


def drawn(count: int, sampling: str, seeds: int = 300) -> list[list[CachedScan]]:
    batch = BatchConfig.model_validate({"images": count, "sampling": sampling})
    return [sample(SCANS, batch, 2, torch.Generator().manual_seed(seed)) for seed in range(seeds)]


def test_patients_are_drawn_alike_however_many_scans_they_have() -> None:
    patients = Counter(scan.patient for (scan,) in drawn(1, "patients"))
    assert all(abs(count / 300 - 1 / 3) < 0.09 for count in patients.values())  # three standard deviations
    scans = Counter(scan.key for (scan,) in drawn(1, "patients") if scan.patient == "many")
    assert len(scans) == 9
    assert 0.6 < sum(scan.patient == "many" for (scan,) in drawn(1, "scans")) / 300 < 0.9


def test_a_batch_holds_no_patient_or_scan_twice_while_there_are_others() -> None:
    assert all(len({scan.patient for scan in batch}) == 3 for batch in drawn(3, "patients"))
    assert all(len({scan.key for scan in batch}) == 12 for batch in drawn(12, "scans"))
    assert all(len(batch) == 20 for sampling in ("scans", "patients") for batch in drawn(20, sampling, seeds=3))


def test_the_same_generator_draws_the_same_batch() -> None:
    assert drawn(4, "patients", seeds=5) == drawn(4, "patients", seeds=5)
    assert len({tuple(scan.key for scan in batch) for batch in drawn(4, "scans", seeds=5)}) > 1


def test_what_is_drawn_on_a_stream_of_its_own_is_there_when_it_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU's, whose step reads it on another stream."""
    seen: list[str] = []

    @contextmanager
    def current(_: object) -> Iterator[None]:
        seen.append("entered")
        yield
        seen.append("left")

    @contextmanager
    def current_device(device: object) -> Iterator[None]:
        seen.append(f"on {device}")
        yield
        seen.append("back")

    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "device", current_device)
    stream = Mock(device="cuda:1", synchronize=lambda: seen.append("waited"))
    with _done_on(stream):
        seen.append("drawn")
    assert seen == ["on cuda:1", "entered", "drawn", "waited", "left", "back"]
    with _done_on(None):
        assert len(seen) == 6


STUDY = small_study(3, batch={"images": 5})


def request_of(round: int, *, study: StudyConfig = STUDY, fill: float = 1.0, **changes: object) -> TrainRequest:
    student = {"shared.a": torch.full((2, 3), fill), "image.b": torch.full((4,), fill)}
    return TrainRequest(
        **{
            "study": study,
            "run": RUN,
            "round": round,
            "student": student,
            "teacher": None,
            "teacher_retention": {},
            **changes,
        }
    )


def remembered(round: int, **tensors: torch.Tensor) -> Remembered:
    return Remembered(round, {f"teacher/{name}": tensor for name, tensor in tensors.items()}, {})


def test_a_teacher_that_came_is_the_teacher() -> None:
    teacher = {"shared.a": torch.zeros(2, 3)}
    assert _round_teacher(request_of(2, teacher=teacher), {}, None) is teacher


def test_in_round_one_the_student_is_the_teacher() -> None:
    student = _round_student(request := request_of(1), None)
    assert _round_teacher(request, student, None) is student is request.student


def test_a_teacher_is_rebuilt_from_the_round_before() -> None:
    student = tensors_of(build_network(STUDY.model, seed=1, ranks={2}))
    before = tensors_of(build_network(STUDY.model, seed=2, ranks={2}))
    groups = {group_of(name) for name in student}
    untouched = min(groups)
    request = request_of(3, student=student, teacher_retention=dict.fromkeys(groups - {untouched}, 0.9))
    rebuilt = _round_teacher(request, student, remembered(2, **before))
    assert rebuilt.keys() == student.keys()
    for name, tensor in rebuilt.items():
        if group_of(name) == untouched:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * student[name])


@pytest.mark.parametrize(
    "memory", [None, remembered(1, **{"shared.a": torch.ones(2, 3)}), remembered(2, **{"shared.a": torch.ones(2, 3)})]
)
def test_a_site_without_student_or_teacher_asks_for_them(memory: Remembered | None) -> None:
    request = request_of(3)
    with pytest.raises(WireError, match="needs_whole"):
        _round_teacher(request, request.student, memory)
    step = replace(request, student=None, student_step=request.student)
    if memory is not None:
        memory = replace(memory, tensors={n.replace("teacher", "released"): t for n, t in memory.tensors.items()})
    with pytest.raises(WireError, match="needs_whole"):
        _round_student(step, memory)


def test_a_student_is_rebuilt_from_the_one_before_and_its_step() -> None:
    before = {"shared.a": torch.rand(2, 3), "image.b": torch.rand(4)}
    memory = Remembered(2, {f"released/{name}": tensor for name, tensor in before.items()}, {})
    request = request_of(3)
    student = _round_student(replace(request, student=None, student_step=request.student), memory)
    assert all(torch.equal(student[name], before[name] + 1.0) for name in before)


def site_with_pictures(
    folder: Path, study: StudyConfig, pictures: int = 2, *, run: str = RUN, **settings: object
) -> Site:
    scans = folder / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        pixels = np.random.default_rng(number).integers(0, 255, (41, 35)).astype(np.uint8)
        write_png(scans / f"{number}.png", pixels)
    raw = {
        "name": "small",
        "data": (DataSource(folder=scans),),
        "state": folder / "state",
        "devices": "cpu",
        **settings,
    }
    return Site(SiteConfig.model_validate(raw), study, run)


def first_round(study: StudyConfig, *, seed: int = 0) -> TrainRequest:
    return request_of(1, study=study, student=tensors_of(build_network(study.model, seed=seed, ranks={2})))


def assert_same_reply(ours: TrainReply, expected: TrainReply) -> None:
    assert replace(ours, update={}, seconds=0.0) == replace(expected, update={}, seconds=0.0)
    assert ours.update.keys() == expected.update.keys()
    assert [name for name in ours.update if not torch.equal(ours.update[name], expected.update[name])] == []


@pytest.mark.parametrize("sampling", ["scans", "patients"])
def test_a_site_with_fewer_scans_than_the_batch_trains(tmp_path: Path, sampling: str) -> None:
    study = small_study(1, batch={"images": 3, "sampling": sampling})
    request = first_round(study)
    reply = run_round(site_with_pictures(tmp_path, study), request)
    assert reply.scans == {2: 2, 3: 0}
    assert reply.update.keys() == request.student.keys()
    assert any(tensor.abs().max() > 0 for tensor in reply.update.values())
    assert all(tensor.isfinite().all() for tensor in reply.update.values())


def test_two_devices_send_the_update_of_one(tmp_path: Path) -> None:
    study = small_study(1, batch={"images": 3})
    one = run_round(site_with_pictures(tmp_path / "one", study, 4), first_round(study))
    two = run_round(site_with_pictures(tmp_path / "two", study, 4, devices=("cpu", "cpu")), first_round(study))
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    apart = torch.cat([(two.update[name] - one.update[name]).flatten() for name in one.update])
    whole = torch.cat([tensor.flatten() for tensor in one.update.values()])
    # AdamW makes a whole step of a rounding error where the gradient itself is nought, as for the keys' biases; exact
    # equality is in test_devices.py, in float64.
    assert (apart.abs() > 1e-5 * whole.abs().max()).double().mean() < 0.01
    assert apart.norm() < 0.1 * whole.norm()


def test_state_that_does_not_fit_is_told_by_the_sites_name(tmp_path: Path) -> None:
    site = site_with_pictures(tmp_path, STUDY)
    before = tensors_of(build_network(STUDY.model, seed=1, ranks={2}))
    site.memory.remember(Remembered(1, {f"teacher/{name}": tensor for name, tensor in before.items()}, {}))
    (words,) = watched(site, request_of(2, student=before))[2]
    assert words.startswith("small: what it remembers of round 1 does not fit, so moments and centre begin anew")


def test_the_seconds_of_a_round_hold_the_start_of_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([100.0, 117.5])
    done = TrainReply("small", RUN, 1, STUDY.digest(), {}, {}, 2, 0.0, {}, {})
    monkeypatch.setattr(trainer, "run_team", lambda *_, **__: done)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    site = site_with_pictures(tmp_path, STUDY, devices=("cpu", "cpu"))
    assert run_round(site, first_round(STUDY)) == replace(done, seconds=17.5)


@pytest.mark.parametrize(
    ("saved", "told"),
    [(0, r"begins anew, for nothing of it was saved yet \(checkpoint_minutes: 10\)"), (4, "goes on after step 4")],
)
def test_a_lost_device_is_told_with_what_the_next_try_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int, told: str
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise DeviceError("training process 1 on cpu was lost in mid-round")

    monkeypatch.setattr(trainer, "run_team", lost)
    site = site_with_pictures(tmp_path, STUDY, devices=("cpu", "cpu"))
    if saved:
        site.memory.remember_unfinished(Remembered(1, {}, {"figures": {"grad_norms": [1.0] * saved}}))
    with pytest.raises(DeviceError, match=told):
        run_round(site, first_round(STUDY))


# -- a round that is gone on with in its middle ------------------------------------------------------------------------

LONG = small_study(1, batch={"images": 2}, schedule={"rounds": 1, "local_steps": 6})

KILLED_AFTER_STEP_4 = """
import os, pickle, signal, sys
from client.trainer import run_round
from unimiss_core import progress
from unimiss_core.model import ARCHITECTURES
site, request, ARCHITECTURES["nano"] = pickle.load(sys.stdin.buffer)
def watch(event):
    if isinstance(event, progress.StepDone) and event.step == 5:
        assert "torch._dynamo" not in sys.modules, "training loads torch's compiler, and compiles nothing"
        os.kill(os.getpid(), signal.SIGKILL)
with progress.listen(watch):
    run_round(site, request)
"""


def steps_taken(site: Site, request: TrainRequest) -> tuple[TrainReply, list[int]]:
    reply, steps, _ = watched(site, request)
    return reply, steps


def watched(site: Site, request: TrainRequest) -> tuple[TrainReply, list[int], list[str]]:
    """The reply, the steps that were taken, and what was said meanwhile."""
    events: list[progress.Event] = []
    with progress.listen(events.append):
        reply = run_round(site, request)
    steps = [event.step for event in events if isinstance(event, progress.StepDone)]
    return reply, steps, [event.text for event in events if isinstance(event, progress.Note)]


def killed(site: Site, request: TrainRequest) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_STEP_4],
        input=pickle.dumps((site, request, ARCHITECTURES["nano"])),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainReply:
    return run_round(site_with_pictures(tmp_path_factory.mktemp("unbroken"), LONG, 3), first_round(LONG))


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a site that was killed after step 4 of the first round of LONG."""
    folder = tmp_path_factory.mktemp("killed")
    killed(site_with_pictures(folder, LONG, 3, checkpoint_minutes=0), first_round(LONG))
    return folder / "state"


@pytest.fixture
def started_again(left_behind: Path, tmp_path: Path) -> Site:
    """That site."""
    shutil.copytree(left_behind, tmp_path / "state")
    return site_with_pictures(tmp_path, LONG, 3, checkpoint_minutes=0)


def test_a_killed_site_goes_on_in_the_middle_of_the_round_and_ends_bit_identical(
    started_again: Site, unbroken: TrainReply, tmp_path: Path
) -> None:
    reply, steps, said = watched(started_again, first_round(LONG))
    assert steps == [5, 6]
    assert said == ["small: round 1 goes on after step 4 of 6"]
    assert_same_reply(reply, unbroken)
    kept = [path.name for path in (tmp_path / "state" / "runs").rglob("*.safetensors")]
    assert kept == ["round-0001.safetensors"]


def test_a_round_with_another_student_or_a_damaged_checkpoint_begins_anew(started_again: Site, tmp_path: Path) -> None:
    (unfinished,) = (tmp_path / "state" / "runs").rglob("unfinished.safetensors")
    saved = unfinished.read_bytes()
    assert steps_taken(started_again, first_round(LONG, seed=1))[1] == [1, 2, 3, 4, 5, 6]
    unfinished.write_bytes(saved[:-100])
    assert steps_taken(started_again, first_round(LONG))[1] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "change", [{"figures": {"of another version": 1}}, {"figures": None}, {"learner": {}}, {"watch": "lost"}]
)
def test_an_unfinished_round_that_another_version_wrote_begins_anew(
    started_again: Site, unbroken: TrainReply, change: dict[str, object]
) -> None:
    state = started_again.memory.unfinished(1)
    assert state is not None
    kept = {name: tensor for name, tensor in state.tensors.items() if not ("watch" in change and "watch." in name)}
    started_again.memory.remember_unfinished(Remembered(1, kept, {**state.facts, **change}))
    reply, steps, said = watched(started_again, first_round(LONG))
    assert steps == [1, 2, 3, 4, 5, 6]
    (words,) = said
    assert words.startswith("small: what was saved of round 1 does not fit, so the round begins anew: ")
    assert_same_reply(reply, unbroken)


def test_a_site_with_time_between_checkpoints_writes_none_of_a_short_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SiteState, "remember_unfinished", lambda *_: pytest.fail("written"))
    run_round(site_with_pictures(tmp_path, LONG, 3), first_round(LONG))


def test_a_disk_without_room_for_a_checkpoint_on_the_way_does_not_cost_the_round(
    unbroken: TrainReply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = durable.write_bytes

    def nearly_full(path: Path, payload: bytes) -> None:
        if path.stem == "unfinished":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, payload)

    monkeypatch.setattr(durable, "write_bytes", nearly_full)
    site = site_with_pictures(tmp_path, LONG, 3, checkpoint_minutes=0)
    assert_same_reply(run_round(site, first_round(LONG)), unbroken)
    assert "No space left on device; make room" in caplog.text


# -- NaN and infinity --------------------------------------------------------------------------------------------------


def poisoned(draw: Callable[..., Batch], bad: set[tuple[int, int]]) -> Callable[..., Batch]:
    """`Batches.draw`, with NaN in the batches of these (step, attempt)."""

    def drawn(batches: Batches, step: int, attempt: int = 0) -> Batch:
        batch = draw(batches, step, attempt)
        return batch._replace(views=batch.views * math.nan) if (step, attempt) in bad else batch

    return drawn


def test_a_batch_that_gives_nan_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, draw = site_with_pictures(tmp_path, LONG, 3), Batches.draw
    monkeypatch.setattr(
        Batches, "draw", lambda batches, step, attempt=0: draw(batches, step, 2 if step == 3 else attempt)
    )
    expected = run_round(site, first_round(LONG))
    monkeypatch.setattr(Batches, "draw", poisoned(draw, {(3, 0), (3, 1)}))
    reply, _, said = watched(site, first_round(LONG))
    assert len(said) == 2
    assert all(words.startswith("small: batch skipped: step 3: loss nan") for words in said)
    assert (expected.diagnostics["skipped_batches"], reply.diagnostics["skipped_batches"]) == (0, 2)
    assert_same_reply(replace(reply, diagnostics={}), replace(expected, diagnostics={}))


def test_a_skipped_batch_keeps_no_memory() -> None:
    """An error keeps what its step held, gradients of a whole network; a card may have no room for them twice."""
    errors: list[weakref.ref[NonFiniteLossError]] = []

    class Learner:
        def step(self, *_: torch.Tensor, step: int, **__: float) -> int:
            if len(errors) < 2:
                assert not any(error() for error in errors)
                error = NonFiniteLossError("nan")
                errors.append(weakref.ref(error))
                try:
                    raise error
                finally:
                    del error  # or this frame would keep it
            return step

    batch = Batch(torch.zeros(1), 1.0)
    batches = SimpleNamespace(draw=lambda *_: batch)
    gc.disable()
    try:
        assert _take_step(Learner(), batches, 7, batch, site="s") == (7, 2)  # type: ignore[arg-type, comparison-overlap]
        assert [error() for error in errors] == [None, None]
    finally:
        gc.enable()


def test_a_site_whose_every_batch_gives_nan_refuses_the_round_and_remembers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_with_pictures(tmp_path, LONG, 3)
    monkeypatch.setattr(Batches, "draw", poisoned(Batches.draw, {(3, attempt) for attempt in range(BATCH_TRIES)}))
    with pytest.raises(NonFiniteLossError, match="step 3: loss nan"):
        run_round(site, first_round(LONG))
    assert site.memory.before(2) is None
