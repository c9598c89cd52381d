"""Sites that are not done when a round closes, over the rounds of a run: what a deadline that is too short costs shows
in each round alone, its cause does not."""

from dataclasses import dataclass, field

from server.wording import duration
from unimiss_core import progress

IN_A_ROW = 2
"""Rounds that a site is late in before a person is told; once may be chance."""


@dataclass
class SlowSites:
    """deadline_s: how long a round waits; it is part of what is told."""

    deadline_s: float
    _seconds: dict[str, float] = field(default_factory=dict)
    """What a site's last update took, by its own clock."""
    _late_in: dict[str, list[int]] = field(default_factory=dict)
    """The rounds in a row, to the last, that a site was late in."""
    _told: set[str] = field(default_factory=set)

    def note_seconds(self, site: str, seconds: float) -> None:
        self._seconds[site] = seconds

    def note(self, site: str, round: int, *, late: bool) -> None:
        """Whether a site that is there was late in a try of `round`; tells, once, of one that keeps being so."""
        before = [one for one in self._late_in.pop(site, []) if one < round]  # a round that is tried again is one round
        if not late:
            return
        self._late_in[site] = rounds = [*before, round] if before[-1:] == [round - 1] else [round]
        if len(rounds) >= IN_A_ROW and site not in self._told:
            self._told.add(site)
            progress.report(progress.Note(self._words(site, len(rounds))))

    def _words(self, site: str, rounds: int) -> str:
        took = self._seconds.get(site)
        known = "how long it needs is not known yet" if took is None else f"its last update took {duration(took)}"
        return (
            f"{site} was not done in time in {rounds} rounds in a row: {known}, and deadline_s is {self.deadline_s:g} "
            "s. Raise deadline_s of the coordinator, or lower local_steps of the next study"
        )
