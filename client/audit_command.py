"""`unimiss audit-privacy`: the private engine measured against a study's claim, and a finished run attacked."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.audited_engine import Engine
from client.cache import CachedScan, open_library, open_private_library
from client.findings import Finding
from client.membership import membership
from client.one_run import CANARIES, OneRun, canaries_for, one_run
from client.privacy_audit import KINDS, check_engine
from client.site_config import load_site
from unimiss_core import checkpoint, progress
from unimiss_core.config import load
from unimiss_core.device import device_of
from unimiss_core.errors import CheckpointError, ConfigError, PrivacyClaimError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.study import StudyConfig

MOST_STEPS = 1000
"""That a bound takes by itself."""


def of_study(path: Path, *, canaries: int | None, steps: int | None, patients_at_once: int = 1) -> None:
    """Print what the engine releases against what the study claims, for images and for volumes.

    canaries: of the bound on epsilon; None takes as `client.one_run.canaries_for` does.
    steps: of the bound; None takes as many as draw each canary four times, MOST_STEPS at most.
    patients_at_once: as the site file has it.
    Raises PrivacyClaimError: a measure contradicts the claim; ConfigError: the study is not in mode `patient`, or its
    model has no room for so many canaries, which is told before anything is measured.
    """
    study = load(StudyConfig, path)
    if study.privacy.mode != "patient":
        raise ConfigError(
            f"{path}: its privacy mode is {study.privacy.mode}; only mode: patient has an engine to audit"
        )
    contradicted = 0
    engines = [Engine(study, rank, patients_at_once=patients_at_once) for rank in study.ranks]
    counts = [canaries_for(engine, canaries) for engine in engines]
    for engine, count in zip(engines, counts, strict=True):
        rank = engine.rank
        findings = check_engine(engine)
        taken = steps or _steps(engine)
        few = "" if canaries or count == CANARIES else ", all that the model has room for"
        _say(f"{KINDS[rank]}: what {taken} steps tell of {count} canaries{few}")
        run = one_run(engine, canaries=count, steps=taken)
        findings.append(run.finding())
        _print(_table(f"{study.name}: a step on {KINDS[rank]}", findings))
        print(_in_words(run))
        contradicted += sum(not finding.agrees for finding in findings)
    if contradicted:
        raise PrivacyClaimError(f"{path}: measures that contradict what the study claims: {contradicted}")
    print("no measure contradicts the claim")


def of_run(run: Path, members: Path, others: Path, *, device: str = "auto", key: Path | None = None) -> None:
    """Print how well the run's newest checkpoint tells the patients of two site files apart.

    members: whose scans the run trained on. Both are read as the run's study has scans read: a patient-level one where
    each file says whose it is. key: the public key that must have signed the checkpoint. Raises ConfigError,
    UnknownPatientError, CheckpointError, NoUsableScanError.
    """
    study = load(StudyConfig, run / "study.yaml")
    if study.finetune is not None:
        raise ConfigError(f"{run}: its study fine-tunes; members are told by the loss of pretraining alone, as yet")
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{run}: holds no checkpoint")
    held = checkpoint.load(newest, key=read_signing_public_key(key) if key else None)
    scans = _scans(study, "members", members), _scans(study, "others", others)
    _say(f"losses of {sum(map(len, scans))} scans")
    found = membership(study, held.student, held.teacher, *scans, device_of(device))
    print(
        f"{newest.name}: a member's loss is below another patient's with chance {found.auc:.3f} "
        f"(95%: {found.low:.3f} to {found.high:.3f}; {found.members} members, {found.others} others)"
    )
    told = "members cannot be told by it" if found.low <= 0.5 <= found.high else "members and others differ"
    print(f"0.5 is a guess: {told}. This is one attack; another may find more, and it bounds no epsilon")


def _scans(study: StudyConfig, who: str, site: Path) -> Sequence[CachedScan]:
    """As a site of the study reads them: of a patient-level one each patient's are those that it would have alone."""
    _say(f"reading the scans of the {who}")
    opened = open_private_library if study.privacy.mode == "patient" else open_library
    return opened(load_site(site), study.plan).scans


def _say(what: str) -> None:
    """A sign of life, beside the figures."""
    progress.report(progress.Note(what))


def _steps(engine: Engine) -> int:
    """As many as draw each canary four times, within patience."""
    return min(MOST_STEPS, math.ceil(4 / engine.privacy.sampling_rate.of(engine.rank)))


def _table(title: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=title)
    for heading in ("measure", "claimed", "measured", "interval", "verdict"):
        table.add_column(heading, justify="left" if heading in ("measure", "verdict") else "right")
    for each in findings:
        table.add_row(
            each.what,
            f"{'at most ' if each.bound else ''}{each.claimed:.5g}",
            f"{each.measured:.4g}",
            "" if each.bound else f"{each.low:.4g} to {each.high:.4g}",
            "agrees" if each.agrees else "CONTRADICTS",
        )
    return table


def _in_words(run: OneRun) -> str:
    return (
        f"{run.correct} of {run.guesses} guesses about {run.canaries} canaries were right: epsilon of {run.steps} "
        f"steps is at least {run.lower_bound:.2f} at 95%, and claimed to be at most {run.claimed:.3g}.\nA bound from "
        "below can show that a claim is false, never that it is true."
    )


def _print(table: Table) -> None:
    Console(width=None if Console().is_terminal else 120).print(table)
