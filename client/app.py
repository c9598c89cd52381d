"""The ClientApp: what a site answers. Messages are translated here; the work is done in `client.trainer`.

Flower sends the text of an exception to the coordinator, and such a text can hold a file's path or a patient's name.
So nothing is raised out of this file: a site answers with a result or with a reason from a fixed list.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.execution import look_over
from client.private_round import private_introduction, private_round
from client.site import Site, name_of, open_site
from client.telling import tell_if_heard, tell_of_scans
from client.terms import check_rounds, check_terms
from client.trainer import run_round
from unimiss_core.codec import layout_of
from unimiss_core.errors import (
    ConfigError,
    DeviceError,
    LedgerError,
    MemoryTooSmallError,
    NonFiniteLossError,
    NoUsableScanError,
    PrivacyBudgetError,
    ScanError,
    UnimissError,
    UnknownPatientError,
    WireError,
    where,
)
from unimiss_core.groups import groups_of_ranks
from unimiss_core.network import empty_network
from unimiss_core.scan import RANKS
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction, Refusal, TrainRequest, as_kept, run_of, study_of, with_ledger

log = logging.getLogger(__name__)
app = ClientApp()

REASONS: dict[type[Exception], str] = {
    ConfigError: "site_setup",
    NoUsableScanError: "no_usable_scans",
    NonFiniteLossError: "not_finite",
    DeviceError: "device_lost",
    ScanError: "no_usable_scans",
    MemoryTooSmallError: "site_setup",
    PrivacyBudgetError: "budget",
    LedgerError: "ledger",
    UnknownPatientError: "undisclosed",
}
"""Exception -> what the coordinator is told; a WireError brings its own code, anything else is `failed`. Those that may
hang on scans do not come here from a patient-level study: `client.private_round.cause_kept_here`."""


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this site is and what it can train, after it has read its scans for the study."""

    def answer() -> RecordDict:
        hello = Hello.unpack(message.content)
        site = open_site(context, hello.study, hello.run)
        check_terms(site.config, site.study, site.ledger)
        look_over(site.config)  # before the scans are read, which can take hours
        if hello.study.privacy.mode != "none":
            _check_promise(site.config.name, hello.study)
        if site.is_private:
            check_rounds(site.config, site.study, site.run, site.ledger)
        return (private_introduction(site) if site.is_private else _introduction(site)).pack()

    return _reply(message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""

    def answer() -> RecordDict:
        study = study_of(message.content)
        site = open_site(context, study, run_of(message.content))
        check_terms(site.config, study, site.ledger)
        layout = layout_of(empty_network(study.model))
        trained = {group: layout[group] for group in groups_of_ranks(site.ranks)}
        request = TrainRequest.unpack(message.content, trained)
        if site.is_private:
            payload, head = private_round(site, request, trained)
            return with_ledger(as_kept(payload), head)
        return run_round(site, request).pack(trained, study.wire.dtype)

    return _reply(message, context, answer)


def _check_promise(site: str, study: StudyConfig) -> None:
    """Raises WireError where the study's noise does not keep its promise. All that a site does in the mode `site`,
    for there it trusts the coordinator with its update, counts and losses."""
    from client.accounting import check_study  # here, for it takes seconds, and only private studies need it

    try:
        check_study(study)
    except ConfigError as error:
        tell_if_heard(site, str(error))  # by Opacus, which a coordinator has not
        raise WireError("promise", "the study's noise does not keep its max_epsilon") from None


def _introduction(site: Site) -> Introduction:
    tell_of_scans(site, site.library)
    scans = {rank: len(site.library.of_rank(rank)) for rank in RANKS}
    return Introduction(site.config.name, scans, sum(site.library.left_out.values()))


def _reply(message: Message, context: Context, answer: Callable[[], RecordDict]) -> Message:
    try:
        content = answer()
    except WireError as error:
        log.warning("refused reason=%s", error)
        content = Refusal(error.reason).pack()
    except UnimissError as error:
        name = name_of(context)
        # On the site's own screen; the coordinator gets a code.
        tell_if_heard(name, str(error).removeprefix(f"site '{name}': "))
        content = Refusal(REASONS.get(type(error), "failed")).pack()
    except Exception as error:
        log.error("failed: %s", where(error))
        content = Refusal("failed").pack()
    return Message(content, reply_to=message)
