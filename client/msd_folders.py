"""What a folder of the Medical Segmentation Decathlon or of nnU-Net says: its cases' files, and its dataset.json."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.channels import case_of, channel_of, stem
from client.label_config import MsdData
from unimiss_core.errors import ConfigError
from unimiss_core.json_text import read_object
from unimiss_core.task_config import SegmentationConfig, folded


def images_by_case(folder: Path, masks: Collection[str]) -> dict[str, dict[int | None, str]]:
    """Case, as one of `masks_by_case` -> its files: by the channel's number, or by None where one is all of the case.

    Four digits at the end of a name are a channel's unless a mask is called so, too: no other case's files decide that,
    for they may be another patient's. Raises ConfigError: no folder.
    """
    found: dict[str, dict[int | None, str]] = {}
    for name in reversed(_names_in(folder)):  # of several endings the first
        number = None if stem(name) in masks else channel_of(name)
        found.setdefault(stem(name) if number is None else case_of(name), {})[number] = name
    return found


def masks_by_case(folder: Path) -> dict[str, str]:
    """Raises ConfigError: no folder."""
    return {stem(name): name for name in reversed(_names_in(folder))}  # of several endings the first


def _names_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigError(f"data.folder: holds no folder {folder.name}")
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if stem(name) != name and not name.startswith(".")]


@dataclass(frozen=True)
class Told:
    """What a folder's dataset.json says, where it is there."""

    labels: Mapping[str, Any] | None = None
    channels: Mapping[str, str] = field(default_factory=dict)
    """By their numbers."""


def told_in(path: Path) -> Told:
    """Raises ConfigError: it is none."""
    try:
        told = read_object(path)
        channels = dict(told.get("channel_names") or told.get("modality") or {})
        return Told(dict(told["labels"]), {str(number): str(name) for number, name in channels.items()})
    except FileNotFoundError:
        return Told()
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("data.folder: dataset.json is no JSON with 'labels', as MSD and nnU-Net write it") from None


def check_labels(labels: Mapping[str, Any], task: SegmentationConfig) -> None:
    """Raises ConfigError: they are no classes one of which each voxel is of, or contradict the task."""
    if regions := sum(isinstance(value, list) for value in labels.values()):
        raise ConfigError(
            f"data.folder: {regions} label(s) of dataset.json are of several values (nnU-Net's regions), and here each "
            "voxel is of one class; name each value of the masks as a label of its own, or write masks whose values "
            "are what is to be told apart"
        )
    if any(str(told).strip().lower() == "ignore" for told in (*labels, *labels.values())):
        raise ConfigError(
            "data.folder: dataset.json has a label 'ignore', for voxels that nobody labelled, and here they would be "
            "trained as a class; label them in the masks, or leave out cases that hold any, and then take the label "
            "out of dataset.json"
        )
    if len(labels) != task.outputs:
        raise ConfigError(
            f"task.classes: {len(task.classes)} beside the background; dataset.json has {len(labels) - 1}"
        )
    _check_order(labels, task)


def _check_order(labels: Mapping[str, Any], task: SegmentationConfig) -> None:
    """labels: value -> name as MSD writes them, or name -> value as nnU-Net does. Raises ConfigError: they give the
    task's own names to other values; of names that are not the task's nothing can be said."""
    if not all(value.isdecimal() for value in labels):
        labels = {str(value): name for name, value in labels.items()}
    values = {str(name).strip().lower(): value for value, name in labels.items() if value.isdecimal()}
    for number, name in enumerate(task.classes, start=1):
        if (told := values.get(name.strip().lower(), str(number))) != str(number):
            raise ConfigError(
                f"task.classes: '{name}' is value {number}, and dataset.json says it is {told}; value i of a mask is "
                "the i-th class, so put the classes in the order of dataset.json"
            )


def numbers_of(task: SegmentationConfig, data: MsdData, told: Mapping[str, str]) -> tuple[int, ...]:
    """Of each of the task's channels, as data.channels or dataset.json has them; told: number -> name of the latter.

    Raises ConfigError: neither says it, or they contradict each other.
    """
    assert task.channels is not None
    named = _numbers_told(task.channels, told)
    for name, known, said in zip(task.channels, named, data.channels or (), strict=data.channels is not None):
        if known and said not in known:
            raise ConfigError(f"data.channels: {name} is {said}, and dataset.json says it is {known[0]}")
    if data.channels is not None:
        return data.channels
    lacking = [name for name, known in zip(task.channels, named, strict=True) if len(known) != 1]
    if lacking:
        which = f"which channel {', '.join(lacking)} is"
        there, way_out = f"no dataset.json says {which}", ""
        if told:
            there = f"dataset.json names {', '.join(map(str, told.values()))}, which does not say {which}"
            way_out = "write them as it does, or "
        raise ConfigError(f"task.channels: {there}; {way_out}give data.channels, the number of each")
    return tuple(number for (number,) in named)


def _numbers_told(channels: Sequence[str], told: Mapping[str, str]) -> list[list[int]]:
    """Of each channel all that go by its name."""
    by_name: dict[str, list[int]] = {}
    for number, name in told.items():
        if number.isdecimal():
            by_name.setdefault(folded(name), []).append(int(number))
    return [by_name.get(folded(name), []) for name in channels]


def numbers_beside(scans: Path, channels: Sequence[str]) -> tuple[int, ...] | None:
    """Of each channel, as a dataset.json has them that lies in the folder of the scans or, as where nnU-Net's imagesTs
    are asked about, in the one above; None where none names all of them."""
    folder = (scans if scans.is_dir() else scans.parent).absolute()
    for path in (folder / "dataset.json", folder.parent / "dataset.json"):
        try:
            told = told_in(path).channels
        except ConfigError:  # of whatever kind that is, it is no labelled folder's
            continue
        numbers = _numbers_told(channels, told)
        if all(len(known) == 1 for known in numbers):
            return tuple(number for (number,) in numbers)
    return None
