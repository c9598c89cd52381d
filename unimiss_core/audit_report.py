"""`unimiss-site audit` and `unimiss-server audit`: a log verified from its first line to its last, and shown."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from unimiss_core.chain import Head
from unimiss_core.errors import AuditError, ConfigError

if TYPE_CHECKING:  # pydantic takes a moment to import: not for another command's arguments
    from unimiss_core.audit_log import AuditLog, Entry
    from unimiss_core.chained_log import Chain

NEWEST = 20
"""Entries that are shown where nobody asks for more."""

Summary = Callable[["Sequence[Entry]"], Iterator[str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both commands take besides where the log is."""
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--newest", type=int, default=NEWEST, metavar="N", help=f"entries to show (default: {NEWEST})")
    shown.add_argument("--all", action="store_true", help="show every entry")
    shown.add_argument("--json", action="store_true", help="print every entry as a line of JSON, and nothing else")
    shown.add_argument("--head", action="store_true", help="print the log's head alone: to be noted elsewhere")
    parser.add_argument("--expect", metavar="HEAD", help="a head that was noted before, which must be in the log")


def show(log: "AuditLog[Entry]", options: argparse.Namespace, summary: Summary) -> None:
    """Verify the log, then print what `add_options` asks for. Raises AuditError, ConfigError."""
    chain = log.read()
    if options.expect is not None:
        _check_expected(chain, options.expect)
    for line in _lines(chain, options, summary):
        print(line)


def _lines(chain: "Chain[Entry]", options: argparse.Namespace, summary: Summary) -> Iterator[str]:
    from unimiss_core.audit_log import in_words

    if options.head:
        yield str(chain.head)
        return
    if options.json:
        yield from (json.dumps(entry.model_dump(mode="json", exclude_none=True)) for entry in chain.entries)
        return
    shown = chain.entries if options.all else chain.entries[max(0, len(chain.entries) - options.newest) :]
    yield from map(in_words, shown)
    yield from summary(chain.entries)
    yield f"{len(chain.entries)} entries, the chain is whole; head {chain.head}"


def _check_expected(chain: "Chain[Entry]", noted: str) -> None:
    from unimiss_core.audit_log import WAY_OUT

    try:
        head = Head.of(noted)
    except ValueError:
        raise ConfigError(f"--expect {noted}: expected a head as --head prints it, NUMBER:SHA256") from None
    if not chain.holds(head):
        raise AuditError(
            f"entry {head.seq} with that digest is not in the log, which holds {chain.head.seq}: it was put back to an "
            f"older one, or made up anew; {WAY_OUT}"
        )
