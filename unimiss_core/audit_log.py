"""What was asked, decided, sent and done at one end of a federation: a chained log of entries of fixed kinds.

Both ends keep one, `audit.jsonl` with its head beside it (`unimiss_core.chained_log`); which kinds of entry there are,
`client.audit` and `server.audit` say. A kind may be given further optional fields, and loses none, so that logs stay
readable. No entry holds a patient, a path, a pixel or a text that a peer wrote: every field is a number, or of a form
that is checked.

Whoever may write to the folder can make up another chain that is whole, or put back an older one with its head. What
such a person cannot change is a head that was noted elsewhere: `audit --head` prints it, `audit --expect` looks for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

from unimiss_core.chained_log import Chain, ChainedLog, Link
from unimiss_core.errors import AuditDiskError, AuditError, ConfigError

WAY_OUT = "docs/audit.md says what to do"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""sha256, in hex."""
Count = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(pattern="^[a-z0-9_]{1,32}$")]
"""A reason, or another of our own codes."""
Fingerprint = Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]

Facts = Mapping[str, Any]


class Entry(Link):
    """What every line says."""

    kind: str
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    """UTC, by this machine's clock."""

    def facts(self) -> dict[str, Any]:
        """What it says besides its place in the chain, as far as it says anything."""
        return {
            name: value
            for name, value in self.model_dump(mode="json", exclude_none=True).items()
            if name not in Entry.model_fields
        }


EntryT = TypeVar("EntryT", bound=Entry)


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class AuditLog(Generic[EntryT]):
    """The audit log at `path`, whose entries are of `kinds`."""

    def __init__(self, path: Path, kinds: Mapping[str, type[EntryT]], *, clock: Callable[[], str] = utc_now) -> None:
        """Nothing is read or written yet."""
        self._kinds, self._clock = kinds, clock
        self._log: ChainedLog[EntryT] = ChainedLog(path, self._entry_of, damaged=AuditError, way_out=WAY_OUT)

    def record(self, kind: str, facts: Facts | None = None, **more: Any) -> None:
        """Add an entry; when this returns, it is on the disk, and what it says may be done.

        Raises AuditDiskError: the disk is full, or the folder cannot be written to; AuditError: the log's end is
        damaged. ValueError, which is our own mistake: no such kind, or not with these facts.
        """
        if kind not in self._kinds:
            raise ValueError(f"no kind of audit entry is called {kind}")
        told = {"kind": kind, "time": self._clock(), **(facts or {}), **more}
        try:
            self._log.append(partial(self._kinds[kind], **told))
        except ConfigError as error:  # of the disk; a damaged log is an AuditError already
            raise AuditDiskError(f"nothing leaves and nothing is done that is not written down: {error}") from None

    def read(self) -> Chain[EntryT]:
        """All entries, verified from the first to the last. Raises AuditError: the log is damaged; ConfigError: it
        cannot be read."""
        return self._log.read()

    def backwards(self, *, holding: bytes) -> Iterator[EntryT]:
        """As `ChainedLog.backwards`."""
        return self._log.backwards(holding=holding)

    def _entry_of(self, line: bytes) -> EntryT:
        kind = _KIND.validate_json(line).kind
        if kind not in self._kinds:
            raise ValueError("another kind of entry")
        return self._kinds[kind].model_validate_json(line)


class _Kind(Link):
    """As much of a line as says what class it is of."""

    model_config = ConfigDict(extra="ignore")
    kind: str


_KIND = TypeAdapter(_Kind)


def by_kind(*classes: type[EntryT]) -> dict[str, type[EntryT]]:
    """The classes by what their `kind` may be: the values of its Literal."""
    found: dict[str, type[EntryT]] = {}
    for each in classes:
        literal = each.model_fields["kind"].annotation
        for kind in getattr(literal, "__args__", ()):
            assert kind not in found, f"two classes of entry for the kind {kind}"
            found[kind] = each
    return found


def in_words(entry: Entry) -> str:
    """One line for a person; digests are shortened."""
    told = " ".join(f"{name}={_shown(value)}" for name, value in entry.facts().items())
    return f"{entry.seq:>6}  {entry.time}  {entry.kind:<13} {told}".rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(entries: Sequence[Entry], *names: str) -> dict[tuple[str, ...], int]:
    """How many entries say the same under `names`; those that do not say all of them are left out."""
    found: dict[tuple[str, ...], int] = {}
    for entry in entries:
        facts = entry.facts()
        if all(name in facts for name in names):
            key = tuple(str(facts[name]) for name in names)
            found[key] = found.get(key, 0) + 1
    return found
