"""Which studies a site takes part in: by its own file and ledger, looked at before any scan is, whatever is asked.

A study that is not patient-level is charged nothing, so a limit on what patients may cost would mean nothing in it: a
coordinator that leaves out `privacy` would get the trained weights in clear. So a site that set a limit, or promised
patients one by taking part in a private study, refuses the others, until its file says otherwise.
"""

from collections.abc import Iterator

from client.audit import last_ledger, site_log
from client.hold import Hold
from client.home import PATIENTS_OF_BEFORE
from client.ledger import Ledger, require_one_ledger
from client.site_config import PatientLimits, SiteConfig
from client.telling import tell
from unimiss_core import locks
from unimiss_core.errors import ConfigError, PrivacyBudgetError
from unimiss_core.study import StudyConfig


def check_terms(config: SiteConfig, study: StudyConfig, ledger: Ledger) -> None:
    """Raises PrivacyBudgetError: the study does not protect patients, and the site asks for it; ConfigError: the study
    is patient-level, and the site cannot take part in such; LedgerError: the ledger is damaged, or was put back."""
    check_ledger(config, ledger)
    if study.privacy.mode == "patient":
        if (lacking := _lacking(config.privacy)) is not None:
            raise ConfigError(f"site '{config.name}': takes part in no patient-level study: {lacking}")
        if not config.privacy.ranks.intersection(study.ranks):
            kind = " or ".join("images" if rank == 2 else "volumes" for rank in study.ranks)
            raise ConfigError(
                f"site '{config.name}': study '{study.name}' learns from {kind}, which privacy.holds does not declare"
            )
    elif (why := _protected(config.privacy, ledger)) is not None:
        raise PrivacyBudgetError(
            f"study '{study.name}' has the privacy mode {study.privacy.mode}, which charges patients nothing, and this "
            f"site takes part in patient-level studies alone: {why}. To take part all the same, and outside of what is "
            "counted, set privacy.allow_unprotected: true in the site file"
        )


def check_ledger(config: SiteConfig, ledger: Ledger) -> None:
    """Raises LedgerError: by the site's own audit log, the ledger was put back or begun anew; and as `Ledger` and
    `require_one_ledger`. A state folder that was put back as a whole takes the log with it: that, coordinators notice
    (`Ledger.check_known`)."""
    require_one_ledger(config)
    if (known := last_ledger(site_log(config.state))) is not None:
        ledger.check_known(known, by="this site's own audit log tells of")


def check_rounds(config: SiteConfig, study: StudyConfig, run: str, ledger: Ledger) -> None:
    """Whether any round of a patient-level study would be charged, when the site introduces itself to a new run; and,
    on the site's own screen, whether as many as the study has. Asks the site file, the study and the ledger, no scan.

    Raises PrivacyBudgetError: not even the first round would be. Of a run that was charged before nothing is asked: the
    reply to its last round is paid for, and may be sent again. LedgerError as `check_terms`.
    """
    if ledger.was_charged_for(run):
        return
    ranks, rounds = config.privacy.ranks.intersection(study.ranks), study.schedule.rounds
    if (why := ledger.first_refused(study, ranks)) is not None:
        raise PrivacyBudgetError(f"study '{study.name}' is refused before its first round: {why}")
    if (left := ledger.rounds_left(study, ranks)) < rounds:
        tell(
            config.name,
            f"the limits on what patients may cost bear {left} of the {rounds} rounds of study '{study.name}'; this "
            "site refuses the others (`unimiss-site ledger SITE.yaml --study STUDY.yaml`)",
        )


def terms(config: SiteConfig, ledger: Ledger, *, unowned: int = 0) -> Iterator[str]:
    """What `check_terms` comes to, a line for each kind of study. Raises LedgerError.

    unowned: scans of which nothing says whose they are, where they were looked at.
    """
    check_ledger(config, ledger)
    limits, is_charged = config.privacy, ledger.is_begun
    if (lacking := _lacking(limits)) is not None:
        yield f"Patient-level studies: no; {lacking}."
    elif unowned:
        yield (
            f"Patient-level studies: no; of {unowned} scans nothing says whose they are: set patient_pattern, a table "
            "with a patient column, or file_is_patient: true where every file is of another patient."
        )
    else:
        most = "this site sets no limit (privacy.max_epsilon), so each study's own holds, alone"
        if limits.max_epsilon is not None:
            spent = ledger.site_account().spent if is_charged else 0.0  # accountants take seconds to load
            most = f"at most {limits.max_epsilon:g} over all studies, of which {spent:.3g} is spent"
        yield f"Patient-level studies: yes, as a site with {' and '.join(limits.holds or ())}; epsilon: {most}."
        if limits.max_epsilon is not None and not is_charged:
            yield f"Nothing was charged here yet. {PATIENTS_OF_BEFORE}"
    if config.ledger is not None:
        yield "What patients cost is counted together with every other site whose file names the same ledger."
    if (held := Hold(config).in_words()) is not None:
        yield f"Held: {held}."
    if (why := _protected(limits, ledger)) is not None:
        yield f"Other studies: no, for {why} (privacy.allow_unprotected: true would let it)."
    else:
        yield "Other studies: yes; what they tell of patients is in no epsilon."


def _lacking(limits: PatientLimits) -> str | None:
    """What a patient-level study needs and this site lacks."""
    if not locks.EXIST:
        return "this system has no file locks, without which one charge could pay for two releases; use Linux or macOS"
    if limits.holds is None:
        return "its site file does not say what it trains on; set privacy.holds: [images], [volumes] or both"
    return None


def _protected(limits: PatientLimits, ledger: Ledger) -> str | None:
    """Why only patient-level studies may come; None where others may."""
    if limits.allow_unprotected:
        return None
    if limits.max_epsilon is not None:
        return "privacy.max_epsilon is set"
    return "its patients were charged before" if ledger.is_begun else None
