"""Masks of DICOM series as DICOM SEG objects, for archives and viewers: the one file that knows highdicom.

An object is of its series' patient and study, whose names it therefore holds, and lies in its frame of reference.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ConfigError
from unimiss_core.extras import way_to
from unimiss_core.task_checkpoint import TaskManifest

_MAKER = "Federated UniMiSS"
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""RAS+ to DICOM's own axes."""


def check_highdicom() -> None:
    """Before scans are read. Raises ConfigError."""
    if importlib.util.find_spec("highdicom") is None:
        raise ConfigError(f"--dicom-seg: highdicom must be installed: {way_to('dicomseg')}")


def write_dicom_seg(
    path: Path,
    classes: NDArray[np.uint8],
    affine: NDArray[np.float64],
    sources: Sequence[Path],
    manifest: TaskManifest,
) -> bool:
    """Write classes (D, H, W), in canonical axes with their affine to RAS+; whether it was done.

    Frames lie as the slices of the series do, rows and columns alike. Not done: a series whose files do not say what
    such an object must repeat of them; an enhanced object of which highdicom cannot find it, as each frame says it for
    itself (Siemens), or which holds private groups of frames (Philips).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _segmentation(classes, affine, sources, manifest).save_as(partial)
    except (
        Exception
    ):  # of files that lack what the standard asks for, highdicom raises many kinds; their text may quote
        partial.unlink(missing_ok=True)
        return False
    partial.replace(path)
    return True


def _segmentation(
    classes: NDArray[np.uint8], affine: NDArray[np.float64], sources: Sequence[Path], manifest: TaskManifest
) -> Any:
    import highdicom

    images = [highdicom.imread(source) for source in sources]
    volume = highdicom.Volume(
        classes,
        affine=_LPS @ affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=images[0].FrameOfReferenceUID,
    ).to_patient_orientation(_orientation_of(images[0]))
    described = [_segment(number, name, manifest) for number, name in enumerate(manifest.task.classes, start=1)]
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=volume,
        segmentation_type="BINARY",
        segment_descriptions=described,
        series_instance_uid=highdicom.UID(),
        series_number=1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=manifest.task.name,
        software_versions=str(manifest.format_version),
        device_serial_number=manifest.sha256[:16],
        content_label="SEGMENTATION",
        content_description="predicted, not looked at by a person",
    )


def _segment(number: int, name: str, manifest: TaskManifest) -> Any:
    """What the class is called stands in its label; that it is some tissue is all that its code says."""
    import highdicom

    tissue = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    intelligence = highdicom.sr.CodedConcept("123109", "DCM", "Artificial Intelligence")
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=tissue,
        segmented_property_type=tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_MAKER, family=intelligence, version=manifest.sha256[:16]
        ),
    )


def _orientation_of(image: Any) -> Any:
    """Of the axes (slice, row, column) of the series' own frames, as letters."""
    import highdicom

    functional = image.get("SharedFunctionalGroupsSequence")
    plane = functional[0].PlaneOrientationSequence[0] if functional else image
    along_row, down_column = np.array(plane.ImageOrientationPatient, dtype=float).reshape(2, 3)
    axes = np.eye(4)
    axes[:3, :3] = np.stack([np.cross(along_row, down_column), down_column, along_row], axis=1)
    return highdicom.spatial.get_closest_patient_orientation(axes)
