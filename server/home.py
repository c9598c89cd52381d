"""The coordinator's folder: what `unimiss-server init` makes, and where each thing in it lies.

coordinator.yaml        quorum, deadlines, probe: a coordinator file without study, out and sites
server.yaml             address, ports, what the public side allows
study.yaml              an example to begin from
audit.jsonl, .head      what was done here, chained
certificates/           authority.crt, server.crt, signing.pub: not secret
secrets/                authority.key, server.key, signing.key, superexec: 0600 in a folder of 0700
sites/                  NAME.yaml: an approved or revoked site; NAME.welcome.yaml: what it was given
ledgers.json            how far each site's ledger of private rounds has come, as far as it told
runs/STUDY/             one folder for each study, as docs/artefacts.md says
flower/                 Flower's own home, SuperLink's database and the logs of what we start
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from unimiss_core.errors import ConfigError

VARIABLE = "UNIMISS_SERVER_HOME"
"""Of the environment: names the folder where no --home does."""


@dataclass(frozen=True)
class Home:
    """Paths of a coordinator's folder."""

    path: Path

    @classmethod
    def chosen(cls, given: Path | None) -> Self:
        """The folder that --home or the environment names, else the current one. Raises ConfigError: `init` made none
        there."""
        home = cls((given or Path(os.environ.get(VARIABLE) or ".")).absolute())
        if not home.server.is_file():
            raise ConfigError(
                f"{home.path}: is not a coordinator's folder; make one with `unimiss-server init`, or name it with "
                f"--home or {VARIABLE}"
            )
        return home

    @property
    def study(self) -> Path:
        return self.path / "study.yaml"

    @property
    def coordinator(self) -> Path:
        return self.path / "coordinator.yaml"

    @property
    def server(self) -> Path:
        return self.path / "server.yaml"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def certificates(self) -> Path:
        return self.path / "certificates"

    @property
    def authority_certificate(self) -> Path:
        return self.certificates / "authority.crt"

    @property
    def server_certificate(self) -> Path:
        return self.certificates / "server.crt"

    @property
    def signing_public_key(self) -> Path:
        return self.certificates / "signing.pub"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    @property
    def authority_key(self) -> Path:
        return self.secrets / "authority.key"

    @property
    def server_key(self) -> Path:
        return self.secrets / "server.key"

    @property
    def signing_key(self) -> Path:
        return self.secrets / "signing.key"

    @property
    def superexec_secret(self) -> Path:
        return self.secrets / "superexec"

    @property
    def sites(self) -> Path:
        return self.path / "sites"

    def site(self, name: str) -> Path:
        return self.sites / f"{name}.yaml"

    def welcome(self, name: str) -> Path:
        return self.sites / f"{name}.welcome.yaml"

    @property
    def ledgers(self) -> Path:
        """As `server.known_ledgers`."""
        return self.path / "ledgers.json"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def run(self, study: str) -> Path:
        return self.runs / study

    def run_file(self, study: str) -> Path:
        """The coordinator file of a study's run."""
        return self.run(study) / "coordinator.yaml"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of everything that is started here."""
        return self.path / "flower"

    @property
    def database(self) -> Path:
        return self.flower / "superlink.db"

    @property
    def front_status(self) -> Path:
        """What the front last wrote of sites and refusals."""
        return self.flower / "front.json"

    @property
    def passage(self) -> Path:
        """Of the front: what each site is given, and what is on its way from it."""
        return self.flower / "passage"

    @property
    def lock(self) -> Path:
        """Held by the one `unimiss-server run` of this folder; holds its process number."""
        return self.flower / "run.lock"

    @property
    def running(self) -> Path:
        """What that `run` last wrote of itself."""
        return self.flower / "running.json"

    @property
    def workplace(self) -> Path:
        """An empty folder that Flower's processes are started from."""
        return self.flower / "empty"

    @property
    def bundle(self) -> Path:
        """The project that `flwr run` would submit: the installed code."""
        return self.flower / "bundle"
