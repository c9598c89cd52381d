"""`unimiss-simulate CONFIG --out DIR [--resume]`: a federation on this machine, watched while it runs."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Before anything of Flower is imported: it would call home.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
# Before torch is: threads that wait for each other by spinning take five times as long where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from unimiss_core.errors import UnimissError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `unimiss_core.errors`)."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except UnimissError as error:
        way_on = f"\nGo on with: {_resume_line(options)}" if error.resumes else ""
        print(f"unimiss-simulate: {error}{way_on}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        # A full disk, a folder that may not be written: what was finished is whole, and resuming goes on from it.
        print(
            f"unimiss-simulate: {error.strerror} while writing below {options.out}; mend it, then: "
            f"{_resume_line(options)}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is saved. Go on with: {_resume_line(options)}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    # Here, because torch and Flower take seconds to import: arguments are checked before, and Ctrl-C is heard.
    from server.display import Display
    from server.simulate import simulate

    logging.basicConfig(level=logging.DEBUG if options.verbose else logging.ERROR, format="%(name)s: %(message)s")
    logging.getLogger("flwr").setLevel(logging.DEBUG if options.verbose else logging.ERROR)
    with Display() as display:
        simulate(options.config, options.out, resume=options.resume)
    display.summarise(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimiss-simulate",
        description="Run a federation on this machine: every site with its own site file, the ordinary apps.",
        epilog="Exit codes: 0 finished, 1 another error, 2 wrong configuration, or a site that cannot take part where "
        "the file has no `quorum`, 4 bad checkpoint, 5 a round could not be completed, as where no site has a usable "
        "scan, 8 the run's audit log is damaged or cannot be written to, 130 interrupted.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="e.g. configs/simulation/demo.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the run and its artefacts")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an unfinished run in DIR; start afresh where there is none"
    )
    parser.add_argument("--verbose", action="store_true", help="log what the apps do")
    return parser


def _resume_line(options: argparse.Namespace) -> str:
    return shlex.join([sys.argv[0], str(options.config), "--out", str(options.out), "--resume"])


if __name__ == "__main__":
    sys.exit(main())
