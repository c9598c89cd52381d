"""Which scans a step trains on, and their views, drawn while the step before is computed.

Everything follows from study seed, site and step: a round that is gone on with in its middle, or on another number of
devices, sees the views that it would have seen.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from client.cache import CachedScan
from client.drawing import draw_views
from client.site import Site
from unimiss_core.learner import Learner, StepReport
from unimiss_core.scan import Rank
from unimiss_core.schedule import rank_of_step
from unimiss_core.study import BatchConfig
from unimiss_core.team import Team, part_of
from unimiss_core.views import generator_for

T = TypeVar("T")
DrawnT = TypeVar("DrawnT")


class Batch(NamedTuple):
    """One process's part of a step's batch: views (B, V, C, *S) on its device, and their share of the whole batch."""

    views: Tensor
    share: float

    def train(self, learner: Learner, step: int) -> StepReport:
        """Raises as `Learner.step` does."""
        return learner.step(self.views, step=step, share=self.share)


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
        return Batch(draw_views(scans, study, generator, self._device, part=part.scans), part.share)

    def drawn_ahead(self, steps: Sequence[int]) -> AbstractContextManager[Iterator[tuple[int, Batch]]]:
        """(step, batch) of each step in turn; the next batch is drawn while the current one is trained on."""
        return drawn_ahead(self.draw, steps)


@contextmanager
def drawn_ahead(draw: Callable[[T], DrawnT], items: Sequence[T]) -> Iterator[Iterator[tuple[T, DrawnT]]]:
    """(item, what is drawn for it) in turn; the next is drawn in another thread while the current one is used."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        yield _in_turn(draw, items, ahead)


def _in_turn(draw: Callable[[T], DrawnT], items: Sequence[T], ahead: ThreadPoolExecutor) -> Iterator[tuple[T, DrawnT]]:
    upcoming: Future[DrawnT] | None = None
    for index, item in enumerate(items):
        drawn = draw(item) if upcoming is None else upcoming.result()
        upcoming = ahead.submit(draw, items[index + 1]) if index + 1 < len(items) else None
        yield item, drawn


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
