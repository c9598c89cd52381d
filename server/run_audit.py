"""A run's audit log as its rounds write it: in threads of its own, so that no reply waits for a digest or a disk."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from server.audit import Released, coordinator_log
from server.exchange import Reply
from unimiss_core.wire import content_digest

Digest = Future[str | None]


class RunAudit:
    """Lines are written in the order of the calls; `settle` waits for them, and is what raises where one cannot be."""

    def __init__(self, path: Path, study_digest: str) -> None:
        """path: the log's. Nothing is read or written yet."""
        self._log, self._study = coordinator_log(path), study_digest
        self._writer, self._digester = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._unsettled: list[Future[object]] = []

    def asked(self, *, run: str, round: int, site: str, bytes: int) -> None:
        self._write(partial(self._log.record, "asked", run=run, round=round, site=site, bytes=bytes))

    def digest_of(self, reply: Reply) -> Digest:
        """Begin to work out what a reply is known by at both ends, while the reply is looked at."""
        return self._digester.submit(_digest, reply)

    def heard(self, digest: Digest, *, run: str, round: int, site: str, bytes: int, reason: str, counts: bool) -> None:
        """What became of a reply. Waits for its digest, so that one reply at most is held in memory for that."""
        told = {"run": run, "round": round, "site": site, "bytes": bytes, "reason": reason or None}
        self._write(partial(self._log.record, "counted" if counts else "refused", told, sha256=digest.result()))

    def released(self, *, run: str, round: int, manifest: Path) -> None:
        """A round's checkpoint is on the disk. Raises as `settle`."""
        facts = self._release(run, round, manifest)
        self._write(partial(self._log.record, "release", facts))
        self.settle()

    def gone_on_with(self, *, run: str, round: int, manifest: Path) -> None:
        """Write down the release that the run goes on from, where a coordinator was killed before it could."""
        facts = self._release(run, round, manifest)
        if not any(isinstance(entry, Released) and entry.facts() == facts for entry in self._log.read().entries):
            self._log.record("release", facts)

    def settle(self) -> None:
        """Wait until all is on the disk. Raises AuditError: something is not."""
        unsettled, self._unsettled = self._unsettled, []
        for written in unsettled:
            written.result()

    def _release(self, run: str, round: int, manifest: Path) -> dict[str, str | int]:
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        return {"run": run, "round": round, "study": self._study, "manifest": digest}

    def _write(self, record: Callable[[], object]) -> None:
        self._unsettled.append(self._writer.submit(record))


def _digest(reply: Reply) -> str | None:
    message = reply.message
    if message is None or not message.has_content():
        return None
    try:
        return content_digest(message.content)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return None  # a peer may send what only looks like a message
