"""A site's folder: what `unimiss-site init` makes, and where each thing in it lies.

site.yaml               data folders, devices, limits and policy: the site file
keys/                   site.key, site.tls.key: one private key in two forms (0600, never leaves); site.pub;
                        after `join` also site.crt, authority.crt, coordinator.pub, out of the welcome
SITE.join.yaml          to be given to the coordinator's operator
welcome.yaml            what the coordinator's operator gave back: written by `unimiss-site join`
state/                  all that the daemon writes: ledger, audit log, cache, what was learned, Flower's own home; but
                        what `ledger` and `cache` of site.yaml put elsewhere
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from unimiss_core.errors import ConfigError

VARIABLE = "UNIMISS_SITE_HOME"
"""Of the environment: names the folder where no --home does."""

PATIENTS_OF_BEFORE = (
    "If its patients took part before, under another name, let 'state' be the folder of then: what they have cost is "
    "in the ledger there (docs/site.md, 'Another name')."
)
"""For a site whose ledger is empty."""


@dataclass(frozen=True)
class Home:
    """Paths of a site's folder."""

    path: Path

    @classmethod
    def named(cls, given: Path | None) -> Self:
        """The folder that --home or the environment names, else the current one, whatever is in it."""
        return cls((given or Path(os.environ.get(VARIABLE) or ".")).absolute())

    @classmethod
    def chosen(cls, given: Path | None) -> Self:
        """The folder that --home or the environment names, else the current one. Raises ConfigError: `init` made none
        there, or its site has left."""
        home = cls.named(given)
        if home.has_left:
            raise ConfigError(
                f"{home.path}: this site has left its coordinator, and its keys are gone; nothing runs here. What was "
                f"done and spent is still told: unimiss-site audit {home.site}, unimiss-site ledger {home.site}"
            )
        if not home.private_key.is_file():
            raise ConfigError(
                f"{home.path}: is not a site's folder; make one with `unimiss-site init`, or name it with --home or "
                f"{VARIABLE}"
            )
        return home

    @property
    def has_left(self) -> bool:
        """Whether `leave` destroyed its keys: the public one stays."""
        return self.public_key.is_file() and not self.private_key.exists()

    @property
    def site(self) -> Path:
        return self.path / "site.yaml"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def private_key(self) -> Path:
        """In OpenSSH's form, for Flower's node authentication."""
        return self.keys / "site.key"

    @property
    def tls_key(self) -> Path:
        """The same key as PEM, for TLS."""
        return self.keys / "site.tls.key"

    @property
    def public_key(self) -> Path:
        return self.keys / "site.pub"

    @property
    def certificate(self) -> Path:
        """The site's, for TLS."""
        return self.keys / "site.crt"

    @property
    def authority(self) -> Path:
        """What the coordinator's certificate must be signed by."""
        return self.keys / "authority.crt"

    @property
    def coordinator_key(self) -> Path:
        """Signs the coordinator's manifests."""
        return self.keys / "coordinator.pub"

    def join_request(self, name: str) -> Path:
        return self.path / f"{name}.join.yaml"

    @property
    def welcome(self) -> Path:
        return self.path / "welcome.yaml"
