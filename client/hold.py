"""After a private round that failed, nothing private begins at a site before a person has looked.

That a round failed may hang on all scans together, for instance on whether they fit the cache at the spacing that its
study asks for, and the coordinator is told of it exactly: no noise covers it. Were it told again and again, a
coordinator would choose settings, pay next to no epsilon for each try, and read off the answers what no patient agreed
to. So a failure is told once for each time that a person lets the site go on; until then every request is answered
`held`, the one that failed, too.

A process that dies, for instance of too little memory, tells as much by its silence. So whatever reads scans, a round
or an introduction, leaves a mark in the folder `unanswered` of the state folder before it reads the first, and takes it
away with its answer:

    <some digits>.json     locked: a process is at work on it. Not locked: its process died
    <some digits>.failed   it failed, or another did while it was at work: it was answered the same

One death is free, for a machine may be started anew at any time; the next one holds the site. Nothing is counted: a
mark that is left stays until a person clears it. A round that fails renames its mark, which takes neither room on the
disk nor a free file descriptor; where even that is refused, its mark stays as that of a death.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from client.ledger_entries import Request
from client.site_config import SiteConfig
from client.telling import tell_if_heard
from unimiss_core import durable
from unimiss_core.errors import ConfigError, WireError
from unimiss_core.json_text import read_object
from unimiss_core.locks import locked

FREE_DEATHS = 1
"""Since a person looked; a power cut and a process that was killed for its memory look the same."""


class Hold:
    """Of one site, over all runs and studies."""

    def __init__(self, site: SiteConfig) -> None:
        """Nothing is read or written yet."""
        self._site, self._folder = site.name, site.state / "unanswered"

    def in_words(self) -> str | None:
        """What stands in the way of private rounds, and the way out, in several lines; None where nothing does."""
        try:
            holding = self._holding()
        except OSError as error:
            return (
                f"whether a private round failed cannot be told ({error.strerror or 'unknown error'}), and none begins "
                "before its state folder can be read"
            )
        if not holding:
            return None
        return "\n".join(_held_in_words(holding))

    def check(self) -> None:
        """Raises WireError `held`: a round has failed, or several have died, since a person looked."""
        if (held := self.in_words()) is not None:
            tell_if_heard(self._site, held)
            raise _held()

    @contextmanager
    def at_work(self, request: Request) -> Iterator[None]:
        """Around all work on scans, from before the first is read until the reply is recorded.

        request: of round 0 for an introduction, whose failure goes unsaid and must not leave this. A WireError is a
        failure that the coordinator is told: of several that fail at once, one at most is told as that, the others as
        `held`. Raises ConfigError, before anything is read: the mark cannot be written.
        """
        with self._marked(request) as mark:
            try:
                yield
            except WireError:
                failed = mark.with_suffix(".failed")
                with suppress(OSError):
                    mark.rename(failed)
                    durable.sync(self._folder)
                tell_if_heard(self._site, self.in_words() or "")
                if self._only(failed):
                    raise
                raise _held() from None
            except Exception:  # hangs on no scan; whatever ends the process, and is none, leaves the mark
                _forget(mark)
                raise
            _forget(mark)

    def clear(self) -> bool:
        """Let private rounds begin again; False where nothing was held. Raises ConfigError: a mark cannot go."""
        try:
            left = [*self._failed(), *self._dead()]
            for mark in left:
                mark.unlink()
        except OSError as error:
            told = error.strerror or "unknown error"
            raise ConfigError(f"site '{self._site}': its state folder cannot be written to: {told}") from None
        return bool(left)

    @contextmanager
    def _marked(self, request: Request) -> Iterator[Path]:
        """The mark of a round at work; it is on the disk, and locked until this ends."""
        mark = self._folder / f"{secrets.token_hex(8)}.json"
        with ExitStack() as holding:
            try:
                durable.make_folder(self._folder)
                file = holding.enter_context(mark.open("xb"))
                holding.enter_context(locked(file, wait=False))  # before it says anything: see `_is_left`
                file.write(json.dumps(request._asdict()).encode())
                file.flush()
                os.fsync(file.fileno())
                durable.sync(self._folder)
            except OSError as error:
                _forget(mark)
                told = error.strerror or "unknown error"
                raise ConfigError(f"the state folder cannot be written to: {told}; make room, or mend it") from None
            self._tell_of_deaths()
            yield mark

    def _tell_of_deaths(self) -> None:
        with suppress(OSError):
            for mark in self._dead():
                told = "; the next one that dies holds the site (`unimiss-site clear SITE.yaml`, once you know why)"
                tell_if_heard(self._site, _in_words(mark) + told)

    def _holding(self) -> list[Path]:
        """The marks that hold the site. Raises OSError."""
        dead = self._dead()
        return [*self._failed(), *(dead if len(dead) > FREE_DEATHS else ())]

    def _only(self, failed: Path) -> bool:
        try:
            return self._holding() == [failed]
        except OSError:
            return False

    def _failed(self) -> list[Path]:
        return self._marks(".failed")

    def _dead(self) -> list[Path]:
        return [mark for mark in self._marks(".json") if _is_left(mark)]

    def _marks(self, suffix: str) -> list[Path]:
        """Raises OSError, which a glob would not."""
        try:
            return sorted(mark for mark in self._folder.iterdir() if mark.suffix == suffix)
        except FileNotFoundError:
            return []


def _is_left(mark: Path) -> bool:
    """Whether no process is at work on it. An empty one says nothing yet, and no scan was read. Raises OSError."""
    try:
        with mark.open("rb") as file, locked(file, shared=True, wait=False):
            return bool(file.read(1)) and mark.exists()  # it may have been answered meanwhile
    except (BlockingIOError, FileNotFoundError):
        return False


def _held_in_words(holding: Sequence[Path]) -> Iterator[str]:
    """What happened, what it means, what to look at, how to go on: a line each."""
    yield f"{'; '.join(map(_in_words, holding))}."
    yield (
        "What it means: until a person has looked, this site begins no private round and reads no scan for one. "
        "That one ended so may depend on patients' scans, and no noise hides it: coordinators may learn it only once."
    )
    sources = {".failed": "this site's log, which says why a round failed"}
    sources[".json"] = "the system's log, for why a process ended: too little memory, a power cut, somebody's kill"
    looked_at = [source for suffix, source in sources.items() if any(mark.suffix == suffix for mark in holding)]
    yield f"What to look at: {'; and '.join(looked_at)}. Mend that first, or the next round tells as much again."
    yield "Then go on with `unimiss-site clear SITE.yaml`; the round, asked for again, goes on under the charge it has"


def _in_words(mark: Path) -> str:
    ended = "failed" if mark.suffix == ".failed" else "died with its process"
    try:
        request = Request(**read_object(mark))
    except (OSError, ValueError, TypeError):
        return f"a private round {ended}"
    which = f"round {request.round}" if request.round else "the introduction"
    return f"{which} of run '{request.run}' {ended}"


def _forget(mark: Path) -> None:
    with suppress(OSError):  # then it stays, as that of a death
        mark.unlink()


def _held() -> WireError:
    return WireError("held", "a private round failed, and its operator has not let the site go on")
