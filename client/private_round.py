"""A round of a study in the privacy mode `patient`: charged before a scan is read, kept before it leaves.

What leaves the site in such a study, and what covers it, is a table of docs/privacy.md; here it is held to.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from client.hold import Hold
from client.ledger import Asked
from client.ledger_entries import Request
from client.site import Site
from client.telling import tell, tell_if_heard, tell_of_noise_alone, tell_of_scans
from client.trainer import beginning, run_round
from unimiss_core.chain import Head
from unimiss_core.codec import Layout
from unimiss_core.errors import UnimissError, UnknownPatientError, WireError, where
from unimiss_core.privacy import mechanisms
from unimiss_core.privacy_config import PatientPrivacyConfig
from unimiss_core.scan import RANKS, Rank
from unimiss_core.wire import Introduction, TrainReply, TrainRequest, to_keep

log = logging.getLogger(__name__)


def private_introduction(site: Site) -> Introduction:
    """Who this site is: what its file declares, without a count, and where its ledger stands.

    It costs nothing and may be asked for with any plan, so it hangs on no scan. They are read now, which can take
    hours, but whatever comes of it is for the site's own screen; no other plan's scans go for it, which a run that has
    begun may need, and while the site is held, or at work on a round, nothing is read. Raises LedgerError; ConfigError,
    from the state folder's disk; and UnknownPatientError, which hangs on no plan.
    """
    limits, promise = site.config.privacy, site.study.privacy
    if limits.max_epsilon is None and isinstance(promise, PatientPrivacyConfig):
        told = f"only study '{site.study.name}' limits what patients may cost, to epsilon {promise.max_epsilon:g}"
        tell(site.config.name, f"{told}; under another name it would begin anew: set privacy.max_epsilon")
    if (held := Hold(site.config).in_words()) is not None:
        tell(site.config.name, held)  # and nothing is read: a process that dies of it would be seen
    else:
        _read_ahead(site)
    return Introduction(site.config.name, _presence(site.ranks), 0, site.ledger.head)


@contextmanager
def cause_kept_here(site: str) -> Iterator[None]:
    """Around what reads scans or trains on them: why it failed may tell of them. It is told on the site's own screen,
    and raised is one WireError, `undisclosed`, whatever it was and whoever listens. UnknownPatientError goes by: it is
    told as the same."""
    try:
        yield
        return
    except UnknownPatientError:
        raise
    except UnimissError as error:
        tell_if_heard(site, str(error).removeprefix(f"site '{site}': "))
    except Exception as error:
        log.error("failed: %s", where(error))
    raise WireError("undisclosed", "the cause is told at the site alone")


def private_round(site: Site, request: TrainRequest, layout: Layout) -> tuple[bytes, Head]:
    """The packed reply to a request to train (`unimiss_core.wire.to_keep`): charged anew, or the one that was sent
    before; and where the ledger then stands. layout: of what the site trains.

    Raises PrivacyBudgetError where the round would cost patients too much, LedgerError where the ledger was put back
    behind what the coordinator knows of it, WireError `held` where a round failed and no person has looked, and
    ConfigError from the state folder, all before a scan is read; from then on as `cause_kept_here`, and the site is
    held. What was charged stays charged.
    """
    ledger = site.ledger
    if request.ledger is not None:
        ledger.check_known(request.ledger)
    with ledger.alone(request.run):
        asked = Asked(site.study, request.run, request.round, beginning(site, request).digest)
        payload = ledger.reply_of(asked)
        if payload is None:
            payload = _charged(site, asked, request, layout)
    return payload, ledger.head


def undisclosed(reply: TrainReply, ranks: Collection[Rank]) -> TrainReply:
    """The reply without what no noise covers: losses and diagnostics, counts, and how long it took.

    ranks: what the site declares, whatever scans it has.
    """
    return replace(reply, scans=_presence(ranks), seconds=0.0, losses={}, diagnostics={})


def _read_ahead(site: Site) -> None:
    """Raises UnknownPatientError, and ConfigError from the state folder."""
    introduction = Request(site.run, 0, site.study.digest(), "")
    try:
        with site.ledger.alone(site.run), Hold(site.config).at_work(introduction):
            _read_untold(site)
    except WireError as busy:
        log.warning("its scans are read in its first round: %s", busy)


def _read_untold(site: Site) -> None:
    """Raises UnknownPatientError."""
    try:
        with cause_kept_here(site.config.name):
            tell_of_scans(site, site.read(evicts=False))
    except WireError as untold:
        log.warning("introduced all the same: %s", untold)


def _charged(site: Site, asked: Asked, request: TrainRequest, layout: Layout) -> bytes:
    """A new reply, which may leave when this returns."""
    hold = Hold(site.config)
    hold.check()
    reservation = site.ledger.reserve(asked, mechanisms(site.study, site.ranks, [request.round]))
    with hold.at_work(asked.as_charged):
        with cause_kept_here(site.config.name):
            reply = undisclosed(run_round(site, request), site.ranks)
            tell_of_noise_alone(site, site.library)  # an archive may be gone since the introduction
            payload = to_keep(reply.pack(layout, site.study.wire.dtype))
        hold.check()  # on a disk without locks another may have failed meanwhile: then it is not told that this did not
        with cause_kept_here(site.config.name):  # that there is no room now may be what scans took of it
            site.ledger.record_reply(reservation, payload)
    return payload


def _presence(ranks: Collection[Rank]) -> Mapping[Rank, int]:
    """1 for whatever number of scans, 0 for none."""
    return {rank: int(rank in ranks) for rank in RANKS}
