"""A run as its artefacts tell it, shown as a simulation is: each new line of metrics becomes the round's events, and
what the ServerApp said besides is said again."""

import math
from collections.abc import Mapping
from typing import Any

from server.run_folder import RunFolder
from server.said import Said
from unimiss_core import progress
from unimiss_core.loss_terms import mean_cross_entropy
from unimiss_core.progress import RoundDone, RoundStarted, SiteReplied


class Watching:
    """Tells `unimiss_core.progress` of rounds that other processes finish. rounds: of the study."""

    def __init__(self, folder: RunFolder, rounds: int) -> None:
        self._folder = folder
        self._rounds = rounds
        self._said = Said(folder.path)
        self._told = max((row["round"] for row in folder.metric_rows()), default=0)
        """The last round that was told, or was there before."""
        self._seen = self._stamp()

    def look(self) -> None:
        """Tell what is new; to be called now and then. Rounds first: what a run says last looks back at all of them."""
        self._look_for_rounds()
        for event in self._said.new():
            progress.report(event)

    def _look_for_rounds(self) -> None:
        if (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        for row in self._folder.metric_rows():
            if row["round"] > self._told:
                self._told = row["round"]
                tell(row, self._rounds)

    def _stamp(self) -> tuple[int, int]:
        """Changes with the file of metrics, which may have grown to megabytes."""
        try:
            seen = self._folder.metrics.stat()
        except OSError:
            return 0, 0
        return seen.st_mtime_ns, seen.st_size


def tell(row: Mapping[str, Any], rounds: int) -> None:
    """A line of metrics.jsonl as the events that the coordinator's own process reported."""
    number, sites = int(row["round"]), row["sites"]
    progress.report(RoundStarted(number, rounds, tuple(sorted(sites)), ago_s=float(row["seconds"])))
    for name, site in sorted(sites.items()):
        progress.report(SiteReplied(number, name, site["status"], site["reason"]))
    means = {name: mean_cross_entropy(site["losses"]) for name, site in sites.items()}
    losses = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    progress.report(RoundDone(number, rounds, float(row["seconds"]), losses))
