"""All that stands between a study and this site, told at once, so that nobody mends one line to meet the next.

Asked are the policy, the terms of privacy and the labels, each by its own module; here they are put together, for a
request (`check_may_come`) and for `unimiss-site check` (`obstacles`), where somebody wants to know before joining.
"""

from collections.abc import Collection, Iterator

from client import policy
from client.labels_asked import lacking_labels
from client.ledger import Ledger
from client.site_config import SiteConfig
from client.site_labels import check_labels
from client.terms import check_terms
from unimiss_core.errors import (
    ConfigError,
    LedgerError,
    PolicyError,
    PrivacyBudgetError,
    UnimissError,
    UnknownPatientError,
)
from unimiss_core.groups import groups_of_ranks
from unimiss_core.scan import Rank
from unimiss_core.students import travelling_layout
from unimiss_core.study import StudyConfig


def check_may_come(config: SiteConfig, study: StudyConfig, run: str, ledger: Ledger) -> None:
    """Raises as `policy.check_policy` and `check_terms`: the first error of the two, with the words of both. A damaged
    ledger is no matter of the study's, and is told where the policy would have let it in. No scan is read."""
    found: list[UnimissError] = []
    try:
        policy.check_policy(config, study, run)
    except PolicyError as error:
        found.append(error)
    try:
        check_terms(config, study, ledger)
    except LedgerError:
        if not found:
            raise
    except (ConfigError, PrivacyBudgetError) as error:
        found.append(error)
    if found:
        raise type(found[0])("\n".join(map(str, found)))


def obstacles(
    config: SiteConfig, study: StudyConfig, ledger: Ledger, *, ranks: Collection[Rank], unowned: int
) -> Iterator[str]:
    """What would make this site refuse a new run of the study, a line for each. Raises LedgerError.

    ranks: of the scans that are usable. unowned: those of which nothing says whose they are.
    """
    yield from policy.refusals(config, study)
    yield from _of_privacy(config, study, ledger)
    yield from _of_scans(config, study, ranks, unowned) if study.finetune is None else _of_labels(config, study)


def _of_scans(config: SiteConfig, study: StudyConfig, found: Collection[Rank], unowned: int) -> Iterator[str]:
    is_private = study.privacy.mode == "patient"
    ranks = (config.privacy.ranks if is_private else frozenset(found)).intersection(study.ranks)
    try:
        policy.check_groups(config, groups_of_ranks(ranks).intersection(travelling_layout(study)))
    except PolicyError as error:
        yield str(error)
    if is_private and unowned:
        yield f"it counts patients, and of {unowned} scans nothing says whose they are (above)"


def _of_labels(config: SiteConfig, study: StudyConfig) -> Iterator[str]:
    assert study.finetune is not None
    if (lacking := lacking_labels(config, study.finetune)) is not None:
        yield lacking
        return
    try:
        check_labels(config, study)
    except UnknownPatientError as error:
        yield str(error).removeprefix(f"site '{config.name}': ")


def _of_privacy(config: SiteConfig, study: StudyConfig, ledger: Ledger) -> Iterator[str]:
    try:
        check_terms(config, study, ledger)
    except (ConfigError, PrivacyBudgetError) as error:
        yield str(error).removeprefix(f"site '{config.name}': ")
    else:
        if study.privacy.mode == "patient":
            why = ledger.first_refused(study, config.privacy.ranks.intersection(study.ranks))
            if why is not None:
                yield f"not even its first round may be: {why}"
    if study.privacy.mode != "none":
        from client.accounting import check_study  # here, for it takes seconds, and only private studies need it

        try:
            check_study(study)
        except ConfigError as error:
            yield str(error)
