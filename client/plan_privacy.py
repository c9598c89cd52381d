"""`unimiss plan-privacy`: what a study's privacy costs or needs, before anybody trains."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.accounting import (
    ALL_RANKS,
    WEAK,
    delta_is_weak,
    epsilon,
    epsilon_by_renyi,
    noise_for,
    smallest_noise,
    study_history,
)
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.groups import group_of, groups_of_ranks
from unimiss_core.privacy import Mechanism
from unimiss_core.privacy_config import NoPrivacyConfig, PatientPrivacyConfig, SitePrivacyConfig
from unimiss_core.private_learner import is_trained
from unimiss_core.students import empty_student
from unimiss_core.study import StudyConfig

DROWNED = 1.0
"""Noise over clip norm from which on a single patient's gradient, were all alike, is smaller than the noise."""


def of_study(path: Path, patients: int | None = None) -> None:
    """Print what each kind of site's patients pay in the study. Raises ConfigError: it promises nothing, or too little
    to be told; or its delta is too large for `patients`, those of the largest site."""
    study = load(StudyConfig, path)
    privacy = study.privacy
    if isinstance(privacy, NoPrivacyConfig):
        raise ConfigError(f"{path}: the study promises no privacy; give it a section `privacy` (docs/privacy.md)")
    by_site = isinstance(privacy, SitePrivacyConfig)
    if patients is not None and not by_site:
        _check_delta(privacy.delta, patients, "privacy.delta")
    table = Table(title=f"{study.name}: epsilon of a {'site' if by_site else 'patient'} at delta {privacy.delta:g}")
    for heading in ("site with", "releases", "epsilon", "Renyi bound", f"limit {privacy.max_epsilon:g}"):
        table.add_column(heading, justify="left" if heading == "site with" else "right")
    kept = True
    words = dict(zip(ALL_RANKS, ("images", "volumes", "both"), strict=True))
    kinds = [ranks for ranks in ALL_RANKS if ranks.issubset(study.ranks)]
    for ranks in kinds[-1:] if by_site else kinds:
        history = study_history(study, ranks)
        reached = epsilon(history, privacy.delta)
        kept = kept and reached <= privacy.max_epsilon
        table.add_row(
            "anything" if by_site else words[ranks],
            str(sum(each.steps for each in history)),
            f"{reached:.3g}",
            f"{epsilon_by_renyi(history, privacy.delta):.3g}",
            "kept" if reached <= privacy.max_epsilon else "exceeded",
        )
    _print(table)
    if isinstance(privacy, PatientPrivacyConfig):
        _print(_steps_of(study, privacy, patients))
    if not by_site and patients is None:
        print(f"delta {privacy.delta:g} is for sites of {WEAK / privacy.delta:,.0f} patients at most; see --patients")
    if not kept:
        print(
            f"noise_multiplier {noise_for(study, privacy.max_epsilon):.4g} would keep epsilon {privacy.max_epsilon:g}"
        )


def _steps_of(study: StudyConfig, privacy: PatientPrivacyConfig, patients: int | None) -> Table:
    """What a step's noise does to its gradient, by the rank of its scans."""
    table = Table(title="a step" if patients is None else f"a step at a site of {patients:,} patients")
    drawn = () if patients is None else ("drawn",)
    for heading in ("on", "values trained", "divided by", *drawn, "noise / clip norm", "what to expect"):
        table.add_column(heading, justify="left" if heading in ("on", "what to expect") else "right")
    for rank in study.ranks:
        values = sum(
            parameter.numel()
            for key, parameter in empty_student(study).named_parameters()
            if group_of(key) in groups_of_ranks({rank}) and is_trained(study, key, parameter)
        )
        batch = study.batch.of(rank)
        drowned = privacy.noise_multiplier * math.sqrt(values) / batch
        name = "images" if rank == 2 else "volumes"
        expected = () if patients is None else (f"{privacy.sampling_rate.of(rank) * patients:.3g}",)
        table.add_row(name, f"{values:,}", f"{batch:,}", *expected, f"{drowned:.3g}", _expected(drowned))
    return table


def of_numbers(
    *, patients: int, batch: int, steps: int, epsilons: Sequence[float], delta: float, parameters: int
) -> None:
    """Print the noise that each epsilon needs, and what it does to the gradient. Raises ConfigError.

    patients: of one site. batch: patients that a step is expected to hold. parameters: values that are trained.
    """
    if batch > patients:
        raise ConfigError(f"--batch {batch} must not be above --patients {patients}")
    _check_delta(delta, patients, "--delta")
    rate = batch / patients
    table = Table(title=f"{patients:,} patients, {batch:,} in a step, {steps:,} steps, delta {delta:g}")
    for heading in ("epsilon", "noise multiplier", "noise / clip norm", "what to expect"):
        table.add_column(heading, justify="left" if heading == "what to expect" else "right")
    for target in epsilons:
        noise = smallest_noise(lambda s: epsilon([Mechanism(s, rate, steps)], delta), target)
        drowned = noise * math.sqrt(parameters) / batch
        table.add_row(f"{target:g}", f"{noise:.3g}", f"{drowned:.3g}", _expected(drowned))
    _print(table)


def _check_delta(delta: float, patients: int, name: str) -> None:
    """Raises ConfigError, with the setting's name."""
    if (told := delta_is_weak(delta, patients)) is not None:
        raise ConfigError(f"{name}: {told}")


def _expected(drowned: float) -> str:
    """In words: the gradient of a step is at most one clip norm long, and of unlike patients far shorter."""
    if drowned > 10 * DROWNED:
        return "noise drowns it: fewer parameters, larger steps, a public start"
    return "noise exceeds the gradient: expect little" if drowned > DROWNED else "may learn"


def _print(table: Table) -> None:
    Console(width=None if Console().is_terminal else 120).print(table)
