"""The `unimiss-site` command: what a hospital's operator types."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from client import daemon_command
from unimiss_core.commands import Command, Program
from unimiss_core.errors import ConfigError, NoUsableScanError

if TYPE_CHECKING:  # readers take a second to import: not for a wrong command line, and only where Ctrl-C is handled
    from rich.console import Console

    from client.site_check import CheckReport
    from client.site_config import DataSource
    from unimiss_core.study import StudyConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (`unimiss_core.commands`)."""
    return Program("unimiss-site", "Run a site of a federated study.", COMMANDS).run(arguments)


def _add_site_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", type=Path, nargs="?", metavar="SITE.yaml", help="the site file (default: --home's)")
    daemon_command.add_home(parser)


def _site_file(options: argparse.Namespace) -> Path:
    """The one that was named, or that of the site's folder. Raises ConfigError."""
    from client.home import Home

    site: Path | None = options.site
    return site or Home.chosen(options.home).site


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--name", required=True, metavar="NAME", help="what coordinator and reports call this site")
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="the state folder that this site had under another name: its ledger and audit log go on",
    )
    parser.set_defaults(act=_init)


def _init(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from client.audit import log_of
    from client.home import PATIENTS_OF_BEFORE, Home
    from client.joining import begin

    site_file = Home(options.folder).site
    begun = begin(
        options.folder,
        options.name,
        state=options.state,
        note=lambda kind, facts: log_of(site_file).record(kind, facts),
    )
    print(f"{begun.home.path}: the site {options.name}; its private key stays in {begun.home.keys}")
    print(f"fingerprint  {begun.fingerprint}")
    print(f"Give {begun.join_request} to the coordinator's operator, and read the fingerprint to them by telephone.")
    if options.state is None:
        print(f"Then fill in {begun.home.site}. {PATIENTS_OF_BEFORE}")
    else:
        print(f"Then fill in {begun.home.site}: data, and privacy, policy, ledger and state_key as the site file of")
        print("before has them. Ledger and audit log of before go on.")


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("welcome", type=Path, metavar="WELCOME.yaml", help="as the coordinator's operator sent it")
    daemon_command.add_home(parser)
    parser.set_defaults(act=_join)


def _join(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from client.audit import log_of
    from client.home import Home
    from client.joining import join

    home = Home.chosen(options.home)
    joined = join(home, options.welcome, note=log_of(home.site).record)
    print(f"{joined.site}: {'joined' if joined.is_new else 'has a new welcome of'} the coordinator at {joined.address}")
    print(f"fingerprint  {joined.fingerprint}")
    print(
        "Before the first run, compare it by telephone with the coordinator's operator, on a number that you know from "
        "elsewhere: who could change the file on its way could have put in another key."
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="DATA",
        help="a folder of scans, or a site file (.yaml); without it, all of this site: its machine, its line to the "
        "coordinator, and the scans of its file",
    )
    daemon_command.add_home(parser)
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the account as JSON")
    parser.add_argument("--save-nifti", type=Path, metavar="DIR", help="write what the model would see as NIfTI")
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="write a contact sheet")
    parser.add_argument("--study", type=Path, metavar="STUDY.yaml", help="prepare scans as this study says")
    parser.add_argument("--show-paths", action="store_true", help="name files; the report is then for this site only")
    parser.set_defaults(act=_check)


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError: no such folder or file, the machine is not ready, or the site would refuse the study;
    NoUsableScanError: nothing in it can be used."""
    from rich.console import Console

    from client import site_check
    from client.home import Home
    from unimiss_core.config import load
    from unimiss_core.study import PlanConfig, StudyConfig

    data, amiss = options.data, 0
    if data is None:
        home = Home.chosen(options.home)
        data, amiss = home.site, daemon_command.show_readiness(home)
    sources, processes = _sources(data)
    study = load(StudyConfig, options.study) if options.study else None
    for file in (options.report, options.preview):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: its folder does not exist; create it first")
    if options.save_nifti is not None:
        try:
            options.save_nifti.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--save-nifti {options.save_nifti}: cannot be made ({error.strerror})") from None
    with _bar() as show:
        report = site_check.check(
            sources,
            study.plan if study else PlanConfig(),
            by_patient=study is not None and study.privacy.mode == "patient",
            processes=processes,
            nifti_folder=options.save_nifti,
            preview=options.preview,
            show=show,
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(site_check.tables(report, show_paths=options.show_paths))
    is_refused = data.is_file() and _say_terms(data, console, report, study)
    if options.report is not None:
        _write(options.report, json.dumps(site_check.as_json(report, show_paths=options.show_paths), indent=1) + "\n")
    if not report.used:
        said = (
            "the table says why, and --show-paths names the files" if report.files_seen else "there is no file to read"
        )
        raise NoUsableScanError(f"no usable scan; {said}")
    ends = [f"{amiss} of what stands above the scans must be mended before this site can take part"] if amiss else []
    ends += ["this study would be refused, for what is said above"] if is_refused else []
    if ends:
        raise ConfigError("\n".join(ends))


def _say_terms(site_file: Path, console: "Console", report: "CheckReport", study: "StudyConfig | None") -> bool:
    """Which studies a site takes part in, what its file says otherwise than was found, and why it would refuse `study`;
    whether it would. Raises LedgerError, and ConfigError where its table of labels is wrong."""
    from client import policy
    from client.ledger import ledger_of
    from client.obstacles import obstacles
    from client.site_check import otherwise_declared
    from client.site_config import load_site
    from client.site_labels import labels_told
    from client.terms import terms

    site = load_site(site_file)
    ledger = ledger_of(site)
    said = [
        *policy.in_words(site.policy),
        *labels_told(site, study),
        *terms(site, ledger, unowned=report.unowned),
        *otherwise_declared(report, site.privacy),
    ]
    refused = list(obstacles(site, study, ledger, ranks=report.ranks, unowned=report.unowned)) if study else []
    if study is not None:
        said.append(f"Study '{study.name}' ({study.digest()}) would be {'refused:' if refused else 'let in.'}")
    console.print(*said, *(f"- {line}" for line in refused), sep="\n", markup=False, highlight=False)
    return bool(refused)


def _add_ledger(parser: argparse.ArgumentParser) -> None:
    _add_site_file(parser)
    parser.add_argument("--study", type=Path, metavar="STUDY.yaml", help="say how many rounds of it the limits allow")
    parser.add_argument(
        "--begin-anew",
        action="store_true",
        help="where the ledger was lost or put back: go on from what there is (docs/privacy.md, 'The ledger', first)",
    )
    parser.set_defaults(act=_ledger)


def _ledger(options: argparse.Namespace) -> None:
    """Raises as `client.ledger_report.show`."""
    from rich.console import Console

    from client import ledger_report

    if options.begin_anew:
        print(ledger_report.begin_anew(_site_file(options)))
    ledger_report.show(_site_file(options), options.study, Console(width=None if sys.stdout.isatty() else 120))


def _add_audit(parser: argparse.ArgumentParser) -> None:
    from unimiss_core.audit_report import add_options

    parser.add_argument("site", type=Path, nargs="?", metavar="SITE.yaml", help="the site file, if not the home's")
    daemon_command.add_home(parser)
    add_options(parser)
    parser.set_defaults(act=_audit)


def _audit(options: argparse.Namespace) -> None:
    """Raises ConfigError, and AuditError where the log is damaged."""
    from client.audit import log_of, summary
    from client.home import Home
    from unimiss_core import audit_report

    audit_report.show(log_of(options.site or Home.chosen(options.home).site), options, summary)


def _add_make_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a new file, on another disk than the state folder")
    parser.set_defaults(act=_make_key)


def _make_key(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from unimiss_core.sealing import make_key

    make_key(options.file)
    print(f"{options.file}: a new key; write it into the site file as state_key, and keep a copy elsewhere:")
    print("without it the site begins anew, and nothing that was sealed can be opened by anybody")


def _add_clear(parser: argparse.ArgumentParser) -> None:
    _add_site_file(parser)
    parser.set_defaults(act=_clear)


def _clear(options: argparse.Namespace) -> None:
    """Raises ConfigError, and AuditError where nothing can be written down: then all stays as it is. Of one that was
    written down and could not be done the log says more than was done, and the next try is written down, too."""
    from client.audit import log_of
    from client.hold import Hold
    from client.site_config import load_site

    site_file = _site_file(options)
    site = load_site(site_file, reads_scans=False)
    log_of(site_file).record("clear")
    is_cleared = Hold(site).clear()
    if is_cleared:
        print(f"{site.name}: private rounds may begin again; the next one that fails holds them anew")
    else:
        print(f"{site.name}: nothing is held, for no private round failed or died since a person last looked")


def _sources(data: Path) -> tuple[Sequence["DataSource"], int | None]:
    """What to read, and with how many processes."""
    from client.execution import look_over
    from client.site_config import DataSource, load_site

    if data.is_dir():
        return (DataSource(folder=data.absolute()),), None
    if data.is_file() and data.suffix in (".yaml", ".yml"):
        site = load_site(data)
        look_over(site)
        return site.data, site.workers
    if not data.exists():
        raise ConfigError(f"{data}: does not exist; give a folder of scans or a site file (.yaml)")
    raise ConfigError(f"{data}: expected a folder of scans or a site file (.yaml), and it is neither")


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total or None)


def _write(path: Path, text: str) -> None:
    try:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


COMMANDS: Mapping[str, Command] = {
    "init": Command("make a site's folder, with a key pair that never leaves it", _add_init, {8}),
    "join": Command("trust the coordinator that sent this welcome", _add_join, {8}),
    "check": Command(
        "look at this machine, its line to the coordinator and its scans; no scan leaves", _add_check, {3, 6}
    ),
    "ledger": Command("say what patients have cost, and what is left; verifies the ledger", _add_ledger, {6, 8}),
    "audit": Command("say what was asked of this site and what left it; verifies the log", _add_audit, {8}),
    "make-key": Command("make a key to seal this site's own files with (state_key)", _add_make_key),
    "clear": Command(
        "let private rounds begin again after one has failed; where nothing is held, there is nothing to do",
        _add_clear,
        {8},
    ),
    "run": Command("take part: the daemon, until it is told to stop", daemon_command.add_run, {8}),
    "status": Command("how the daemon is doing, and whether it reaches the coordinator", daemon_command.add_status),
    "leave": Command("stop, and destroy this site's keys", daemon_command.add_leave, {8}),
}


if __name__ == "__main__":
    sys.exit(main())
