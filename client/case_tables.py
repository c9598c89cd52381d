"""Scans that a table names for a model to be asked about: a line for each, with a column for each of its channels.

Of all ways to give a model its scans the one in which nothing is guessed by names of files, and the only one in which
DICOM series can be channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from client.candidates import Candidate, Channel, LeftOut
from client.catalogue import Catalogue, catalogue_each, only_of
from client.channel_reading import is_unlike
from client.channels import holds_several, tell_which_is_which, whole
from client.csv_tables import SHOWN, SURPLUS, refuse, require_columns, rows_of, wrong_paths
from client.reading import report_looked
from unimiss_core import progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.scan import Modality

SCAN = "scan"
"""The column of a model that reads one image or volume, unless another is named."""
_ENDINGS = (".csv", ".tsv")

Named = tuple[Path, Modality | None]
"""A file or a series' folder, and what it is taken for where it does not say it."""


def is_table(scans: Path) -> bool:
    """Whether this names scans and is none itself, by its own name: text may be anything."""
    return scans.suffix.lower() in _ENDINGS and not scans.is_dir()


@dataclass(frozen=True)
class CaseTable:
    """What a table says, before any file is looked at."""

    folder: Path
    """What its paths begin from."""
    lines: Mapping[int, tuple[str, ...]]
    """Line, as it is numbered -> its path for each channel, blank where there is none."""

    @classmethod
    def of(cls, path: Path, folder: Path | None, said: Sequence[str], channels: Sequence[str]) -> "CaseTable":
        """folder: None is the table's own. said: COLUMN for a model without channels, CHANNEL=COLUMN for one with
        `channels`, of which those without are called as their column. Raises ConfigError: what is wrong with any of it.
        """
        if not path.is_file():
            raise ConfigError(f"{path}: does not exist; give a folder of scans, one file, or a table of paths")
        folder = path.parent if folder is None else folder
        if not folder.is_dir():
            raise ConfigError(f"--root: {folder} is no folder; paths of the table begin from it")
        wanted = _columns(said, channels) if channels else _column(said)
        columns, rows = rows_of(path, named=path.name)
        way_out = "name a column with --scan, of several channels as --scan CHANNEL=COLUMN"
        require_columns(path.name, columns, wanted, way_out)
        if not rows:
            raise ConfigError(f"table {path.name}: holds no rows")
        problems = [f"line {row.number}: {SURPLUS}" for row in rows if row.has_surplus]
        problems += [f"line {row.number}: {told}" for row in rows for told in _wrong(row.cells, wanted)]
        refuse(f"table {path.name}", problems)
        if channels:
            pairs = zip(channels, wanted, strict=True)
            told = ", ".join(f"{on_one_line(name)} is column '{on_one_line(column)}'" for name, column in pairs)
            progress.report(progress.Note(f"channels: {told}"))
        return cls(folder, {row.number: tuple(row.cells[column] for column in wanted) for row in rows})


def cases_of_table(table: CaseTable, channels: Sequence[Channel], *, interpolate: bool) -> Catalogue:
    """A scan for each line, by the headers of its files; or why it cannot be used, by its first channel that cannot.

    A cell is the path of a file, or of the folder of one DICOM series. The same file in each column holds the channels
    as its volumes. Left out are a line that lacks a channel, its cell being blank, say (`lacks_channel`), one of which
    DICOM says that it is no such channel (`unlike_channel`), and what `catalogue.read_one` does not read. channels: as
    many as a line has paths. Notes tell which volume is which channel, and which lines are hardly one patient's.
    """
    named = {line: _named(table.folder, cells, channels) for line, cells in table.lines.items()}
    paths = list(dict.fromkeys(one for of_line in named.values() for one in of_line))
    found = dict(zip(paths, catalogue_each(paths, interpolate=interpolate, looked=report_looked), strict=True))
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    for line, of_line in named.items():
        try:
            parts = _parts([found[one] for one in of_line], channels)
        except ScanError as error:
            left_out.append(LeftOut(table.folder, tuple(filter(None, table.lines[line])), error.reason, line=line))
        else:
            candidates.append(replace(whole(parts, table.folder), line=line))
    _tell_of(candidates, channels)
    if not candidates and all(one.reason == "missing_file" for one in left_out):
        told = "nothing lies where the table says, below the folder that its paths begin from; --root names another"
        progress.report(progress.Note(told))
    return Catalogue(tuple(candidates), tuple(left_out), (), sum(one.files_seen for one in found.values()))


def _named(folder: Path, cells: Sequence[str], channels: Sequence[Channel]) -> list[Named]:
    """One where all cells name it, for its volumes; none where a cell is blank, for then nothing is read."""
    if "" in cells:
        return []
    if len({PurePosixPath(cell) for cell in cells}) == 1 < len(cells):
        return [(folder / cells[0], None)]
    return [(folder / cell, channel.modality) for cell, channel in zip(cells, channels, strict=True)]


def _parts(found: Sequence[Catalogue], channels: Sequence[Channel]) -> list[Candidate]:
    """The scan of each channel, of what was found for a line. Raises ScanError."""
    if not found:
        raise ScanError("lacks_channel")
    if len(found) < len(channels):
        one = only_of(found[0])
        if not holds_several(one):
            raise ScanError("lacks_channel")
        return [replace(one, volume=of.number, modality=of.modality or one.modality) for of in channels]
    parts = [only_of(of_path) for of_path in found]
    pairs = zip(channels, parts, strict=True)
    if any(part.format == "dicom" and is_unlike(channel.name, part.modality) for channel, part in pairs):
        raise ScanError("unlike_channel")
    if len({part.paths for part in parts}) < len(parts):  # by itself here, and there by its folder
        raise ScanError("lacks_channel")
    return parts


def _tell_of(candidates: Sequence[Candidate], channels: Sequence[Channel]) -> None:
    """What a person should look at, for nothing says that it is wrong."""
    of_several = [one for one in candidates if len(one.parts) > 1 and any(map(holds_several, one.parts))]
    in_one_file = {one.line for one in of_several if len({part.paths for part in one.parts}) == 1}
    tell_which_is_which(channels, of_files=False, of_volumes=bool(in_one_file), others=0)
    _warn(
        [one.line for one in of_several if one.line not in in_one_file],
        "name a file of several volumes beside others, of which the first volume is read",
    )
    # Not refused: series may have been given pseudonyms one by one.
    patients = {one.line: {part.patient for part in one.parts if part.format == "dicom"} for one in candidates}
    _warn(
        [line for line, known in patients.items() if len(known) > 1],
        "hold series of which DICOM does not say that they are of one patient; see that the table pairs them rightly",
    )


def _warn(lines: Sequence[int], what: str) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:SHOWN])) + (" and others" if len(lines) > SHOWN else "")
        progress.report(progress.Note(f"WARNING: {len(lines)} line(s) ({shown}) {what}"))


def _wrong(cells: Mapping[str, str], columns: Sequence[str]) -> Iterator[str]:
    """A line that says nothing at all is a mistake; one channel of several may be what a patient lacks."""
    filled = [column for column in columns if cells[column]] or columns[:1]
    return wrong_paths(cells, filled, columns)


def _column(said: Sequence[str]) -> tuple[str]:
    if len(said) > 1:
        raise ConfigError(f"--scan: {len(said)} columns, but the model reads one image or volume; name one")
    return (said[0] if said else SCAN,)


def _columns(said: Sequence[str], channels: Sequence[str]) -> tuple[str, ...]:
    by_channel: dict[str, str] = {}
    for text in said:
        name = next((one for one in channels if text.startswith(f"{one}=")), None)
        if name is None or name in by_channel:
            names = ", ".join(map(on_one_line, channels))
            raise ConfigError(f"--scan: give CHANNEL=COLUMN, once for each of {names} whose column has another name")
        by_channel[name] = text.removeprefix(f"{name}=")
    return tuple(by_channel.get(name, name) for name in channels)
