"""Small DICOM files for the tests of reading: a series with a known pattern, and changes to it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from client.dicom import write_dicom

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def pattern(depth: int, rows: int, columns: int) -> NDArray[np.int16]:
    """(D, H, W) in HU: every voxel tells its index, within the CT window."""
    d, h, w = np.indices((depth, rows, columns))
    return (d * 100 + h * 7 + w - 500).astype(np.int16)


def write_series(
    folder: Path,
    volume: NDArray[Any],
    *,
    positions: Sequence[Sequence[float]] | None = None,
    gap_mm: float = 3.0,
    spacing_mm: tuple[float, float] = (0.9, 0.7),
    orientation: Sequence[float] = AXIAL,
    order: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write (D, H, W) as one file for each slice, rising along the normal; `order` gives the files' order by name."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    common = {
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": "invented-1",
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "PixelSpacing": list(spacing_mm),
        "ImageOrientationPatient": list(orientation),
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        **(attributes or {}),
    }
    for place, index in enumerate(order if order is not None else range(len(volume))):
        position = positions[index] if positions is not None else list(normal * gap_mm * index)
        own = each[index] if each is not None else {}
        facts = {"ImagePositionPatient": [float(v) for v in position], "InstanceNumber": index + 1, **common, **own}
        write_dicom(folder / f"file{place:03d}", volume[index], facts)


def write_radiograph(path: Path, pixels: NDArray[Any], **attributes: Any) -> None:
    """Write one CR image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"Modality": "CR", "PatientID": "invented-2", "ImageType": ["ORIGINAL", "PRIMARY"], **attributes}
    write_dicom(path, pixels, facts)
