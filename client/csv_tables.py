"""Tables that a hospital or a researcher wrote: CSV in UTF-8 with a header line, cells parted by commas or by tabs.

The header line alone says which: tabs where it has some, and no comma but in quotation marks, as BIDS writes its .tsv
files; commas otherwise, whatever the file is called.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError

SURPLUS = "has more cells than the header line; put quotation marks around a text that holds a comma, or a tab"
"""What is wrong with such a line: which text is which column's cannot be told, whose scan it is least of all."""


_PATH = re.compile(r"[/\\]|\.(nii|gz|png|jpe?g|tiff?|dcm)$", re.IGNORECASE)
"""Of a header's cell: then it names no column."""
SHOWN = 5
"""Problems of a table that a message tells; the others are counted."""


@dataclass(frozen=True)
class Row:
    number: int
    """Line of the file at which it ends, from 1: what messages and results call it."""
    cells: Mapping[str, str]
    """Column -> its text without space around it; empty where the line ends before it."""
    has_surplus: bool
    """Whether there is text beyond the last column."""

    def is_among(self, where: Mapping[str, Sequence[str]]) -> bool:
        """Whether each of these columns holds one of its texts, space around either aside."""
        return all(self.cells[column] in map(str.strip, allowed) for column, allowed in where.items())


def rows_of(table: Path, *, named: str, keeps_bytes: bool = False) -> tuple[tuple[str, ...], list[Row]]:
    """Names of columns, without space around them, and the lines below but those without any text, such as a
    spreadsheet ends a table with.

    named: what messages call it. keeps_bytes: bytes that are no UTF-8 cost the line they stand in, not the table.
    Raises ConfigError: it is no CSV. A quotation mark that nothing closes is told, for it takes all that follows along.
    """
    try:
        errors = "surrogateescape" if keeps_bytes else "strict"
        with table.open(encoding="utf-8-sig", errors=errors, newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, strict=True, restval="", delimiter=_parted_by(header))
            rows = [_row(reader.line_num, raw) for raw in reader]
            columns = tuple(name.strip() for name in reader.fieldnames or ())
    except csv.Error:
        raise ConfigError(
            f"table {named}: line {reader.reader.line_num} is no CSV, or one before it: a quotation mark is open, or "
            "stands within a text, where it must be doubled"
        ) from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"table {named}: cannot be read as a CSV in UTF-8 with a header line") from None
    return columns, [row for row in rows if row.has_surplus or any(row.cells.values())]


def require_columns(named: str, known: Sequence[str], wanted: Iterable[str], way_out: str) -> None:
    """Raises ConfigError: a table so `named` has not each of these columns once, or one column alone."""
    problems = []
    # Where the header line is missing, what stands there instead may name a patient.
    folded = {one.casefold(): one for one in known if not _PATH.search(one)}
    for column in dict.fromkeys(wanted):
        told = on_one_line(column)
        if column not in known:
            near = difflib.get_close_matches(column.casefold(), folded, n=1)
            meant = f" (did you mean '{on_one_line(folded[near[0]])}'?)" if near else ""
            problems.append(f"no column '{told}'{meant}")
        elif known.count(column) > 1:
            problems.append(f"{known.count(column)} columns '{told}'")
    if problems and not folded:
        raise ConfigError(f"table {named}: its first line must name the columns, and is one of paths")
    if problems and len(known) == 1 and any(mark in known[0] for mark in ";\t|"):
        raise ConfigError(f"table {named}: its header is a single column; separate columns by commas")
    if problems:
        raise ConfigError(f"table {named}: {'; '.join(problems)}; {way_out}")


def wrong_paths(cells: Mapping[str, str], columns: Sequence[str], scan_columns: Sequence[str]) -> Iterator[str]:
    """What is wrong with a line's paths in these columns, of which some are a scan's channels; no text of the line is
    told, which could be a patient's."""
    for column in columns:
        path, told = PurePosixPath(cells[column]), on_one_line(column)
        if not cells[column]:
            yield f"'{told}' is blank, and must be a path"
        elif path.is_absolute() or ".." in path.parts or "\0" in cells[column]:
            yield f"'{told}' must be a relative path that stays below the folder"
    named = [PurePosixPath(cells[column]) for column in scan_columns if cells[column]]
    if 1 < len(set(named)) < len(named):
        yield "names one file for two channels; give each a file of its own, or all the same one of as many volumes"


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raises ConfigError: there are some, of which the first are told."""
    if problems:
        more = f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(f"{where}: {len(problems)} problem(s)\n  - " + "\n  - ".join(problems[:SHOWN]) + more)


def _parted_by(header: str) -> str:
    bare = re.sub(r'"[^"]*("|$)', "", header)
    return "\t" if "\t" in bare and "," not in bare else ","


def _row(number: int, raw: dict[str | None, str | list[str]]) -> Row:
    """raw: of `csv.DictReader`, which keeps what is beyond the last column under None."""
    cells = {name.strip(): text.strip() for name, text in raw.items() if name is not None and isinstance(text, str)}
    return Row(number, cells, has_surplus=any(text.strip() for text in raw.get(None, ())))
