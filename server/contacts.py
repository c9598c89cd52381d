"""When each site was last heard, and how its clock goes: kept in a file that `unimiss-server status` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from unimiss_core.config import Config

BEHIND_S, AHEAD_S = 305.0, 5.0
"""Flower's node authentication takes a request that was signed so long ago, or so far in the future."""


class Contact(Config):
    seen: AwareDatetime
    """When the last request came."""
    clock_ahead_s: float | None
    """Of the site's clock before ours, as that request said."""

    @property
    def clock_is_wrong(self) -> bool:
        """So that Flower takes none of its requests."""
        return self.clock_ahead_s is not None and not -BEHIND_S < self.clock_ahead_s < AHEAD_S


class _Kept(Config):
    """The file. refused: reason -> how often since the front began."""

    at: AwareDatetime
    refused: Mapping[str, int]
    sites: Mapping[str, Contact]


@dataclass
class Contacts:
    sites: dict[str, Contact] = field(default_factory=dict)

    def heard(self, site: str, at: datetime, ahead_s: float | None) -> None:
        rounded = None if ahead_s is None else round(ahead_s, 1)
        self.sites[site] = Contact(seen=at.replace(microsecond=0), clock_ahead_s=rounded)

    def as_text(self, refused: Mapping[str, int], at: datetime) -> str:
        """What `read` reads. refused: as of `_Kept`."""
        sites = dict(sorted(self.sites.items()))
        return _Kept(at=at.replace(microsecond=0), refused=refused, sites=sites).model_dump_json(indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> tuple["Contacts", dict[str, int]]:
        """The contacts and the refusals; empty where the front has not yet written them, or the file is damaged."""
        try:
            kept = _Kept.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return cls(), {}
        return cls(dict(kept.sites)), dict(kept.refused)
