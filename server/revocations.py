"""Keys that were revoked, as the coordinator's audit log says: more lasting than the files of sites, which a backup may
bring back from before."""

import os
from pathlib import Path
from typing import BinaryIO

from unimiss_core.errors import ConfigError
from unimiss_core.json_text import object_in


class Revocations:
    """path: of the log. Its lines are read once, however often it is asked; `unimiss-server audit` verifies them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._read_to = 0
        """Which file it was, and how many bytes of it are known."""
        self._last: dict[str, str] = {}
        """Fingerprint -> what was done with that key last."""
        self._given: dict[str, str] = {}
        """Name -> fingerprint of the key that it was approved with."""

    def last(self) -> frozenset[str]:
        """Fingerprints of keys that were revoked and not approved since. Raises ConfigError: the log cannot be read."""
        try:
            with self._path.open("rb") as log:
                self._read(log)
        except FileNotFoundError:  # none was begun, or it was moved away, which docs/audit.md allows
            self._forget()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror})") from None
        return frozenset(key for key, did in self._last.items() if did == "revoke")

    def given_to(self, site: str) -> str | None:
        """Fingerprint of the key that a name was approved with; None where the log does not tell. Raises as `last`."""
        self.last()
        return self._given.get(site)

    def _forget(self) -> None:
        self._last.clear()
        self._given.clear()

    def _read(self, log: BinaryIO) -> None:
        """What was added since the last time; the whole, where it is another file, or was cut."""
        seen = os.fstat(log.fileno())
        if seen.st_ino != self._file or seen.st_size < self._read_to:
            self._file, self._read_to = seen.st_ino, 0
            self._forget()
        log.seek(self._read_to)
        for line in log:
            if not line.endswith(b"\n"):  # it is being written
                break
            self._read_to += len(line)
            if b'"approve"' in line or b'"revoke"' in line:
                self._note(line)

    def _note(self, line: bytes) -> None:
        try:
            told = object_in(line)
            if told["kind"] in ("approve", "revoke"):
                self._last[str(told["fingerprint"])] = told["kind"]
                self._given[str(told["site"])] = str(told["fingerprint"])
        except (ValueError, KeyError):  # `audit` says that it is damaged
            return
