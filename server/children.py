"""The processes that a coordinator is made of: started in an order, started again when they end, ended in reverse.

Each leads a process group of its own, so that Ctrl-C at the terminal reaches the coordinator alone and it can end them
in order; each is tethered (unimiss_core/tether.py), so that none outlives it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unimiss_core.child import Child
from unimiss_core.errors import UnimissError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before a child that ended is started again: twice as long each time, from the first again once it has stayed."""
STAYED_S = 300.0
END_S = 15.0
"""How long a child may take to end before it is killed."""
READY_S = 300.0
"""How long a child may take to be ready; a busy machine imports for minutes."""


class ChildError(UnimissError):
    """A process that the coordinator needs does not come up."""

    resumes = True


@dataclass(frozen=True)
class Recipe:
    """How to start a child. is_ready: whether those after it may be started."""

    name: str
    command: Sequence[str]
    is_ready: Callable[[], bool] = lambda: True


@dataclass
class Member:
    """A recipe at work. pause_s: before it is started again; not_before: when, on the clock."""

    recipe: Recipe
    process: Child | None = None
    started_at: float = 0.0
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    not_before: float = 0.0
    last_code: int | None = None
    """That it last ended with; below 0 is a signal."""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.code is None


@dataclass
class Children:
    """folder: logs go there. workplace: an empty folder; a SuperLink that starts in a project's folder makes runs of
    other copies use that folder's code. log_bytes: of each log's newest file."""

    recipes: Sequence[Recipe]
    folder: Path
    workplace: Path
    environment: Mapping[str, str]
    log_bytes: int
    clock: Callable[[], float] = time.monotonic
    members: list[Member] = field(init=False)

    def __post_init__(self) -> None:
        self.members = [Member(recipe) for recipe in self.recipes]

    def start(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Start all, each when the one before it is ready. Raises ChildError: one ended instead, or never was.

        is_stopped: whether the operator has changed their mind; then those that are not started yet are not.
        """
        for child in self.members:
            if is_stopped():
                return
            self._start(child)
            give_up = self.clock() + READY_S
            while not child.recipe.is_ready() and not is_stopped():
                if not child.is_running or self.clock() > give_up:
                    raise ChildError(f"{child.recipe.name} does not begin; {self.log_of(child)} says why")
                time.sleep(0.1)

    def look_after(self) -> None:
        """Start again what has ended, when its pause is over; to be called every second or so."""
        now = self.clock()
        for child in self.members:
            if child.is_running:
                if now - child.started_at >= STAYED_S:
                    child.pause_s = FIRST_PAUSE_S
            elif child.process is not None:
                self._note_end(child, now)
            elif now >= child.not_before:
                child.restarts += 1
                self._start(child)

    def runs_s(self, name: str) -> float:
        """For how long one has run since it was last started; 0 where it does not."""
        return sum(
            self.clock() - child.started_at for child in self.members if child.recipe.name == name and child.is_running
        )

    def end_one(self, name: str) -> None:
        """End one that no longer does what it is for; `look_after` starts it again."""
        for child in self.members:
            if child.recipe.name == name and child.process is not None:
                child.process.end(END_S)

    def end(self) -> None:
        """End all, the last first; each is killed, with what it started, where it does not end."""
        for child in reversed(self.members):
            if child.process is not None:
                child.process.end(END_S)
                child.process = None

    def log_of(self, child: Member) -> Path:
        return self.folder / f"{child.recipe.name}.log"

    def _start(self, child: Member) -> None:
        recipe = child.recipe
        child.process = Child.start(
            recipe.command, self.environment, self.workplace, self.log_of(child), log_bytes=self.log_bytes
        )
        child.started_at = self.clock()

    def _note_end(self, child: Member, now: float) -> None:
        assert child.process is not None
        child.last_code = child.process.code
        child.process.end(END_S)  # what it started must not work on beside its successor
        child.process = None
        child.not_before = now + child.pause_s
        log.warning("%s ended with code %s; again in %g s", child.recipe.name, child.last_code, child.pause_s)
        child.pause_s = min(2 * child.pause_s, LONGEST_PAUSE_S)
