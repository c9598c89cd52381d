"""metrics.jsonl, a line for each finished round (docs/artefacts.md), as all read it who read it.

A coordinator that is killed, or whose disk is full, can leave a last line that is torn; a disk or a person, any line
that is damaged. Such a line is passed over, and costs no other.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from unimiss_core import durable
from unimiss_core.json_text import value_in

NAME = "metrics.jsonl"

Row = dict[str, Any]


def parsed(path: Path) -> Iterator[Any]:
    """What each line holds, whatever that is; None for one that is no JSON. Raises OSError."""
    return map(_parsed, _lines(path))


def rows(path: Path) -> list[Row]:
    """Lines that name their round. `sites` and `global` are always there, of sites alone those that have a `status`,
    with `diagnostics`. Empty where there is no file."""
    return [_filled(raw) for raw in parsed(path) if _is_row(raw)] if path.exists() else []


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Raises OSError: the file ends where it ended before, if it can still be cut there. ValueError: as `as_line`."""
    with path.open("ab", buffering=0) as file:
        durable.append(cast(BinaryIO, file), as_line(row) + b"\n")


def forget_rounds_after(path: Path, round: int) -> None:
    """Delete lines of later rounds, and a last one that is torn; damaged ones stay as they are. Where there is no file,
    an empty one is made."""
    lines = _lines(path) if path.exists() else []
    if lines and _parsed(lines[-1]) is None and not path.read_bytes().endswith(b"\n"):
        lines.pop()
    _write(path, [line for line in lines if not _is_row(raw := _parsed(line)) or raw["round"] <= round])


def change(path: Path, round: int, by: Callable[[Row], Row]) -> None:
    """Write the lines of a round anew, as `by` gives them; all others stay as they are."""
    found = ((line, _parsed(line)) for line in _lines(path))
    _write(path, [as_line(by(raw)) if _is_row(raw) and raw["round"] == round else line for line, raw in found])


def as_line(row: Mapping[str, Any]) -> bytes:
    """Raises ValueError: a figure is not finite."""
    return json.dumps(row, sort_keys=True, allow_nan=False).encode()


def _lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _write(path: Path, lines: list[bytes]) -> None:
    """Nothing is written where nothing changes."""
    content = b"".join(line + b"\n" for line in lines)
    if not path.exists() or path.read_bytes() != content:
        durable.write_bytes(path, content)


def _parsed(line: bytes) -> Any:
    try:
        return value_in(line.decode(errors="replace"))
    except ValueError:
        return None


def _is_row(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("round"), int)


def _filled(raw: Row) -> Row:
    sites = {
        name: site | {"diagnostics": _object(site.get("diagnostics"))}
        for name, site in _object(raw.get("sites")).items()
        if isinstance(_object(site).get("status"), str)
    }
    return raw | {"sites": sites, "global": _object(raw.get("global"))}


def _object(raw: Any) -> Row:
    return raw if isinstance(raw, dict) else {}
