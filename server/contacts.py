"""When each site was last heard, and how its clock goes: kept in a file that `unimiss-server status` reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

BEHIND_S, AHEAD_S = 305.0, 5.0
"""Flower's node authentication takes a request that was signed so long ago, or so far in the future."""


@dataclass
class Contact:
    """seen: of the last request, ISO time. clock_ahead_s: of the site's clock before ours, as that request said."""

    seen: str
    clock_ahead_s: float | None

    @property
    def clock_is_wrong(self) -> bool:
        """So that Flower takes none of its requests."""
        return self.clock_ahead_s is not None and not -BEHIND_S < self.clock_ahead_s < AHEAD_S


@dataclass
class Contacts:
    sites: dict[str, Contact] = field(default_factory=dict)

    def heard(self, site: str, at: datetime, ahead_s: float | None) -> None:
        rounded = None if ahead_s is None else round(ahead_s, 1)
        self.sites[site] = Contact(at.isoformat(timespec="seconds"), rounded)

    def as_text(self, refused: Mapping[str, int], at: datetime) -> str:
        """What `read` reads. refused: reason -> how often since the front began."""
        sites = {name: asdict(contact) for name, contact in sorted(self.sites.items())}
        return json.dumps({"at": at.isoformat(timespec="seconds"), "refused": refused, "sites": sites}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> tuple["Contacts", dict[str, int]]:
        """The contacts and the refusals; empty where the front has not yet written them."""
        try:
            told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sites = {name: Contact(**contact) for name, contact in told["sites"].items()}
            return cls(sites), {str(reason): int(count) for reason, count in told["refused"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return cls(), {}
