"""A run as its artefacts tell it, shown as a simulation is: each new line of metrics becomes the round's events."""

import math
from collections.abc import Mapping
from typing import Any

from server.run_folder import RunFolder
from unimiss_core import progress
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.progress import RoundDone, RoundStarted, SiteReplied


class Watching:
    """Tells `unimiss_core.progress` of rounds that other processes finish. rounds: of the study."""

    def __init__(self, folder: RunFolder, rounds: int) -> None:
        self._folder = folder
        self._rounds = rounds
        self._told = self._newest()
        """The last round that was told, or was there before."""

    def look(self) -> None:
        """Tell what is new; to be called now and then."""
        if self._newest() <= self._told:
            return
        for row in self._folder.metric_rows():
            if row["round"] > self._told:
                self._told = row["round"]
                tell(row, self._rounds)

    def _newest(self) -> int:
        return max((row["round"] for row in self._folder.metric_rows()), default=0)


def tell(row: Mapping[str, Any], rounds: int) -> None:
    """A line of metrics.jsonl as the events that the coordinator's own process reported."""
    number, sites = int(row["round"]), row["sites"]
    progress.report(RoundStarted(number, rounds, tuple(sorted(sites))))
    for name, site in sorted(sites.items()):
        progress.report(SiteReplied(number, name, site["status"], site["reason"]))
    means = {name: mean_cross_entropy(site["losses"]) for name, site in sites.items()}
    losses = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    progress.report(RoundDone(number, rounds, float(row["seconds"]), losses))
