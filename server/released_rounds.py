"""Which rounds of a study of site-level privacy were released from a folder: a record that only ever grows.

    OUT/released.json       {"rounds": [1, 2, 2, 3], "study": "4e0ace08..."}

A round's number is written, and on the disk, before anybody can see what was made with its noise: metrics, probe,
checkpoint and the requests of the next round. A round that is done again, from an older checkpoint or because the
newest one was lost, stands there twice, and the study pays for both.

- **What costs nothing**: noise that was drawn in vain. The checkpoint is on the disk as `.partial` before the round is
  counted, so that a disk too full for it, or a crash until then, ends the round uncounted, and it is done again with
  another draw. Nothing of the first one left this process but for files that no run reads and that the next start
  deletes, on a disk that holds the sites' updates themselves; nor does what ended it hang on what was drawn.
- **What a crash costs**: one release, where it falls between the record and the checkpoint's name, or where the disk
  has no room for the line of metrics that is written there. For all that the record knows the noised sum was seen by
  then; it never errs the other way.
- **What it cannot notice**: that the whole folder is a copy, or an older copy that was put back; nor a run of the same
  study in another folder. Each goes on from the record that it finds.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from server.wording import listed
from unimiss_core import durable
from unimiss_core.errors import PrivacyBudgetError, RunFolderError
from unimiss_core.gaussian_privacy import gaussian_epsilon, in_words
from unimiss_core.json_text import read_object
from unimiss_core.privacy_config import SitePrivacyConfig
from unimiss_core.study import StudyConfig

WAY_OUT = (
    "put back the file as it was, or begin a new run, to whose epsilon what this one released adds "
    "(docs/privacy.md, 'Site level')"
)


class ReleasedRounds:
    """The record of one folder and its study, which is in mode `site`; every call reads the file anew."""

    def __init__(self, folder: Path, study: StudyConfig) -> None:
        """Nothing is read or written yet. Raises ValueError: the study is in another mode."""
        if not isinstance(study.privacy, SitePrivacyConfig):
            raise ValueError(f"the study's privacy mode is {study.privacy.mode}, not site")
        self._path = folder / "released.json"
        self._study = study
        self._promise = study.privacy

    @property
    def rounds(self) -> Sequence[int]:
        """The number of each release's round, in the order in which they were made. Raises RunFolderError: the record
        is missing, damaged, or of another study."""
        try:
            book = read_object(self._path)
            rounds, study = book["rounds"], book["study"]
            if not all(type(round) is int and round > 0 for round in rounds):
                raise ValueError
        except FileNotFoundError:
            raise self._error("is missing") from None
        except (ValueError, KeyError, TypeError):
            raise self._error("is damaged") from None
        if study != self._study.digest():
            raise self._error("is of another study")
        return list(rounds)

    def begin(self, finished: int, *, anew: bool) -> None:
        """Make ready to go on after round `finished`; what the folder released before is kept, also where a run begins
        again in it. anew: no run was begun in the folder yet. Raises RunFolderError: as `rounds`, or a finished round
        is not in the record."""
        if anew and not self._path.exists():
            self._write([])
        if lacking := sorted(set(range(1, finished + 1)) - set(self.rounds)):
            raise self._error(f"does not hold round {lacking[0]}, which was released: it was put back to an older one")

    def require_budget(self, round: int) -> None:
        """Raises PrivacyBudgetError: one more release is more than the study may cost."""
        if (reached := self.epsilon(more=1)) <= self._promise.max_epsilon:
            return
        raise PrivacyBudgetError(
            f"round {round} of study '{self._study.name}' is not begun: with it sites would pay {in_words(reached)} at "
            f"delta {self._promise.delta:g}, above privacy.max_epsilon={self._promise.max_epsilon:g}"
            f"{self._said_of_repeats()}. The model after round {round - 1} is this study's last"
        )

    def note(self, round: int) -> None:
        """Count a release of `round`; when this returns, that is on the disk, and the release may be made."""
        self._write([*self.rounds, round])

    def epsilon(self, *, more: int = 0) -> float:
        """What a site has paid that took part in all releases so far and, after them, in so many more; infinite where
        that promises nothing."""
        return gaussian_epsilon(self._promise.noise_multiplier, len(self.rounds) + more, self._promise.delta)

    def cost_of_going_back(self, finished: int) -> str:
        """In words: what it costs to go on after round `finished`, although later ones were released."""
        reached, limit = self.epsilon(more=self._study.schedule.rounds - finished), self._promise.max_epsilon
        ends = ", so that the run will end before its last round" if reached > limit else ""
        return (
            f"round {finished + 1} is then released a second time, and sites pay for both: {in_words(reached)} at "
            f"delta {self._promise.delta:g} after the last round, where privacy.max_epsilon is {limit:g}{ends}"
        )

    def _said_of_repeats(self) -> str:
        often = [f"round {round} {count} times" for round, count in sorted(Counter(self.rounds).items()) if count > 1]
        return f"; it has released {listed(often)}" if often else ""

    def _write(self, rounds: Sequence[int]) -> None:
        book = {"rounds": list(rounds), "study": self._study.digest()}
        durable.write_text(self._path, json.dumps(book, sort_keys=True) + "\n")

    def _error(self, what: str) -> RunFolderError:
        return RunFolderError(f"{self._path}: the record of what was released {what}; {WAY_OUT}")


def record_of(folder: Path, study: StudyConfig) -> ReleasedRounds | None:
    """The record of a study of site-level privacy; None for others, whose releases this coordinator does not charge."""
    return ReleasedRounds(folder, study) if isinstance(study.privacy, SitePrivacyConfig) else None
