"""What each file is, by its content: DICOM, NIfTI or a picture by its header, or the reason why it is none of these."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client import dicom, nifti, pictures, workers
from client.candidates import Format
from client.dicom_bytes import looks_like_dicom
from client.series import Header
from unimiss_core.errors import ScanError

FEW_FILES = 256
FEW_BYTES = 256 * 2**20
"""Up to so much is read in this process, unless native codecs take part: workers take a second to start."""

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
"""What a picture or NIfTI must not be called: then something went wrong where it was written."""


@dataclass(frozen=True)
class Plain:
    """A NIfTI file or picture by its header."""

    file: str
    format: Format
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    flags: tuple[str, ...] = ()
    compressed: bool = False
    """As `Candidate.compressed`."""


def bytes_of(paths: Iterable[Path]) -> int:
    """As they are stored; none for what cannot be asked."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


@dataclass(frozen=True)
class Look:
    """A file to be looked at."""

    folder: Path
    file: str
    secret: bytes


def look(task: Look) -> Header | Plain:
    """`look_at` for a worker."""
    return look_at(task.folder, task.file, task.secret)


def look_at(folder: Path, file: str, secret: bytes) -> Header | Plain:
    """What the file below `folder` is, by its content. Raises ScanError where it is nothing that can be read."""
    path = folder / file
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # a link that is there leads nowhere
        raise ScanError("cannot_open" if path.is_symlink() else "missing_file") from None
    if stat.S_ISDIR(status.st_mode):
        raise ScanError("linked_folder" if path.is_symlink() else "cannot_open")
    if not stat.S_ISREG(status.st_mode):
        raise ScanError("not_an_image")  # a pipe would block its reader for ever
    if status.st_size == 0:
        raise ScanError("empty_file")
    with path.open("rb") as stream:
        start = stream.read(348)
    # A DICOM file may look like a TIFF too: its first 128 bytes are free for that.
    if start[128:132] != b"DICM" and (pictures.looks_like_picture(start) or nifti.looks_like_nifti(start)):
        if path.suffix.lower() in _DICOM_SUFFIXES:
            raise ScanError("name_contradicts_content")
        return _plain(path, file, start)
    if looks_like_dicom(start):
        return dicom.read_header(path, file, secret)
    raise ScanError("not_an_image")


def _plain(path: Path, file: str, start: bytes) -> Plain:
    if pictures.looks_like_picture(start):
        shape, compressed = pictures.check_header(path), pictures.may_take_long(path)
        return Plain(file, "picture", shape, (1.0, 1.0), ("spacing_unknown",), compressed)
    volume, spacing_mm, flags = nifti.check_header(path)
    return Plain(file, "nifti", volume, spacing_mm, flags)


def looks(
    tasks: Sequence[Look], *, processes: int | None, isolate: bool
) -> Iterator[tuple[int, Header | Plain | ScanError]]:
    """(index of the task, what `look` says), as they end."""
    few = len(tasks) <= FEW_FILES and bytes_of(task.folder / task.file for task in tasks) <= FEW_BYTES
    # A header takes a millisecond or two, a worker half a second to start.
    count = min(processes or os.cpu_count() or 1, 1 + len(tasks) // 128)
    return workers.run_here(look, tasks) if few and not isolate else workers.run(look, tasks, workers=count)
