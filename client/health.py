"""How the daemon is doing: four small files in the state folder, which `unimiss-site status` reads from any terminal.

contact.json is the gate's: what it hears from the coordinator. health.json is the daemon's: what it starts and why it
waits. refused.json is the ClientApp's and the gate's: why this site last refused what it was asked. noise-alone.json is
the ClientApp's: that a private study finds no scan here. Each appears whole or not at all, and none names a patient, a
scan or a path.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from unimiss_core import durable
from unimiss_core.config import Config, Name
from unimiss_core.scan import Rank

log = logging.getLogger(__name__)

PROBLEMS: dict[str, str] = {
    "unreachable": "the coordinator cannot be reached: its machine is off, or the network or a firewall is in between, "
    "or no study runs there just now, for its port is open only while one does",
    "proxy": "the proxy that HTTPS_PROXY names cannot be reached, or lets nobody through to the coordinator",
    "tls": "what answers is not the coordinator that this site has joined, or a certificate has run out; "
    "`unimiss-site check` says which",
    "no_run": "the coordinator's public side answers, and no run is going on behind it",
    "failed": "the coordinator's public side answers, and what is behind it failed over what this site asked: mostly "
    "because its disk is full or its database busy, which only its operator can mend",
    "not_approved": "the coordinator does not know this site's key, or has revoked it; only its operator can mend that",
    "signature": "the coordinator does not take this site's signature: mostly because a clock is wrong, here or there; "
    "`unimiss-site check` compares them",
    "not_yet": "the coordinator still holds the connection before for live, which passes within a minute, or its run "
    "began before this site was approved",
    "answer": "the coordinator answers what this version of the program does not understand",
}
"""What keeps the site from the coordinator, in words for its operator."""

LASTING = frozenset({"tls", "not_approved"})
"""What waiting does not mend: a person has to."""

State = Literal["starting", "running", "waiting", "stopped"]
HealthT = TypeVar("HealthT", bound=Config)

CONTACT = "contact.json"
HEALTH = "health.json"
REFUSED = "refused.json"
NOISE_ALONE = "noise-alone.json"


class Contact(Config):
    """What the gate heard; times in seconds since 1970."""

    connected: float | None = None
    """Since when the coordinator counts this site as there; None before."""
    answered: float | None = None
    """When it last answered anything."""
    asked: float | None = None
    """When it last asked for work."""
    round: int | None = None
    """Of the study, as last asked; None for an introduction."""
    problem: str | None = None
    """A key of PROBLEMS."""
    problem_since: float | None = None


class Health(Config):
    """What the daemon does; times in seconds since 1970."""

    pid: int
    state: State
    since: float
    """When the daemon began."""
    restarts: int = 0
    """How often a process that it runs ended by itself."""
    ended: str | None = None
    """How the last of them ended."""
    next_try: float | None = None


class Refused(Config):
    """What this site refused; there while it answered nothing since."""

    at: float
    """Seconds since 1970."""
    reason: str
    """As its coordinator was told: a code of `unimiss_core.reasons`."""
    words: str
    """For the site's operator, of one or more lines."""


class NoiseAlone(Config):
    """A private study's last round, or its introduction, found no scan of these ranks; there while that is so."""

    at: float
    """Seconds since 1970."""
    study: Name
    ranks: tuple[Rank, ...]


class ContactBook:
    """Writes contact.json: at once where something changed, else at most every few seconds."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time, every_s: float = 10.0) -> None:
        self._path = folder / CONTACT
        self._now = now
        self._every_s = every_s
        self._contact = Contact()
        self._written = float("-inf")
        self._alone = threading.Lock()

    def connected(self) -> None:
        self._set(at_once=True, connected=self._now())

    def asked(self, round_text: str) -> None:
        """round_text: the coordinator's word for the round; anything but a number is none."""
        number = int(round_text) if round_text.isascii() and round_text.isdigit() and len(round_text) < 10 else None
        self._set(at_once=True, asked=self._now(), round=number)

    def answered(self) -> None:
        was_troubled = self._contact.problem is not None
        self._set(at_once=was_troubled, answered=self._now(), problem=None, problem_since=None)

    def failed(self, problem: str) -> None:
        """problem: a key of PROBLEMS."""
        if problem != self._contact.problem:
            self._set(at_once=True, problem=problem, problem_since=self._now())

    def _set(self, *, at_once: bool, **changes: float | str | None) -> None:
        with self._alone:  # heartbeats come from another thread
            self._contact = self._contact.model_copy(update=changes)
            if at_once or self._now() - self._written >= self._every_s:
                self._written = self._now()
                write(self._path, self._contact)


def write(path: Path, facts: Config) -> None:
    """A disk that is full must not end what is told of here."""
    try:
        durable.write_bytes(path, facts.model_dump_json().encode())
    except OSError as error:
        log.warning("%s cannot be written: %s", path.name, error.strerror or "unknown error")


def tell_of_refusal(folder: Path, reason: str, words: str) -> None:
    """`unimiss-site run` and `status` say so until this site answers something. words: which name no path, no patient.
    Never raises: no such word may keep an answer from leaving."""
    with suppress(Exception):
        write(folder / REFUSED, Refused(at=time.time(), reason=reason, words=words))


def note_noise_alone(folder: Path, study: str, ranks: Sequence[Rank]) -> None:
    """ranks: of which a private study finds no scan; none takes the word back. Never raises, as `tell_of_refusal`."""
    with suppress(Exception):
        if ranks:
            write(folder / NOISE_ALONE, NoiseAlone(at=time.time(), study=study, ranks=tuple(ranks)))
        else:
            (folder / NOISE_ALONE).unlink(missing_ok=True)


def read_noise_alone(folder: Path) -> NoiseAlone | None:
    return _read(NoiseAlone, folder / NOISE_ALONE)


def read_contact(folder: Path) -> Contact | None:
    return _read(Contact, folder / CONTACT)


def read_health(folder: Path) -> Health | None:
    return _read(Health, folder / HEALTH)


def read_refused(folder: Path) -> Refused | None:
    return _read(Refused, folder / REFUSED)


def _read(kind: type[HealthT], path: Path) -> HealthT | None:
    """None where there is none, or one of another version."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
