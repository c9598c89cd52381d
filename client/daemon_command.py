"""`unimiss-site run`, `status` and `leave`: what concerns the daemon, of the command in `client.site_command`."""

import argparse
import logging
import sys
import time
from pathlib import Path

from client.home import Home
from unimiss_core.errors import ConfigError, UnimissError


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="FOLDER", help="as `init` made it (default: UNIMISS_SITE_HOME, or this folder)"
    )


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


def _run(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from client.daemon import run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(Home.chosen(options.home), note)


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
    from client.leaving import leave
    from client.site_config import load_site

    home = Home.chosen(options.home)
    site = load_site(home.site)
    if not options.yes:
        raise ConfigError(
            f"{home.path}: leaving stops the daemon and destroys this site's keys, for good; the ledger and the audit "
            "log stay. To do it: unimiss-site leave --yes"
        )
    leave(home, site, note)
    print(f"{site.name}: has left; its keys are gone, its ledger and audit log stay in {site.state}")
    print(f"Tell the coordinator's operator, who then types: unimiss-server revoke {site.name}")


def note(kind: str, facts: dict[str, str | int | float]) -> None:
    logging.getLogger(__name__).info("%s %s", kind, " ".join(f"{key}={value}" for key, value in facts.items()))


def _state(home: Home) -> Path:
    """The state folder, also where the data folders are not there at the moment. Raises ConfigError."""
    from client.site_config import SiteConfig
    from unimiss_core.config import load

    return home.path / load(SiteConfig, home.site).state
