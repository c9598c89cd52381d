"""What a site's patients have cost: charged before a scan is read, kept for ever, refused where it would be too much.

One ledger for a site, over all runs and studies, for a patient pays for everything the site ever released; or one for
several sites that hold the same patients. It lies in the state folder, or where the site file says: `ledger.jsonl`, one
entry a line (`client.ledger_entries`), each bearing the digest of the line before (`unimiss_core.chained_log`). A
private round goes through it so:

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
set of steps, the one that was charged. Presupposed is what the accountant presupposes: that patients are drawn for each
step anew, from a generator that nobody outside can know, so that two charges are never for one draw.

That holds for the newest reservation of a run alone, and only until its reply is recorded. A later round may have begun
from what an earlier attempt left in the site's memory, moments and centre: going back to that earlier round would be a
second release, and so would a request of the same round with another student. Each is charged as a new one, or refused
where the limits do not allow it.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from os.path import realpath
from pathlib import Path

from client.ledger_entries import Charges, Entry, Replied, Request, Reserved, entry_of, releases_of, total
from client.shared_ledger import NOTE, note_in, noted_in
from client.site_config import PatientLimits, SiteConfig
from client.site_state import KEPT_ROUNDS, make_run_folder, name_in_seal, run_folder
from unimiss_core import durable
from unimiss_core.chain import Head
from unimiss_core.chained_log import ChainedLog
from unimiss_core.errors import ConfigError, LedgerError, PrivacyBudgetError, WireError
from unimiss_core.locks import locked
from unimiss_core.privacy import Mechanism, mechanisms
from unimiss_core.privacy_config import PatientPrivacyConfig
from unimiss_core.scan import Rank
from unimiss_core.sealing import Damaged, Seal
from unimiss_core.study import StudyConfig

WAY_OUT = "docs/privacy.md, 'The ledger', says what to do"
_NOT_YET = "not charged yet"
"""Of a site that counts with others: no entry bears it."""

Epsilon = Callable[[Sequence[Mechanism], float], float]
"""(releases, delta) -> epsilon of them together; raises ConfigError where it is too large to be told."""


@dataclass(frozen=True)
class Asked:
    """What a coordinator asks for: a round of a study in the privacy mode `patient`."""

    study: StudyConfig
    run: str
    round: int
    request: str
    """sha256, in hex, of all that the round begins with: student, teacher and study. Equal digests, equal requests."""

    @property
    def as_charged(self) -> Request:
        return Request(self.run, self.round, self.study.digest(), self.request)


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
        """What the limit is above what was spent. Not what rounds to come may cost alone: epsilon of all together is
        less than the sum. `Ledger.rounds_left` tells how many there may be."""
        return float("inf") if self.limit is None else max(0.0, self.limit - self.spent)


class Ledger:
    """The ledger of one site. Every call reads the file anew and checks the whole chain.

    Each raises LedgerError where it is damaged, naming the line, and ConfigError where the disk is full or the folder
    cannot be written to: what was charged before still is then, and nothing may be sent.
    """

    def __init__(
        self,
        folder: Path,
        limits: PatientLimits,
        epsilon: Epsilon,
        seal: Seal | None = None,
        *,
        shared: Path | None = None,
    ) -> None:
        """folder: the site's state folder. epsilon: `client.accounting.epsilon`. seal: of the replies that are kept;
        the ledger itself is in clear. shared: where the ledger lies, if not there; charges of other sites may come
        between any two calls. Nothing is read or written yet."""
        self._folder, self._limits, self._epsilon, self._seal = folder, limits, epsilon, seal
        self._shared = shared
        self._log: ChainedLog[Entry] = ChainedLog(
            (shared or folder) / "ledger.jsonl", entry_of, damaged=LedgerError, way_out=WAY_OUT
        )
        self._held: str | None = None

    @contextmanager
    def alone(self, run: str) -> Iterator[None]:
        """Hold this site, for `run`, against its other processes, from before `reply_of` until the reply is recorded.

        Two attempts at one round, both alive, would leave the memory of one and the reply of the other: two releases
        for one charge. And of two rounds, though of other runs or studies, each could fail of what the other takes, so
        that two exact facts were told before a person looks (`client.hold`). The system lets go when this process
        ends, however it ends. Raises WireError `busy`: another is at work. Where there are no such locks,
        `client.terms` lets no private round come so far.
        """
        with ExitStack() as holding:
            try:
                durable.make_folder(self._folder)
                file = holding.enter_context((self._folder / "private.lock").open("ab"))
                holding.enter_context(locked(file, wait=False))
            except BlockingIOError:
                raise WireError("busy", "another process of this site is at work on a private round") from None
            except OSError as error:
                raise _unwritable(error) from None
            self._held = run
            try:
                yield
            finally:
                self._held = None

    def reply_of(self, asked: Asked) -> bytes | None:
        """The reply to this very request, as it was recorded; None where none was, or it is no longer kept (the last
        two rounds of a run are), so that another is a new release."""
        owner = self._owner()
        with self._log.writing() as log:  # not only read: the entry must be on the disk before the reply goes
            digest = Charges.of(log.chain, owner).newest_reply(asked.as_charged)
        path = self._reply_file(asked.run, asked.round)
        try:
            reply = path.read_bytes()
            if self._seal is not None:
                reply = self._seal.open(reply, name_in_seal(path))
        except (OSError, Damaged):
            return None
        return reply if hashlib.sha256(reply).hexdigest() == digest else None

    def reserve(self, asked: Asked, releases: Sequence[Mechanism]) -> Reservation:
        """Charge a round before any scan is read; when this returns, the charge is on the disk.

        releases: all that its reply is made of (`unimiss_core.privacy.mechanisms`). Nothing is charged anew where the
        newest reservation of the run is for the same request and releases and has no reply: the round goes on under it.

        Raises PrivacyBudgetError, and charges nothing: all that was charged under the study's name (one that was
        edited goes on with what it cost) would exceed its `privacy.max_epsilon` with this, or all charges of the site
        its own limit, as they are today; or there is less noise than the site asks for. Raises ValueError: there are no
        releases, the study is not in mode `patient`, or `alone` is not held.
        """
        self._require_alone(asked.run)
        if not (charged := total(releases)):
            raise ValueError("a private round without releases")
        owner = self._owner(begins=True)
        with self._log.writing() as log:
            charges = Charges.of(log.chain, owner)
            entry = _open_for(charges, asked, charged)
            added = [] if entry else charged
            if (refused := self._refused(charges, asked.study, charged, added)) is not None:
                raise PrivacyBudgetError(f"round {asked.round} of study '{asked.study.name}' is refused: {refused}")
            seq = entry.seq if entry else log.append(partial(_reserved, asked, charged, owner)).seq
        return Reservation(seq, asked.run, asked.round)

    def record_reply(self, reservation: Reservation, reply: bytes) -> None:
        """Keep `reply` and note that it leaves; when this returns, both are on the disk, and it may be sent.

        Raises ValueError: the reservation has its reply already, or is not the run's newest; or `alone` is not held.
        """
        self._require_alone(reservation.run)
        path = self._reply_file(reservation.run, reservation.round)
        charges = self._charges()
        newest = charges.newest(reservation.run)
        if newest is None or newest.seq != reservation.seq or newest.seq in charges.replies:
            raise ValueError("a reply to a reservation that is used or given up")
        # Kept first: a reply that is noted and lost would have to be paid for again. And while nobody is kept from the
        # ledger, for other sites may count in it: what is asked above nobody changes meanwhile, by `alone`.
        try:
            make_run_folder(path.parent)
            durable.write_bytes(path, reply if self._seal is None else self._seal.seal(reply, name_in_seal(path)))
        except OSError as error:
            raise _unwritable(error) from None
        digest = hashlib.sha256(reply).hexdigest()
        with self._log.writing() as log:
            log.append(partial(Replied, reservation=reservation.seq, reply=digest))
        _forget_replies(path.parent, newest=reservation.round)

    @property
    def head(self) -> Head:
        """Number and digest of the last entry: what a coordinator keeps, to notice a ledger that was put back."""
        with self._log.writing() as log:  # not only read: what is told must be on the disk
            return log.chain.head

    @property
    def entries(self) -> int:
        """How many it has. Nothing is written."""
        return len(self._log.read().entries)

    @property
    def is_begun(self) -> bool:
        """Whether it has any entry. Nothing is written."""
        return self.entries > 0

    def check_known(self, known: Head, *, by: str = "the coordinator has seen") -> None:
        """Raises LedgerError: `known`, which was this ledger's head when somebody looked, is not in it. So it is an
        older copy, or another ledger, and forgets releases that were made. by: who looked, for the message."""
        with self._log.writing() as log:
            chain = log.chain
        if not chain.holds(known):
            raise LedgerError(
                f"{by} entry {known.seq} of this site's ledger, which is not in it (it holds {chain.head.seq}): the "
                "state folder, or the ledger, was put back to an older one, or begun anew, or 'ledger' of the site "
                f"file named another folder then; {WAY_OUT}"
            )

    def site_account(self) -> Account:
        """Over everything that the site ever released, against the site's own limit."""
        return self._account(self._charges().reserved, self._limits.max_epsilon, self._limits.delta)

    def study_accounts(self) -> dict[tuple[str, str], Account]:
        """(name, newest digest) of each study that was charged for -> its charges, against the limit that it had last,
        in order of the first."""
        charges = self._charges()
        newest = {entry.study_name: entry for entry in charges.reserved}
        return {
            (name, entry.study): self._account(charges.of_study(name), entry.max_epsilon, entry.delta)
            for name, entry in newest.items()
        }

    def spent_on(self, study: str) -> float:
        """Epsilon of all that was charged under a study's name, at the delta that it had last; 0 where nothing was."""
        entries = self._charges().of_study(study)
        return self._account(entries, None, entries[-1].delta).spent if entries else 0.0

    def newest_charge(self, study: StudyConfig) -> Request | None:
        """What was charged last for `study` as it stands: the run at work on it, if any is, and how far it has come."""
        charged = [entry for entry in self._charges().own if entry.study == study.digest()]
        return charged[-1].for_request if charged else None

    def rounds_left(self, study: StudyConfig, ranks: Collection[Rank], *, after: int = 0) -> int:
        """How many more rounds of `study` a site with scans of `ranks` may be charged, until the study ends or a limit
        is reached, in a run that goes on after round `after`; 0: that begins anew. Raises ValueError as `reserve`."""
        charges = self._charges()
        to_come = range(after + 1, study.schedule.rounds + 1)

        def too_many(rounds: int) -> bool:
            added = mechanisms(study, ranks, to_come[:rounds])
            return self._refused(charges, study, added, added) is not None

        if not to_come or not too_many(len(to_come)):  # as of most studies, for it takes a second
            return len(to_come)
        return bisect_left(range(1, len(to_come)), True, key=too_many)

    def first_refused(self, study: StudyConfig, ranks: Collection[Rank]) -> str | None:
        """Why a site with scans of `ranks` would refuse to be charged for round 1 of `study`, or for any round of so
        little noise; None where it would not. Raises ValueError as `reserve`."""
        first, all_rounds = (mechanisms(study, ranks, range(1, end)) for end in (2, study.schedule.rounds + 1))
        return self._refused(self._charges(), study, all_rounds, first)

    def was_charged_for(self, run: str) -> bool:
        return self._charges().newest(run) is not None

    def _charges(self) -> Charges:
        return Charges.of(self._log.read(), self._owner())

    def _owner(self, *, begins: bool = False) -> str | None:
        """What marks this site's charges; None in a ledger of its own. begins: from now on it counts in this folder."""
        if self._shared is None:
            return None
        try:
            note = noted_in(self._folder, self._shared) if begins else note_in(self._folder)
        except OSError as error:
            raise _unwritable(error) from None
        return _NOT_YET if note is None else note.owner

    def _account(self, entries: Sequence[Reserved], limit: float | None, delta: float) -> Account:
        try:
            spent = self._epsilon(releases_of(entries), delta)
        except ConfigError:
            spent = float("inf")
        return Account(spent, limit, delta, len(entries))

    def _refused(
        self, charges: Charges, study: StudyConfig, releases: Sequence[Mechanism], added: Sequence[Mechanism]
    ) -> str | None:
        """Why a round of `releases`, of which `added` are not charged yet, may not be; None where it may."""
        promise, limits = study.privacy, self._limits
        if not isinstance(promise, PatientPrivacyConfig):
            raise ValueError(f"the study's privacy mode is {promise.mode}, not patient")
        noise, least = min(each.noise_multiplier for each in releases), limits.least_noise_multiplier
        if least is not None and noise < least:
            return (
                f"its noise multiplier, of gradient and centre together, is {noise:.4g}, and this site asks for at "
                f"least {least:g} (privacy.least_noise_multiplier of the site file)"
            )
        of_study = releases_of(charges.of_study(study.name))
        if over := self._exceeded([*of_study, *added], promise.max_epsilon, promise.delta):
            return (
                f"{over} that the study promises (privacy.max_epsilon of the study), with all that was charged under "
                "its name, whatever its settings were then; the study ends here for this site"
            )
        of_site = releases_of(charges.reserved)
        if limits.max_epsilon and (over := self._exceeded([*of_site, *added], limits.max_epsilon, limits.delta)):
            return (
                f"{over} that this site allows over all studies (privacy.max_epsilon of the site file); only whoever "
                "answers for the patients' protection should raise it"
            )
        return None

    def _exceeded(self, releases: Sequence[Mechanism], limit: float, delta: float) -> str | None:
        """In words, where all these exceed `limit`."""
        try:
            reached = self._epsilon(total(releases), delta)
        except ConfigError as error:
            return f"what patients cost cannot be told ({error}), so it is above epsilon {limit:g}"
        return (
            f"patients would cost epsilon {reached:.4g} at delta {delta:g}, above {limit:g}"
            if reached > limit
            else None
        )

    def _reply_file(self, run: str, round: int) -> Path:
        return run_folder(self._folder, run) / f"reply-{round:04d}.bin"

    def _require_alone(self, run: str) -> None:
        if self._held != run:
            raise ValueError("the ledger is written to within alone(run) only")


def ledger_of(config: SiteConfig) -> Ledger:
    """The ledger of a site, over all its studies, and of every other site that names its folder."""
    return Ledger(config.state, config.privacy, _epsilon, config.seal(), shared=config.ledger)


def require_one_ledger(config: SiteConfig) -> None:
    """Raises LedgerError: the site was charged in another ledger than its file names, which would forget that;
    ConfigError: there is no folder that the file names, or it lies where its files would not stay."""
    places = (config.ledger_folder, config.state, config.cache_folder)
    folder, state, cache = (Path(realpath(place)) for place in places)  # of a loop, too, of which whoever writes tells
    try:
        note, is_there = note_in(config.state), folder.is_dir()
    except OSError as error:
        raise ConfigError(f"'ledger' or 'state' cannot be looked into: {error.strerror or 'unknown error'}") from None
    way_out = "(docs/site.md, 'In two federations at once')"
    if note is not None and note.folder != str(folder):
        what = "names another folder" if config.ledger else "is left out"
        raise LedgerError(
            f"site '{config.name}': it counts what patients cost in a ledger with other sites, and 'ledger' of its "
            f"file {what} now, in which those charges may not be; {NOTE} of the state folder says which it was. Where "
            f"that was moved, not copied, while no daemon of these sites ran, delete the note {way_out}"
        )
    if config.ledger is None or folder == state:
        return
    if Ledger(config.state, config.privacy, _epsilon).is_begun:
        raise LedgerError(
            f"site '{config.name}': its state folder holds a ledger that is begun, and 'ledger' of the site file names "
            f"another, in which those charges are not; move it there, where that is empty, or leave it out {way_out}"
        )
    if {state, cache} & {*folder.parents}:
        raise ConfigError("'ledger' lies below the state folder or the cache, parts of which go; point it away")
    if not is_there:
        raise ConfigError("'ledger' names no folder; correct it, or make the folder (mkdir -m 700), before a round")


def _epsilon(releases: Sequence[Mechanism], delta: float) -> float:
    from client.accounting import epsilon  # here, for it takes seconds, and only what is charged needs it

    return _remembered(epsilon, tuple(releases), delta)


@lru_cache(maxsize=16)
def _remembered(epsilon: Epsilon, releases: tuple[Mechanism, ...], delta: float) -> float:
    """What a round reserves is told again when its reply is written down, and accountants take a second."""
    return epsilon(releases, delta)


def _open_for(charges: Charges, asked: Asked, releases: Sequence[Mechanism]) -> Reserved | None:
    """The reservation that this request may go on under: see the module."""
    newest = charges.newest(asked.run)
    if newest is None or newest.seq in charges.replies:
        return None
    same = newest.for_request == asked.as_charged and newest.releases() == list(releases)
    return newest if same else None


def _reserved(asked: Asked, releases: Sequence[Mechanism], owner: str | None, *, seq: int, previous: str) -> Reserved:
    promise = asked.study.privacy
    assert isinstance(promise, PatientPrivacyConfig), "checked before it is charged"
    return Reserved(
        seq=seq,
        previous=previous,
        run=asked.run,
        round=asked.round,
        request=asked.request,
        study=asked.study.digest(),
        study_name=asked.study.name,
        max_epsilon=promise.max_epsilon,
        delta=promise.delta,
        mechanisms=tuple((each.noise_multiplier, each.sampling_rate, each.steps) for each in releases),
        owner=owner,
    )


def _forget_replies(folder: Path, *, newest: int) -> None:
    """Delete all but the replies of the last rounds; newer ones are of rounds that a coordinator has undone."""
    for path in folder.glob("reply-*.bin"):
        if not newest - KEPT_ROUNDS < int(path.stem.removeprefix("reply-")) <= newest:
            with suppress(OSError):  # it only takes room, and the round's reply is recorded already
                path.unlink()


def _unwritable(error: OSError) -> ConfigError:
    return ConfigError(
        f"the state folder cannot be written to: {error.strerror or 'unknown error'}; make room, or point 'state' to "
        "another disk"
    )
