"""DICOM in and out: the one file that knows pydicom. Codecs (gdcm, openjpeg, rle) come in through its plugins.

`read_header` says what a file is without decoding a pixel, `read_frames` gives the values of frames. Both raise
`ScanError` with a reason code for whatever a file can do wrong; no text of a file gets into the error.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from client.dicom_bytes import DEFLATED, PixelRoom, check_inflation, pixel_room
from client.dicom_elements import count_of, identity_of, number_of, numbers_of, says_scale, scale_of, text_of, texts_of
from client.dicom_rules import CLASS_OF_MODALITY, DICOMDIR, SECONDARY_CAPTURE, modality_of, pixels_reason, type_reason
from client.dicom_values import as_stored, between, bounds, grey_of, without_unused_bits
from client.frames import Frame
from client.patients import dicom_patient_text, patient_of
from client.reasons import reason_of
from client.series import Header
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality

# They quote values of the file in what they log.
for _name in ("pydicom", "pylibjpeg", "openjpeg", "rle"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

_HEADER_TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "PatientID",
    "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "AcquisitionNumber",
    "InstanceNumber", "AcquisitionTime", "ContentTime", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "ImagerPixelSpacing", "EstimatedRadiographicMagnificationFactor", "ImagePositionPatient",
    "ImageOrientationPatient", "EchoTime", "EchoNumbers", "DiffusionBValue", "TemporalPositionIdentifier",
    "TriggerTime", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "BurnedInAnnotation",
    "RecognizableVisualFeatures", "ComplexImageComponent", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip

_DESCRIPTION = ("SOPClassUID", "Modality", "PhotometricInterpretation")
_DESCRIPTION_IN_NUMBERS = (
    "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope",
    "RescaleIntercept",
)  # fmt: skip
"""Other scans under one UID differ in these, where all else is alike; 1 and 1.0 are the same."""

_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"

_quiet_lock = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pydicom quotes values of the file in its warnings: nothing of them may reach a screen or log."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # pydicom raises a dozen kinds on damaged files
            raise ScanError(reason_of(error, "damaged_header")) from None


def _open(path: Path) -> tuple[Dataset, PixelRoom | None]:
    """The header, and the room that its pixel data take in the file; None where there are none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        check_inflation(file, size)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_HEADER_TAGS))
        syntax = _transfer_syntax(dataset)
        if syntax == DEFLATED:
            return dataset, _deflated_room(path)
        implicit, little = dataset.original_encoding
        order: Literal["little", "big"] = "little" if little else "big"
        # pydicom stops at the element that holds the pixels.
        return dataset, pixel_room(file, size, implicit=bool(implicit), order=order)


def _deflated_room(path: Path) -> PixelRoom | None:
    dataset = pydicom.dcmread(path, force=True)
    return PixelRoom(len(dataset.PixelData)) if "PixelData" in dataset else None


def _transfer_syntax(dataset: Dataset) -> UID | None:
    meta = getattr(dataset, "file_meta", None)
    return UID(meta.TransferSyntaxUID) if meta is not None and "TransferSyntaxUID" in meta else None


def _is_compressed(syntax: UID | None) -> bool:
    try:
        return syntax is not None and syntax.is_compressed
    except ValueError:  # none that pydicom knows
        return True


def _header(dataset: Dataset, room: PixelRoom | None, file: str, secret: bytes) -> Header:
    if not len(dataset):
        raise ScanError("damaged_header")
    sop_class = text_of(dataset, "SOPClassUID") or _meta_text(dataset, "MediaStorageSOPClassUID")
    if sop_class == DICOMDIR:
        raise ScanError("dicomdir")
    if not sop_class and not text_of(dataset, "Modality") and room is None:
        raise ScanError("damaged_header")
    syntax = _transfer_syntax(dataset)
    modality = modality_of(sop_class, text_of(dataset, "Modality"))
    patient_text = dicom_patient_text(identity_of(dataset, "PatientID"), identity_of(dataset, "IssuerOfPatientID"))
    frames: tuple[Frame, ...] = ()
    reason = _reason(dataset, room, sop_class, modality)
    if not reason:
        assert modality is not None
        frames = tuple(_frames(dataset, file, modality))
    return Header(
        file=file,
        patient=patient_of(patient_text, secret) if patient_text else None,
        study=identity_of(dataset, "StudyInstanceUID"),
        series=identity_of(dataset, "SeriesInstanceUID"),
        instance=identity_of(dataset, "SOPInstanceUID"),
        modality=modality,
        matrix=(count_of(dataset, "Rows"), count_of(dataset, "Columns")),
        frame_of_reference=identity_of(dataset, "FrameOfReferenceUID"),
        frames=frames,
        described=_described(dataset),
        compressed=_is_compressed(syntax),
        reason=reason,
    )


def _described(dataset: Dataset) -> str:
    texts = [texts_of(dataset, name) for name in _DESCRIPTION]
    told = {name: texts_of(dataset, name) for name in _DESCRIPTION_IN_NUMBERS}
    return repr([*texts, *(numbers_of(dataset, name, max(1, len(of))) or of for name, of in told.items())])


def _reason(dataset: Dataset, room: PixelRoom | None, sop_class: str, modality: Modality | None) -> str:
    """Why the whole file is left out, from its header alone; empty where it is not."""
    # Its four classes with several frames go on with a dot; those of visible light go on with a digit.
    if f"{sop_class}.".startswith(f"{SECONDARY_CAPTURE}."):
        return "secondary_capture"
    if room is None:
        return "no_pixels"
    if modality is None:
        return "unsupported_object"
    if text_of(dataset, "BurnedInAnnotation").upper() == "YES":
        return "burned_in_annotation"
    image_type = [word.strip().upper() for word in texts_of(dataset, "ImageType")]
    if by_type := type_reason(image_type, modality, text_of(dataset, "ComplexImageComponent")):
        return by_type
    impossible = pixels_reason(
        rows=count_of(dataset, "Rows"),
        columns=count_of(dataset, "Columns"),
        bits=count_of(dataset, "BitsAllocated"),
        samples=count_of(dataset, "SamplesPerPixel", 1),
        frames=count_of(dataset, "NumberOfFrames", 1),
        photometric=text_of(dataset, "PhotometricInterpretation"),
        room=room,
    )
    return impossible or _rescale_reason(dataset, modality)


def _rescale_reason(dataset: Dataset, modality: Modality) -> str:
    """CT is in HU, and an unsigned CT that does not say how its values become HU cannot be read rightly."""
    says = "RescaleIntercept" in dataset or bool(dataset.get("ModalityLUTSequence"))
    says = says or "PerFrameFunctionalGroupsSequence" in dataset
    unsigned = count_of(dataset, "PixelRepresentation") == 0
    return "no_rescale" if modality == "CT" and unsigned and not says else ""


def _frames(dataset: Dataset, file: str, modality: Modality) -> Iterator[Frame]:
    count = count_of(dataset, "NumberOfFrames", 1)
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
    echo = numbers_of(dataset, "EchoTime", 1) or numbers_of(dataset, "EchoNumbers", 1)
    kinds = texts_of(dataset, "ImageType")[2:] if modality == "MR" else []  # in phase, water, fat, ...
    time = [number_of(dataset, name) for name in ("TemporalPositionIdentifier", "TriggerTime", "AcquisitionNumber")]
    return Frame(
        file=file,
        number=number,
        position=numbers_of(dataset, "ImagePositionPatient", 3) if with_position else None,
        orientation=numbers_of(dataset, "ImageOrientationPatient", 6),
        spacing_mm=_spacing(dataset),
        contrast=(str(echo), str(numbers_of(dataset, "DiffusionBValue", 1)), *kinds),
        time=(*time, number_of(dataset, "AcquisitionTime"), number_of(dataset, "InstanceNumber")),
        acquisition=number_of(dataset, "AcquisitionNumber"),
        reason=_scale_reason(dataset, number),
    )


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    """PixelSpacing, else the detector's spacing brought to the patient's plane where the header says how."""
    spacing: tuple[float, float] | None = numbers_of(dataset, "PixelSpacing", 2)
    if spacing is None and (at_detector := numbers_of(dataset, "ImagerPixelSpacing", 2)):
        factor = number_of(dataset, "EstimatedRadiographicMagnificationFactor")
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

    content, of_mr = macro("FrameContentSequence"), macro("MRImageFrameTypeSequence")
    kinds = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
    frame_type = [word.upper() for name in kinds for word in texts_of(macro(name), "FrameType")]
    echo = numbers_of(macro("MREchoSequence"), "EffectiveEchoTime", 1)
    b_value = numbers_of(macro("MRDiffusionSequence"), "DiffusionBValue", 1)
    return Frame(
        file=file,
        number=number,
        position=numbers_of(macro("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=numbers_of(macro("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        spacing_mm=numbers_of(macro("PixelMeasuresSequence"), "PixelSpacing", 2),
        contrast=(str(echo), str(b_value), *frame_type[2:]),
        time=(
            number_of(content, "TemporalPositionIndex"),
            number_of(content, "FrameAcquisitionNumber"),
            number_of(dataset, "InstanceNumber"),
        ),
        acquisition=number_of(content, "FrameAcquisitionNumber"),
        reason=type_reason(frame_type, modality, text_of(of_mr, "ComplexImageComponent"))
        or _scale_reason(dataset, number),
    )


def _meta_text(dataset: Dataset, name: str) -> str:
    meta = getattr(dataset, "file_meta", None)
    return text_of(meta, name) if meta is not None else ""


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
        except MemoryError:
            raise
        except Exception as error:
            raise ScanError(reason_of(error, "damaged_header")) from None
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
    if syntax == _JPEG_EXTENDED and count_of(dataset, "BitsStored") > 8:
        return "needs_extra_jpeg12"
    return "cannot_decode" if _is_compressed(syntax) else "truncated_pixels"


def _values(dataset: Dataset, number: int, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values -> grey, unused bits off, rescaled, turned over where white is low, padding at the low end."""
    photometric, bits = text_of(dataset, "PhotometricInterpretation"), count_of(dataset, "BitsStored")
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        stored = grey_of(stored)
    if stored.ndim != 2:
        raise ScanError("bad_pixel_description")
    if not _is_compressed(_transfer_syntax(dataset)):
        stored = without_unused_bits(stored, bits=bits, high_bit=count_of(dataset, "HighBit", bits - 1))
    values = _rescaled(dataset, number, stored)
    if photometric == "MONOCHROME1":
        ends = _rescaled(dataset, number, np.array([bounds(stored, bits=bits)]))
        values = ends.sum(dtype=np.float32) - values
    padding = numbers_of(dataset, "PixelPaddingValue", 1)
    if padding is not None:
        limit = numbers_of(dataset, "PixelPaddingRangeLimit", 1) or padding
        outside = between(stored, as_stored(padding[0], stored), as_stored(limit[0], stored))
        if outside.any() and not outside.all():
            lowest = values[~outside].min()
            # In CT it mostly lies below any window, and stays as every other converter leaves it.
            is_ct = text_of(dataset, "Modality") == "CT"
            values[outside] = np.minimum(values[outside], lowest) if is_ct else lowest
    return values


def _rescaled(dataset: Dataset, number: int, stored: NDArray[Any]) -> NDArray[np.float32]:
    if dataset.get("ModalityLUTSequence"):
        lut = apply_modality_lut(stored.astype(np.int64), dataset)
        return np.asarray(lut, dtype=np.float32)
    slope, intercept = _rescale(dataset, number)
    # In float32 like every common converter, so that volumes agree with theirs bit for bit.
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _scale_reason(dataset: Dataset, number: int) -> str:
    """Why the values of a frame cannot be known, from its header alone; empty where they can."""
    try:
        if not dataset.get("ModalityLUTSequence"):  # which goes before slope and intercept
            _rescale(dataset, number)
    except ScanError as error:
        return error.reason
    return ""


def _modality(dataset: Dataset) -> Modality | None:
    sop_class = text_of(dataset, "SOPClassUID") or _meta_text(dataset, "MediaStorageSOPClassUID")
    return modality_of(sop_class, text_of(dataset, "Modality"))


def _rescale(dataset: Dataset, number: int) -> tuple[float, float]:
    """Slope and intercept of one frame: its own in an enhanced object, else the file's, else none (1, 0)."""
    holders = [dataset]
    if shared := dataset.get("SharedFunctionalGroupsSequence"):
        holders = [*(shared[0].get("PixelValueTransformationSequence") or []), *holders]
    if per_frame := dataset.get("PerFrameFunctionalGroupsSequence"):
        holders = [*(per_frame[number].get("PixelValueTransformationSequence") or []), *holders]
    modality = _modality(dataset)
    empty_counts = modality in ("CT", "PT")  # which is in HU; of which each slice has a slope of its own
    for holder in holders:
        if says_scale(holder, empty_counts=empty_counts):
            return scale_of(holder, empty_counts=empty_counts)
    if per_frame and modality == "CT" and count_of(dataset, "PixelRepresentation") == 0:
        raise ScanError("no_rescale")  # a plain CT was refused by its header
    return 1.0, 0.0


# ---------------------------------------------------------------------------------------------------------- writing


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
        "SOPClassUID": CLASS_OF_MODALITY.get(str(attributes.get("Modality")), SECONDARY_CAPTURE),
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
