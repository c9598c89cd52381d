"""What a study's noise amounts to: the mechanisms that a site's rounds are made of, before any accountant.

In each private step a site releases two sums over the same Poisson draw of patients: of clipped gradients, with noise
of s_g clip norms, and of the patients' mean bottlenecks, one of norm 1 at most for each of R representations, with
noise s_f. Scaled to noise of one they are a single Gaussian release of sensitivity sqrt(1 / s_g^2 + R / s_f^2), hence
one of multiplier

    s = (1 / s_g^2 + R / s_f^2)^(-1/2).
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from unimiss_core.scan import Rank
from unimiss_core.schedule import steps_of_rank
from unimiss_core.study import StudyConfig


class Mechanism(NamedTuple):
    """`steps` releases of a subsampled Gaussian mechanism, each over a fresh Poisson draw of patients."""

    noise_multiplier: float
    """Standard deviation over sensitivity."""
    sampling_rate: float
    steps: int


def joint_multiplier(gradient: float, centre: float, representations: int) -> float:
    """Of the gradient's release together with the centres' of one step."""
    return float((gradient**-2 + representations * centre**-2) ** -0.5)


def mechanisms(study: StudyConfig, ranks: Collection[Rank], rounds: Iterable[int]) -> list[Mechanism]:
    """What a site with scans of `ranks` releases in `rounds` (from 1) of a study in mode `patient`; one for each rank
    that it trains.

    A patient who has scans of both ranks is in both; that is what a site's worst patient costs.
    """
    from unimiss_core.objectives import build_objective  # here, for torch takes seconds; who reads a ledger needs none

    privacy = study.privacy
    if privacy.mode != "patient":
        raise ValueError(f"the study's privacy mode is {privacy.mode}")
    present, stretches = set(ranks), _stretches(rounds)
    taken = {rank: sum(steps_of_rank(rank, present, study.schedule, part) for part in stretches) for rank in present}
    objective = build_objective(study)
    return [
        Mechanism(
            joint_multiplier(privacy.noise_multiplier, privacy.centre_noise, len(objective.representations(rank))),
            privacy.sampling_rate.of(rank),
            taken[rank],
        )
        for rank in sorted(present)
        if taken[rank] > 0
    ]


def _stretches(rounds: Iterable[int]) -> list[range]:
    """The same rounds; a range as it is, for a study may have a million of them."""
    if isinstance(rounds, range) and rounds.step == 1:
        return [rounds]
    return [range(round, round + 1) for round in rounds]
