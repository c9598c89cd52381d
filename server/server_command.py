"""The `unimiss-server` command: what a coordinator's operator types."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from unimiss_core.commands import Command, Program
from unimiss_core.errors import ConfigError

COMPARE = (
    "Before you rely on it, read the fingerprint to the other side by telephone, on a number that you know from "
    "elsewhere: who could change the file on its way could have put in another key."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (`unimiss_core.commands`)."""
    return Program("unimiss-server", "Coordinate federated studies.", COMMANDS).run(arguments)


def _add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home", type=Path, metavar="FOLDER", help="as `init` made it (default: UNIMISS_SERVER_HOME, or this folder)"
    )


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty")
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="under which sites reach this machine")
    parser.set_defaults(act=_init)


def _init(options: argparse.Namespace) -> None:
    from server.audit import coordinator_log
    from server.founding import found
    from server.home import Home
    from unimiss_core.keys import fingerprint, read_signing_public_key

    note = coordinator_log(Home(options.folder.absolute()).audit).record
    home = found(options.folder, options.address, now=datetime.now(UTC), note=note)
    print(f"{home.path}: a coordinator that sites reach at {options.address}")
    print(f"fingerprint  {fingerprint(read_signing_public_key(home.signing_public_key))}")
    print(f"Keep a backup of {home.secrets} where only you can read it: without it every site must join anew.")


def _add_approve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", metavar="SITE", help="the site's name, as its join request says it")
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="its SITE.join.yaml, or site.pub")
    _add_home(parser)
    parser.set_defaults(act=_approve)


def _approve(options: argparse.Namespace) -> None:
    from server.approval import approve
    from server.audit import coordinator_log
    from server.home import Home

    home = Home.chosen(options.home)
    note = coordinator_log(home.audit).record
    done = approve(home, options.site, options.key, now=datetime.now(UTC), note=note)
    print(f"{done.site}: approved" if done.is_new else f"{done.site}: was approved before, with the same key")
    print(f"fingerprint  {done.fingerprint}")
    print(f"welcome      {done.welcome}")
    print(COMPARE)


def _add_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", metavar="SITE")
    parser.add_argument("--yes", action="store_true", help="do it: neither this name nor this key is ever given again")
    _add_home(parser)
    parser.set_defaults(act=_revoke)


def _revoke(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from server.approval import require_known, revoke
    from server.audit import coordinator_log
    from server.home import Home

    home = Home.chosen(options.home)
    if not options.yes:
        require_known(home, options.site)
        typed = "" if options.home is None else f" --home {shlex.quote(str(options.home))}"
        raise ConfigError(
            f"'{options.site}': would be shut out at once and for ever, for neither this name nor its key is given "
            f"again; see `unimiss-server sites`. To do it: unimiss-server revoke {options.site} --yes{typed}"
        )
    is_new = revoke(home, options.site, note=coordinator_log(home.audit).record)
    said = "shut out from its next request on" if is_new else "was revoked before"
    print(f"{options.site}: {said}")


def _add_sites(parser: argparse.ArgumentParser) -> None:
    _add_home(parser)
    parser.set_defaults(act=_sites)


def _sites(options: argparse.Namespace) -> None:
    from server.approval import standing
    from server.home import Home

    for line in standing(Home.chosen(options.home), now=datetime.now(UTC)):
        print(line)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    from unimiss_core.audit_report import add_options

    parser.add_argument("study", nargs="?", metavar="STUDY", help="show its run's log in place of this coordinator's")
    _add_home(parser)
    add_options(parser)
    parser.set_defaults(act=_audit)


def _audit(options: argparse.Namespace) -> None:
    """Raises ConfigError, and AuditError where the log is damaged."""
    from server.audit import coordinator_log, summary
    from server.home import Home
    from unimiss_core import audit_report

    home = Home.chosen(options.home)
    path = home.audit if options.study is None else home.run(options.study) / "audit.jsonl"
    if options.study is not None and not path.exists():
        begun = ", ".join(sorted(folder.name for folder in home.runs.iterdir())) if home.runs.is_dir() else ""
        raise ConfigError(f"'{options.study}': no run of it was begun here; begun were: {begun or 'none'}")
    audit_report.show(coordinator_log(path), options, summary)


def _add_renew(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also those that last")
    _add_home(parser)
    parser.set_defaults(act=_renew)


def _renew(options: argparse.Namespace) -> None:
    from server.approval import renew
    from server.audit import coordinator_log
    from server.home import Home

    home = Home.chosen(options.home)
    made = renew(home, now=datetime.now(UTC), every=options.all, note=coordinator_log(home.audit).record)
    print("\n".join(made) or "nothing runs out soon")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="what all sites agree on")
    parser.add_argument("--verbose", action="store_true", help="log what is done")
    _add_home(parser)
    parser.set_defaults(act=_run)


def _run(options: argparse.Namespace) -> None:
    """Raises as `server.run_command.run`."""
    from server.superlink import QUIET

    os.environ.update(QUIET)  # before anything of Flower is imported
    from server.audit import coordinator_log
    from server.display import Display
    from server.home import Home
    from server.run_command import run

    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would write a line for each request
    home = Home.chosen(options.home)
    with Display() as display:
        composed = run(home, options.study, note=coordinator_log(home.audit).record)
    display.summarise(composed.folder.path)


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_home(parser)
    parser.set_defaults(act=_status)


def _status(options: argparse.Namespace) -> None:
    from server.home import Home
    from server.run_command import runner
    from server.running import status

    home = Home.chosen(options.home)
    for line in status(home, at_work=runner(home) is not None, now=datetime.now(UTC)):
        print(line)


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_home(parser)
    parser.set_defaults(act=_stop)


def _stop(options: argparse.Namespace) -> None:
    from server.audit import coordinator_log
    from server.home import Home
    from server.run_command import stop

    home = Home.chosen(options.home)
    print("stopped" if stop(home, note=coordinator_log(home.audit).record) else "no run was at work")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="the study's name")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new or empty")
    parser.add_argument("--round", type=int, metavar="N", help="default: the newest")
    _add_home(parser)
    parser.set_defaults(act=_export)


def _export(options: argparse.Namespace) -> None:
    from server.audit import coordinator_log
    from server.export import export
    from server.home import Home

    home = Home.chosen(options.home)
    note = coordinator_log(home.audit).record
    exported = export(home, options.study, options.out, round=options.round, note=note)
    print(f"{options.out}: round {exported.round} of {options.study}; README.md is its model card")
    print(f"Who receives it needs {home.signing_public_key}, by another way: unimiss verify {options.out} --key FILE")


COMMANDS: Mapping[str, Command] = {
    "init": Command("make a coordinator's folder, with keys and certificates of its own", _add_init, {8}),
    "approve": Command("let a site take part, by its key", _add_approve, {8}),
    "revoke": Command("shut a site out, at once and for ever", _add_revoke, {8}),
    "sites": Command("list who was approved or revoked", _add_sites),
    "audit": Command("say what was done here, or in a study's run; verifies the log", _add_audit, {8}),
    "renew": Command("make certificates anew that will soon run out", _add_renew, {8}),
    "run": Command("run a study to its last round, or go on with it", _add_run, {4, 5, 8}),
    "status": Command("say how runs, processes and sites stand; from any terminal", _add_status),
    "stop": Command("end the run at work; `run` goes on with it later", _add_stop, {8}),
    "export": Command("write a study's model as a folder to hand on", _add_export, {4, 8}),
}


if __name__ == "__main__":
    sys.exit(main())
