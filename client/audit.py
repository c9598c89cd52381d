"""The site's audit log: everything that was asked of it, and everything that left it, written down before it does.

`audit.jsonl` in the state folder, over all runs and studies. A request is written down before it is looked into, and
its answer before Flower is given it; where that is not possible, nothing leaves but the reason `audit`. So of a site
that was killed the log may say that something left which did not, and never the other way round.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from flwr.app import RecordDict
from pydantic import Field

from client.site_config import state_folder
from unimiss_core.audit_log import AuditLog, Count, Digest, Entry, Fingerprint, Word, by_kind, counted
from unimiss_core.config import RUN, Name
from unimiss_core.errors import WireError
from unimiss_core.study import StudyConfig
from unimiss_core.wire import arrays_in, content_digest, facts_in, num_bytes, run_of, study_of

Run = Annotated[str, Field(pattern=f"^{RUN}$")]
Head = Annotated[str, Field(pattern="^[0-9]{1,12}:[0-9a-f]{64}$")]
Epsilon = Annotated[float, Field(ge=0)]

ASKED = {"query": "introduction", "train": "round"}
"""Flower's type of a message -> what is asked; whatever else comes is `unknown`."""


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
    ledger: Head | None = None


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
    ledger: Head | None = None
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

    kind: Literal["init", "join", "clear", "leave", "check"]
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


def request_facts(message_type: str, content: RecordDict) -> dict[str, Any]:
    """What the log says of a message that came, besides what it is `named_by`."""
    return {
        "asked": ASKED.get(message_type, "unknown"),
        "bytes": num_bytes(content),
        "sha256": content_digest(content),
    }


def named_by(content: RecordDict) -> dict[str, Any]:
    """Run, study and round that a message names, as far as they can be read."""
    named: dict[str, Any] = {}
    try:
        study = study_of(content)
        named |= {"study": study.digest(), "study_name": study.name, "run": run_of(content)}
    except WireError:
        return named
    round = facts_in(content).get("round")
    return named | ({"round": round} if type(round) is int and abs(round) < 10**12 else {})


def answer_entry(content: RecordDict, asked: Mapping[str, Any], epsilon: float | None) -> tuple[str, dict[str, Any]]:
    """(kind, facts) of an answer, read from what is about to leave and nothing else. asked: `named_by` the request."""
    facts = facts_in(content)
    if facts.get("status") == "refused":
        return "refusal", {**asked, "reason": facts["reason"]}
    told = {"sha256": content_digest(content), "ledger": facts.get("ledger")}
    if "status" not in facts:
        counts = {name: facts[name] for name in ("scans_2d", "scans_3d", "left_out")}
        return "introduction", {**asked, **told, **counts}
    figures = facts["losses"].count(":") + facts["diagnostics"].count(":")
    sent = {"bytes": num_bytes(content), "groups": _bytes_by_group(content), "figures": figures}
    return "reply", {**asked, **told, **sent, "epsilon": epsilon}


def is_charged(study: StudyConfig) -> bool:
    return study.privacy.mode == "patient"


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


def _bytes_by_group(content: RecordDict) -> dict[str, int]:
    """By group; what is not of the update, which nothing of ours sends, under its part's name as well."""
    return {
        (group if part == "update" else f"{part}.{group}"): len(array.data)
        for part, record in arrays_in(content).items()
        for group, array in record.items()
    }
