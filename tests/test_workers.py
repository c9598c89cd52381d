import os
import time

import pytest

from client import workers
from unimiss_core.errors import ScanError


def work(task):
    """What a task says: sleep, die, fail, or answer."""
    kind, value = task
    if kind == "sleep":
        time.sleep(value)
    if kind == "die":
        os._exit(value)
    if kind == "chatter":
        print("Zzyzx", flush=True)
        os.write(2, b"Zzyzx")
    if kind == "refuse":
        raise ScanError("blank", "nothing")
    if kind == "fail":
        raise KeyError("Zzyzx^Invented")
    if kind == "hog":
        return len(bytearray(value))
    return value


def test_hangs_crashes_and_failures_cost_only_their_own_task(capfd):
    tasks = [("answer", 1), ("die", 3), ("sleep", 30), ("refuse", 0), ("fail", 0), ("chatter", 7), ("hog", 2**40)]
    tasks += [("answer", number) for number in range(20)]
    outcomes = dict(workers.run(work, tasks, workers=2, time_limit_s=4.0))
    assert sorted(outcomes) == list(range(len(tasks)))
    reasons = [getattr(outcomes[index], "reason", outcomes[index]) for index in range(7)]
    assert reasons == [1, "reader_crashed", "timed_out", "blank", "reader_failed", 7, "out_of_memory"]
    assert [outcomes[index] for index in range(7, len(tasks))] == list(range(20))
    assert "Zzyzx" not in repr(outcomes)
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_in_this_process_the_outcomes_are_the_same():
    tasks = [("answer", 1), ("refuse", 0), ("fail", 0)]
    outcomes = dict(workers.run_here(work, tasks))
    assert outcomes[0] == 1
    assert (outcomes[1].reason, outcomes[2].reason) == ("blank", "reader_failed")


def test_workers_end_with_their_work():
    running = workers.run(work, [("sleep", 60), ("sleep", 60)], workers=2)
    begun = time.monotonic()
    first = workers.run(work, [("answer", 1), ("sleep", 60)], workers=2)
    assert next(first)[1] == 1
    first.close()
    running.close()
    assert time.monotonic() - begun < 30


def test_no_tasks_need_no_workers():
    assert list(workers.run(work, [])) == []


@pytest.mark.parametrize("reason", ["blank", "timed_out"])
def test_a_reason_survives_the_way_between_processes(reason):
    import pickle

    again = pickle.loads(pickle.dumps(ScanError(reason, "detail")))
    assert (again.reason, again.detail, str(again)) == (reason, "detail", f"{reason}: detail")
