"""How far each site's ledger of private rounds is known to have come, over all runs of this coordinator.

A run keeps that in its own checkpoints (`server.attendance`); a site whose state folder was put back between two runs
would be met by a coordinator that knows nothing. So it also stands in one file of the coordinator's folder:

    {"north": "12:9f86d081..."}      the number and digest of the last entry that was told
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from unimiss_core import durable
from unimiss_core.chain import Head
from unimiss_core.config import Name
from unimiss_core.errors import ConfigError

_FORM = TypeAdapter(dict[Name, str])


class KnownLedgers:
    """The file at `path`; None remembers nothing, as where a run is all that there is."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> dict[str, Head]:
        """By site. Raises ConfigError: the file is damaged; OSError."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            return {site: Head.of(text) for site, text in _FORM.validate_json(self._path.read_bytes()).items()}
        except (ValidationError, ValueError):
            raise ConfigError(
                f"{self._path}: is damaged; put it back from a backup, or delete it, and runs begin without knowing "
                "how far the sites' ledgers had come (docs/privacy.md, 'The ledger')"
            ) from None

    def note(self, heads: Mapping[str, Head], *, forgotten: Collection[str] = ()) -> None:
        """Keep whichever is further, and nothing older of the `forgotten`. Raises as `read`."""
        before = self.read()
        known = {site: head for site, head in before.items() if site not in forgotten}
        if self._path is not None and (found := furthest(known, heads)) != before:
            told = {site: str(head) for site, head in sorted(found.items())}
            durable.write_text(self._path, json.dumps(told, indent=1) + "\n")


def furthest(*known: Mapping[str, Head]) -> dict[str, Head]:
    """Of each site, the head of the most entries."""
    found: dict[str, Head] = {}
    for heads in known:
        for site, head in heads.items():
            if site not in found or head.seq > found[site].seq:
                found[site] = head
    return found
