"""What a scan's answers are called after its own files. Only where that is asked for: such names may name patients."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from client.candidates import Candidate
from client.channels import case_of
from unimiss_core.errors import ConfigError

_ENDINGS = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm")


def without_ending(path: Path) -> str:
    """A file's name without the ending of its format."""
    ending = next((one for one in _ENDINGS if path.name.lower().endswith(one)), "")
    return path.name[: len(path.name) - len(ending)]


def names_by_number(scans: Iterable[tuple[int, Candidate]], *, keeps_ending: bool) -> Mapping[int, str]:
    """Number of a scan -> what it is called: as its file, without the ending unless it `keeps_ending`; of a series as
    its folder, of several channels' files as their case. Raises ConfigError, which names no file: two would be called
    alike, perhaps on a disk that knows no capitals."""
    names: dict[int, str] = {}
    first: dict[str, int] = {}
    for number, scan in scans:
        names[number] = name = _name_of(scan, keeps_ending=keeps_ending)
        if (other := first.setdefault(name.casefold(), number)) != number:
            raise ConfigError(
                f"--names input: scans {other} and {number} would be called alike, and there may be others; rename "
                "files or folders, predict each folder by itself, or leave --names out (--show-paths says which scan "
                "is which)"
            )
    return names


def _name_of(scan: Candidate, *, keeps_ending: bool) -> str:
    path = scan.paths[0]
    if len(scan.first.files) > 1:
        return path.parent.resolve().name or path.name
    if len(scan.files) > 1:
        return case_of(path.name)
    return path.name if keeps_ending else without_ending(path) or path.name
