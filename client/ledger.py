"""What a site's patients have cost: charged before a scan is read, kept for ever, refused where it would be too much.

One ledger for a site, over all runs and studies, for a patient pays for everything the site ever released. It lies in
the state folder: `ledger.jsonl`, one entry a line (`client.ledger_entries`), each bearing the digest of the line before
(`client.chained_log`). A private round goes through it so:

    with ledger.alone(run):
        if (sent := ledger.reply_of(asked)) is not None:
            return sent                                   # asked for again: the same bytes, charged once
        reservation = ledger.reserve(asked, mechanisms)   # raises PrivacyBudgetError; from here on it is charged
        ...                                               # scans are read, steps are taken
        ledger.record_reply(reservation, reply)           # from here on it may leave
        return reply

**One charge, one release.** `reserve` names what is asked: run, round and the request's digest. A round that crashed is
asked for again, and goes on under the reservation it has, because nothing of the first attempt was released: its reply
left neither the process nor, by `record_reply`, its folder; the steps it had saved are among those of the second, and
those it had not saved are lost with its memory and drawn anew, with fresh noise. So what is released in the end is one
set of steps, the one that was charged.

That holds for the newest reservation of a run alone, and only until its reply is recorded. A later round may have begun
from what an earlier attempt left in the site's memory, moments and centre: going back to that earlier round would be a
second release, and so would a request of the same round with another student. Each is charged as a new one, or refused
where the limits do not allow it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.chained_log import Head
from client.site_config import PatientLimits
from unimiss_core.privacy import Mechanism
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

Epsilon = Callable[[Sequence[Mechanism], float], float]
"""(releases, delta) -> epsilon of them together; raises ConfigError where it is too large to be told."""


@dataclass(frozen=True)
class Asked:
    """What a coordinator asks for."""

    study: StudyConfig
    run: str
    round: int
    request: str
    """sha256, in hex, of all that the round begins with: student, teacher and study. Equal digests, equal requests."""


@dataclass(frozen=True)
class Reservation:
    """A round that is paid for and not yet replied to; `seq` is its entry's number."""

    seq: int
    run: str
    round: int


@dataclass(frozen=True)
class Account:
    """One limit, and what was spent of it."""

    spent: float
    """Epsilon of everything charged; infinity where it is too large to be told."""
    limit: float | None
    """None: there is none."""
    delta: float
    rounds: int
    """Charged, released or not."""

    @property
    def left(self) -> float:
        """What the limit is above what was spent. Not what rounds to come may cost alone: epsilons of rounds together
        are less than their sum. `Ledger.rounds_left` tells how many there may be."""
        raise NotImplementedError


class Ledger:
    """The ledger of one site. Every call reads the file anew and checks the whole chain.

    Each raises LedgerError where it is damaged, naming the line, and ConfigError where the disk is full or the folder
    cannot be written to: what was charged before still is then.
    """

    def __init__(self, folder: Path, limits: PatientLimits, epsilon: Epsilon) -> None:
        """folder: the site's state folder. epsilon: `client.accounting.epsilon`. Nothing is read or written yet."""
        raise NotImplementedError

    @contextmanager
    def alone(self, run: str) -> Iterator[None]:
        """Hold `run` against other processes of this site, from before `reply_of` until the reply is recorded.

        Two attempts at one round, both alive, would leave the memory of one and the reply of the other: two releases
        for one charge. The system lets go when this process ends, however it ends. Raises WireError `busy`: another is
        at work on the run. Windows has no such lock; there nothing is held.
        """
        raise NotImplementedError

    def reply_of(self, asked: Asked) -> bytes | None:
        """The reply to this very request, as it was recorded; None where none was, or it is no longer kept (the last
        two rounds of a run are), so that another is a new release."""
        raise NotImplementedError

    def reserve(self, asked: Asked, mechanisms: Sequence[Mechanism]) -> Reservation:
        """Charge a round before any scan is read; when this returns, the charge is on the disk.

        mechanisms: all that its reply releases (`unimiss_core.privacy.mechanisms`). Nothing is charged anew where the
        newest entry of the run is a reservation for the same request and mechanisms: it goes on under that.

        Raises PrivacyBudgetError, and charges nothing: the study's charges with this one would exceed its
        `privacy.max_epsilon`, or all charges of the site its own limit, both as they are now; or there is less noise
        than the site asks for. Raises ValueError: there are no mechanisms, or `alone` is not held.
        """
        raise NotImplementedError

    def record_reply(self, reservation: Reservation, reply: bytes) -> None:
        """Keep `reply` and note that it leaves; when this returns, both are on the disk, and it may be sent.

        Raises ValueError: the reservation has its reply already, or is not the run's newest.
        """
        raise NotImplementedError

    @property
    def head(self) -> Head:
        """Number and digest of the last entry: what a coordinator keeps, to notice a ledger that was put back."""
        raise NotImplementedError

    def check_known(self, known: Head) -> None:
        """Raises LedgerError: `known`, which a coordinator saw as this ledger's head, is not in it. So it is an older
        copy, or another ledger, and forgets releases that were made."""
        raise NotImplementedError

    def site_account(self) -> Account:
        """Over everything that the site ever released, against the site's own limit."""
        raise NotImplementedError

    def study_accounts(self) -> dict[tuple[str, str], Account]:
        """(name, digest) of each study that was charged for -> its charges, against its own limit, in order."""
        raise NotImplementedError

    def rounds_left(self, study: StudyConfig, ranks: Collection[Rank]) -> int:
        """How many more rounds of `study` a site with scans of `ranks` may be charged, from the one after the last
        that was, until the study ends or a limit is reached."""
        raise NotImplementedError
