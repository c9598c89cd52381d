"""Scans as headers promise them, files that are left out, and which lone slices are which.

Here, as in `client.series`, every rule is about the items it is given. Whoever must not let one patient decide about
another gives it each patient's apart: `of_each_patient`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from client.series import Kind, Stack
from unimiss_core.scan import Modality

Format = Literal["dicom", "nifti", "picture"]
MAX_VOLUME_MM3 = 5e9
"""No scanner takes five cubic metres. On a plan's grid such a scan would need more room than all the others."""
ItemT = TypeVar("ItemT")


class Channel(NamedTuple):
    """One of the images or volumes that each scan of a task is made of."""

    name: str
    number: int
    """Of its file, CASE_0000 or CASE_0001 and so on, or of its volume in a file that holds all of them."""
    modality: Modality | None
    """What it is taken for where its file does not say it."""


@dataclass(frozen=True)
class Candidate:
    """A scan that looks usable by its headers, and how to read it."""

    folder: Path
    files: tuple[str, ...]
    """Paths below the folder, in slice order."""
    format: Format
    patient: str
    """Key of the patient; see `client.patients`."""
    modality: Modality
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    flags: tuple[str, ...] = ()
    study: str = ""
    """Key of the DICOM study, made like a patient's; empty where there is none."""
    stack: Stack | None = None
    compressed: bool = False
    """In a way that may make its reader crash, or take long for a small file."""
    volume: int = 0
    """Of a NIfTI file that holds several: which is read."""
    parts: tuple["Candidate", ...] = ()
    """Of a scan of several channels, or that a table names: what is read for each. `files` are those of all parts, and
    what else is said here is of the first."""
    line: int = 0
    """Of the table that names it, where one does."""

    @property
    def first(self) -> "Candidate":
        """Of its parts, on whose grid answers lie; itself where it has none."""
        return self.parts[0] if self.parts else self

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """As it will be read, of each image or volume that it is made of."""
        return tuple(one.modality for one in self.parts) or (self.modality,)

    @property
    def kind(self) -> Kind:
        return "2d" if len(self.shape) == 2 else "3d"

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)


@dataclass(frozen=True)
class LeftOut:
    """Files that belong together and are not used."""

    folder: Path
    files: tuple[str, ...]
    reason: str
    modality: Modality | None = None
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    patient: str = ""
    line: int = 0
    """As of a `Candidate`."""

    @property
    def kind(self) -> Kind:
        return "2d" if self.modality == "XR" or len(self.shape) == 2 else "3d"

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)


def of_each_patient(items: Iterable[ItemT], patient: Callable[[ItemT], object]) -> list[list[ItemT]]:
    """The items of each patient, in their order; patients in the order of their first item."""
    apart: dict[object, list[ItemT]] = {}
    for item in items:
        apart.setdefault(patient(item), []).append(item)
    return list(apart.values())


def without_lone_slices(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[LeftOut]]:
    """Single slices of a modality of which there are at least as many volumes are no images of their own.

    Otherwise a few of them would make a site of CT or MR train the 2D path on remains of series. Where slices
    prevail, they are what the folders, or the patient's files, are about, and are used as images.
    """
    kinds = Counter((candidate.modality, candidate.kind) for candidate in candidates)
    kept: list[Candidate] = []
    lone: list[LeftOut] = []
    for one in candidates:
        is_lone = one.kind == "2d" and one.modality in ("CT", "MR", "PT")
        if is_lone and kinds[one.modality, "2d"] <= kinds[one.modality, "3d"]:
            lone.append(_left_out(one, "lone_slice"))
        else:
            kept.append(one)
    return kept, lone


def without_absurd_sizes(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[LeftOut]]:
    """Volumes larger than what can be scanned have wrong spacings, each credible by itself."""
    kept: list[Candidate] = []
    absurd: list[LeftOut] = []
    for one in candidates:
        if one.kind == "3d" and math.prod(one.shape) * math.prod(one.spacing_mm) > MAX_VOLUME_MM3:
            absurd.append(_left_out(one, "bad_spacing"))
        else:
            kept.append(one)
    return kept, absurd


def _left_out(one: Candidate, reason: str) -> LeftOut:
    return LeftOut(one.folder, one.files, reason, one.modality, one.shape, one.spacing_mm, one.patient)
