"""Every usable scan of some folders, one at a time: what a researcher's commands go through.

Scans are read as they are asked for, so that memory holds one or two, however many there are.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from client import workers
from client.candidates import Candidate, Format
from client.catalogue import Catalogue, catalogue, catalogue_one, read, safe_here
from client.medmnist import who_takes
from client.reasons import REASONS
from client.site_config import DataSource
from unimiss_core import progress
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.scan import Modality, Scan
from unimiss_core.study import PlanConfig

ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class Origin:
    """Where a scan came from: for joining labels at the site; never to be sent or logged."""

    folder: Path
    files: tuple[str, ...]
    """Paths below the folder, in the order of slices or channels."""
    patient: str
    """Key of the patient, comparable within one `Reading`."""
    format: Format
    number: int
    """Place in the order of reading, from 1, among all that looked usable by their headers."""
    frames: tuple[int, ...] = ()
    """Of DICOM: which frames of the files, in the order of slices."""
    line: int = 0
    """Of the table that names it, where one does."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)

    @cached_property
    def key(self) -> str:
        """What the scan is called wherever its files lie: 32 hex digits.

        Of NIfTI and pictures the first half of the file's sha256; of DICOM, and of several channels' files, of the
        sha256 of all files in their order, and the numbers of DICOM's frames.
        """
        digests = []
        for path in self.paths:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if self.format != "dicom" and len(digests) == 1:
            return digests[0][:32]
        return hashlib.sha256(repr((digests, self.frames)).encode()).hexdigest()[:32]


class NotUsed(NamedTuple):
    """Files that belong together, below their folder, and why they are not used."""

    files: tuple[str, ...]
    reason: str
    line: int = 0
    """As of `Origin`."""


@dataclass
class Reading:
    """The scans of folders, in a fixed order, not cached and not yet prepared; and the account of what is left out.

    Pictures and NIfTI volumes come by path, a folder's files before its subfolders, then DICOM series by the path of
    their first file.
    """

    found: Catalogue
    left_out: list[NotUsed] = field(default_factory=list)

    def __post_init__(self) -> None:
        entries = (*self.found.left_out, *self.found.unreadable)
        self.left_out += [NotUsed(entry.files, entry.reason, entry.line) for entry in entries]

    @classmethod
    def of_sources(
        cls,
        sources: Sequence[DataSource],
        plan: PlanConfig | None = None,
        *,
        nameless: bool = False,
        looked: Callable[[int], None] | None = None,
    ) -> "Reading":
        """plan: says whether missing slices may be made up. nameless: DICOM that says no patient is read, too, for it
        does not matter whose it is. looked: called with the number of files looked at as the work goes on. Raises
        ConfigError for a wrong table."""
        interpolate = plan is not None and plan.interpolates
        secret = secrets.token_bytes(32)
        return cls(catalogue(sources, secret, interpolate=interpolate, nameless=nameless, looked=looked))

    @classmethod
    def of_path(cls, path: Path, plan: PlanConfig, modality: Modality | None = None) -> "Reading":
        """Of a folder, or of one file, whosever scans they are. modality: of files that do not say it. Raises
        ConfigError: there is neither."""
        if path.is_dir():
            source = DataSource(folder=path, modality=modality)
            return cls.of_sources([source], plan, nameless=True, looked=report_looked)
        if not path.is_file():
            what = "is neither a folder nor a file" if path.exists() else "does not exist"
            raise ConfigError(f"{path}: {what}; give a folder of scans, or one file")
        return cls(catalogue_one(path, modality, interpolate=plan.interpolates))

    def __len__(self) -> int:
        """Scans that look usable by their headers."""
        return len(self.found.candidates)

    def __iter__(self) -> Iterator[tuple[Origin, Scan]]:
        return self.each(read)

    def each(self, function: Callable[[Candidate], ReadT]) -> Iterator[tuple[Origin, ReadT]]:
        """What `function`, as for `workers.run`, reads of each scan; where it raises ScanError, the scan is left
        out."""
        candidates = self.found.candidates
        for index, outcome in workers.read_in_order(function, candidates, here=safe_here(candidates)):
            origin = _origin(index + 1, candidates[index])
            if isinstance(outcome, ScanError):
                self.leave_out(origin, outcome.reason)
                continue
            held = [outcome]
            del outcome  # a large scan must be gone as soon as whoever asked for it has no more use for it
            yield origin, held.pop()

    def leave_out(self, origin: Origin, reason: str) -> None:
        """Count a scan that was read as one that could not be used after all."""
        self.left_out.append(NotUsed(origin.files, reason, origin.line))

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> how many scans or files were left out for it so far."""
        return dict(sorted(Counter(one.reason for one in self.left_out).items()))

    def tell(self) -> None:
        """Report what was left out as a `progress.Note`, if anything was."""
        if reasons := self.reasons:
            said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            progress.report(progress.Note(f"left out: {said}"))
        self._tell_of_arrays()

    def explain(self) -> None:
        """`tell`, with each reason in words."""
        for reason, count in self.reasons.items():
            progress.report(progress.Note(f"left out: {count} {reason}: {REASONS.get(reason, 'not known')}"))
        self._tell_of_arrays()

    def _tell_of_arrays(self) -> None:
        if told := who_takes(one.files[0] for one in self.left_out if one.reason == "not_an_image"):
            progress.report(progress.Note(told))

    def require(self, used: int) -> None:
        """Raises NoUsableScanError: nothing was used."""
        if not used:
            why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items()) or "there is none"
            raise NoUsableScanError(f"no scan that can be used: {why}; docs/reading.md explains each reason")


def read_scans(sources: Sequence[DataSource], plan: PlanConfig | None = None) -> Iterator[tuple[Origin, Scan]]:
    """Every usable scan of `sources`, as `Reading` has them; at the end, what was left out is told."""
    reading = Reading.of_sources(sources, plan)
    yield from reading
    reading.tell()


def report_looked(files: int) -> None:
    """For whoever watches a command."""
    progress.report(progress.Preparing("scans", files, 0))


def _origin(number: int, candidate: Candidate) -> Origin:
    parts = candidate.parts or (candidate,)
    return Origin(
        candidate.folder,
        candidate.files,
        candidate.patient,
        candidate.format,
        number,
        frames=tuple(frame.number for part in parts if part.stack is not None for frame in part.stack.frames),
        line=candidate.line,
    )
