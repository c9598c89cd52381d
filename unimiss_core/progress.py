"""What is going on, for whoever wants to show it: a progress bar, a log, a status file.

The code that works calls `report(event)`; whoever shows it wraps the work in `with listen(callback):`.
A guard is called at each report and may raise to stop the work there: that is how Ctrl-C reaches a site that
runs in a thread of the simulation. No event holds anything that may not be logged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preparing:
    """A site reads and caches its scans: `done` of `total` (0 while unknown).

    is_secret: in a patient-level study, where whoever watches may be the coordinator: a screen shows neither number.
    """

    site: str
    done: int
    total: int
    is_secret: bool = False


@dataclass(frozen=True)
class RoundStarted:
    """ago_s: how long ago that was, where another process is at work and tells of it a little later."""

    round: int
    rounds: int
    sites: tuple[str, ...]
    ago_s: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """A site finished optimiser step `step` of `steps` in this round.

    loss: mean over the objective's cross-entropies (`unimiss_core.loss_terms`), so that images and volumes show on one
    scale, where log K is the level of a model that tells nothing apart. None in a patient-level study, whose noise does
    not cover it.
    """

    site: str
    step: int
    steps: int
    loss: float | None


@dataclass(frozen=True)
class Working:
    """A sign of life between steps, of which nothing is shown: who watches over work that may hang waits on."""


@dataclass(frozen=True)
class SiteReplied:
    round: int
    site: str
    status: str
    reason: str
    at_work_on: int | None = None
    """The earlier round that a site is still at work on, whose update counts late, if at all."""


@dataclass(frozen=True)
class Collapsed:
    """What a site's figures of a round say: nothing is learned of one kind of scan. steps: of the study, so far."""

    round: int
    site: str
    sign: str
    steps: int


@dataclass(frozen=True)
class RoundDone:
    """A round is written. losses: site -> mean over the round's steps and the objective's cross-entropies."""

    round: int
    rounds: int
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """One sentence for the person who watches."""

    text: str


Event = Preparing | RoundStarted | StepDone | Working | SiteReplied | Collapsed | RoundDone | Note

_listeners: list[Callable[[Event], None]] = []
_guards: list[Callable[[], None]] = []


def report(event: Event) -> None:
    for guard in tuple(_guards):
        guard()
    for listener in tuple(_listeners):
        listener(event)


def is_watched() -> bool:
    """Whether anybody in this process shows what is reported."""
    return bool(_listeners)


@contextmanager
def listen(callback: Callable[[Event], None]) -> Iterator[None]:
    """Call `callback` for each event reported in this process, from whichever thread reports it."""
    _listeners.append(callback)
    try:
        yield
    finally:
        _listeners.remove(callback)


@contextmanager
def guarded_by(guard: Callable[[], None]) -> Iterator[None]:
    """Call `guard` before each report in this process, in the thread that reports."""
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)
