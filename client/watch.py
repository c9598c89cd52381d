"""Work on a GPU that hangs is known by its silence alone: neither the card nor its driver says so, and what waits for
them can be neither interrupted nor killed.

So the work is watched from beside it: from another thread, or another process where a site has several devices. Every
event that it reports (`unimiss_core.progress`) is a sign of life; after a silence that is too long, the round is given
up for it.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Lock, Thread
from typing import TypeVar

from client.interpreter import leave_no_core_file
from unimiss_core import progress
from unimiss_core.errors import DeviceError
from unimiss_core.scan import Rank

T = TypeVar("T")

STALLED = timedelta(minutes=10)
"""What is silent for longer than this in the midst of a round's steps counts as hung, and the round fails."""
BEGINNING = timedelta(hours=1)
"""The same before the first steps of a rank, in which networks are compiled, micro-batches tried out and steps
recorded, and after the last step."""
NEW_STEPS = 2
"""Of a rank: the second is recorded (`unimiss_core.step_graphs`)."""
SLOWER = 3.0
"""So many times the longest silence so far before a step of the rank is not too long either: cards differ, and studies
may ask for steps of many minutes."""
LOOK_S = 5.0
LEAVES_WITHIN_S = 4.0
"""Flower's own way out ends a process after five."""
ONE_MESSAGE = "UNIMISS_ONE_MESSAGE"
"""In the environment of a process that answers one message and ends. In any other, as in a simulation, what hangs would
be left behind, with the device's memory, at the side of the next round."""


def is_of_one_message() -> bool:
    """Whether this process may leave behind what hangs, for it ends soon itself."""
    return os.environ.get(ONE_MESSAGE) == "1"


class Left(BaseException):
    """Raised in work that nobody waits for any more, at its next sign of life: nothing below is to take it for an error
    of its own."""


class Watch:
    """How long the steps of a round may be silent. ranks: of each step of the whole round, in turn."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._alone = Lock()
        self._next = 0
        self._is_begun = self._is_left = False
        self._taken = Counter[Rank]()
        self._longest: dict[Rank, float] = {}
        """Silence in seconds, by rank; not that before its first step."""
        self._silent_s = 0.0
        """Added up look by look, so that a machine that was asleep for hours did not keep silent for hours."""

    @property
    def limit_s(self) -> float:
        """From the last sign of life on."""
        rank = self._rank
        if rank is None or self._taken[rank] < NEW_STEPS:
            return BEGINNING.total_seconds()
        return max(STALLED.total_seconds(), SLOWER * self._longest.get(rank, 0.0))

    @property
    def _rank(self) -> Rank | None:
        """Of the step that is waited for; None before the first that is heard of, and after the last."""
        return self._ranks[self._next] if self._is_begun and self._next < len(self._ranks) else None

    def heard(self, event: progress.Event) -> None:
        """Raises Left."""
        with self._alone:
            if self._is_left:
                raise Left
            rank = self._rank
            if rank is not None and self._taken[rank]:
                self._longest[rank] = max(self._longest.get(rank, 0.0), self._silent_s)
            if isinstance(event, progress.StepDone):
                self._taken[self._ranks[event.step - 1]] += 1
                self._is_begun, self._next = True, event.step
            self._silent_s = 0.0

    def silent_for(self, seconds: float) -> bool:
        """Nothing was heard for `seconds` more: whether it is too long by now."""
        with self._alone:
            self._silent_s += seconds
            return self._silent_s > self.limit_s

    def leave(self) -> None:
        """What is watched is to end at its next sign of life."""
        with self._alone:
            self._is_left = True

    def in_words(self) -> str:
        return f"no step was taken, and nothing else was heard, for {self.limit_s / 60:.0f} minutes"


def watched(work: Callable[[], T], watch: Watch) -> T:
    """`work()`, in a thread of its own. Raises as that does, and DeviceError where it is silent for too long: then it
    is left where it hangs, and this process must end soon (`is_of_one_message`)."""
    leave_no_core_file()  # a thread that is left behind may abort this process
    future = Future[T]()
    Thread(target=_do, args=[work, watch, future], daemon=True).start()
    try:
        while not wait([future], LOOK_S).done:
            if watch.silent_for(LOOK_S):
                raise DeviceError(f"the device hangs, or its driver or the disks do: {watch.in_words()}")
    except BaseException as error:
        watch.leave()
        if not isinstance(error, DeviceError):  # the process is told to end; a thread that it ends in torch aborts it
            wait([future], LEAVES_WITHIN_S)
        raise
    return future.result()


def _do(work: Callable[[], T], watch: Watch, future: Future[T]) -> None:
    try:
        with progress.listen(watch.heard):
            result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
