"""nnU-Net's names of files: CASE_0000, CASE_0001, ... are a case's channels, of which a model reads one or several."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from client.candidates import Candidate, LeftOut
from client.catalogue import Catalogue
from unimiss_core import progress

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
    alike: dict[tuple[Path, str], list[str]] = {}
    looked_at: tuple[Candidate | LeftOut, ...] = (*found.candidates, *found.left_out, *found.unreadable)
    for path in (path for one in looked_at for path in one.paths):
        if stem(path.name) != path.name:
            alike.setdefault((path.parent, path.name.removeprefix(stem(path.name))), []).append(path.name)
    by_channel = {of for of, names in alike.items() if are_channels(names)}

    def is_other(one: Candidate) -> bool:
        path, name = one.paths[0], one.paths[0].name
        return (path.parent, name.removeprefix(stem(name))) in by_channel and channel_of(name) != channel

    others = [one for one in found.candidates if is_other(one)]
    if by_channel:
        told = f"reads channel {channel} of each case, on which the model was fine-tuned"
        progress.report(progress.Note(f"{told}; {len(others)} file(s) of other channels are not looked at"))
    left_out = (LeftOut(o.folder, o.files, "other_channel", o.modality, o.shape, o.spacing_mm) for o in others)
    kept = tuple(one for one in found.candidates if not is_other(one))
    return replace(found, candidates=kept, left_out=(*found.left_out, *left_out))
