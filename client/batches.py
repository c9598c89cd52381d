"""Which scans a step trains on, and their views, drawn while the step before is computed.

Everything follows from study seed, site and step: a round that is gone on with in its middle, or on another number of
devices, sees the views that it would have seen.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from client.cache import CachedScan
from client.site import Site
from unimiss_core.scan import Rank
from unimiss_core.schedule import rank_of_step
from unimiss_core.study import BatchConfig
from unimiss_core.team import Team, part_of
from unimiss_core.views import draw_batch, generator_for


class Batch(NamedTuple):
    """One process's part of a step's batch: views (B, V, C, *S) on its device, and their share of the whole batch."""

    views: Tensor
    share: float


class Batches:
    """The batches of one site, as one process of `team` sees them."""

    def __init__(self, site: Site, team: Team, device: torch.device) -> None:
        self._site = site
        self._team = team
        self._device = device

    def draw(self, step: int, attempt: int = 0) -> Batch:
        """The batch of a global step. attempt: counts the batches that were drawn for this step before."""
        study, library = self._site.study, self._site.library
        rank = rank_of_step(library.ranks, step, study.schedule.alternate)
        place = (step, attempt) if attempt else (step,)
        generator = generator_for(study.seed, self._site.config.name, *place)
        scans = sample(library.of_rank(rank), study.batch, rank, generator)
        part = part_of(self._team, len(scans))
        return Batch(draw_batch(scans, study.views, generator, self._device, part=part.scans), part.share)

    @contextmanager
    def drawn_ahead(self, steps: Sequence[int]) -> Iterator[Iterator[tuple[int, Batch]]]:
        """(step, batch) of each step in turn; the next batch is drawn while the current one is trained on."""
        with ThreadPoolExecutor(max_workers=1) as ahead:
            yield self._in_turn(steps, ahead)

    def _in_turn(self, steps: Sequence[int], ahead: ThreadPoolExecutor) -> Iterator[tuple[int, Batch]]:
        upcoming: Future[Batch] | None = None
        for step, following in zip_longest(steps, steps[1:]):
            batch = self.draw(step) if upcoming is None else upcoming.result()
            upcoming = None if following is None else ahead.submit(self.draw, following)
            yield step, batch


def sample(scans: Sequence[CachedScan], batch: BatchConfig, rank: Rank, generator: torch.Generator) -> list[CachedScan]:
    """The scans of one batch: of different scans or patients, as the study says, unless the site holds fewer."""
    by_patient = defaultdict(list)
    for index, scan in enumerate(scans):
        by_patient[scan.patient if batch.sampling == "patients" else index].append(scan)
    groups, count = list(by_patient.values()), batch.of(rank)
    if count <= len(groups):
        chosen = torch.randperm(len(groups), generator=generator)[:count]
    else:
        chosen = torch.randint(len(groups), (count,), generator=generator)
    return [_one_of(groups[index], generator) for index in chosen.tolist()]


def _one_of(scans: Sequence[CachedScan], generator: torch.Generator) -> CachedScan:
    return scans[0] if len(scans) == 1 else scans[int(torch.randint(len(scans), (), generator=generator))]
