"""NIfTI in and out: the one file that knows nibabel."""

import contextlib
import gzip
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.imageglobals import logger as _nibabel_logger
from numpy.typing import NDArray

from client.reasons import reason_of
from client.series import MAX_SPACING_MM, MAX_VOXELS, MIN_SPACING_MM
from client.volumes import canonical, image_of, spacing_of
from unimiss_core.errors import ScanError
from unimiss_core.scan import Modality, Scan

_nibabel_logger.setLevel(logging.CRITICAL + 1)  # it quotes values of the file

_MAX_INFLATION = 1040
"""No deflate stream unfolds to more than 1,032 times its size."""
_MAX_SHEAR = 0.02
"""Largest cosine between two axes; a skewed grid is none that slices can be cut from."""
_AFFINES_DIFFER_MM = 1.0


def looks_like_nifti(start: bytes) -> bool:
    """Whether a file that begins with `start` (348 bytes where it has them) is NIfTI-1 or 2, plain or gzipped."""
    if start[:2] == b"\x1f\x8b":
        return True  # gzip: `check_header` says what is inside
    return _magic(start)


def _magic(start: bytes) -> bool:
    """Of NIfTI-1 or 2 with header and voxels in one file; pairs of .hdr and .img are not read."""
    return start[344:348] == b"n+1\0" or start[4:8] == b"n+2\0"


def check_header(path: Path) -> tuple[tuple[int, ...], tuple[float, ...], tuple[str, ...]]:
    """(shape, spacing in mm, flags) that the header states, in the file's own axes; one volume of a 4D file.

    Raises ScanError: not NIfTI, or a header that cannot be true of this file or is no scan.
    """
    with _opened(path) as image:
        affine, flags = _affine(image)
        return _spatial_shape(image), spacing_of(affine), flags


def read_nifti(path: Path, modality: Modality, *, volume: int = 0) -> Scan:
    """One volume, from 0, of a NIfTI file in canonical axes; a file with one slice is an image. Raises as
    `read_volumes`."""
    (scan,) = read_volumes(path, [(volume, modality)])
    return scan


def read_volumes(path: Path, wanted: Sequence[tuple[int, Modality]]) -> tuple[Scan, ...]:
    """Each (number, modality) as `read_nifti`, in the order asked for; a file that is gzipped is unpacked once.

    Raises ScanError: `not_an_image`, `damaged_header`, `truncated_pixels`, `bad_spacing`, `bad_geometry`, ...;
    `lacks_channel`: the file holds fewer volumes.
    """
    with _opened(path) as image:
        affine, flags = _affine(image)
        place_known = "orientation_assumed" not in flags
        found: dict[int, Scan] = {}
        for place in sorted(range(len(wanted)), key=lambda place: wanted[place][0]):  # forward through the file
            number, modality = wanted[place]
            found[place] = _scan(_volume(image, number), affine, modality, place_known=place_known)
    return tuple(found[place] for place in range(len(wanted)))


def _scan(voxels: NDArray[np.float32], affine: NDArray[np.float64], modality: Modality, *, place_known: bool) -> Scan:
    """Of voxels (X, Y, Z)."""
    if 1 in voxels.shape:
        return image_of(voxels[None], affine, modality)
    turned, affine = canonical(voxels[None], affine)
    return Scan(turned, spacing_of(affine), modality, affine, place_known=place_known)


def _volume(image: Any, number: int) -> NDArray[np.float32]:
    """(X, Y, Z), scaled as the header says. Raises ScanError."""
    shape, held = _spatial_shape(image), image.shape[3:]
    if number >= math.prod(held):
        raise ScanError("lacks_channel")
    place = (slice(None),) * min(3, len(image.shape)) + tuple(np.unravel_index(number, held, order="F") if held else ())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            voxels = np.asarray(image.dataobj[place], dtype=np.float32).reshape(shape)
            if number == math.prod(held) - 1:
                image.dataobj.file_like.read(1)  # past the last voxel gzip compares its checksum
            return voxels
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ScanError(reason_of(error, "truncated_pixels")) from None
    except MemoryError:
        raise
    except Exception:
        raise ScanError("cannot_decode") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image behind `path`, by content and not by name: gzip is undone here. Voxels are read inside only."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as stream:
        try:
            start = stream.read(540)  # the longer of both headers
        except (OSError, EOFError, zlib.error) as error:
            raise ScanError(reason_of(error, "not_an_image")) from None
        if not _magic(start):
            raise ScanError("not_an_image")
        kind: Any = nibabel.Nifti2Image if start[4:8] == b"n+2\0" else nibabel.Nifti1Image
        length = 540 if kind is nibabel.Nifti2Image else 348
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Not `from_stream`: that reads the extensions too, as much of them as the file says.
                header = kind.header_class(start[:length])
                image = kind(kind.ImageArrayProxy(stream, header), header.get_best_affine(), header)
                _check_size(image, path, zipped)
        except (ScanError, MemoryError):
            raise
        except Exception as error:
            raise ScanError(reason_of(error, "damaged_header")) from None
        yield image


def _check_size(image: Any, path: Path, zipped: bool) -> None:
    """Whether the file can hold what its header claims, before anything of that size is allocated."""
    kind: np.dtype[Any] = image.header.get_data_dtype()
    claimed = image.dataobj.offset + math.prod(image.shape) * kind.itemsize
    size = path.stat().st_size
    if min(image.shape, default=0) < 1:
        raise ScanError("bad_pixel_description")
    if claimed > (size * _MAX_INFLATION if zipped else size):
        raise ScanError("truncated_pixels")
    if kind.kind not in "iuf":
        raise ScanError("colour_image" if kind.kind == "V" else "bad_pixel_description")


def _spatial_shape(image: Any) -> tuple[int, ...]:
    """(X, Y, Z) of one volume."""
    shape = (*(int(length) for length in image.shape), 1, 1)[:3]
    if sum(length > 1 for length in shape) < 2:
        raise ScanError("bad_pixel_description")
    if math.prod(shape) > MAX_VOXELS:
        raise ScanError("too_large")
    return shape


def _affine(image: Any) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine to RAS+ mm, and what is worth a remark about it. Raises ScanError where it cannot be used."""
    header, flags = image.header, []
    affine = np.array(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise ScanError("bad_geometry")
    if math.prod(image.shape[3:]) > 1:
        flags.append("first_of_several_times")
    if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        flags.append("orientation_assumed")
    if int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0 and _disagree(image):
        flags.append("qform_and_sform_disagree")
    affine[:3] *= _millimetres(header)
    spacing = np.array(spacing_of(affine))
    solid = [axis for axis, length in enumerate((*image.shape, 1, 1)[:3]) if length > 1]
    if not all(MIN_SPACING_MM <= spacing[axis] <= MAX_SPACING_MM for axis in solid) or not (spacing > 0).all():
        raise ScanError("bad_spacing")
    directions = affine[:3, :3] / spacing
    if np.abs(directions.T @ directions - np.eye(3)).max() > _MAX_SHEAR:
        raise ScanError("bad_geometry", "axes are not at right angles")
    return affine, tuple(flags)


def _millimetres(header: Any) -> float:
    """1 where the header says nothing, or what the standard does not know."""
    return {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 0b111, 1.0)


def _disagree(image: Any) -> bool:
    """Whether qform and sform put a corner of the volume at places more than a millimetre apart."""
    try:
        by_q, by_s = image.header.get_qform(), image.header.get_sform()
    except Exception:
        return True
    far = np.array([*(length - 1 for length in (*image.shape, 1, 1)[:3]), 1.0])
    corners = np.array([[0, 0, 0, 1.0], far])
    return bool(np.abs((by_q - by_s) @ corners.T).max() > _AFFINES_DIFFER_MM)


def write_nifti(path: Path, scan: Scan) -> None:
    """Write `scan` as NIfTI-1 (gzipped where the name ends in .gz), whole or not at all; channels must be one.

    Values keep their type (float32); `read_nifti` gives them back.
    """
    if scan.voxels.shape[0] != 1:
        raise AssertionError(f"{scan.voxels.shape[0]} channels")
    voxels = scan.voxels[0] if scan.rank == 3 else scan.voxels
    affine = scan.affine
    if affine is None:
        depth = scan.spacing_mm if scan.rank == 3 else (1.0, *scan.spacing_mm)
        affine = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]]) @ np.diag([*depth, 1.0])
    # Stored as (W, H, D): the order that other programs show upright.
    make: Any = nibabel.Nifti1Image
    image = make(voxels.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    partial = path.with_name(f".{path.name}.partial{suffix}")
    nibabel.save(image, partial)
    partial.replace(path)


def write_mask(path: Path, labels: NDArray[np.uint8], affine: NDArray[np.float64], like: Path | None = None) -> None:
    """Write classes (D, H, W) or (H, W), in canonical axes with their affine, as NIfTI of 8 bits, whole or not at all.

    like: the NIfTI file that the scan was read from: the mask then has its shape, its order of axes and its affine.
    """
    volume = labels if labels.ndim == 3 else labels[None]
    make: Any = nibabel.Nifti1Image
    if like is None:
        image = make(volume.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])
        image.header.set_xyzt_units("mm")
    else:
        with _opened(like) as source:
            theirs, header = np.array(source.affine, dtype=np.float64), source.header.copy()
            in_mm, _ = _affine(source)
        image = make(_in_axes_of(volume, affine, in_mm), theirs)
        image.set_sform(theirs, code=int(header["sform_code"]) or 1)
        image.set_qform(theirs, code=int(header["qform_code"]))
        image.header["xyzt_units"] = header["xyzt_units"]
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    partial = path.with_name(f".{path.name}.partial{suffix}")
    nibabel.save(image, partial)
    partial.replace(path)


def _in_axes_of(
    volume: NDArray[np.uint8], affine: NDArray[np.float64], other: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """The volume with its axes ordered and turned as those of another grid, alike but for that: `canonical` undone."""
    turns = np.linalg.inv(affine[:3, :3]) @ other[:3, :3]  # (own axis, other axis): a permutation with signs
    order = np.abs(turns).argmax(0)
    backwards = tuple(axis for axis in range(3) if turns[order[axis], axis] < 0)
    return np.ascontiguousarray(np.flip(volume.transpose(*order), backwards))
