"""Scans that a table names for a model to be asked about: a line for each, with a column for each of its channels.

Of all ways to give a model its scans the one in which nothing is guessed by names of files, and the only one in which
DICOM series can be channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from client.candidates import Candidate, Channel, LeftOut
from client.catalogue import Catalogue, only_one
from client.channel_reading import is_unlike
from client.channels import holds_several, whole
from client.csv_tables import SURPLUS, refuse, require_columns, rows_of, wrong_paths
from client.reading import report_looked
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError, ScanError

SCAN = "scan"
"""The column of a model that reads one image or volume, unless another is named."""
_ENDINGS = (".csv", ".tsv")


def is_table(scans: Path) -> bool:
    """Whether this names cases and is none itself, by its name: what a table looks like, other files may, too."""
    return scans.suffix.lower() in _ENDINGS and scans.is_file()


@dataclass(frozen=True)
class CaseTable:
    path: Path
    folder: Path
    """What its paths begin from."""
    columns: tuple[str, ...]
    """Of each channel, in their order."""

    @classmethod
    def of(cls, path: Path, folder: Path | None, said: Sequence[str], channels: Sequence[str]) -> "CaseTable":
        """folder: None is the table's own. said: COLUMN for a model without channels, CHANNEL=COLUMN for one with
        `channels`, of which those without are called as their column. Raises ConfigError."""
        folder = path.parent if folder is None else folder
        if not folder.is_dir():
            raise ConfigError(f"--root: {folder} is no folder; paths of the table begin from it")
        return cls(path, folder, _columns(said, channels) if channels else _column(said))


def cases_of_table(table: CaseTable, channels: Sequence[Channel], *, interpolate: bool) -> Catalogue:
    """A scan for each line, by the headers of its files; or why it cannot be used, by its first channel that cannot.

    A cell is the path of a file, or of the folder of one DICOM series. The same file in each column holds the channels
    as its volumes. Left out are a line that lacks a channel, its cell being blank (`lacks_channel`), one of which DICOM
    says that it is no such channel (`unlike_channel`), and what `catalogue.read_one` does not read. channels: as many
    as the table's columns. Raises ConfigError: it is no table of paths; nothing has been looked at.
    """
    columns, rows = rows_of(table.path, named=table.path.name)
    way_out = "name a column with --scan, of several channels as --scan CHANNEL=COLUMN"
    require_columns(table.path.name, columns, table.columns, way_out)
    if not rows:
        raise ConfigError(f"table {table.path.name}: holds no rows")
    problems = [f"line {row.number}: {SURPLUS}" for row in rows if row.has_surplus]
    problems += [f"line {row.number}: {said}" for row in rows for said in _wrong(row.cells, table.columns)]
    refuse(f"table {table.path.name}", problems)
    candidates: list[Candidate] = []
    left_out: list[LeftOut] = []
    looked = 0
    for row in rows:
        cells = [row.cells[column] for column in table.columns]
        looked += len(set(cells) - {""})
        try:
            candidates.append(replace(_case(table.folder, cells, channels, interpolate=interpolate), line=row.number))
        except ScanError as error:
            files = tuple(dict.fromkeys(filter(None, cells)))
            left_out.append(LeftOut(table.folder, files, error.reason, line=row.number))
        report_looked(looked)
    return Catalogue(tuple(candidates), tuple(left_out), (), files_seen=looked)


def _wrong(cells: Mapping[str, str], columns: Sequence[str]) -> Iterator[str]:
    """A line that says nothing at all is a mistake; one channel of several may be what a patient lacks."""
    filled = [column for column in columns if cells[column]] or columns[:1]
    return wrong_paths(cells, filled, columns)


def _case(folder: Path, cells: Sequence[str], channels: Sequence[Channel], *, interpolate: bool) -> Candidate:
    """Raises ScanError."""
    if "" in cells:
        raise ScanError("lacks_channel")
    if len({PurePosixPath(cell) for cell in cells}) == 1 < len(cells):
        one = only_one(folder / cells[0])
        if not holds_several(one):
            raise ScanError("lacks_channel")
        parts = [replace(one, volume=of.number, modality=of.modality or one.modality) for of in channels]
    else:
        pairs = zip(cells, channels, strict=True)
        parts = [_part(folder / cell, channel, interpolate=interpolate) for cell, channel in pairs]
    files = dict.fromkeys(path.relative_to(folder).as_posix() for part in parts for path in part.paths)
    return replace(whole(parts), folder=folder, files=tuple(files))


def _part(path: Path, channel: Channel, *, interpolate: bool) -> Candidate:
    one = only_one(path, channel.modality, interpolate=interpolate)
    if is_unlike(channel.name, one.modality) and one.format == "dicom":
        raise ScanError("unlike_channel")
    return one


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
