"""In a private library each patient has the scans that it would have if there were no others."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from client.cache import CachedScan, open_private_library
from client.dicom import write_dicom
from client.nifti import write_nifti
from client.patients import load_secret, patient_of
from client.pictures import write_png
from client.site_config import DataSource, SiteConfig
from tests.series_files import AXIAL, pattern
from unimiss_core.scan import Scan
from unimiss_core.study import PlanConfig

WARD = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")
ONE_STUDY = "1.2.3"
"""An anonymiser gave it to everybody."""

Seen = tuple[str, tuple[int, ...], tuple[float, ...], bytes]
"""Key, shape, spacing and pixels of a prepared scan."""


def write_slice(folder: Path, place: int, who: str, series: str, level: int, **attributes: object) -> None:
    """One slice of a series, which may be another patient's, too. place: in the folder, so that patients are mixed."""
    facts = {
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": who,
        "StudyInstanceUID": ONE_STUDY,
        "SeriesInstanceUID": f"{ONE_STUDY}.{series}",
        "SOPInstanceUID": f"{ONE_STUDY}.{series}.{level}",
        "FrameOfReferenceUID": f"{ONE_STUDY}.9",
        "PixelSpacing": [0.9, 0.7],
        "ImageOrientationPatient": list(AXIAL),
        "ImagePositionPatient": [0.0, 0.0, 3.0 * level],
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        **attributes,
    }
    write_dicom(folder / f"{place:03d}_{who}", pattern(12, 20, 30)[level] + np.int16(ord(who)), facts)


def write_ward(folder: Path) -> None:
    """What one patient's files could do to another's by each rule of reading, all in one folder."""
    folder.mkdir()
    for level in range(6):  # one series under two patients, and a's third slice is b's, too
        write_slice(folder, 90 - level, "a", "1", level)
    write_slice(folder, 10, "b", "1", 2)
    for level in range(5):  # volumes of a study where others have lone slices, and c one of its own
        write_slice(folder, 20 + level, "c", "3", level)
    write_slice(folder, 19, "c", "4", 7)
    write_slice(folder, 30, "d", "5", 3)
    for place, level in enumerate((0, 1, 3, 4)):  # e's series lacks a slice, and f has a lone one in it
        write_slice(folder, 40 + place, "e", "6", level)
    write_slice(folder, 44, "e", "7", 5, Modality="CR")
    write_slice(folder, 50, "f", "6", 9)
    write_slice(folder, 51, "f", "8", 5, Modality="CR")
    for name, seed in (("060_g", 0), ("061_h", 0), ("062_h", 1), ("063_i", 2), ("064_i", 2)):  # g's slice is h's, too
        pixels = np.random.default_rng(seed).integers(0, 255, (33, 21)).astype(np.uint8)
        write_png(folder / f"{name}.png", pixels)
    for number in range(7):  # with j's volumes slices no longer prevail
        voxels = np.random.default_rng(number).normal(size=(1, 8, 20, 24)).astype(np.float32) * 200
        write_nifti(folder / f"{70 + number:03d}_j.nii", Scan(voxels, (3.0, 1.0, 1.0), "CT"))


def seen(scan: CachedScan) -> Seen:
    return scan.key, scan.shape, scan.spacing_mm, scan.crop(tuple(slice(n) for n in scan.shape[1:])).tobytes()


class Archive:
    """The ward's folder, of which some patients' files are put in place; patients have the same keys each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        write_ward(folder / "all")
        secret = load_secret(folder / "state")
        self._names = {patient_of(who, secret).key: who for who in WARD}

    def scans_of(self, *present: str) -> dict[str, list[Seen]]:
        """Patient -> its scans, in order, where these patients' files alone are there."""
        place = self._folder / "".join(present)
        (place / "scans").mkdir(parents=True)
        for path in (self._folder / "all").iterdir():
            if path.stem[-1] in present:
                (place / "scans" / path.name).hardlink_to(path)
        source = DataSource(folder=place / "scans", modality="CT", patient_pattern="_(?P<patient>.)")
        site = SiteConfig(name="ward", data=(source,), state=self._folder / "state", cache=place / "cache")
        found = defaultdict(list)
        for scan in open_private_library(site, PlanConfig()).scans:
            found[self._names[scan.patient]].append(seen(scan))
        return dict(found)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def test_a_patients_scans_are_those_that_it_has_alone(archive: Archive) -> None:
    together = archive.scans_of(*WARD)
    for who in WARD:
        assert together[who] == archive.scans_of(who)[who], who
    ranks = {who: [len(shape) - 1 for _, shape, _, _ in scans] for who, scans in sorted(together.items())}
    images = {"b": [2], "d": [2], "e": [2], "f": [2, 2], "g": [2], "h": [2, 2], "i": [2]}
    assert ranks == {"a": [3], **images, "c": [3], "j": [3] * 7}


def test_to_leave_a_patient_out_changes_nobody_elses_scans(archive: Archive) -> None:
    """Keys, order and pixels."""
    together = archive.scans_of(*WARD)
    for left_out in WARD:
        others = archive.scans_of(*(who for who in WARD if who != left_out))
        assert others == {who: scans for who, scans in together.items() if who != left_out}, left_out
