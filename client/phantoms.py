"""Made-up hospitals: seeded phantoms written as the files that real ones have, for the demo and for tests.

    FOLDER/labels.csv                   one line for each file: file, patient, modality, lesion (0 or 1), finding
    FOLDER/scans/PHANTOM-1-0007/...     cr: xray-1.dcm; ct: 32 slices, named in no order; mixed: ct.nii.gz, xray-1.png

CT is rendered in HU; an X-ray is the Beer-Lambert projection of the same body, so that both show the same anatomy.
Every byte follows from the hospital's seed and the patient's number; all patients are invented.
"""

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from client.anatomy import Array, Body, Grid, draw_body, render
from client.dicom import write_dicom
from client.nifti import write_nifti
from client.pictures import write_png
from unimiss_core.config import Config
from unimiss_core.scan import Scan

WATER_PER_MM = 0.02
"""Linear attenuation of water at about 70 keV."""

_DETECTOR = (128, 160)
_DETECTOR_SPACING_MM = (2.0, 2.1)
_RAY_STEP_MM = 7.0
_FULL = 4095
"""Largest stored value of an X-ray: 12 bits."""

PositiveMm = Annotated[float, Field(gt=0)]
PositiveCount = Annotated[int, Field(gt=0)]


class PhantomConfig(Config):
    """A made-up hospital."""

    kind: Literal["cr", "ct", "mixed"]
    """cr: CR and DX DICOM images; ct: CT DICOM series; mixed: a NIfTI volume and PNG X-rays of each patient."""
    patients: PositiveCount
    seed: Annotated[int, Field(ge=0)] = 0
    """Hospitals of different seeds have different patients; number k of a seed is the same in every kind."""
    lesion_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Chance that a patient has nodules or an opacity in the lungs."""
    volume_shape: tuple[PositiveCount, PositiveCount, PositiveCount] = (32, 96, 96)
    """(D, H, W)"""
    volume_spacing_mm: tuple[PositiveMm, PositiveMm, PositiveMm] = (8.0, 3.5, 3.5)


Row = tuple[str, str, str, int, str]
_COLUMNS = ("file", "patient", "modality", "lesion", "finding")


def write_hospital(config: PhantomConfig, folder: Path) -> None:
    """Write the hospital below `folder`. What stands there under the same names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for number in range(config.patients) for row in _write_patient(config, number, folder)]
    partial = folder / ".labels.csv.partial"
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    partial.replace(folder / "labels.csv")  # last, so that it stands only where all the rest does


def _write_patient(config: PhantomConfig, number: int, folder: Path) -> list[Row]:
    rng = np.random.default_rng([config.seed, number])
    body = draw_body(rng, lesion=bool(rng.random() < config.lesion_share))
    name = f"PHANTOM-{config.seed}-{number:04d}"
    place = folder / "scans" / name
    place.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, str]] = []
    if config.kind == "ct":
        files += [(path, "CT") for path in _write_series(place, name, ct(body, config, rng), config, rng)]
    if config.kind == "mixed":
        files.append((place / "ct.nii.gz", "CT"))
        write_nifti(files[0][0], _scan(ct(body, config, rng), config))
    if config.kind in ("cr", "mixed"):
        write = _write_cr if config.kind == "cr" else _write_picture
        visits = 1 + int(rng.random() < 0.25)
        files += [(write(place, name, visit, radiograph(body, rng), rng), "XR") for visit in range(1, visits + 1)]
    lesion = int(body.finding != "none")
    return [(path.relative_to(folder).as_posix(), name, kind, lesion, body.finding) for path, kind in files]


# ------------------------------------------------------------------------------------------------------------ physics


def ct(body: Body, config: PhantomConfig, rng: np.random.Generator) -> Array:
    """A CT of the body in whole HU (D, H, W), with a scanner's noise."""
    volume = render(body, _grid(config, rng))
    volume += rng.uniform(8, 22) * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(volume), -1024, 3071), dtype=np.float32)


def _grid(config: PhantomConfig, rng: np.random.Generator) -> Grid:
    """Nobody lies exactly in the middle of the scanner."""
    z, y, x = (float(v) for v in rng.normal(0, (6, 5, 5)))
    return Grid(config.volume_shape, config.volume_spacing_mm, (z, y, x))


def project(volume_hu: Array, step_mm: float, *, axis: int = 1) -> Array:
    """Share of parallel rays that pass a volume along `axis`: exp(-sum mu step), mu = mu_water (1 + HU / 1000).

    Beer and Lambert's law for one energy, without scatter; mu is never below 0 (air).
    """
    attenuation = WATER_PER_MM * np.maximum(0, 1 + volume_hu / 1000)
    return np.asarray(np.exp(-step_mm * attenuation.sum(axis=axis)), dtype=np.float32)


def radiograph(body: Body, rng: np.random.Generator) -> NDArray[np.uint16]:
    """A frontal X-ray (H, W) of 12 bits, bone bright: the logarithm of what a noisy detector counted.

    The patient's left is at the picture's right. Exposure, position and the window of the values vary.
    """
    z, x = (float(v) for v in rng.normal(0, (7, 6)))
    rays = round(2 * 1.15 * body.half_depth_mm / _RAY_STEP_MM)
    spacing = (_DETECTOR_SPACING_MM[0], _RAY_STEP_MM, _DETECTOR_SPACING_MM[1])
    volume = render(body, Grid((_DETECTOR[0], rays, _DETECTOR[1]), spacing, (z, 0.0, x)))
    photons = project(volume, _RAY_STEP_MM) * rng.uniform(20_000, 60_000)
    photons += np.sqrt(photons) * rng.standard_normal(photons.shape, dtype=np.float32)
    density = -np.log(np.maximum(photons, 1.0))[::-1]  # rows run downwards, z upwards
    low, high = np.percentile(density, (0.5, 99.5))
    low, high = low - rng.uniform(0, 0.1) * (high - low), high + rng.uniform(0, 0.15) * (high - low)
    grey = np.clip((density - low) / (high - low), 0, 1)
    return np.asarray(np.rint(grey * _FULL), dtype=np.uint16)


# -------------------------------------------------------------------------------------------------------------- files


def _scan(volume: Array, config: PhantomConfig) -> Scan:
    affine = np.eye(4)
    centre = (np.array(config.volume_shape) - 1) / 2 * config.volume_spacing_mm
    d, h, w = config.volume_spacing_mm
    # (d, h, w) point to superior, posterior and left; RAS+ to right, anterior and superior.
    affine[:3, :3] = [[0, 0, -w], [0, -h, 0], [d, 0, 0]]
    affine[:3, 3] = centre[2], centre[1], -centre[0]
    return Scan(volume[None], config.volume_spacing_mm, "CT", affine)


def _write_series(
    place: Path, name: str, volume: Array, config: PhantomConfig, rng: np.random.Generator
) -> Iterator[Path]:
    """One DICOM file for each slice; neither names nor instance numbers follow their places."""
    spacing = config.volume_spacing_mm
    corner = [-(n - 1) / 2 * step for n, step in zip(config.volume_shape, spacing, strict=True)]
    signed = bool(rng.random() < 0.5)
    slope, intercept = (1, 0) if signed else (1, -1024)
    stored = ((volume - intercept) / slope).astype(np.int16 if signed else np.uint16)
    study = _study_of(name, "CT")
    for index, number in enumerate(rng.permutation(len(stored)).tolist()):
        path = place / f"IM{number:04d}.dcm"
        attributes = {
            **study,
            "SOPInstanceUID": _uid(name, "CT", index),
            "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "InstanceNumber": number + 1,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [corner[2], corner[1], corner[0] + index * spacing[0]],
            "PixelSpacing": [spacing[1], spacing[2]],
            "SliceThickness": spacing[0],
            "RescaleSlope": slope,
            "RescaleIntercept": intercept,
        }
        write_dicom(path, stored[index], attributes)
        yield path


def _write_cr(place: Path, name: str, visit: int, pixels: NDArray[np.uint16], rng: np.random.Generator) -> Path:
    """A CR or DX image; some detectors store white as low."""
    modality = "CR" if rng.random() < 0.5 else "DX"
    inverted = bool(rng.random() < 0.3)
    path = place / f"xray-{visit}.dcm"
    attributes = {
        **_study_of(name, f"XR{visit}"),
        "SOPInstanceUID": _uid(name, f"XR{visit}", 0),
        "Modality": modality,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "ViewPosition": "PA",
        "InstanceNumber": 1,
        "PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2",
        "BitsStored": 12,
        "HighBit": 11,
        "ImagerPixelSpacing": list(_DETECTOR_SPACING_MM),
        "BurnedInAnnotation": "NO",
    }
    write_dicom(path, (_FULL - pixels).astype(np.uint16) if inverted else pixels, attributes)
    return path


def _write_picture(place: Path, _name: str, visit: int, pixels: NDArray[np.uint16], rng: np.random.Generator) -> Path:
    """A PNG of 8 bits, or of 16."""
    path = place / f"xray-{visit}.png"
    if rng.random() < 0.5:
        write_png(path, pixels * np.uint16(16))
    else:
        write_png(path, (pixels >> 4).astype(np.uint8))
    return path


def _study_of(name: str, examination: str) -> dict[str, str]:
    return {
        "PatientID": name,
        "PatientName": "Phantom^Invented",
        "StudyInstanceUID": _uid(name, examination, "study"),
        "SeriesInstanceUID": _uid(name, examination, "series"),
        "FrameOfReferenceUID": _uid(name, examination, "frame"),
    }


def _uid(*parts: str | int) -> str:
    """A DICOM UID (of the 2.25 root, which needs no registration) that follows from `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
