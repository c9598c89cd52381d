"""A site's folder: what `unimiss-site init` makes, and where each thing in it lies.

site.yaml               data folders, devices, limits and policy: the site file
keys/                   site.key (0600, never leaves), site.pub
SITE.join.yaml          to be given to the coordinator's operator
welcome.yaml            what the coordinator's operator gave back: written by `unimiss-site join`
state/                  all that the daemon writes: ledger, audit log, cache, what was learned, Flower's own home
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Paths of a site's folder."""

    path: Path

    @property
    def site(self) -> Path:
        return self.path / "site.yaml"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def private_key(self) -> Path:
        return self.keys / "site.key"

    @property
    def public_key(self) -> Path:
        return self.keys / "site.pub"

    def join_request(self, name: str) -> Path:
        return self.path / f"{name}.join.yaml"

    @property
    def welcome(self) -> Path:
        return self.path / "welcome.yaml"
