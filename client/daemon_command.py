"""`unimiss-site run`, `status` and `leave`: what concerns the daemon, of the command in `client.site_command`."""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from client.home import Home
from unimiss_core.errors import ConfigError, UnimissError

if TYPE_CHECKING:
    from client.site_config import SiteConfig


def add_run(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.set_defaults(act=_run)


def add_status(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--json", action="store_true", help="for a monitor")
    parser.set_defaults(act=_status)


def add_leave(parser: argparse.ArgumentParser) -> None:
    add_home(parser)
    parser.add_argument("--yes", action="store_true", help="do it: the keys cannot be made again")
    parser.set_defaults(act=_leave)


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="FOLDER", help="as `init` made it (default: UNIMISS_SITE_HOME, or this folder)"
    )


def _run(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from client.audit import log_of
    from client.daemon import run

    logging.basicConfig(format="%(message)s")
    logging.getLogger("client").setLevel(logging.INFO)
    home = Home.chosen(options.home)
    run(home, log_of(home.site).record)


def _status(options: argparse.Namespace) -> None:
    """Raises ConfigError; UnimissError: the daemon does not run, for whoever asks by exit code."""
    from client import status
    from client.daemon import is_running

    state = _state(Home.chosen(options.home))
    print(status.as_json(state) if options.json else "\n".join(status.lines(state, time.time())))
    if not is_running(state):
        sys.stdout.flush()
        raise UnimissError("the daemon does not run")


def _leave(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from client.audit import log_of
    from client.daemon import is_running
    from client.leaving import leave
    from client.site_config import load_site

    home = Home.chosen(options.home)
    site = load_site(home.site, reads_scans=False)
    if not options.yes:
        raise ConfigError(
            f"{home.path}: leaving stops the daemon and destroys this site's keys, for good; the ledger and the audit "
            f"log stay. To do it: unimiss-site leave --yes{_as_typed(options)}"
        )
    if is_running(site.state):
        print("the daemon is asked to stop; that can take a minute", flush=True)
    leave(home, site, log_of(home.site).record)
    print(f"{site.name}: has left; its keys are gone. Its ledger and audit log stay: `audit` and `ledger` {home.site}")
    print(
        f"Under another name they go on by: unimiss-site init FOLDER --name NAME --state {shlex.quote(str(site.state))}"
    )
    print(_what_stays(site))
    print(f"Tell the coordinator's operator, who then types: unimiss-server revoke {site.name} --yes")


def _as_typed(options: argparse.Namespace) -> str:
    """The folder, where the command line named one: what is told to be typed must not mean another site's."""
    return "" if options.home is None else f" --home {shlex.quote(str(options.home))}"


def _what_stays(site: "SiteConfig") -> str:
    """And may be deleted, because nothing needs it any more."""
    return (
        f"Left in place, too: prepared scans, which are pixels ({site.cache_folder}); what was learned "
        f"({site.state / 'runs'}); and {site.state / 'patient_secret'}, by which the prepared scans name patients. "
        "Nothing needs these three any more; rm -r deletes them."
    )


def show_readiness(home: Home) -> int:
    """Print what `client.readiness` looks at; how much of it is bad. Raises ConfigError."""
    from client.readiness import points
    from client.site_config import load_site

    amiss = 0
    for point in points(home, load_site(home.site)):
        print(f"{point.mark:<8} {point.what}: {point.words}", flush=True)
        amiss += point.mark == "bad"
    print()
    return amiss


def _state(home: Home) -> Path:
    """The state folder, also where the data folders are not there at the moment. Raises ConfigError."""
    from client.site_config import state_folder

    return state_folder(home.site)
