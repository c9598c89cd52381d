"""A round on a GPU that hangs is given up; one that is merely slow is not. No GPU is needed: silence is silence."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from client import watch as watching
from client.watch import BEGINNING, LOOK_S, NEW_STEPS, SLOWER, STALLED, Left, Watch, watched
from unimiss_core import progress
from unimiss_core.errors import DeviceError
from unimiss_core.scan import Rank

IMAGES: list[Rank] = [2] * 20


def done(step: int) -> progress.StepDone:
    return progress.StepDone("north", step, 20, None)


def looks_until_given_up(watch: Watch) -> float:
    """Seconds of silence."""
    silent = LOOK_S
    while not watch.silent_for(LOOK_S):
        silent += LOOK_S
        assert silent < 1e5
    return silent - LOOK_S


def test_before_the_first_step_and_after_the_last_a_round_may_be_silent_for_longer() -> None:
    assert looks_until_given_up(Watch(IMAGES)) == BEGINNING.total_seconds()
    ended = Watch(IMAGES)
    for step in range(1, 21):
        ended.heard(done(step))
    assert looks_until_given_up(ended) == BEGINNING.total_seconds()


def test_between_steps_it_may_be_silent_for_as_long_as_a_process_of_a_team() -> None:
    watch = Watch(IMAGES)
    watch.heard(done(1))
    assert watch.limit_s == BEGINNING.total_seconds()
    watch.heard(done(NEW_STEPS))
    assert looks_until_given_up(watch) == STALLED.total_seconds()


def test_the_first_steps_of_the_other_rank_have_their_time_in_a_round_that_goes_on_in_its_middle() -> None:
    watch = Watch([2] * 10 + [3] * 10)
    for step in (8, 9, 10):  # those before were taken by a process that was killed
        watch.heard(done(step))
    assert watch.limit_s == BEGINNING.total_seconds()
    watch.heard(done(11))
    watch.heard(done(12))
    assert watch.limit_s == STALLED.total_seconds()


def test_where_steps_take_many_minutes_as_many_may_pass() -> None:
    watch = Watch(IMAGES)
    for step in range(1, NEW_STEPS + 1):
        for _ in range(int(600 / LOOK_S)):
            assert not watch.silent_for(LOOK_S)
        watch.heard(done(step))
    assert looks_until_given_up(watch) == SLOWER * 600


@pytest.mark.parametrize(
    "sign", [progress.Working(), progress.Note("smaller parts"), progress.Preparing("north", 1, 2)]
)
def test_whatever_is_heard_is_a_sign_of_life(sign: progress.Event) -> None:
    watch = Watch(IMAGES)
    for step in range(1, NEW_STEPS + 1):
        watch.heard(done(step))
    for _ in range(10):
        assert not watch.silent_for(STALLED.total_seconds() - LOOK_S)
        watch.heard(sign)


def test_what_is_watched_answers_or_fails_as_without() -> None:
    assert watched(lambda: 7, Watch(IMAGES)) == 7

    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        watched(fail, Watch(IMAGES))


def test_what_hangs_is_left_where_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    released, heard = threading.Event(), Watch(IMAGES)

    def hang() -> None:
        for step in range(1, NEW_STEPS + 1):
            progress.report(done(step))
        released.wait(60)

    monkeypatch.setattr(watching, "LOOK_S", 0.01)
    monkeypatch.setattr(Watch, "silent_for", lambda watch, _: watch.limit_s < BEGINNING.total_seconds())
    began = time.monotonic()
    with pytest.raises(
        DeviceError, match=r"hangs, or its driver or the disks do: no step was taken, .* for 10 minutes"
    ):
        watched(hang, heard)
    assert time.monotonic() - began < 30
    released.set()


TOLD_TO_END = """
import signal, sys, threading, time
from client import watch
from unimiss_core import progress

def work():
    try:
        while True:
            progress.report(progress.Working())
            time.sleep(0.05)
    finally:
        print("unwound", flush=True)

def told(*_):
    raise SystemExit(7)

signal.signal(signal.SIGTERM, told)
threading.Timer(1.0, lambda: signal.raise_signal(signal.SIGTERM)).start()
watch.watched(work, watch.Watch([2]))
"""


def test_what_is_told_to_end_unwinds_its_work_first() -> None:
    """As it did in one thread: nothing goes on behind a process that ends, or is torn down within torch."""
    ended = subprocess.run(
        [sys.executable, "-c", TOLD_TO_END],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        cwd=Path(__file__).parents[1],
    )
    assert (ended.returncode, ended.stdout) == (7, "unwound\n"), ended.stderr


def test_what_was_given_up_does_nothing_more_when_it_wakes() -> None:
    watch = Watch(IMAGES)
    watch.leave()
    with pytest.raises(Left):
        watch.heard(done(1))


def test_the_silence_of_first_steps_gives_no_measure() -> None:
    """With their trials and compiling it would be an hour's, for the rest of the round."""
    watch = Watch(IMAGES)
    watch.silent_for(3000)
    watch.heard(done(1))
    watch.heard(done(2))
    assert watch.limit_s == STALLED.total_seconds()
    watch.silent_for(500)
    watch.heard(progress.Working())
    assert watch.limit_s == SLOWER * 500
