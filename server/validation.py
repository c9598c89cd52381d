"""What sites measure of the shared model on patients whom they hold out, and which round was best by it.

In its reply to a round a site tells of the model that the round began with, which is that of the round before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.wording import counted
from unimiss_core.figures import OF_VALIDATION

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Best:
    """A round by the sites' mean."""

    round: int
    mean: float
    sites: int

    def in_words(self) -> str:
        told = f"best by what sites measured on patients of their own: round {self.round}"
        return f"{told}, {self.mean:.3f} as the mean of {counted(self.sites, 'site')}"


def by_round(told: Iterable[tuple[int, Mapping[str, Figures]]]) -> dict[int, dict[str, float]]:
    """Round whose model was measured -> site -> its figure. told: a round and what the sites said in it, by name.

    What is no share is no such figure, whatever a site says.
    """
    found: dict[int, dict[str, float]] = {}
    for round, sites in told:
        for site, figures in sites.items():
            for name in OF_VALIDATION:
                if 0 <= figures.get(name, -1) <= 1:
                    found.setdefault(round - 1, {})[site] = figures[name]
    return found


def best_of(measured: Mapping[int, Mapping[str, float]]) -> Best | None:
    """Of the rounds that most sites measured, for means over others cannot be compared; of equal ones the first."""
    most = max((len(sites) for sites in measured.values()), default=0)
    means = {round: sum(sites.values()) / most for round, sites in sorted(measured.items()) if len(sites) == most > 0}
    if not means:
        return None
    round = max(means, key=means.__getitem__)
    return Best(round, means[round], most)


def best_in(rows: Iterable[Mapping[str, Any]]) -> Best | None:
    """Of lines of metrics.jsonl. An update that came late tells of an earlier model, and is not looked at."""
    return best_of(by_round((row["round"], _told_in_time(row["sites"])) for row in rows))


def _told_in_time(sites: Mapping[str, Any]) -> dict[str, Figures]:
    return {name: one["diagnostics"] for name, one in sites.items() if one["status"] == "ok"}
