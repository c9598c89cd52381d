"""The images or volumes that one scan is made of, as tasks of several channels have them."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from client import workers
from client.catalogue import only_one, read_one, safe_to_read_here, volumes_of
from client.patients import MODALITY_NAMES
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan
from unimiss_core.task_config import TaskConfig

_TOLD_APART = {"CT", "MR", "PT"}
"""A picture of any of them is read as XR."""


def modalities_of(task: TaskConfig, said: Modality | None) -> tuple[Modality | None, ...]:
    """What each of a scan's channels is taken for where its file does not say it: what is said of all, or else what the
    channel's name begins with, as CT and PET do."""
    return tuple(said or modality_named(name) for name in task.channels or ("",))


def contradicted(task: TaskConfig, said: Modality | None) -> str | None:
    """Which of the task's channels is, by its name, not what is said of all, in words: CT's window laid on PET, say.
    OT contradicts no name, for it asks for percentiles of all."""
    for name in task.channels or () if said not in (None, "OT") else ():
        if (named := modality_named(name)) not in (None, said):
            return f"{said} is said of all channels, and '{on_one_line(name)}' is {named} by its name"
    return None


def require_like_names(task: TaskConfig, scans: Sequence[Scan]) -> None:
    """Of what a scan of the task is made of, as it was read. Raises ScanError: `unlike_channel` (DICOM says what it is,
    and so shows columns that were swapped)."""
    for name, scan in zip(task.channels or (), scans, strict=task.channels is not None):
        if is_unlike(name, scan.modality):
            raise ScanError("unlike_channel")


def is_unlike(name: str, modality: Modality) -> bool:
    """Whether a channel called so cannot be what its file says it is."""
    kinds = {modality_named(name), modality}
    return len(kinds) > 1 and kinds <= _TOLD_APART


def modality_named(name: str) -> Modality | None:
    """What a channel called so holds; None where its name does not begin with a modality's."""
    return MODALITY_NAMES.get(re.split(r"[^A-Z]", name.upper())[0])


def read_channels(
    paths: Sequence[Path], numbers: Sequence[int], modalities: Sequence[Modality | None], *, interpolate: bool
) -> tuple[Scan, ...]:
    """A scan of each path, which may be a series' folder. One path for all of several is a NIfTI file that holds them
    as its volumes, of these numbers from 0, as the Medical Segmentation Decathlon has them.

    For a worker, or files that are known to be safe. Raises ScanError: as `read_one`; `lacks_channel`.
    """
    if len(set(paths)) == 1 < len(paths):
        if only_one(paths[0]).format != "nifti":
            raise ScanError("lacks_channel")
        each = zip(numbers, modalities, strict=True)
        return volumes_of(paths[0], [(number, modality or "OT") for number, modality in each])
    pairs = zip(paths, modalities, strict=True)
    return tuple(read_one(path, modality, interpolate=interpolate) for path, modality in pairs)


def read_channels_apart(
    paths: Sequence[Path], numbers: Sequence[int], modalities: Sequence[Modality | None], *, interpolate: bool
) -> tuple[Scan, ...]:
    """`read_channels`, in a process of its own where a codec may crash or much memory is asked for, and raises as it
    does."""
    reads = partial(read_channels, numbers=numbers, modalities=modalities, interpolate=interpolate)
    return workers.read_single(reads, paths, here=safe_to_read_here(paths))
