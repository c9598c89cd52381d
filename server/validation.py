"""What sites measure of the shared model on patients whom they hold out, and which round was best by it.

In its reply to a round a site tells of the model that the round began with, which is that of the round before.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.wording import counted
from unimiss_core.figures import VALIDATION_AUC, VALIDATION_DICE
from unimiss_core.study import StudyConfig

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Best:
    """A round, and the mean over the sites that measured it."""

    round: int
    mean: float
    sites: int
    gone: int = 0
    """Of these sites, those that did not measure the newest round that any measured."""

    def in_words(self) -> str:
        told = f"best by what sites measured on patients of their own: round {self.round}"
        told += f", {self.mean:.3f} as the mean of {counted(self.sites, 'site')}"
        return f"{told}, {self.gone} of which told no figure of the newest round" if self.gone else told


def figure_of(study: StudyConfig | None) -> str | None:
    """What its sites are asked to tell; None where they hold out nobody."""
    if study is None or study.finetune is None or not study.finetune.validation:
        return None
    return VALIDATION_DICE if study.finetune.task.name == "segmentation" else VALIDATION_AUC


def by_round(told: Iterable[tuple[int, Mapping[str, Figures]]], figure: str) -> dict[int, dict[str, float]]:
    """Round whose model was measured -> site -> its figure. told: a round and what the sites said in it, by name.

    figure: as of `figure_of`; a site may tell another, too. What is no share is none, whatever a site says.
    """
    found: dict[int, dict[str, float]] = {}
    for round, sites in told:
        for site, figures in sites.items():
            if 0 <= figures.get(figure, -1) <= 1:
                found.setdefault(round - 1, {})[site] = figures[figure]
    return found


def best_of(measured: Mapping[int, Mapping[str, float]]) -> Best | None:
    """Of equal rounds the first; never round 0, whose head no label has taught, whatever its encoder was begun from. It
    is the best of those before the newest, or the newest: the checkpoint of no other round is needed."""
    best: int | None = None
    for round, sites in sorted((round, sites) for round, sites in measured.items() if round > 0):
        if best is None or _is_better(sites, measured[best]):
            best = round
    if best is None:
        return None
    told = measured[best]
    gone = len(told.keys() - measured[max(measured)].keys())
    return Best(best, math.fsum(told.values()) / len(told), len(told), gone)


def _is_better(sites: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """By the sites that measured both, for patients differ from site to site; they must be most of those that measured
    the best so far, or it stays. Where these are less than half as many as measure now, the best is by the word of too
    few, and goes: a site that told a single figure decides nothing."""
    if 2 * len(best) < len(sites):
        return True
    both = sites.keys() & best.keys()
    return 2 * len(both) > len(best) and math.fsum(sites[name] - best[name] for name in both) > 0


def best_in(rows: Iterable[Mapping[str, Any]], figure: str) -> Best | None:
    """Of lines of metrics.jsonl, as `unimiss_core.metric_lines.rows` gives them. An update that came late tells of an
    earlier model, and is not looked at."""
    return best_of(by_round(((row["round"], _told_in_time(row["sites"])) for row in rows), figure))


def _told_in_time(sites: Mapping[str, Any]) -> dict[str, Figures]:
    return {name: one["diagnostics"] for name, one in sites.items() if one["status"] == "ok"}
