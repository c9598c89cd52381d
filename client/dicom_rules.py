"""Which DICOM objects are scans: storage classes, words of ImageType, possible pixels. No file is opened here.

Every rule gives a reason code of `client.reasons`, or nothing where it has no objection.
"""

from collections.abc import Mapping, Sequence

from client.dicom_bytes import PixelRoom
from client.series import MAX_VOXELS
from unimiss_core.scan import Modality

CLASSES: Mapping[str, Modality] = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
    "1.2.840.10008.5.1.4.1.1.1": "XR",
    "1.2.840.10008.5.1.4.1.1.1.1": "XR",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "XR",
    "1.2.840.10008.5.1.4.1.1.1.2": "XR",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "XR",
    "1.2.840.10008.5.1.4.1.1.1.3": "XR",
    "1.2.840.10008.5.1.4.1.1.1.3.1": "XR",
    "1.2.840.10008.5.1.4.1.1.12.1": "XR",
    "1.2.840.10008.5.1.4.1.1.12.2": "XR",
}
"""Storage classes that hold scans: CT, MR and PET (plain, enhanced, legacy converted), CR, DX, MG, IO, XA, RF."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"
MODALITIES: Mapping[str, Modality] = {
    "CT": "CT",
    "MR": "MR",
    "PT": "PT",
    **dict.fromkeys(("CR", "DX", "RG", "RF", "XA", "MG", "IO", "PX"), "XR"),
}

_IMAGE_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("LOCALIZER", "SCOUT"), "localizer"),
    **dict.fromkeys(("DOSE_INFO", "DOSE", "SCREEN SAVE", "SCREENSAVE"), "dose_or_screen"),
    "MOSAIC": "mosaic",
    **dict.fromkeys(
        ("MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "CPR", "VRT", "VOLUME RENDER",
         "3D RENDERING", "CSA 3D EDITOR", "CSAPARALLEL"),
        "derived_image",
    ),
    **dict.fromkeys(
        ("ADC", "EADC", "FA", "PERFUSION", "ASL", "RELCBF", "RELCBV", "CBF", "CBV", "MTT", "RELMTT", "TTP", "TTEST",
         "SUB", "SUBTRACTION", "T1 MAP", "T2 MAP", "T2_STAR MAP", "FIELD_MAP", "PHASE MAP", "B0 MAP", "VELOCITY"),
        "parameter_map",
    ),
    **dict.fromkeys(("P", "PHASE", "R", "REAL", "I", "IMAGINARY"), "phase_image"),
}  # fmt: skip
"""Words of ImageType, from the third on, that mean no plain picture of the body."""

CLASS_OF_MODALITY: Mapping[str, str] = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
}
"""What a file is written as that does not say its storage class."""


def modality_of(sop_class: str, modality: str) -> Modality | None:
    """What a storage class holds; the Modality element speaks only where the class is not stated."""
    return CLASSES.get(sop_class) if sop_class else MODALITIES.get(modality)


def type_reason(image_type: Sequence[str], modality: Modality, component: str = "") -> str:
    """Whether the words of ImageType, or ComplexImageComponent of an enhanced MR, mean something else than a plain
    picture of the body."""
    for word in image_type[2:]:
        reason = _IMAGE_TYPES.get(word, "")
        # In an X-ray or PET these words mean something else.
        if reason and (modality in ("CT", "MR") or reason not in ("phase_image", "parameter_map")):
            return reason
    if modality == "MR" and _IMAGE_TYPES.get(component.upper()) == "phase_image":
        return "phase_image"
    if image_type[:1] == ["DERIVED"] and {"MPR", "REFORMATTED"} & set(image_type[2:]):
        return "derived_image"
    # Every PET is computed, and scanners say so; a CT or MR that says so was made from another series.
    if modality in ("CT", "MR") and list(image_type[:2]) == ["DERIVED", "SECONDARY"]:
        return "derived_image"
    return ""


_MAX_FRAMES = 2**17
"""Each frame is described one by one; three times the longest series that is known to us."""
_MAX_PIXELS_PER_BYTE = 8192
"""No codec packs more of an honest picture into a byte; a header that claims more lies."""


def pixels_reason(
    *, rows: int, columns: int, bits: int, samples: int, frames: int, photometric: str, room: PixelRoom
) -> str:
    """Whether the header's claims about pixels can be true of a file with that much room for them."""
    if not rows or not columns or bits not in (1, 8, 16, 32, 64) or samples not in (1, 3) or not frames:
        return "bad_pixel_description"
    if rows * columns * frames > MAX_VOXELS or frames > _MAX_FRAMES:
        return "too_large"
    if bits == 1:
        return "binary_image"
    pixels = rows * columns * frames
    if room.encoded:
        return "truncated_pixels" if pixels > room.size * _MAX_PIXELS_PER_BYTE else ""
    chroma = 2 / 3 if photometric == "YBR_FULL_422" else 1.0
    return "truncated_pixels" if room.size < pixels * samples * bits // 8 * chroma else ""
