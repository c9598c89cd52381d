"""Work on a GPU that hangs is known by its silence alone: neither the card nor its driver says so, and what waits for
them can be neither interrupted nor killed.

So the work is watched from beside it: from another thread, or another process where a site has several devices. Every
event that it reports (`unimiss_core.progress`) is a sign of life; after a silence that is too long, the round is given
up for it.
"""

import faulthandler
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Lock, Thread
from typing import TypeVar

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
ONE_MESSAGE = "UNIMISS_ONE_MESSAGE"
"""In the environment of a process that answers one message and ends. In any other, as in a simulation, what hangs would
be left behind, with the device's memory, at the side of the next round."""


def is_of_one_message() -> bool:
    """Whether this process may leave behind what hangs, for it ends soon itself."""
    return os.environ.get(ONE_MESSAGE) == "1"


class Watch:
    """How long the steps of a round may be silent. ranks: of each step of the whole round, in turn."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._alone = Lock()
        self._next = 0
        self._is_begun = False
        self._taken = Counter[Rank]()
        self._longest: dict[Rank, float] = {}
        self._silent_s = 0.0
        """Added up look by look, so that a machine that was asleep for hours did not keep silent for hours."""

    @property
    def limit_s(self) -> float:
        """From the last sign of life on."""
        if not self._is_begun or self._next >= len(self._ranks):
            return BEGINNING.total_seconds()
        rank = self._ranks[self._next]
        if self._taken[rank] < NEW_STEPS:
            return BEGINNING.total_seconds()
        return max(STALLED.total_seconds(), SLOWER * self._longest[rank])

    def heard(self, event: progress.Event) -> None:
        with self._alone:
            if isinstance(event, progress.StepDone):
                rank = self._ranks[event.step - 1]
                self._taken[rank] += 1
                self._longest[rank] = max(self._longest.get(rank, 0.0), self._silent_s)
                self._is_begun, self._next = True, event.step
            self._silent_s = 0.0

    def silent_for(self, seconds: float) -> bool:
        """Nothing was heard for `seconds` more: whether it is too long by now."""
        with self._alone:
            self._silent_s += seconds
            return self._silent_s > self.limit_s

    def in_words(self) -> str:
        return f"no step was taken, and nothing else was heard, for {self.limit_s / 60:.0f} minutes"


def watched(work: Callable[[], T], watch: Watch) -> T:
    """`work()`, in a thread of its own. Raises as that does, and DeviceError where it is silent for too long: then it
    is left where it hangs, and this process must end soon (`is_of_one_message`)."""
    future = Future[T]()
    try:
        _end_unless_back()
        Thread(target=_do, args=[work, watch, future], daemon=True).start()
        while not wait([future], LOOK_S).done:
            _end_unless_back()
            if watch.silent_for(LOOK_S):
                raise DeviceError(f"the device hangs, or its driver does: {watch.in_words()}")
    finally:
        faulthandler.cancel_dump_traceback_later()
    return future.result()


def _end_unless_back() -> None:
    """What hangs and holds Python's lock keeps this thread waiting, too. So a thread that needs no lock ends the
    process, with code 1 and the line where it hung, unless this is called again in time."""
    faulthandler.dump_traceback_later(STALLED.total_seconds() + 60, exit=True)


def _do(work: Callable[[], T], watch: Watch, future: Future[T]) -> None:
    try:
        with progress.listen(watch.heard):
            result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
