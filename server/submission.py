"""A run from its first submission to an end that our own artefacts vouch for.

Flower loses a run whose ServerApp dies, and its own word of how a run ended says little; so what counts is the run's
folder: its newest checkpoint; ended.json, in which the ServerApp says why it stopped; and finished.json, which it
leaves when the last round's model, audit and report are written, too. Whatever may get better is submitted again, to go
on from the last round, with pauses that grow; whatever needs a person ends with that message.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from server.run_folder import RunFolder
from server.server_config import Patience
from unimiss_core import checkpoint
from unimiss_core.errors import UnimissError

if TYPE_CHECKING:  # it imports Flower, for seconds
    from server.control import RunState

log = logging.getLogger(__name__)

ASK_S = 5.0
"""Between two questions to SuperLink whether the run goes on."""


class SuperLink(Protocol):
    """What a submission asks of `server.control.Control`."""

    def submit(self, run_config: Mapping[str, str | bool]) -> int: ...
    def state(self, run: int) -> "RunState | None": ...


class RunEnded(UnimissError):  # noqa: N818 - what a run does
    """The run ended before its last round. exit_code: of the error that the ServerApp ended with."""

    def __init__(self, message: str, exit_code: int, *, resumes: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.resumes = resumes


def rounds_done(folder: RunFolder) -> int:
    """By the newest checkpoint. Raises CheckpointError: it is damaged."""
    newest = checkpoint.latest(folder.checkpoints)
    return 0 if newest is None else checkpoint.round_of(newest)


def is_finished(folder: RunFolder, rounds: int) -> bool:
    """Whether the last of so many rounds is done, and all that comes after it. Raises CheckpointError."""
    return rounds_done(folder) >= rounds and folder.is_finished


def _without_ways(error: str) -> str:
    """What a ServerApp says that lacks sites or updates, without what a person could do: `server.quorum`. It is tried
    again by itself first, and `unimiss-server status` has it whole."""
    told, _, _ = error.partition("\n")
    return told.partition(". Mend the sites")[0].partition(". No time mends")[0]


@dataclass
class Submission:
    """folder: of the run, called as the study is. rounds: of the study."""

    superlink: SuperLink
    folder: RunFolder
    rounds: int
    patience: Patience = field(default_factory=Patience)
    clock: Callable[[], float] = time.monotonic
    run: int | None = None
    """The run's id at SuperLink while it is there."""
    fruitless: int = 0
    """Tries in a row that finished no round."""
    not_before: float = 0.0
    _began_with: int = field(default=0, init=False)
    _asked_at: float = field(default=0.0, init=False)

    def step(self) -> bool:
        """Do what is due; True when the run is finished. To be called every second or so.

        Raises RunEnded; ControlError, where SuperLink does not answer: the next step tries again.
        """
        now = self.clock()
        if self.run is None:
            if is_finished(self.folder, self.rounds):
                return True
            if now >= self.not_before:
                self._submit(now)
            return False
        if now - self._asked_at < ASK_S:
            return False
        self._asked_at = now
        state = self.superlink.state(self.run)
        if state is not None and not state.is_finished:
            return False
        return self._judge(self.run, now, "" if state is None else state.details)

    def _submit(self, now: float) -> None:
        self._began_with, self._asked_at = rounds_done(self.folder), now
        # The study's name, which sites know, and no path of this machine's: what is submitted, every site is told.
        self.run = self.superlink.submit({"coordinator": self.folder.path.name, "resume": True})
        log.info("run=%s submitted after round %s", self.run, self._began_with)

    def _judge(self, run: int, now: float, details: str) -> bool:
        self.run = None
        told, done = self.folder.how_it_ended(run), rounds_done(self.folder)
        if not told and is_finished(self.folder, self.rounds):
            return True
        gone = "its process is gone" + (", or the report could not be written" if done >= self.rounds else "")
        error = str(told.get("error", details or f"{gone}; flower/superexec.log may say why"))
        code = int(told.get("exit_code", 1))
        if not told.get("resumes", True):
            raise RunEnded(error, code, resumes=False)
        self.fruitless = 0 if done > self._began_with else self.fruitless + 1
        if self.fruitless >= self.patience.tries:
            failed = "did not bring the run to its end, though all rounds are done" if done >= self.rounds else ""
            raise RunEnded(
                f"{self.fruitless} tries {failed or 'finished no round'}; the last: {error}", code, resumes=True
            )
        pause = min(self.patience.pause_s * 2 ** max(self.fruitless - 1, 0), self.patience.longest_s)
        self.not_before = now + pause
        short = _without_ways(error)
        ways = "" if short == error else "; `unimiss-server status` says what can be done meanwhile"
        log.warning("run=%s ended after round %s (%s); tried again in %g s%s", run, done, short, pause, ways)
        return False
