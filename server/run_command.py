"""`unimiss-server run STUDY.yaml`, and `stop`: a study from its start to its last round, in the foreground.

One process per folder, which holds flower/run.lock for as long as it lives: by that lock `stop` knows that the process
number in it is meant. Its children are tethered to it; when it is killed, they end, and `run` again goes on from the
last finished round.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from server import expiry, superlink
from server.children import ChildError, Children
from server.composition import Composed, compose
from server.founding import unnoted
from server.home import Home
from server.refusals import Note
from server.registry import Registry
from server.running import Running, children_of
from server.said import Said
from server.server_config import ServerConfig
from server.submission import Submission, is_finished, rounds_done
from unimiss_core import locks, progress
from unimiss_core.config import load
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.keys import pem_of_public, site_public_key

if TYPE_CHECKING:  # it imports Flower, for seconds
    from server.control import Control

log = logging.getLogger(__name__)

TICK_S = 1.0
NODES_S = 10.0
"""Between two looks whether a site was approved or revoked meanwhile."""
HANGS_S = 180.0
"""A SuperLink that is silent for so long does not come back by itself; a busy machine starts one within that."""
HANGS = 5
"""So many in a row that it was started again for this, and answered nothing since, end the run."""
DATES_S, TELL_DATES_S = 60.0, 86400.0
"""Between two looks whether a certificate has run out; between two warnings that one soon will."""
WRITE_S = 5.0
"""Between two notes of how it stands, for `status`."""
STOP_S = 90.0
"""How long `stop` waits for `run` to end."""


class Interrupted(UnimissError):  # noqa: N818 - by a person
    """`stop`, Ctrl-C or the system ended the run; it goes on when it is run again."""

    exit_code = 130
    resumes = True


class Stop:
    """Set by SIGINT and SIGTERM, while it is in use."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> bool:
        return self.is_set

    @contextmanager
    def heard(self) -> Iterator["Stop"]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda *_: setattr(self, "is_set", True)) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def run(home: Home, study_file: Path, *, note: Note = unnoted) -> Composed:
    """Run a study to its end: its last round, and all that comes after it. Raises UnimissError: why it ended before,
    and whether it may be gone on with."""
    with alone(home), Stop().heard() as stop:
        config = load(ServerConfig, home.server)
        composed = compose(home, study_file)
        if not is_finished(composed.folder, composed.study.schedule.rounds):
            home.running.unlink(missing_ok=True)  # of a `run` that was killed
            expiry.require_lasting(home, now=datetime.now(UTC))
            superlink.prepare(home, config)
            note("run", {"study": composed.study.name})
            with _end_noted(note, composed.study.name):
                _with_children(home, config, composed, stop)
    return composed


@contextmanager
def _end_noted(note: Note, study: str) -> Iterator[None]:
    code = 1
    try:
        yield
        code = 0
    except UnimissError as error:
        code = error.exit_code
        raise
    finally:
        with suppress(UnimissError):  # a full disk may be why it ended, and must not hide that
            note("run_ended", {"study": study, "code": code})


def _with_children(home: Home, config: ServerConfig, composed: Composed, stop: Stop) -> None:
    from server.control import Control

    control, registry = Control(config.superlink_port, home.authority_certificate), Registry(home)
    children = superlink.family(home, config, lambda: _knows_sites(control, registry))
    try:
        done, rounds = rounds_done(composed.folder), composed.study.schedule.rounds
        goes_on = f"{composed.study.name}: goes on after round {done} of {rounds}; " if done else ""
        progress.report(progress.Note(f"{goes_on}starting SuperLink and the public side ({config.bound})"))
        children.start(stop)
        submission = Submission(control, composed.folder, rounds, config.patience)
        _Loop(home, composed, children, control, registry, submission).until_the_end(stop)
    finally:
        progress.report(progress.Note("ending SuperLink and the public side"))
        try:
            control.close()  # first, or SuperLink would wait for this connection to end, and be killed
        finally:
            children.end()
            home.running.unlink(missing_ok=True)


def _knows_sites(control: "Control", registry: Registry) -> bool:
    """Whether SuperLink, which has just begun, lets in the approved sites."""
    from server.control import ControlError

    try:
        _agree_on_nodes(control, registry)
    except ControlError:
        return False
    return True


def _agree_on_nodes(control: "Control", registry: Registry) -> None:
    """Raises ControlError."""
    try:
        sites = registry.approved()
    except ConfigError as error:
        # Somebody may be editing it: no reason to end a run. The front refuses that site within `registry.HOLD_S`.
        log.warning("%s", error)
        return
    control.agree_on_nodes({pem_of_public(site_public_key(s.public_key, s.name)): s.name for s in sites})


class _Loop:
    """What `run` does every second, beside waiting."""

    def __init__(
        self,
        home: Home,
        composed: Composed,
        children: Children,
        control: "Control",
        registry: Registry,
        submission: Submission,
    ) -> None:
        self._home = home
        self._composed = composed
        self._children = children
        self._control = control
        self._submission = submission
        self._said = Said(composed.folder.path)
        self._registry = registry
        self._since = time.time()
        self._nodes_at = self._written_at = self._dates_at = self._dates_told_at = float("-inf")
        self._hung = 0
        """How often in a row SuperLink was started again because it answered nothing."""
        self._told = ""
        """The last that SuperLink failed with: said once, not every second."""
        self._can_write = True
        """Whether the last note of how it stands could be written: that it cannot is said once."""
        self._is_tidy = False
        """Whether runs that an earlier `run` left at SuperLink are stopped."""

    def until_the_end(self, stop: Stop) -> None:
        """Raises RunEnded, Interrupted, RunOut, ChildError."""
        while not stop():
            self._look_at_dates()
            self._children.look_after()
            finished = self._step()
            self._said.say_again()
            self._write()
            if finished:
                return
            time.sleep(TICK_S)
        with suppress(UnimissError):
            self._control.stop_all()
        self._note_stop("its operator stopped it")
        raise Interrupted("stopped; what was finished is saved")

    def _look_at_dates(self) -> None:
        """Raises RunOut."""
        if (now := time.monotonic()) - self._dates_at < DATES_S:
            return
        self._dates_at, today = now, datetime.now(UTC)
        try:
            expiry.require_lasting(self._home, now=today)
        except expiry.RunOut as error:
            self._note_stop(str(error))
            raise expiry.RunOut(f"{error}. What was finished is saved", resumes=error.resumes) from None
        except ConfigError as error:  # somebody may be putting back a backup; what is at work has read it
            log.warning("%s", error)
        if now - self._dates_told_at >= TELL_DATES_S:
            self._dates_told_at = now
            for line in expiry.ending_soon(self._home, now=today):
                progress.report(progress.Note(line))

    def _note_stop(self, why: str) -> None:
        """For the run's report and `status`, where the ServerApp had no time to say more."""
        folder = self._composed.folder
        with suppress(OSError, UnimissError):  # there may be no room, or a checkpoint that is damaged
            round = rounds_done(folder) + 1
            if round <= self._submission.rounds and not folder.why_it_stopped():
                folder.note_stop({"round": round, "error": why, "sites": {}})

    def _step(self) -> bool:
        from server.control import ControlError

        if self._control.silent_s() == 0.0:  # it answered, if only with no
            self._hung = 0
        try:
            if not self._is_tidy:
                self._control.stop_all()
                self._is_tidy = True
            if (now := time.monotonic()) - self._nodes_at >= NODES_S:
                self._nodes_at = now
                _agree_on_nodes(self._control, self._registry)
            return self._submission.step()
        except ControlError as error:  # it may be starting again
            if str(error) != self._told:
                self._told = str(error)
                log.warning("%s", error)
            self._end_where_it_hangs()
            return False

    def _end_where_it_hangs(self) -> None:
        """A SuperLink that runs and answers nothing for long is ended, upon which it is started again. Raises
        ChildError: that has been of no use."""
        if min(self._control.silent_s(), self._children.runs_s(superlink.SUPERLINK)) > HANGS_S:
            self._hung += 1
            if self._hung > HANGS:
                raise ChildError(
                    f"SuperLink was started again {HANGS} times in a row and answers nothing; "
                    f"{self._home.flower / 'superlink.log'} may say why. What was finished is saved"
                )
            log.warning("SuperLink has not answered for %g s; it is started again", HANGS_S)
            self._children.end_one(superlink.SUPERLINK)

    def _write(self) -> None:
        if (now := time.monotonic()) - self._written_at < WRITE_S:
            return
        self._written_at = now
        running = Running(
            study=self._composed.study.name,
            rounds=self._submission.rounds,
            since=self._since,
            submitted=self._submission.run is not None,
            fruitless=self._submission.fruitless,
            children=children_of(self._children),
        )
        try:
            running.write(self._home.running)
        except OSError as error:  # a full disk: the round at work may still be lost, but not by this
            if self._can_write:
                log.warning("%s cannot be written to (%s); make room", self._home.path, error.strerror)
            self._can_write = False
        else:
            self._can_write = True


@contextmanager
def alone(home: Home) -> Iterator[None]:
    """Hold the folder against another `run`. Raises ConfigError."""
    home.flower.mkdir(mode=0o700, exist_ok=True)
    with home.lock.open("a+b", buffering=0) as file:
        try:
            with locks.locked(file, wait=False):
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                yield
        except BlockingIOError:
            raise ConfigError(
                f"{home.path}: `unimiss-server run` is at work here already; see `unimiss-server status`, or end it "
                "with `unimiss-server stop`"
            ) from None


def runner(home: Home) -> int | None:
    """The process number of the `run` at work in the folder; None where none is."""
    try:
        with home.lock.open("r+b") as file, locks.locked(file, wait=False):
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:  # whoever holds it wrote it
        told = home.lock.read_text()
        return int(told) if told.isdigit() else None


def stop(home: Home, *, note: Note = unnoted) -> bool:
    """End the `run` of this folder; False where there was none. Raises ConfigError: it does not end, or is another
    user's."""
    if (number := runner(home)) is None:
        return False
    note("stop", {})
    try:
        os.kill(number, signal.SIGTERM)
    except OSError as error:
        raise ConfigError(f"{home.path}: process {number} cannot be asked to end ({error.strerror})") from None
    give_up = time.monotonic() + STOP_S
    while runner(home) == number:
        if time.monotonic() > give_up:
            raise ConfigError(f"{home.path}: process {number} does not end; look at its screen, or kill it")
        time.sleep(0.2)
    return True
