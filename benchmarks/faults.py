"""Faults and hostile peers of a whole federation on loopback: what ends how, what was lost, and who wrote it down.

    python -m benchmarks.faults --list
    python -m benchmarks.faults                              all of them: an hour and more on two cores
    python -m benchmarks.faults site-killed network-cut --json faults.json

A federation is what its operators start (benchmarks/deployed.py): one coordinator and sites, each of several processes,
with TLS and keys. The faults are in benchmarks/fault_cases.py, the hostile peers in benchmarks/hostile_cases.py. Full
disks are file systems in memory, mounted in a namespace of this program's own. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import fault_cases, hostile_cases
from benchmarks.deployed import DeploymentError
from benchmarks.fault_cases import NotRunError, Outcome
from benchmarks.hostile_cases import Refused
from unimiss_core.errors import UnimissError

UPDATES = "hostile-updates"
NAMES = (*fault_cases.CASES, *hostile_cases.CASES, UPDATES)
_APART = "UNIMISS_FAULTS_APART"


@dataclass(frozen=True)
class Missed:
    """A case without an outcome. why: the machine does not allow it, or what went wrong."""

    case: str
    why: str


Row = Outcome | Refused | Missed


def measured(names: Sequence[str], folder: Path) -> Iterator[Row]:
    for name in names:
        if name in fault_cases.CASES:
            yield from _caught(name, lambda name=name: [fault_cases.run_case(name, folder / name)])  # type: ignore[misc]
    if hostile := [name for name in hostile_cases.CASES if name in names]:
        yield from _caught("hostile peers", lambda: _on_stage(hostile, folder / "hostile"))
    if UPDATES in names:
        yield from _caught(UPDATES, lambda: hostile_cases.hostile_updates(folder / UPDATES))


def _on_stage(names: Sequence[str], folder: Path) -> Iterator[Row]:
    with hostile_cases.stage(folder) as stage:
        for name in names:
            yield from _caught(name, lambda name=name: [Refused(name, *hostile_cases.CASES[name](stage))])  # type: ignore[misc]


def _caught(name: str, rows: Callable[[], Iterator[Row] | Sequence[Row]]) -> Iterator[Row]:
    """One case that fails must not keep the others from being run."""
    try:
        yield from rows()
    except NotRunError as error:
        yield Missed(name, f"not run: {error}")
    except (DeploymentError, UnimissError, AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        yield Missed(name, f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    faults = Table("fault", "ended", "s", "rounds", "rounds lost", "updates lost", "what happened")
    peers = Table("hostile peer", "what it got", "where it stands")
    missed = Table("case", "no outcome")
    for row in rows:
        if isinstance(row, Outcome):
            figures = (f"{row.seconds:.0f}", row.rounds, row.rounds_lost, row.updates_lost)
            faults.add_row(row.case, row.ended, *map(str, figures), row.lost)
        elif isinstance(row, Refused):
            peers.add_row(row.case, row.answer, row.where or "in no audit log")
        else:
            missed.add_row(row.case, row.why)
    yield from (table for table in (faults, peers, missed) if table.row_count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="Faults and hostile peers.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="name the cases, and nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes, one by one as they come")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(NAMES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list names them")
    if options.list:
        print("\n".join(NAMES))
        return 0
    rows = list(_run(options.cases or NAMES, options.json))
    for table in tables(rows):
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(any(isinstance(row, Missed) and row.why.startswith("FAILED") for row in rows))


def _run(names: Sequence[str], file: Path | None) -> Iterator[Row]:
    began, told = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        for row in measured(names, Path(folder)):
            print(f"{time.monotonic() - began:6.0f} s  {row}", file=sys.stderr, flush=True)
            told.append({"kind": type(row).__name__.lower(), **asdict(row)})
            if file is not None:
                file.write_text(json.dumps(told, indent=1) + "\n")
            yield row


def _go_apart() -> None:
    """Begin anew in a namespace of our own, where this program may mount; where there is none, go on as it is."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if _APART in os.environ or not shutil.which(apart[0]) or subprocess.run([*apart, "true"]).returncode:
        return
    os.environ[_APART] = "1"
    os.execvp(apart[0], [*apart, sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]])


if __name__ == "__main__":
    _go_apart()
    sys.exit(main())
