"""DICOM in and out: the one file that knows pydicom. Codecs (gdcm, openjpeg, rle) come in through its plugins.

`read_header` says what a file is without decoding a pixel, `read_frames` gives the values of frames. Both raise
`ScanError` with a reason code for whatever a file can do wrong; no text of a file gets into the error.
"""

import contextlib
import logging
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from client.patients import dicom_patient_text, patient_of
from client.series import MAX_VOXELS, Frame, Header
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality

# They quote values of the file in what they log.
for _name in ("pydicom", "pylibjpeg", "openjpeg", "rle"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

_CLASSES: Mapping[str, Modality] = {
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
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DICOMDIR = "1.2.840.10008.1.3.10"
_MODALITIES: Mapping[str, Modality] = {
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

_HEADER_TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID",
    "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "AcquisitionNumber",
    "InstanceNumber", "AcquisitionTime", "ContentTime", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "ImagerPixelSpacing", "EstimatedRadiographicMagnificationFactor", "ImagePositionPatient",
    "ImageOrientationPatient", "EchoTime", "EchoNumbers", "DiffusionBValue", "TemporalPositionIdentifier",
    "TriggerTime", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "BurnedInAnnotation",
    "RecognizableVisualFeatures", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

_MAX_INFLATION = 64 * 2**20
"""A deflated header and its pixels may unfold to at least this, and to 32 times their size."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"

_quiet_lock = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pydicom quotes values of the file in its warnings: nothing of them may reach a screen or log."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def looks_like_dicom(start: bytes) -> bool:
    """Whether a file that begins with `start` (132 bytes or more) may be DICOM, with preamble or without."""
    if start[128:132] == b"DICM":
        return True
    # Without preamble: a data element of group 2 or 8 in little endian, or 8 in big endian, with a known beginning.
    group = start[:2]
    if group in (b"\x02\x00", b"\x08\x00"):
        element = int.from_bytes(start[2:4], "little")
    elif group == b"\x00\x08":
        element = int.from_bytes(start[2:4], "big")
    else:
        return False
    return len(start) >= 16 and element <= 0x0070 and (start[4:6].isalpha() or start[6:8] == b"\x00\x00")


# ---------------------------------------------------------------------------------------------------------- headers


def read_header(path: Path, file: str, secret: bytes) -> Header:
    """What the DICOM file at `path` is; `file` is what the result calls it, `secret` makes the patient's key.

    A file that is DICOM but no scan comes back with its `reason`. Raises ScanError: not DICOM, an index (DICOMDIR),
    or damaged beyond saying what it is.
    """
    with _quiet():
        try:
            dataset, room = _open(path)
            return _header(dataset, room, file, secret)
        except (ScanError, OSError, MemoryError):
            raise
        except Exception:  # pydicom raises a dozen kinds on damaged files
            raise ScanError("damaged_header") from None


def _open(path: Path) -> tuple[Dataset, int | None]:
    """The header, and the bytes that its pixel data take in the file (None: none there, -1: encapsulated)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        _check_inflation(file, size)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_HEADER_TAGS))
        syntax = _transfer_syntax(dataset)
        if syntax is not None and syntax.encode() == _DEFLATED:
            return dataset, _deflated_room(path)
        return dataset, _room(file, size, dataset)


def _room(file: BinaryIO, size: int, dataset: Dataset) -> int | None:
    """Bytes of pixel data behind the header that was just read: pydicom stops at the element that holds them."""
    implicit, little = dataset.original_encoding
    order = "little" if little else "big"
    start = file.read(12)
    if len(start) < 8:
        return None
    group, element = int.from_bytes(start[:2], order), int.from_bytes(start[2:4], order)  # type: ignore[arg-type]
    if group != 0x7FE0 or element not in (0x0008, 0x0009, 0x0010):
        return None
    if implicit:
        length, begin = int.from_bytes(start[4:8], order), file.tell() - len(start) + 8  # type: ignore[arg-type]
    else:
        length, begin = int.from_bytes(start[8:12], order), file.tell()  # type: ignore[arg-type]
    if length == 0xFFFFFFFF:
        return -1
    return max(0, min(length, size - begin))


def _check_inflation(file: BinaryIO, size: int) -> None:
    """Refuse a deflated file that unfolds to more than it may, before anything holds it unfolded."""
    start = file.read(4096)
    if start[128:132] == b"DICM" and _DEFLATED in start:
        if start[132:136] != b"\x02\0\0\0":
            raise ScanError("damaged_header", "deflated, and does not say from where on")
        file.seek(144 + int.from_bytes(start[140:144], "little"))
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            while chunk := inflate.unconsumed_tail or file.read(2**16):
                total += len(inflate.decompress(chunk, 2**20))
                if total > max(_MAX_INFLATION, 32 * size):
                    raise ScanError("too_large", "unfolds to too much")
        except zlib.error:
            raise ScanError("damaged_header") from None
    file.seek(0)


def _deflated_room(path: Path) -> int | None:
    dataset = pydicom.dcmread(path, force=True)
    return len(dataset.PixelData) if "PixelData" in dataset else None


def _transfer_syntax(dataset: Dataset) -> UID | None:
    meta = getattr(dataset, "file_meta", None)
    return UID(meta.TransferSyntaxUID) if meta is not None and "TransferSyntaxUID" in meta else None


def _is_compressed(syntax: UID | None) -> bool:
    try:
        return syntax is not None and syntax.is_compressed
    except ValueError:  # none that pydicom knows
        return True


def _header(dataset: Dataset, room: int | None, file: str, secret: bytes) -> Header:
    if not len(dataset):
        raise ScanError("damaged_header")
    sop_class = _text(dataset, "SOPClassUID") or _meta_text(dataset, "MediaStorageSOPClassUID")
    if sop_class == _DICOMDIR:
        raise ScanError("dicomdir")
    if not sop_class and not _text(dataset, "Modality") and room is None:
        raise ScanError("damaged_header")
    syntax = _transfer_syntax(dataset)
    modality = _CLASSES.get(sop_class) or (_MODALITIES.get(_text(dataset, "Modality")) if not sop_class else None)
    patient_text = dicom_patient_text(_text(dataset, "PatientID"), _text(dataset, "IssuerOfPatientID"))
    frames: tuple[Frame, ...] = ()
    reason = _reason(dataset, room, sop_class, modality)
    if not reason:
        assert modality is not None
        frames = tuple(_frames(dataset, file, modality))
    return Header(
        file=file,
        patient=patient_of(patient_text, secret) if patient_text else None,
        study=_text(dataset, "StudyInstanceUID"),
        series=_text(dataset, "SeriesInstanceUID"),
        instance=_text(dataset, "SOPInstanceUID"),
        modality=modality,
        matrix=(_count(dataset, "Rows"), _count(dataset, "Columns")),
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        frames=frames,
        compressed=_is_compressed(syntax),
        reason=reason,
    )


def _reason(dataset: Dataset, room: int | None, sop_class: str, modality: Modality | None) -> str:
    """Why the whole file is left out, from its header alone; empty where it is not."""
    if sop_class.startswith(_SECONDARY_CAPTURE):
        return "secondary_capture"
    if room is None:
        return "no_pixels"
    if modality is None:
        return "unsupported_object"
    if _text(dataset, "BurnedInAnnotation").upper() == "YES":
        return "burned_in_annotation"
    image_type = [word.strip().upper() for word in _texts(dataset, "ImageType")]
    if by_type := _type_reason(image_type, modality):
        return by_type
    return _pixels_reason(dataset, room) or _rescale_reason(dataset, modality)


def _type_reason(image_type: Sequence[str], modality: Modality) -> str:
    for word in image_type[2:]:
        reason = _IMAGE_TYPES.get(word, "")
        # In an X-ray or PET these words mean something else.
        if reason and (modality in ("CT", "MR") or reason not in ("phase_image", "parameter_map")):
            return reason
    if image_type[:1] == ["DERIVED"] and {"MPR", "REFORMATTED"} & set(image_type[2:]):
        return "derived_image"
    # Every PET is computed, and scanners say so; a CT or MR that says so was made from another series.
    if modality in ("CT", "MR") and list(image_type[:2]) == ["DERIVED", "SECONDARY"]:
        return "derived_image"
    return ""


def _pixels_reason(dataset: Dataset, room: int) -> str:
    """Whether the header's claims about the pixels can be true of this file."""
    rows, columns, bits = (_count(dataset, name) for name in ("Rows", "Columns", "BitsAllocated"))
    samples, frames = _count(dataset, "SamplesPerPixel", 1), _count(dataset, "NumberOfFrames", 1)
    if not rows or not columns or bits not in (1, 8, 16, 32, 64) or samples not in (1, 3) or not frames:
        return "bad_pixel_description"
    if rows * columns * frames > MAX_VOXELS:
        return "too_large"
    if bits == 1:
        return "binary_image"
    if 0 <= room < rows * columns * samples * frames * bits // 8 * _chroma(dataset):
        return "truncated_pixels"
    return ""


def _chroma(dataset: Dataset) -> float:
    return 2 / 3 if _text(dataset, "PhotometricInterpretation") == "YBR_FULL_422" else 1.0


def _rescale_reason(dataset: Dataset, modality: Modality) -> str:
    """CT is in HU, and an unsigned CT that does not say how its values become HU cannot be read rightly."""
    says = "RescaleIntercept" in dataset or "ModalityLUTSequence" in dataset
    says = says or "PerFrameFunctionalGroupsSequence" in dataset
    unsigned = _count(dataset, "PixelRepresentation") == 0
    return "no_rescale" if modality == "CT" and unsigned and not says else ""


def _frames(dataset: Dataset, file: str, modality: Modality) -> Iterator[Frame]:
    count = _count(dataset, "NumberOfFrames", 1)
    functional = dataset.get("PerFrameFunctionalGroupsSequence")
    if functional is not None and len(functional) != count:
        raise ScanError("bad_pixel_description", "frames and their descriptions differ in number")
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number in range(count):
        if functional is None:
            # A plain multi-frame object has one position for all frames: no geometry can be had from it.
            yield _plain_frame(dataset, file, number, modality, with_position=count == 1)
        else:
            yield _enhanced_frame(dataset, shared, functional[number], file, number, modality)


def _plain_frame(dataset: Dataset, file: str, number: int, modality: Modality, *, with_position: bool) -> Frame:
    echo = _numbers(dataset, "EchoTime", 1) or _numbers(dataset, "EchoNumbers", 1)
    kinds = _texts(dataset, "ImageType")[2:] if modality == "MR" else []  # in phase, water, fat, ...
    time = [_number(dataset, name) for name in ("TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber")]
    return Frame(
        file=file,
        number=number,
        position=_numbers(dataset, "ImagePositionPatient", 3) if with_position else None,
        orientation=_numbers(dataset, "ImageOrientationPatient", 6),
        spacing_mm=_spacing(dataset),
        contrast=(str(echo), str(_numbers(dataset, "DiffusionBValue", 1)), *kinds),
        time=(*time, _number(dataset, "AcquisitionTime"), _number(dataset, "InstanceNumber")),
    )


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    """PixelSpacing, else the detector's spacing brought to the patient's plane where the header says how."""
    spacing: tuple[float, float] | None = _numbers(dataset, "PixelSpacing", 2)
    if spacing is None and (at_detector := _numbers(dataset, "ImagerPixelSpacing", 2)):
        factor = _number(dataset, "EstimatedRadiographicMagnificationFactor")
        factor = factor if 1 <= factor < 10 else 1.0
        spacing = (at_detector[0] / factor, at_detector[1] / factor)
    return spacing


def _enhanced_frame(
    dataset: Dataset, shared: Dataset, own: Dataset, file: str, number: int, modality: Modality
) -> Frame:
    """A frame of an enhanced object: facts of its own, else those shared by all frames."""

    def macro(name: str) -> Dataset:
        for holder in (own, shared):
            if sequence := holder.get(name):
                item: Dataset = sequence[0]
                return item
        return Dataset()

    content = macro("FrameContentSequence")
    kinds = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
    frame_type = [word.upper() for name in kinds for word in _texts(macro(name), "FrameType")]
    echo = _numbers(macro("MREchoSequence"), "EffectiveEchoTime", 1)
    b_value = _numbers(macro("MRDiffusionSequence"), "DiffusionBValue", 1)
    return Frame(
        file=file,
        number=number,
        position=_numbers(macro("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=_numbers(macro("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        spacing_mm=_numbers(macro("PixelMeasuresSequence"), "PixelSpacing", 2),
        contrast=(str(echo), str(b_value), *frame_type[2:]),
        time=(
            _number(content, "TemporalPositionIndex"),
            _number(content, "FrameAcquisitionNumber"),
            _number(dataset, "InstanceNumber"),
        ),
        reason=_type_reason(frame_type, modality),
    )


def _text(dataset: Dataset, name: str) -> str:
    return " ".join(_texts(dataset, name)[:1])


def _texts(dataset: Dataset, name: str) -> list[str]:
    with contextlib.suppress(Exception):
        value = dataset.get(name)
        if value is None:
            return []
        if isinstance(value, str | int | float):
            return [str(value).strip("\0 ")]
        return [str(part).strip("\0 ") for part in value]
    return []


def _meta_text(dataset: Dataset, name: str) -> str:
    meta = getattr(dataset, "file_meta", None)
    return _text(meta, name) if meta is not None else ""


def _numbers(dataset: Dataset, name: str, count: int) -> Any:
    """`count` finite numbers of an element as a tuple; None where they are absent or are no such numbers."""
    try:
        value = dataset.get(name)
        values = [float(value)] if isinstance(value, str | int | float) else [float(part) for part in value]
    except Exception:
        return None
    return tuple(values[:count]) if len(values) >= count and np.isfinite(values).all() else None


def _number(dataset: Dataset, name: str) -> float:
    values = _numbers(dataset, name, 1)
    return float(values[0]) if values else 0.0


def _count(dataset: Dataset, name: str, default: int = 0) -> int:
    """A non-negative whole number; 0 where the element holds something else, `default` where it is absent."""
    try:
        value = dataset.get(name)
        return default if value is None or value == "" else max(0, int(value))
    except Exception:
        return 0


# ---------------------------------------------------------------------------------------------------------- pixels


def read_frames(path: Path, numbers: Sequence[int]) -> NDArray[np.float32]:
    """Values of the frames `numbers` of the file: (N, H, W), after rescale, with white as high value.

    Raises ScanError: `truncated_pixels`, `cannot_decode`, `needs_extra_jpeg12`, `colour_image`, ...
    """
    with _quiet():
        try:
            dataset = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, little = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = _guessed_syntax(implicit, little)
        except (OSError, MemoryError):
            raise
        except Exception:
            raise ScanError("damaged_header") from None
        return np.stack([_frame_values(dataset, number) for number in numbers])


def _guessed_syntax(implicit: bool | None, little: bool | None) -> UID:
    if implicit:
        return pydicom.uid.ImplicitVRLittleEndian
    return pydicom.uid.ExplicitVRLittleEndian if little else pydicom.uid.ExplicitVRBigEndian


def _frame_values(dataset: FileDataset, number: int) -> NDArray[np.float32]:
    try:
        stored = np.asarray(pixel_array(dataset, index=number))
    except MemoryError:
        raise
    except Exception:
        raise ScanError(_decode_reason(dataset)) from None
    try:
        return _values(dataset, number, stored)
    except (ScanError, MemoryError):
        raise
    except Exception:
        raise ScanError("bad_pixel_description") from None


def _decode_reason(dataset: Dataset) -> str:
    syntax = _transfer_syntax(dataset)
    if syntax == _JPEG_EXTENDED and _count(dataset, "BitsStored") > 8:
        return "needs_extra_jpeg12"
    return "cannot_decode" if _is_compressed(syntax) else "truncated_pixels"


def _values(dataset: Dataset, number: int, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values -> grey, unused bits off, inverted where white is low, rescaled, padding at the low end."""
    if _text(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        stored = grey_of(stored)
    if stored.ndim != 2:
        raise ScanError("bad_pixel_description")
    low, high, stored = _stored_range(dataset, stored)
    padded = _padding(dataset, stored)
    if _text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        stored = (low + high) - stored.astype(np.float64)
    values = _rescaled(dataset, number, stored)
    if padded is not None and not padded.all():
        values[padded] = values[~padded].min()
    return values


def grey_of(colour: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 3) whose channels agree -> (H, W). Raises ScanError(colour_image) where they do not.

    A grey picture that went through a colour JPEG differs by a few levels: 2% of the range on average is allowed.
    """
    wide = colour[..., :3].astype(np.float64)
    spread = float((wide.max(axis=2) - wide.min(axis=2)).mean())
    span = float(np.iinfo(colour.dtype).max) if colour.dtype.kind in "ui" else float(np.ptp(wide) or 1.0)
    if spread > 0.02 * span:
        raise ScanError("colour_image")
    return np.asarray(wide.mean(axis=2))


def _stored_range(dataset: Dataset, stored: NDArray[Any]) -> tuple[float, float, NDArray[Any]]:
    """The range that the header gives stored values, and those without bits that do not belong to them."""
    if stored.dtype.kind == "f":
        return float(stored.min()), float(stored.max()), stored
    bits = _count(dataset, "BitsStored") or stored.dtype.itemsize * 8
    allocated = stored.dtype.itemsize * 8
    signed = stored.dtype.kind == "i"
    syntax = _transfer_syntax(dataset)
    if bits < allocated and not _is_compressed(syntax):
        # Old files keep overlays in the unused bits.
        shift = min(max(0, _count(dataset, "HighBit", bits - 1) - (bits - 1)), allocated - bits)
        stored = stored << (allocated - bits - shift) >> (allocated - bits)
    low = -(2.0 ** (bits - 1)) if signed else 0.0
    high = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1
    return low, high, stored


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Where the scanner wrote no picture; CT needs no mask, since its padding lies below any window."""
    value = _numbers(dataset, "PixelPaddingValue", 1)
    if value is None or _text(dataset, "Modality") == "CT":
        return None
    limit = _numbers(dataset, "PixelPaddingRangeLimit", 1) or value
    return np.asarray((stored >= min(value[0], limit[0])) & (stored <= max(value[0], limit[0])))


def _rescaled(dataset: Dataset, number: int, stored: NDArray[Any]) -> NDArray[np.float32]:
    if "ModalityLUTSequence" in dataset and len(dataset.ModalityLUTSequence):
        lut = apply_modality_lut(stored.astype(np.int64), dataset)
        return np.asarray(lut, dtype=np.float32)
    slope, intercept = _rescale(dataset, number)
    # In float32 like every common converter, so that volumes agree with theirs bit for bit.
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _rescale(dataset: Dataset, number: int) -> tuple[float, float]:
    """Slope and intercept of one frame: its own in an enhanced object, else the file's, else none (1, 0)."""
    holders = [dataset]
    if shared := dataset.get("SharedFunctionalGroupsSequence"):
        holders = [*(shared[0].get("PixelValueTransformationSequence") or []), *holders]
    if per_frame := dataset.get("PerFrameFunctionalGroupsSequence"):
        holders = [*(per_frame[number].get("PixelValueTransformationSequence") or []), *holders]
    for holder in holders:
        if "RescaleSlope" in holder or "RescaleIntercept" in holder:
            slope = _numbers(holder, "RescaleSlope", 1) or (1.0,)
            intercept = _numbers(holder, "RescaleIntercept", 1) or (0.0,)
            if slope[0] == 0:
                raise ScanError("bad_pixel_description", "rescale slope is zero")
            return slope[0], intercept[0]
    return 1.0, 0.0


# ---------------------------------------------------------------------------------------------------------- writing

_CLASS_OF_MODALITY: Mapping[str, str] = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
}


def write_dicom(
    path: Path,
    pixels: NDArray[Any],
    attributes: Mapping[str, Any],
    *,
    adjust: Callable[[FileDataset], None] | None = None,
) -> None:
    """Write one uncompressed DICOM file, whole or not at all.

    pixels: (H, W), or (N, H, W) for frames, of uint8, uint16 or int16. attributes: DICOM keyword -> value; `Modality`
    chooses the storage class where `SOPClassUID` is not given; missing UIDs are made. adjust: a last change.
    """
    if pixels.dtype not in (np.uint8, np.uint16, np.int16):
        raise AssertionError(f"pixels of {pixels.dtype}")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    described = {
        "SOPClassUID": _CLASS_OF_MODALITY.get(str(attributes.get("Modality")), _SECONDARY_CAPTURE),
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"NumberOfFrames": pixels.shape[0]} if pixels.ndim == 3 else {}),
        **attributes,
    }
    for keyword, value in described.items():
        setattr(dataset, keyword, value)
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if adjust is not None:
        adjust(dataset)
    partial = path.with_name(path.name + ".partial")
    dataset.save_as(partial, enforce_file_format=True)
    partial.replace(path)
