"""Elements of a DICOM data set as texts and numbers, whatever type a file gives them. No file is opened here."""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from unimiss_core.errors import ScanError


class DataSet(Protocol):
    """What is needed of pydicom's."""

    def get(self, key: str, /) -> Any: ...

    def __contains__(self, name: str, /) -> bool: ...


def text_of(dataset: DataSet, name: str) -> str:
    """The first value of an element, which is its only one where the standard is kept."""
    return " ".join(texts_of(dataset, name)[:1])


def identity_of(dataset: DataSet, name: str) -> str:
    """The whole of an element that says whose or which something is: a part of it may be shared by many."""
    parts = texts_of(dataset, name)
    return "\\".join(parts) if any(parts) else ""


def texts_of(dataset: DataSet, name: str) -> list[str]:
    """Each value of an element, without padding; none where it is absent or cannot be read."""
    with contextlib.suppress(Exception):
        value = dataset.get(name)
        if value is None:
            return []
        if isinstance(value, bytes):  # of a type that has no text
            value = value.decode(errors="surrogateescape").split("\\")
        parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return [str(part).strip("\0 ") for part in parts]
    return []


def numbers_of(dataset: DataSet, name: str, count: int) -> Any:
    """`count` finite numbers of an element as a tuple; None where they are absent or are no such numbers."""
    try:
        values = [float(text) for text in texts_of(dataset, name)]
    except ValueError:
        return None
    return tuple(values[:count]) if len(values) >= count and np.isfinite(values).all() else None


def number_of(dataset: DataSet, name: str) -> float:
    values = numbers_of(dataset, name, 1)
    return float(values[0]) if values else 0.0


def count_of(dataset: DataSet, name: str, default: int = 0) -> int:
    """A non-negative whole number; 0 where the element holds something else, `default` where it is absent."""
    try:
        value = dataset.get(name)
        return default if value is None or value == "" else max(0, int(value))
    except Exception:
        return 0


def says_scale(dataset: DataSet, *, empty_counts: bool) -> bool:
    """Whether a slope or an intercept is there. empty_counts: also where it is empty."""
    names = ("RescaleSlope", "RescaleIntercept")
    return any(name in dataset and (empty_counts or not _is_empty(dataset, name)) for name in names)


def scale_of(dataset: DataSet, *, empty_counts: bool) -> tuple[float, float]:
    """Rescale slope and intercept; 1 and 0 stand for what is absent, and unless `empty_counts` for what is empty.

    Raises ScanError(bad_pixel_description): one is there and is not one number, so that nobody knows what values mean;
    or the slope is zero.
    """
    slope = _only_number(dataset, "RescaleSlope", 1.0, empty_counts=empty_counts)
    intercept = _only_number(dataset, "RescaleIntercept", 0.0, empty_counts=empty_counts)
    if slope == 0:
        raise ScanError("bad_pixel_description", "rescale slope is zero")
    return slope, intercept


def _is_empty(dataset: DataSet, name: str) -> bool:
    with contextlib.suppress(Exception):  # what cannot be read is not empty
        value = dataset.get(name)
        return value is None or not str(value).strip("\0 ")
    return False


def _only_number(dataset: DataSet, name: str, absent: float, *, empty_counts: bool) -> float:
    if name not in dataset or (not empty_counts and _is_empty(dataset, name)):
        return absent
    values = numbers_of(dataset, name, 1)
    if values is None or len(texts_of(dataset, name)) > 1:
        raise ScanError("bad_pixel_description", "rescale is not one number")
    return float(values[0])
