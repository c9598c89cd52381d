"""nnU-Net's names of files: CASE_0000, CASE_0001, ... are a case's channels, of which a model reads one, or several as
one scan."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from client.candidates import Candidate, Channel, LeftOut
from client.catalogue import Catalogue, catalogue_one
from unimiss_core import progress
from unimiss_core.card_wording import on_one_line
from unimiss_core.scan import Modality

_ENDING = re.compile(r"\.(nii|nii\.gz|png|tiff?)$")
_CHANNEL = re.compile(r"_(\d{4})$")


def stem(name: str) -> str:
    """Without the format's ending; all other dots are the case's own, as those of a DICOM UID."""
    return _ENDING.sub("", name)


def case_of(name: str) -> str:
    """Without the channel, too."""
    return _CHANNEL.sub("", stem(name))


def channel_of(name: str) -> int | None:
    """None: the name does not end in four digits."""
    found = _CHANNEL.search(stem(name))
    return int(found[1]) if found else None


def are_channels(names: Collection[str]) -> bool:
    """Whether each name ends in a channel. Where none is _0000, with which nnU-Net's always begin, the four digits are
    the cases' own."""
    channels = {channel_of(name) for name in names}
    return None not in channels and 0 in channels


def cases_of(names: Iterable[str]) -> dict[str, dict[int | None, str]]:
    """Case -> its files, or series' folders, of all names in one folder: by the channel's number, or by None where one
    is all of the case.

    A case is called as such a file: CASE.nii.gz of CASE_0000.nii.gz, CASE_0001.nii.gz, ... Where no name ends in _0000,
    with which nnU-Net's channels begin, four digits are the cases' own.
    """
    there = sorted(names)
    are_numbered = any(channel_of(name) == 0 for name in there)
    found: dict[str, dict[int | None, str]] = {}
    for name in there:
        number = channel_of(name) if are_numbered else None
        case = name if number is None else case_of(name) + name.removeprefix(stem(name))
        found.setdefault(case, {})[number] = name
    return found


def of_numbers(numbers: Iterable[int], held: Mapping[int | None, str]) -> dict[int, str]:
    """The file of each of these channels of a case of `cases_of`, but of those that it lacks. A file that is all of the
    case is every one's: as its volumes, where they are several."""
    if held.keys() == {None}:
        return dict.fromkeys(numbers, held[None])
    return {number: held[number] for number in numbers if number in held}


def in_words(read: Collection[int], others: Collection[int], named: Mapping[str, str]) -> str:
    """Which channels of a folder's cases are read, and which are not. named: as dataset.json has them."""

    def told(number: int) -> str:
        name = re.sub(r"[^\w .+-]", "", named.get(str(number), ""))
        return f"{number} ({name})" if name else str(number)

    def are(numbers: Collection[int]) -> str:
        return f"{' and '.join(map(told, sorted(numbers)))} {'is' if len(numbers) == 1 else 'are'}"

    return f"{len(read) + len(others)} channels per case: {are(read)} read, {are(others)} not looked at"


def of_one_channel(found: Catalogue, channel: int) -> Catalogue:
    """Without other channels of cases, which are left out as `other_channel`, and a note says how many.

    Unchanged where files of one folder and ending, left out or not, are not all called so.
    """
    by_channel = {of for of, names in _names_alike(found).items() if are_channels(names)}

    def is_other(one: Candidate) -> bool:
        path = one.paths[0]
        return (path.parent, _ending(path.name)) in by_channel and channel_of(path.name) != channel

    others = [one for one in found.candidates if is_other(one)]
    if by_channel:
        told = f"reads channel {channel} of each case, on which the model was fine-tuned"
        progress.report(progress.Note(f"{told}; {len(others)} file(s) of other channels are not looked at"))
    left_out = (_left_out(one, "other_channel") for one in others)
    kept = tuple(one for one in found.candidates if not is_other(one))
    return replace(found, candidates=kept, left_out=(*found.left_out, *left_out))


def of_channels(found: Catalogue, channels: Sequence[Channel]) -> Catalogue:
    """With a scan for each case, made of these channels: of its files of one folder and ending, or of the volumes of
    one NIfTI file, whatever that is called. A note says which file is which channel.

    Left out are files of other channels (`other_channel`), cases that lack one (`lacks_channel`), and all else that is
    one image or volume (`unknown_channel`).
    """
    numbered = {
        of: [name for name in names if channel_of(name) is not None] for of, names in _names_alike(found).items()
    }
    by_channel = {of for of, names in numbered.items() if are_channels(names)}
    left_out = list(found.left_out)
    scans: dict[tuple[Path, ...] | tuple[Path, str, str], dict[int, Candidate]] = {}
    others = 0
    for one in found.candidates:
        path, ending = one.paths[0], _ending(one.paths[0].name)
        number = channel_of(path.name)
        if holds_several(one):
            scans[(path,)] = {channel.number: replace(one, volume=channel.number) for channel in channels}
        elif one.format == "dicom" or number is None or (path.parent, ending) not in by_channel:
            left_out.append(_left_out(one, "unknown_channel"))
        elif number not in {channel.number for channel in channels}:
            left_out.append(_left_out(one, "other_channel"))
            others += 1
        else:
            scans.setdefault((path.parent, ending, case_of(path.name)), {})[number] = one
    tell_which_is_which(
        channels, of_files=bool(by_channel), of_volumes=any(len(one) == 1 for one in scans), others=others
    )
    kept = []
    for held in scans.values():
        there = [(held[channel.number], channel) for channel in channels if channel.number in held]
        parts = [replace(one, modality=channel.modality or one.modality) for one, channel in there]
        case = whole(parts, parts[0].folder)
        if len(case.parts) < len(channels):
            left_out.append(_left_out(case, "lacks_channel"))
        else:
            kept.append(case)
    return replace(found, candidates=tuple(kept), left_out=tuple(left_out))


def whole(parts: Sequence[Candidate], folder: Path) -> Candidate:
    """The scan that is made of these, in the order of its channels; all lie in this folder, or below it."""
    return replace(
        parts[0],
        folder=folder,
        files=tuple(dict.fromkeys(path.relative_to(folder).as_posix() for part in parts for path in part.paths)),
        compressed=any(part.compressed for part in parts),
        parts=tuple(parts),
    )


def tell_which_is_which(channels: Sequence[Channel], *, of_files: bool, of_volumes: bool, others: int) -> None:
    """Notes: which files of cases, and which volumes, are read as what. others: files of other channels."""
    if of_files:
        told = ", ".join(f"_{one.number:04d} as {on_one_line(one.name)}" for one in channels)
        more = f"; {others} file(s) of other channels are not looked at" if others else ""
        progress.report(progress.Note(f"of each case reads {told}{more}"))
    if of_volumes:
        told = ", ".join(f"{one.number} as {on_one_line(one.name)}" for one in channels)
        progress.report(progress.Note(f"of each file of several volumes reads, counted from 0, {told}"))


def with_its_case(found: Catalogue, channels: Sequence[Channel], modality: Modality | None) -> Catalogue:
    """What was found of one file, and, where it is a channel of a case, of the others that lie beside it."""
    if not found.candidates or holds_several(found.candidates[0]):
        return found
    path = found.candidates[0].paths[0]
    numbers = {0, *(channel.number for channel in channels)} - {channel_of(path.name)}
    if channel_of(path.name) is None:
        return found
    beside = [path.with_name(f"{case_of(path.name)}_{number:04d}{_ending(path.name)}") for number in sorted(numbers)]
    parts = [catalogue_one(other, modality) for other in beside if other.is_file()]
    return Catalogue(
        candidates=(*found.candidates, *(one for part in parts for one in part.candidates if not holds_several(one))),
        left_out=(*found.left_out, *(one for part in parts for one in part.left_out)),
        unreadable=(*found.unreadable, *(one for part in parts for one in part.unreadable)),
        files_seen=found.files_seen + sum(part.files_seen for part in parts),
    )


def expected_names(channels: Sequence[Channel]) -> str:
    """How scans of these channels are to be given, in words."""
    numbers = [one.number for one in channels]
    volumes = f"of {len(numbers)} volumes"
    if numbers != list(range(len(numbers))):
        volumes = f"that holds them as its volumes {', '.join(map(str, numbers))}, from 0"
    files = ", ".join(f"CASE_{number:04d}" for number in numbers)
    if 0 not in numbers:
        files += ", beside a CASE_0000 (without any, four digits may be a patient's),"
    names = ", ".join(on_one_line(one.name) for one in channels)
    return (
        f"the model reads {names}: give each case as {files} in one folder, all of one ending (.nii.gz, .nii, .png, "
        f".tif or .tiff), or as one NIfTI file {volumes}; or name its files, or DICOM series, in a table"
    )


def _names_alike(found: Catalogue) -> dict[tuple[Path, str], list[str]]:
    """Folder and ending -> the names of its files, used or not."""
    alike: dict[tuple[Path, str], list[str]] = {}
    looked_at: tuple[Candidate | LeftOut, ...] = (*found.candidates, *found.left_out, *found.unreadable)
    for path in (path for one in looked_at for path in one.paths):
        if ending := _ending(path.name):
            alike.setdefault((path.parent, ending), []).append(path.name)
    return alike


def _ending(name: str) -> str:
    return name.removeprefix(stem(name))


def holds_several(one: Candidate) -> bool:
    """Whether it is a NIfTI file of several volumes."""
    return one.format == "nifti" and "first_of_several_times" in one.flags


def _left_out(one: Candidate, reason: str) -> LeftOut:
    return LeftOut(one.folder, one.files, reason, one.modality, one.shape, one.spacing_mm)
