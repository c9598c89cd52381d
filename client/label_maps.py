"""Which NIfTI files and pictures are masks: DICOM says what is a segmentation, other formats do not."""

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ScanError
from unimiss_core.scan import Scan

_MAX_LABELS = 16
"""A scan with so few different values is a mask or a label map."""
_SAMPLED_VOXELS = 2**20
"""Values of a larger scan are told from every k-th voxel."""


def no_labels(scan: Scan) -> Scan:
    """The scan itself. Raises ScanError(label_map)."""
    values = np.unique(_every_kth(scan.voxels.reshape(-1)))
    if len(values) == 1:  # a small lesion may lie between the samples
        values = np.append(values, np.unique(_every_kth(scan.voxels[scan.voxels != values[0]])))
    if 1 < len(values) <= _MAX_LABELS:
        raise ScanError("label_map")
    return scan


def _every_kth(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values[:: max(1, values.size // _SAMPLED_VOXELS)]
