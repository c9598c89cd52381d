"""Readers for workers, who import them by name, that crash at DICOM as a native codec does at a damaged file."""

import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pydicom
from pydicom.uid import RLELossless

from client.labelled import read_pair as _read_pair
from tests.series_files import write_radiograph


def write_compressed(path: Path) -> Path:
    """A radiograph that a codec must decode."""
    write_radiograph(path, np.random.default_rng(9).integers(0, 999, (40, 50)).astype(np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    return path


def read_pair(pair: Any) -> Any:
    """`client.labelled.read_pair`, where it does not crash."""
    if pair.scans[0].suffix == ".dcm":
        crash(pair)
    return _read_pair(pair)


def crash(*_: Any, **__: Any) -> NoReturn:
    os._exit(3)
