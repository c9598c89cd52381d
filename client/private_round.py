"""A round of a study in the privacy mode `patient`: charged before a scan is read, kept before it leaves.

What leaves the site in such a study, and what covers it, is a table of docs/privacy.md; here it is held to.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from client.ledger import Asked
from client.site import Site
from client.trainer import beginning, run_round
from unimiss_core.chain import Head
from unimiss_core.codec import Layout
from unimiss_core.errors import WireError
from unimiss_core.privacy import mechanisms
from unimiss_core.scan import RANKS, Rank
from unimiss_core.wire import Introduction, TrainReply, TrainRequest, to_keep


def private_introduction(site: Site) -> Introduction:
    """Who this site is, without a count, and where its ledger stands. Raises LedgerError and ConfigError."""
    site.memory.remember_told(site.library.ranks)
    return Introduction(site.config.name, _presence(site.library.ranks), 0, site.ledger.head)


def private_round(site: Site, request: TrainRequest, ranks: Collection[Rank], layout: Layout) -> tuple[bytes, Head]:
    """The packed reply to a request to train (`unimiss_core.wire.to_keep`): charged anew, or the one that was sent
    before; and where the ledger then stands.

    ranks: that the site introduced itself with. layout: of what it trains.

    Raises PrivacyBudgetError where the round would cost patients too much and LedgerError where the ledger was put back
    behind what the coordinator knows of it, both before a scan is read; and as `run_round` does. What was charged by
    then stays charged.
    """
    ledger = site.ledger
    if request.ledger is not None:
        ledger.check_known(request.ledger)
    with ledger.alone(request.run):
        asked = Asked(site.study, request.run, request.round, beginning(site, request).digest)
        payload = ledger.reply_of(asked)
        if payload is None:
            payload = _charged(site, asked, request, ranks, layout)
    return payload, ledger.head


def undisclosed(reply: TrainReply) -> TrainReply:
    """The reply without what no noise covers: losses and diagnostics, counts, and how long it took."""
    ranks = [rank for rank in RANKS if reply.scans[rank] > 0]
    return replace(reply, scans=_presence(ranks), seconds=0.0, losses={}, diagnostics={})


def _charged(site: Site, asked: Asked, request: TrainRequest, ranks: Collection[Rank], layout: Layout) -> bytes:
    """A new reply, which may leave when this returns."""
    reservation = site.ledger.reserve(asked, mechanisms(site.study, ranks, [request.round]))
    if site.library.ranks != frozenset(ranks):
        raise WireError("counts", "the site's scans are of other ranks than when it introduced itself")
    reply = undisclosed(run_round(site, request))
    payload = to_keep(reply.pack(layout, site.study.wire.dtype))
    site.ledger.record_reply(reservation, payload)
    return payload


def _presence(ranks: Collection[Rank]) -> Mapping[Rank, int]:
    """1 for whatever number of scans, 0 for none."""
    return {rank: int(rank in ranks) for rank in RANKS}
