"""Work on many files in processes of their own, so that no file can take the program down.

A codec may hang, eat all memory or crash; a worker that does is killed and replaced, and its file gets the reason
`timed_out` or `reader_crashed`. Workers are fresh interpreters (never forks: the parent runs threads) that hear only
from this process, and whatever their libraries print is dropped, because it may quote the file.
"""

import contextlib
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from client.interpreter import Interpreter, leave_no_core_file
from unimiss_core.errors import ScanError

Task = TypeVar("Task")
Result = TypeVar("Result")

MEMORY_LIMIT_BYTES = 12 * 2**30
"""Address space of one worker: a scan that needs more is refused by the allocation, not by the kernel."""
READING_LIMIT_S = 300.0
"""For a worker that reads a whole scan."""


def run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    time_limit_s: float = 60.0,
) -> Iterator[tuple[int, Result | ScanError]]:
    """`function` of each task, as (index of the task, what it returned or the ScanError it ended in), as they end.

    function: importable by name; runs in a worker process. Any exception but ScanError counts as `reader_failed`.
    workers: processes; None takes one for each core. time_limit_s: for one task.
    """
    if function.__module__ == "__main__":
        raise AssertionError("a worker cannot import what stands in a script")
    count = min(workers or os.cpu_count() or 1, max(1, len(tasks)))
    waiting = deque(enumerate(tasks))
    team = [_Worker.start(function) for _ in range(count)]
    try:
        while waiting or any(worker.held for worker in team):
            for index, worker in enumerate(team):
                if worker.lost:
                    worker.stop()
                    team[index] = worker = _Worker.start(function)
                # Two tasks each, so that no worker waits for this process between files.
                while waiting and len(worker.held) < 2 and not worker.lost:
                    worker.give(*waiting.popleft(), time_limit_s)
            for worker in _ready(team):
                yield from worker.take(time_limit_s, waiting)
    finally:
        for worker in team:
            worker.stop()


def run_here(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result | ScanError]]:
    """`run` without processes: in order, for a few files whose readers are known to be safe."""
    for index, task in enumerate(tasks):
        yield index, attempt(function, task)


def read_in_order(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, here: bool
) -> Iterator[tuple[int, Result | ScanError]]:
    """`run` of whole scans in the order of `tasks`: `here`, or one by one in a process of its own where a codec may
    crash or much memory is asked for. The next is not begun `here` before it is asked for."""
    if here:
        return run_here(function, tasks)
    return run(function, tasks, workers=1, time_limit_s=READING_LIMIT_S)  # one keeps the order


def read_single(function: Callable[[Task], Result], task: Task, *, here: bool) -> Result:
    """`read_in_order` of one task: what `function` returns. Raises the ScanError that it ended in."""
    ((_, outcome),) = read_in_order(function, [task], here=here)
    if isinstance(outcome, ScanError):
        raise outcome
    return outcome


def attempt(function: Callable[[Task], Result], task: Task) -> Result | ScanError:
    """What `function` returns, or the ScanError that stands for its failure; never text from the file."""
    try:
        return function(task)
    except ScanError as error:
        return error
    except MemoryError:
        return ScanError("out_of_memory")
    except OSError:
        return ScanError("cannot_open")
    except Exception:  # a reader of foreign files may raise anything; its text may quote the file
        return ScanError("reader_failed")


@dataclass
class _Worker:
    interpreter: Interpreter
    held: deque[tuple[int, Any]] = field(default_factory=deque)
    deadline: float = 0.0
    lost: bool = False

    @classmethod
    def start(cls, function: Callable[[Any], Any]) -> "_Worker":
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        worker = cls(Interpreter.start("client.workers", one_thread))
        with contextlib.suppress(OSError):
            worker.channel.send(function)
        return worker

    @property
    def channel(self) -> Connection:
        return self.interpreter.channel

    def give(self, index: int, task: Any, time_limit_s: float) -> None:
        if not self.held:
            self.deadline = time.monotonic() + time_limit_s
        self.held.append((index, task))
        with contextlib.suppress(OSError):  # it died: take() finds the closed channel and says so
            self.channel.send(task)

    def take(self, time_limit_s: float, waiting: deque[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The next outcome of this worker, if there is one; the task it died or hung on gets its reason."""
        try:
            if self.channel.poll():
                outcome = self.channel.recv()
            elif self.held and time.monotonic() > self.deadline:
                outcome, self.lost = ScanError("timed_out", f"more than {time_limit_s:g} s"), True
            else:
                return
        except (EOFError, OSError, pickle.UnpicklingError):
            outcome, self.lost = ScanError("reader_crashed"), True
        self.deadline = time.monotonic() + time_limit_s
        index, _ = self.held.popleft()
        if self.lost:  # what it had not begun goes to its successor
            waiting.extendleft(reversed(self.held))
            self.held.clear()
        yield index, outcome

    def stop(self) -> None:
        self.interpreter.stop()


def _ready(team: list[_Worker]) -> list[_Worker]:
    """The workers with something to say, or past their deadline; waits for the first of them."""
    busy = {worker.channel: worker for worker in team if worker.held}
    patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
    said = wait(list(busy), timeout=max(0.0, patience) + 0.01)
    now = time.monotonic()
    return [worker for channel, worker in busy.items() if channel in said or now > worker.deadline]


def _serve(channel: Connection) -> None:
    """The life of a worker: one function, then task after task until the channel closes."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    leave_no_core_file()
    with contextlib.suppress(EOFError, OSError):
        function = channel.recv()
        while True:
            channel.send(attempt(function, channel.recv()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
