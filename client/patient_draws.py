"""Which patients a private step trains on: each by a chance of its own, by a generator that nobody outside can know.

Poisson draws are what the accountant presupposes (Abadi et al. 2016, arXiv:1607.00133), and that they are secret: so
nothing here follows from the study's seed, which is public, and a round that is gone on with draws anew. A patient's
scans and views come from a seed of the patient's own in this draw, so that they do not hang on who else was drawn.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from client.batches import drawn_ahead
from client.cache import CachedScan
from client.drawing import draw_views
from client.site import Site
from unimiss_core import progress
from unimiss_core.learner import Learner, StepReport
from unimiss_core.noise import secret_generator
from unimiss_core.privacy_config import PatientPrivacyConfig
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import RANKS, Rank
from unimiss_core.schedule import rank_of_step
from unimiss_core.study import StudyConfig
from unimiss_core.team import Team

_WORD = 2**32


@dataclass(frozen=True)
class _Drawn:
    """A patient who takes part: which of its scans, and what their views are drawn by."""

    scans: Sequence[CachedScan]
    seed: int


@dataclass(frozen=True)
class PatientDraw:
    """One process's part of a draw. Views are made when they are come to: memory is that of two patients."""

    rank: Rank
    patients: Sequence[_Drawn]
    study: StudyConfig
    device: torch.device

    def train(self, learner: Learner, step: int) -> StepReport:
        """Raises as `PrivateLearner.private_step` does."""
        assert isinstance(learner, PrivateLearner), "a private study has a private learner"
        return learner.private_step(self.views(), rank=self.rank, step=step)

    def views(self) -> Iterator[Tensor]:
        """Of each patient in turn: (N, V, C, *S) of its N scans."""
        with drawn_ahead(self._views_of, self.patients) as drawn:
            for _, views in drawn:
                yield views
                progress.report(progress.Working())  # a step takes as long as there are patients in it

    def _views_of(self, patient: _Drawn) -> Tensor:
        generator = torch.Generator().manual_seed(patient.seed)
        return draw_views(patient.scans, self.study, generator, self.device)


class PatientDraws:
    """The draws of one site in one attempt at a round, as one process of `team` sees them: all processes draw the
    same patients and take turns with them."""

    def __init__(self, site: Site, team: Team, device: torch.device) -> None:
        """Raises ValueError: the study is not in the privacy mode `patient`."""
        privacy = site.study.privacy
        if not isinstance(privacy, PatientPrivacyConfig):
            raise ValueError(f"the study's privacy mode is {privacy.mode}, not patient")
        self._study, self._privacy, self._team, self._device = site.study, privacy, team, device
        self._ranks = site.ranks
        self._patients = {rank: _by_patient(site.library.of_rank(rank)) for rank in RANKS}
        self._generator = secret_generator(_shared_key(team, device))

    def draw(self, step: int, attempt: int = 0) -> PatientDraw:
        """The draw of a global step. attempt: 0; a second draw for a step would be a second release."""
        assert attempt == 0
        rank = rank_of_step(self._ranks, step, self._study.schedule.alternate)
        taking_part = self._generator.random(len(self._patients[rank])) < self._privacy.sampling_rate.of(rank)
        drawn = [self._some_of(scans) for scans, is_in in zip(self._patients[rank], taking_part, strict=True) if is_in]
        return PatientDraw(rank, drawn[self._team.place :: self._team.size], self._study, self._device)

    @contextmanager
    def drawn_ahead(self, steps: Sequence[int]) -> Iterator[Iterator[tuple[int, PatientDraw]]]:
        """(step, draw) of each step in turn. A draw itself is cheap, its views are drawn ahead."""
        yield ((step, self.draw(step)) for step in steps)

    def _some_of(self, scans: Sequence[CachedScan]) -> _Drawn:
        """Of one patient, `scans_per_patient` at most."""
        count = min(len(scans), self._privacy.scans_per_patient)
        chosen = self._generator.choice(len(scans), size=count, replace=False)
        return _Drawn([scans[index] for index in chosen], int(self._generator.integers(2**63)))


def _by_patient(scans: Sequence[CachedScan]) -> list[list[CachedScan]]:
    """Scans by patient, in the library's order, which is the same in every process."""
    found = defaultdict(list)
    for scan in scans:
        found[scan.patient].append(scan)
    return list(found.values())


def _shared_key(team: Team, device: torch.device) -> int:
    """128 bits from the operating system of the team's first process; summed, for the team can only sum."""
    words = torch.zeros(4, dtype=torch.int64, device=device)
    if team.place == 0:
        drawn = int.from_bytes(os.urandom(16), "little")
        words += torch.tensor([drawn // _WORD**place % _WORD for place in range(4)], device=device)
    team.sum_([words])
    return sum(word * _WORD**place for place, word in enumerate(words.tolist()))
