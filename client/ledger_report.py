"""`unimiss-site ledger`: what this site's patients have cost, and how far that is from each limit."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client import accounting
from client.audit import last_ledger, log_of
from client.ledger import Account, Ledger, ledger_of, require_one_ledger
from client.site_config import SiteConfig, load_site
from client.terms import check_ledger, terms
from unimiss_core.config import load
from unimiss_core.errors import ConfigError, LedgerError
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

HOLDING = dict(zip(accounting.ALL_RANKS, ("images", "volumes", "both"), strict=True))


def show(site_file: Path, study_file: Path | None, console: Console) -> None:
    """Print the accounts, and how many rounds of a study they allow. The whole chain is verified; nothing is written.

    Raises LedgerError: the ledger is damaged, or was put back; ConfigError: a file is wrong, or the study charges no
    patient.
    """
    site = load_site(site_file, reads_scans=False)
    study = load(StudyConfig, study_file) if study_file else None
    if study is not None and study.privacy.mode != "patient":
        raise ConfigError(f"{study_file}: the study charges no patient (privacy.mode: {study.privacy.mode})")
    ledger = ledger_of(site)
    taken_part_in = list(terms(site, ledger))
    console.print(_accounts(site, ledger))
    console.print(*taken_part_in, sep="\n", markup=False, highlight=False)
    if study is not None:
        held = site.privacy.ranks.intersection(study.ranks)
        console.print(_rounds_left(ledger, study, held))
        if held and (why := ledger.first_refused(study, held)) is not None:
            console.print(f"A new run would be refused: {why}.", markup=False, highlight=False)


def begin_anew(site_file: Path) -> str:
    """Write down in the audit log that a ledger which lacks what the log tells of goes on from what it holds; what to
    tell the person who decided so. Raises LedgerError: what there is of it is damaged; AuditError, ConfigError."""
    site, log = load_site(site_file, reads_scans=False), log_of(site_file)
    require_one_ledger(site)
    ledger = ledger_of(site)
    held, known = ledger.head, last_ledger(log)
    try:
        check_ledger(site, ledger)
        return f"{site.name}: its ledger holds all that its audit log tells of; there is nothing to begin anew"
    except LedgerError:
        assert known is not None
        log.record("begin_ledger")
    return (
        f"{site.name}: the audit log told of {known.seq} entries, and the ledger goes on from the {held.seq} that it "
        "holds. What the others charged is counted no more: lower privacy.max_epsilon by what is known of it, and ask "
        "each coordinator to name this site under forget_ledgers"
    )


def _accounts(site: SiteConfig, ledger: Ledger) -> Table:
    table = Table(title=f"{site.name}: what a patient has cost; the chain is whole", title_justify="left")
    for heading in ("study", "digest", "rounds charged", "delta", "epsilon spent", "limit", "left"):
        table.add_column(heading, justify="left" if heading in ("study", "digest") else "right")
    for (name, digest), account in ledger.study_accounts().items():
        table.add_row(name, digest[:12], *_figures(account))
    table.add_section()
    whose = "all of this site" if site.ledger is None else "all of this ledger's sites"
    table.add_row(whose, "", *_figures(ledger.site_account()))
    return table


def _figures(account: Account) -> tuple[str, ...]:
    spent = f"{account.spent:.3g}" if math.isfinite(account.spent) else "too much to tell"
    limit, left = ("none", "-") if account.limit is None else (f"{account.limit:g}", f"{account.left:.3g}")
    return str(account.rounds), f"{account.delta:g}", spent, limit, left


def _rounds_left(ledger: Ledger, study: StudyConfig, held: frozenset[Rank]) -> Table:
    """Of a run that begins anew, whose rounds are all still to come, and of the run that was charged last.

    held: what the site declares, and is charged for in each round; where it declares nothing, whatever it may hold.
    """
    newest = ledger.newest_charge(study)
    title = f"{study.name}, {study.schedule.rounds} rounds: for how many more this site may be charged"
    table = Table(title=title, title_justify="left")
    table.add_column("site with")
    table.add_column("a new run, from round 1", justify="right")
    if newest is not None:
        table.add_column(f"run {newest.run}, charged to round {newest.round}", justify="right")
    for ranks in [held] if held else HOLDING:
        begun = [] if newest is None else [ledger.rounds_left(study, ranks, after=newest.round)]
        table.add_row(HOLDING[ranks], *map(str, [ledger.rounds_left(study, ranks), *begun]))
    return table
