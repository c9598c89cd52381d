"""The coordinator's audit logs: what was done at it, and what each run asked, was sent and released.

`audit.jsonl` in the coordinator's folder: what its operator did, and who was refused at its front. `audit.jsonl` in a
run's folder: requests, what became of each reply, and releases (`server.run_audit`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from unimiss_core.audit_log import AuditLog, Count, Digest, Entry, Fingerprint, Word, by_kind, counted
from unimiss_core.config import RUN, Name

Run = Annotated[str, Field(pattern=f"^{RUN}$")]


class Operator(Entry):
    """Somebody at the coordinator typed a command."""

    kind: Literal["init", "approve", "revoke", "renew", "run", "stop", "export"]
    site: Name | None = None
    fingerprint: Fingerprint | None = None
    """Of the site's key."""
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,255}$")] | None = None
    """Under which sites reach this coordinator."""
    certificates: Count | None = None
    study: Name | None = None
    run: Run | None = None
    round: Count | None = None
    """Of what was exported."""
    manifest: Digest | None = None
    """Of its checkpoint, as in `Released`."""


class RunEnded(Entry):
    """`unimiss-server run` came to an end by itself or was stopped; one that was killed leaves none."""

    kind: Literal["run_ended"]
    study: Name
    code: Count
    """Its exit code, as `unimiss_core.errors` lists them: 4 is a checkpoint that is not what it was, for one."""


class PeerRefused(Entry):
    """The front did not let somebody in. peer: a site's name, an IP address, or `others`."""

    kind: Literal["peer_refused"]
    reason: Word
    peer: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:%+/-]{1,80}$")]
    count: Count
    """How often since the line before of the same reason and peer."""


class Asked(Entry):
    """A site was sent a round's request."""

    kind: Literal["asked"]
    run: Run
    round: Count
    site: Name
    bytes: Count


class Heard(Entry):
    """What became of what a site answered to the request of a round."""

    kind: Literal["counted", "refused"]
    run: Run
    round: Count
    site: Name
    bytes: Count
    reason: Word | None = None
    """Why it did not count, or counted with less weight."""
    sha256: Digest | None = None
    """As the site's own log has it (`unimiss_core.wire.content_digest`); None where nothing could be read."""


class Released(Entry):
    """A round's student and teacher exist from here on."""

    kind: Literal["release"]
    run: Run
    round: Count
    study: Digest
    manifest: Digest
    """Of its checkpoint, whose manifest names the digests of its tensors."""


CoordinatorLog = AuditLog[Entry]

KINDS: Mapping[str, type[Entry]] = by_kind(Operator, RunEnded, PeerRefused, Asked, Heard, Released)


def coordinator_log(path: Path) -> CoordinatorLog:
    """path: `audit.jsonl` of a coordinator's folder, or of a run's."""
    return AuditLog(path, KINDS)


def summary(entries: Sequence[Entry]) -> Iterator[str]:
    """Rounds released, what each site sent, and who was refused for what."""
    if released := [entry for entry in entries if isinstance(entry, Released)]:
        yield f"rounds released: {len(released)}, the last is {released[-1].round}"
    sent: dict[str, list[int]] = {}
    for entry in entries:
        if isinstance(entry, Heard) and entry.kind == "counted":
            sent.setdefault(entry.site, []).append(entry.bytes)
    for site, sizes in sorted(sent.items()):
        yield f"{site}: {len(sizes)} updates counted, {sum(sizes):,} bytes"
    for (site, reason), count in counted([e for e in entries if e.kind == "refused"], "site", "reason").items():
        yield f"{site}: refused as {reason}: {count}"
    refused: dict[tuple[str, str], int] = {}
    for entry in entries:
        if isinstance(entry, PeerRefused):
            refused[entry.peer, entry.reason] = refused.get((entry.peer, entry.reason), 0) + entry.count
    for (peer, reason), count in refused.items():
        yield f"front: {peer} refused as {reason}: {count}"
