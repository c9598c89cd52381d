"""The site's audit log: everything that was asked of it, and everything that left it, written down before it does.

`audit.jsonl` in the state folder, over all runs and studies. A request is written down before it is looked into, and
its answer before Flower is given it; where that is not possible, nothing leaves but the reason `audit`. So of a site
that was killed the log may say that something left which did not, and never the other way round.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from client.site_config import state_folder
from unimiss_core.audit_log import AuditLog, Count, Digest, Entry, Fingerprint, Word, by_kind, counted
from unimiss_core.chain import Head
from unimiss_core.config import RUN, Name

Run = Annotated[str, Field(pattern=f"^{RUN}$")]
HeadText = Annotated[str, Field(pattern="^[0-9]{1,12}:[0-9a-f]{64}$")]
"""Of a `Head`."""
Epsilon = Annotated[float, Field(ge=0)]


class _OfStudy(Entry):
    """What names a request, as far as it could be read."""

    run: Run | None = None
    study: Digest | None = None
    study_name: Name | None = None
    round: int | None = None


class Asked(_OfStudy):
    """A message came."""

    kind: Literal["request"]
    asked: Literal["introduction", "round", "unknown"]
    bytes: Count
    """Of its arrays."""
    sha256: Digest
    """Of all of it: `unimiss_core.wire.content_digest`."""


class Refused(_OfStudy):
    """It was answered with a reason and nothing else."""

    kind: Literal["refusal"]
    reason: Word


class Introduced(_OfStudy):
    """The site said who it is, and how many scans it has; in a patient-level study 1 for any number."""

    kind: Literal["introduction"]
    scans_2d: Count
    scans_3d: Count
    left_out: Count
    sha256: Digest
    ledger: HeadText | None = None


class Replied(_OfStudy):
    """An update left, or may have left."""

    kind: Literal["reply"]
    bytes: Count
    """Of its arrays."""
    groups: Mapping[str, Count]
    """Parameter group -> bytes."""
    figures: Count
    """How many losses and diagnostics it tells."""
    sha256: Digest
    epsilon: Epsilon | None = None
    """What patients have cost under this study's name, this reply included; None where nothing is charged, or it is too
    much to tell."""
    ledger: HeadText | None = None
    """Where the ledger stood."""


class Bundle(Entry):
    """A run's code was looked at. run: Flower's number of it."""

    kind: Literal["bundle"]
    run: Annotated[str, Field(pattern="^[0-9a-f]{1,20}$")]
    hash: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    decision: Literal["accepted", "refused"]
    reason: Word | None = None


class Daemon(Entry):
    """The site's daemon, and its line to the coordinator."""

    kind: Literal["daemon"]
    event: Literal["started", "stopped", "connected", "lost", "restarted"]
    reason: Word | None = None


class Operator(Entry):
    """Somebody at the site typed a command. coordinator: fingerprint of its signing key."""

    kind: Literal["init", "join", "clear", "leave", "check", "begin_ledger"]
    site: Name | None = None
    fingerprint: Fingerprint | None = None
    coordinator: Fingerprint | None = None


SiteLog = AuditLog[Entry]

KINDS: Mapping[str, type[Entry]] = by_kind(Asked, Refused, Introduced, Replied, Bundle, Daemon, Operator)


def site_log(state: Path) -> SiteLog:
    """state: the site's state folder."""
    return AuditLog(state / "audit.jsonl", KINDS)


def log_of(site_file: Path) -> SiteLog:
    """The audit log of the site of this file. Raises ConfigError."""
    return site_log(state_folder(site_file))


def last_ledger(log: SiteLog) -> Head | None:
    """Where the site's ledger of private rounds stood when something that tells it left last; None where nothing did,
    or a person has begun another since. Raises ConfigError: the log cannot be read."""
    for entry in log.backwards(holding=b"ledger"):
        if entry.kind == "begin_ledger":
            return None
        if isinstance(entry, Introduced | Replied) and entry.ledger is not None:
            return Head.of(entry.ledger)
    return None


def summary(entries: Sequence[Entry]) -> Iterator[str]:
    """What left in all, by study; what was refused, by reason."""
    left: dict[str, list[int]] = {}
    for entry in entries:
        if isinstance(entry, Replied):
            left.setdefault(entry.study_name or "?", []).append(entry.bytes)
    for study, sizes in left.items():
        yield f"study {study}: {len(sizes)} replies, {sum(sizes):,} bytes of updates left"
    refused = [entry for entry in entries if isinstance(entry, Refused)]
    for (reason,), count in counted(refused, "reason").items():
        yield f"refused as {reason}: {count}"
    bundles = [entry for entry in entries if isinstance(entry, Bundle) and entry.decision == "refused"]
    if bundles:
        yield f"bundles refused: {len(bundles)}"
