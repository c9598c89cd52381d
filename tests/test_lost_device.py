"""A site whose only GPU is lost or hangs: it says so and misses the round. Errors of a GPU are made on a CPU here."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from client import patient_draws, trainer
from client import watch as watching
from client.app import _or_refusal
from client.lost_device import is_lost, told_by_kind
from client.patient_draws import PatientDraw, _Drawn
from client.site_state import Remembered
from client.trainer import run_round
from client.watch import ONE_MESSAGE, Watch
from tests.federation import small_study
from tests.labelled_hospitals import opened
from tests.test_federated_finetuning import request_of
from tests.test_held_out import AUC, PICTURES, known_hospital, validated
from tests.test_trainer import first_round, site_with_pictures, watched
from unimiss_core import progress
from unimiss_core.device import devices_of
from unimiss_core.errors import DeviceError, MemoryTooSmallError
from unimiss_core.learner import Learner
from unimiss_core.wire import Refusal

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ECC = torch.AcceleratorError(
    "CUDA error: uncorrectable ECC error encountered at /opt/x.cu:7\nFor debugging consider CUDA_LAUNCH_BLOCKING=1"
)
FULL = torch.AcceleratorError("CUDA error: out of memory\nFor debugging consider CUDA_LAUNCH_BLOCKING=1")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`")
STUDY = small_study(1)


def raising(error: Exception) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_an_error_of_the_device_is_a_lost_one_and_memory_that_ran_out_is_not() -> None:
    with pytest.raises(DeviceError) as told, told_by_kind(GPU):
        raise ECC
    assert str(told.value).startswith("cuda:0 was lost in mid-round: CUDA error: uncorrectable ECC error encountered")
    assert not {"/opt", "debugging"} & set(str(told.value).replace("/x", " ").split())
    full = r"memory of cuda:0 ran out beside a step's own: CUDA .*micro_batch"
    for error in (FULL, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes")):
        with pytest.raises(MemoryTooSmallError, match=full), told_by_kind(GPU):
            raise error
    with pytest.raises(ValueError, match="x"), told_by_kind(GPU):
        raise ValueError("x")


def test_where_a_library_merely_failed_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost(CUBLAS, CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert not is_lost(CUBLAS, GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(ECC))
    assert is_lost(CUBLAS, GPU)


@pytest.mark.parametrize(
    ("saved", "again"), [(0, "begins anew, for nothing of it was saved yet"), (4, "goes on after step 4")]
)
def test_the_coordinator_is_told_device_lost_and_the_site_what_a_next_try_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saved: int, again: str
) -> None:
    site = site_with_pictures(tmp_path, STUDY)
    if saved:
        site.memory.remember_unfinished(Remembered(1, {}, {"figures": {"grad_norms": [1.0] * saved}}))
    monkeypatch.setattr(trainer, "_take_steps", raising(ECC))
    with caplog.at_level(logging.WARNING):
        answer = _or_refusal(
            Context(1, 1, {}, RecordDict(), {}), lambda: run_round(site, first_round(STUDY)).pack({}, "fp32")
        )
    assert Refusal.found_in(answer) == Refusal("device_lost")
    assert "cpu was lost in mid-round: CUDA error: uncorrectable ECC error" in caplog.text
    assert again in caplog.text
    assert "/opt" not in caplog.text


# -- while held-out patients are measured ------------------------------------------------------------------------------

TUNED = validated(2, local_steps=3)


def tuned_round(folder: Path) -> tuple[dict[str, float], list[str]]:
    site = opened(known_hospital(folder / "north", 11, pictures=PICTURES), TUNED)
    reply, _, said = watched(site, request_of(TUNED))
    return reply.diagnostics, said


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    calls: list[str] = []
    monkeypatch.setattr(Learner, "release", lambda _: calls.append("release"), raising=False)
    return calls


def test_what_recorded_steps_hold_is_given_back_before_a_second_network_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: list[str]
) -> None:
    measured = trainer.measured
    monkeypatch.setattr(trainer, "measured", lambda *given: released.append("measured") or measured(*given))
    assert AUC in tuned_round(tmp_path)[0]
    assert released == ["release", "measured"]


@pytest.mark.usefixtures("released")
def test_a_device_that_is_lost_while_it_measures_is_lost_and_a_full_one_costs_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "measured", raising(ECC))
    with pytest.raises(DeviceError, match="goes on after step 3"):
        tuned_round(tmp_path / "lost")
    monkeypatch.setattr(trainer, "measured", raising(FULL))
    diagnostics, said = tuned_round(tmp_path / "full")
    assert AUC not in diagnostics
    assert any("does not measure the shared model: AcceleratorError at" in told for told in said)


# -- a GPU that hangs --------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    """Training on a stand-in for a GPU never ends; the threads in which it does not."""
    threads, released = list[threading.Thread](), threading.Event()

    def hang(*_: object, **__: object) -> None:
        threads.append(threading.current_thread())
        released.wait(0.5 if threads[-1] is threading.main_thread() else 60)

    monkeypatch.setattr(trainer, "devices_for", lambda _: [GPU])
    monkeypatch.setattr(trainer, "train", hang)
    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    monkeypatch.setattr(Watch, "silent_for", lambda *_: True)
    yield threads
    released.set()


@pytest.mark.usefixtures("hanging")
def test_a_gpu_that_hangs_costs_the_round_and_not_all_rounds_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ONE_MESSAGE, "1")
    with pytest.raises(DeviceError, match=r"hangs, or its driver or the disks do: .* minutes\. The round is given up"):
        run_round(site_with_pictures(tmp_path, STUDY), first_round(STUDY))


def test_in_a_simulation_and_on_a_cpu_nothing_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: list[threading.Thread]
) -> None:
    """Neither process ends with its round, and how long a CPU takes nobody can say."""
    site = site_with_pictures(tmp_path, STUDY)
    monkeypatch.delenv(ONE_MESSAGE, raising=False)
    with pytest.raises(AssertionError):  # it has no reply
        run_round(site, first_round(STUDY))
    monkeypatch.setenv(ONE_MESSAGE, "1")
    monkeypatch.setattr(trainer, "devices_for", lambda _: devices_of(["cpu"]))
    with pytest.raises(AssertionError):
        run_round(site, first_round(STUDY))
    assert hanging == [threading.main_thread()] * 2


ANSWERS_AND_ENDS = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
from client import watch
from flwr.supercore.exit import ExitCode, flwr_exit
from unimiss_core.errors import DeviceError, MemoryTooSmallError
sleep = ctypes.CDLL(None).sleep

def hang():
    with ThreadPoolExecutor(max_workers=1) as ahead:  # as views are drawn
        ahead.submit(sleep, 600)
        sleep(600)

watch.LOOK_S = 0.1
watch.Watch.silent_for = lambda *_: True
try:
    watch.watched(hang, watch.Watch([2]))
except DeviceError:
    print("answered", flush=True)
flwr_exit(ExitCode.SUCCESS, emit_telemetry=False)
"""


def test_the_process_of_a_message_ends_however_long_the_device_hangs() -> None:
    """Flower ends it, also where Python would wait for a thread of its own."""
    began = time.monotonic()
    command = [sys.executable, "-c", ANSWERS_AND_ENDS]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert (ended.returncode, ended.stdout) == (0, "answered\n")
    assert time.monotonic() - began < 100


# -- signs of life of what takes long and is no step -------------------------------------------------------------------


def test_each_patient_of_a_private_step_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[progress.Event] = []
    monkeypatch.setattr(patient_draws, "draw_views", lambda *_: torch.zeros(1))
    draw = PatientDraw(2, [_Drawn([], seed) for seed in range(3)], STUDY, CPU)
    with progress.listen(heard.append):
        assert len(list(draw.views())) == 3
    assert heard == [progress.Working()] * 3


@pytest.mark.usefixtures("released")
def test_held_out_scans_that_are_measured_are_signs_of_life(tmp_path: Path) -> None:
    heard: list[progress.Event] = []
    with progress.listen(heard.append):
        tuned_round(tmp_path)
    last_step = max(place for place, event in enumerate(heard) if isinstance(event, progress.StepDone))
    assert progress.Working() in heard[last_step:]
