"""What a line of the ledger says, and what all lines together do.

Neither a patient's identifier nor a path nor a count of patients stands in it: run, study, round, noise and digests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from client.shared_ledger import OWNER
from unimiss_core.chained_log import Chain, Link
from unimiss_core.config import RUN, Name
from unimiss_core.privacy import Mechanism
from unimiss_core.privacy_config import Delta

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""sha256, in hex."""
Count = Annotated[int, Field(gt=0)]
Noise = Annotated[float, Field(gt=0)]
Chance = Annotated[float, Field(gt=0, le=1)]
"""Whatever a study may ask for today: what was charged stays readable."""


class Request(NamedTuple):
    """What is charged for: equal ones are the same, of which one reply may be sent again and again."""

    run: str
    round: int
    study: str
    """Its digest."""
    contents: str
    """sha256, in hex, of all that the round begins with."""


class Reserved(Link):
    """A round that is charged: its reply may release `mechanisms`, once."""

    kind: Literal["reserved"] = "reserved"
    run: Annotated[str, Field(pattern=f"^{RUN}$")]
    round: Count
    request: Digest
    """Of student, teacher and study that the round begins with."""
    study: Digest
    study_name: Name
    max_epsilon: Annotated[float, Field(gt=0)]
    """The study's promise, which its digest holds it to; written out so that the ledger can be read by itself."""
    delta: Delta
    mechanisms: Annotated[tuple[tuple[Noise, Chance, Count], ...], Field(min_length=1)]
    """(noise multiplier, sampling rate, steps) of each."""
    owner: Annotated[str | None, Field(pattern=f"^{OWNER}$", exclude_if=lambda owner: owner is None)] = None
    """Of a ledger that several sites count in, whose charge this is (`client.shared_ledger`)."""

    @property
    def for_request(self) -> Request:
        return Request(self.run, self.round, self.study, self.request)

    def releases(self) -> list[Mechanism]:
        return [Mechanism(*each) for each in self.mechanisms]


class Replied(Link):
    """A reply that may leave, or has left."""

    kind: Literal["replied"] = "replied"
    reservation: Count
    """The number of the entry that paid for it."""
    reply: Digest
    """Of its bytes."""


Entry = Reserved | Replied
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


def entry_of(line: bytes) -> Entry:
    """Raises ValueError: the line is no entry."""
    return _ENTRY.validate_json(line)


def total(releases: Iterable[Mechanism]) -> list[Mechanism]:
    """The same releases, those of equal noise and rate as one: what they cost together does not hang on their order."""
    steps: dict[tuple[float, float], int] = {}
    for each in releases:
        kind = each.noise_multiplier, each.sampling_rate
        steps[kind] = steps.get(kind, 0) + each.steps
    return [Mechanism(*kind, taken) for kind, taken in steps.items() if taken]


@dataclass(frozen=True)
class Charges:
    """All that a ledger says."""

    reserved: Sequence[Reserved]
    replies: dict[int, str]
    """Number of a reservation -> digest of its reply."""
    owner: str | None = None
    """Who asks: limits are over all that is reserved, and a round goes on under its own site's charge alone."""

    @classmethod
    def of(cls, chain: Chain[Entry], owner: str | None = None) -> "Charges":
        reserved = [entry for entry in chain.entries if isinstance(entry, Reserved)]
        replied = [entry for entry in chain.entries if isinstance(entry, Replied)]
        return cls(reserved, {entry.reservation: entry.reply for entry in replied}, owner)

    @property
    def own(self) -> list[Reserved]:
        """What the site that asks was charged for."""
        return [entry for entry in self.reserved if entry.owner == self.owner]

    def of_study(self, name: str) -> list[Reserved]:
        """All that was charged under a study's name: its digest changes with each setting, and patients do not."""
        return [entry for entry in self.reserved if entry.study_name == name]

    def newest(self, run: str) -> Reserved | None:
        """The last reservation of a run: the only one that may still be used."""
        return next((entry for entry in reversed(self.own) if entry.run == run), None)

    def newest_reply(self, request: Request) -> str | None:
        """The digest of the last reply to it."""
        paid = (entry.seq for entry in reversed(self.own) if entry.for_request == request)
        return next((self.replies[seq] for seq in paid if seq in self.replies), None)


def releases_of(entries: Iterable[Reserved]) -> list[Mechanism]:
    return total(mechanism for entry in entries for mechanism in entry.releases())
