"""The ClientApp: what a site answers. Messages are translated here; the work is done in `client.trainer`.

Flower sends the text of an exception to the coordinator, and such a text can hold a file's path or a patient's name.
So nothing is raised out of this file: a site answers with a result or with a reason from a fixed list. All that comes
and all that leaves goes through `_reply`, where it is written into the site's audit log (`client.audit`) first.
"""

import logging
import math
from collections.abc import Callable, Collection
from contextlib import suppress

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from client.audit import log_of
from client.execution import look_over
from client.health import REFUSED, tell_of_refusal
from client.ledger import ledger_of
from client.message_facts import answer_entry, named_by, request_facts
from client.obstacles import check_may_come
from client.policy import check_groups
from client.private_round import private_introduction, private_round
from client.site import Site, name_of, open_site, site_file
from client.site_config import load_site, state_folder
from client.site_labels import check_labels
from client.telling import tell_if_heard, tell_of_scans
from client.terms import check_rounds
from client.trainer import run_round
from unimiss_core.codec import Layout
from unimiss_core.errors import (
    AuditDiskError,
    AuditError,
    ConfigError,
    DeviceError,
    LedgerError,
    MemoryTooSmallError,
    NonFiniteLossError,
    NoUsableScanError,
    PolicyError,
    PrivacyBudgetError,
    ScanError,
    UnimissError,
    UnknownPatientError,
    WireError,
    where,
)
from unimiss_core.groups import Group, groups_of_ranks
from unimiss_core.reasons import REASONS as MEANINGS
from unimiss_core.scan import RANKS
from unimiss_core.students import travelling_layout, update_layout
from unimiss_core.study import StudyConfig
from unimiss_core.wire import (
    Hello,
    Introduction,
    Refusal,
    TrainRequest,
    arrays_in,
    as_kept,
    facts_in,
    run_of,
    study_of,
    with_ledger,
)

log = logging.getLogger(__name__)


class SiteApp(ClientApp):
    """Flower answers a message of a type that nobody registered with an exception's text; a site, with a reason."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type in (MessageType.QUERY, MessageType.TRAIN):
            return super().__call__(message, context)
        return _reply(message, context, _no_such_question)


app = SiteApp()

REASONS: dict[type[Exception], str] = {
    ConfigError: "site_setup",
    NoUsableScanError: "no_usable_scans",
    NonFiniteLossError: "not_finite",
    DeviceError: "device_lost",
    ScanError: "no_usable_scans",
    MemoryTooSmallError: "site_setup",
    PrivacyBudgetError: "budget",
    PolicyError: "policy",
    AuditError: "audit",
    AuditDiskError: "audit",
    LedgerError: "ledger",
    UnknownPatientError: "undisclosed",
}
"""Exception -> what the coordinator is told; a WireError brings its own code, anything else is `failed`. Those that may
hang on scans do not come here from a patient-level study: `client.private_round.cause_kept_here`."""


PASSING = frozenset({"needs_whole", "busy"})
"""Reasons by which a round goes its way: nobody has to know of them."""


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this site is and what it can train, after it has read its scans for the study."""

    def answer() -> RecordDict:
        hello = Hello.unpack(message.content)
        site = _admitted(context, hello.study, hello.run)
        look_over(site.config)  # before the scans are read, which can take hours
        if hello.study.privacy.mode != "none":
            _check_promise(site.config.name, hello.study)
        if site.is_private:
            check_rounds(site.config, site.study, site.run, site.ledger)
        introduction = private_introduction(site) if site.is_private else _introduction(site)
        check_groups(site.config, groups_of_ranks(introduction.ranks).intersection(travelling_layout(site.study)))
        return introduction.pack()

    return _reply(message, context, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""

    def answer() -> RecordDict:
        study = study_of(message.content)
        site = _admitted(context, study, run_of(message.content))
        check_groups(site.config, {group for part in arrays_in(message.content).values() for group in part})
        groups = groups_of_ranks(site.ranks)
        request = TrainRequest.unpack(message.content, _of_groups(travelling_layout(study), groups))
        trained = _of_groups(update_layout(study), groups)
        if site.is_private:
            payload, head = private_round(site, request, trained)
            return with_ledger(as_kept(payload), head)
        return run_round(site, request).pack(trained, study.wire.dtype)

    return _reply(message, context, answer)


def _of_groups(layout: Layout, groups: Collection[Group]) -> Layout:
    return {group: specs for group, specs in layout.items() if group in groups}


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


def _admitted(context: Context, study: StudyConfig, run: str) -> Site:
    """This node's site, where it takes part in `study`; no scan is read. Raises as `check_may_come`."""
    site = open_site(context, study, run)
    check_may_come(site.config, study, run, site.ledger)
    check_labels(site.config, study)
    return site


def _no_such_question() -> RecordDict:
    raise WireError("unknown_request", "asked was for something that no site answers")


def _reply(message: Message, context: Context, answer: Callable[[], RecordDict]) -> Message:
    """`answer`, or why there is none. Where request and answer cannot be written down first, only that is told."""
    return Message(_or_refusal(context, lambda: _written_down(message, context, answer)), reply_to=message)


def _written_down(message: Message, context: Context, answer: Callable[[], RecordDict]) -> RecordDict:
    came = message.content if message.has_content() else RecordDict()  # Flower's Error in its place asks for nothing
    audit, asked = log_of(site_file(context)), named_by(came)
    audit.record("request", asked, **request_facts(message.metadata.message_type, came))
    content = _or_refusal(context, answer)
    kind, facts = answer_entry(content, asked, _spent(message, context, content))
    audit.record(kind, facts)
    if kind != "refusal":
        with suppress(Exception):
            (state_folder(site_file(context)) / REFUSED).unlink(missing_ok=True)
    return content


def _spent(message: Message, context: Context, content: RecordDict) -> float | None:
    """Epsilon under the study's name, where this is the reply of a private round."""
    if facts_in(content).get("status") != "ok" or (study := study_of(message.content)).privacy.mode != "patient":
        return None
    spent = ledger_of(load_site(site_file(context))).spent_on(study.name)
    return spent if math.isfinite(spent) else None


def _or_refusal(context: Context, answer: Callable[[], RecordDict]) -> RecordDict:
    try:
        return answer()
    except WireError as error:
        log.warning("refused reason=%s", error)
        return _refused(context, error.reason)
    except UnimissError as error:
        name = name_of(context)
        # On the site's own screen; the coordinator gets a code.
        tell_if_heard(name, str(error).removeprefix(f"site '{name}': "))
        words = str(error) if isinstance(error, PolicyError | PrivacyBudgetError) else ""
        return _refused(context, REASONS.get(type(error), "failed"), words)
    except Exception as error:
        log.error("failed: %s", where(error))
        return _refused(context, "failed")


def _refused(context: Context, reason: str, words: str = "") -> RecordDict:
    """The refusal, which the daemon's screen and `unimiss-site status` tell of, too. words: what no path and no patient
    stands in; without them it is what the reason means, and the log says more."""
    if reason not in PASSING:
        words = words or f"{MEANINGS[reason].means} (log/training.log in the state folder)"
        with suppress(Exception):  # the site file may be what is wrong
            tell_of_refusal(state_folder(site_file(context)), reason, words)
    return Refusal(reason).pack()
