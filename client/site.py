"""A site as its ClientApp knows it: the site file, the scans it may train on, and what it remembers."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from flwr.app import Context

from client.cache import Library, open_library, open_private_library
from client.held_out import trained_on
from client.ledger import Ledger, ledger_of
from client.site_config import SiteConfig, load_site
from client.site_labels import open_labelled
from client.site_state import SiteState
from client.telling import tell_once_if_heard
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

UNBEGUN = "0" * 16
"""A run of which no site remembers anything."""


@dataclass(frozen=True)
class Site:
    """One hospital within one run of a study."""

    config: SiteConfig
    study: StudyConfig
    run: str

    @cached_property
    def library(self) -> Library:
        """What it trains on: all that `read` gives, but for patients whom the study holds out."""
        return trained_on(self.config, self.study, self.everything)

    @cached_property
    def everything(self) -> Library:
        """What `read` gives."""
        return self.read()

    def read(self, *, evicts: bool = True) -> Library:
        """The preprocessed scans, in fine-tuning the labelled ones; reading what is new can take long.

        evicts: whether scans of other plans may go for these. Raises NoUsableScanError; in a patient-level study there
        may be none, and UnknownPatientError is raised instead where it would have to guess whose they are; WireError
        `no_labels`.
        """
        if self.study.finetune is not None:
            return open_labelled(self.config, self.study, evicts=evicts)
        if self.is_private:
            return open_private_library(self.config, self.study.plan, evicts=evicts)
        return open_library(self.config, self.study.plan)

    @property
    def is_private(self) -> bool:
        """Whether the study is patient-level: nothing may show what scans there are."""
        return self.study.privacy.mode == "patient"

    @property
    def ranks(self) -> frozenset[Rank]:
        """What it trains: the ranks of its scans; in a patient-level study those that its site file declares."""
        return self.config.privacy.ranks.intersection(self.study.ranks) if self.is_private else self.library.ranks

    @cached_property
    def ledger(self) -> Ledger:
        """What this site's patients have cost, in all studies."""
        return ledger_of(self.config)

    @cached_property
    def memory(self) -> SiteState:
        config = self.config
        tell = partial(tell_once_if_heard, config.name, state=config.state)
        return SiteState(config.state, run=self.run, study_digest=self.study.digest(), seal=config.seal(), tell=tell)


def site_file(context: Context) -> Path:
    """Where this node's site file is: its own node configuration says so, never a request.

    Under Flower's simulation engine nodes have no configuration but a number; there the run's folder holds a site
    file for each. Raises ConfigError where neither is given.
    """
    if "site" in context.node_config:
        return Path(str(context.node_config["site"]))
    if "partition-id" in context.node_config and context.run_config.get("simulation"):
        files = sorted(simulation_folder(context).glob("sites/*/site.yaml"))
        if (number := int(context.node_config["partition-id"])) < len(files):
            return files[number]
        raise ConfigError(
            f"this simulated node has number {number}, but the run has only {len(files)} sites; "
            f"give --federation-config 'num-supernodes={len(files)}'"
        )
    raise ConfigError("this node names no site file; start the SuperNode with --node-config 'site=\"/path/site.yaml\"'")


def open_site(context: Context, study: StudyConfig, run: str) -> Site:
    """The site of this node, for a run of `study`. Raises ConfigError."""
    return Site(load_site(site_file(context)), study, run)


def name_of(context: Context) -> str:
    """What this site calls itself, where its file can be read: for words on its own screen."""
    try:
        return load(SiteConfig, site_file(context)).name
    except ConfigError:
        return "this site"


def simulation_folder(context: Context) -> Path:
    """The folder of a run under Flower's simulation engine: run configuration `out`, or one named by the run."""
    out = str(context.run_config.get("out", ""))
    return Path(out).expanduser() if out else Path.home() / ".unimiss" / "runs" / str(context.run_id)
