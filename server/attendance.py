"""What the coordinator remembers of sites from round to round: who failed how often, and how large updates were.

An update's size is the root mean square of its values (`server.admission.admit`).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from unimiss_core.chain import BEGINNING, Head

SIZE_ROUNDS = 3
"""Rounds whose updates say how large an update is."""
LEAST_SIZES = 3
"""Updates that must have counted in them before they say anything."""
LONGEST_PAUSE = 16
"""Most rounds between two tries of a site that keeps failing. Where patients pay for a try, and no answer came in time,
there is no such bound: a site that is too slow for its deadline is asked a dozen times in a thousand rounds."""


@dataclass(frozen=True)
class Failures:
    """How often in a row a site failed, in which round last, and whether that was because no answer came in time."""

    in_a_row: int
    last_round: int
    unanswered: bool = False


@dataclass
class Attendance:
    """failures: by site, of those whose last try failed. sizes: of the updates that counted, by round. ledgers: by
    site, the furthest that its ledger of what patients have cost is known to stand."""

    failures: dict[str, Failures] = field(default_factory=dict)
    sizes: dict[int, list[float]] = field(default_factory=dict)
    ledgers: dict[str, Head] = field(default_factory=dict)

    def meet_ledger(self, site: str, head: Head | None) -> None:
        """A site that introduces itself told where its ledger stands. What is known already stays: the site has not
        yet been asked whether that is still in its ledger, and one that was put back may have grown past it since."""
        if head is not None:
            self.ledgers.setdefault(site, head)

    def note_ledger(self, site: str, head: Head | None) -> None:
        """A reply told where the site's ledger stands, after the site found in it what was known before."""
        if head is not None and head.seq >= self.ledgers.get(site, BEGINNING).seq:
            self.ledgers[site] = head

    def note(self, site: str, round: int, *, counted: bool, unanswered: bool = False) -> None:
        """A site that was asked in `round` counted, or did not. unanswered: nothing came of it in time."""
        before = self.failures.pop(site, Failures(0, 0))
        if not counted:
            again = before.last_round == round  # a round that is tried again is one round
            self.failures[site] = Failures(before.in_a_row + (not again), round, unanswered)

    def is_set_aside(self, site: str, round: int, after: int, *, patients_pay: bool = False) -> bool:
        """Whether a site that failed `after` times in a row, or more often, is to be left out of `round`. patients_pay:
        for each try, whatever comes of it."""
        failed = self.failures.get(site)
        if failed is None or failed.in_a_row < after:
            return False
        pause: int = 2 ** (failed.in_a_row - after)
        if not (patients_pay and failed.unanswered):
            pause = min(pause, LONGEST_PAUSE)
        return round <= failed.last_round + pause

    def note_sizes(self, round: int, sizes: Sequence[float]) -> None:
        """Updates of these sizes counted in `round`; what is too old to matter is forgotten."""
        self.sizes[round] = list(sizes)
        for old in [earlier for earlier in self.sizes if earlier <= round - SIZE_ROUNDS]:
            del self.sizes[old]

    def usual_size(self, round: int) -> float | None:
        """The median size of updates that counted before `round`; None where too few have to tell.

        Those of `round` itself do not matter, so that the order in which they arrive does not. Nor do updates of zeros:
        beside one that changed nothing every other is infinitely large.
        """
        sizes = [size for earlier, found in self.sizes.items() if earlier < round for size in found if size > 0]
        return statistics.median(sizes) if len(sizes) >= LEAST_SIZES else None

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "failures": {site: list(astuple(failed)) for site, failed in self.failures.items()},
            "sizes": {str(round): sorted(sizes) for round, sizes in self.sizes.items()},
            "ledgers": {site: str(head) for site, head in self.ledgers.items()},
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Attendance":
        """From `facts`."""
        return cls(
            {site: Failures(*numbers) for site, numbers in facts["failures"].items()},
            {int(round): list(sizes) for round, sizes in facts["sizes"].items()},
            {site: Head.of(text) for site, text in facts.get("ledgers", {}).items()},
        )
