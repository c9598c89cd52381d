"""What a researcher's commands go through: memory holds one scan at a time, and every scan left out has its reason."""

import weakref
from pathlib import Path

import numpy as np
import pytest

from client.nifti import write_nifti
from client.reading import Reading, read_scans
from client.research_command import main
from client.site_command import main as site_main
from client.site_config import DataSource
from tests.series_files import write_series
from tests.test_predict import LABELS, untrained
from tests.test_research_command import nano_checkpoint
from unimiss_core import progress
from unimiss_core.errors import ConfigError, NoUsableScanError
from unimiss_core.scan import Scan
from unimiss_core.study import PlanConfig

PLAN = PlanConfig()


def volumes(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        values = np.random.default_rng(number).random((1, 9, 10, 11), dtype=np.float32)
        write_nifti(folder / f"{number}.nii.gz", Scan(values, (1.0, 1.0, 1.0), "MR"))
    return folder


def test_a_scan_is_gone_when_nobody_has_use_for_it(tmp_path: Path) -> None:
    seen = 0
    for _, scan in Reading.of_path(volumes(tmp_path / "scans", 3), PLAN):
        voxels = weakref.ref(scan.voxels)
        del scan
        assert voxels() is None
        seen += 1
    assert seen == 3


def test_the_key_of_a_series_follows_the_order_of_its_slices_and_not_its_files_names(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (5, 12, 13)).astype(np.int16)
    write_series(tmp_path / "a", volume)
    (tmp_path / "b").mkdir()
    for number, file in enumerate(sorted((tmp_path / "a").iterdir(), reverse=True)):
        (tmp_path / "b" / f"{number}").write_bytes(file.read_bytes())
    keys = [next(iter(Reading.of_path(tmp_path / name, PLAN)))[0].key for name in "ab"]
    assert keys[0] == keys[1]
    (tmp_path / "a" / "file004").unlink()
    assert next(iter(Reading.of_path(tmp_path / "a", PLAN)))[0].key != keys[0]


def test_dicom_of_nobody_is_read_where_it_does_not_matter_whose_it_is(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (5, 12, 13)).astype(np.int16)
    write_series(tmp_path, volume, attributes={"PatientID": ""})
    (found,) = list(Reading.of_path(tmp_path, PLAN))
    np.testing.assert_array_equal(found[1].voxels[0], volume)
    training = Reading.of_sources([DataSource(folder=tmp_path)], PLAN)
    assert len(training) == 0
    assert training.reasons == {"no_patient_id": 1}


def test_what_is_left_out_on_the_way_counts_with_what_was_left_out_before(tmp_path: Path) -> None:
    folder = volumes(tmp_path / "scans", 2)
    (folder / "notes.txt").write_text("no scan")
    reading = Reading.of_path(folder, PLAN)
    assert len(reading) == 2
    for origin, _ in reading:
        reading.leave_out(origin, "blank")
    assert reading.reasons == {"blank": 2, "not_an_image": 1}
    with pytest.raises(NoUsableScanError, match="2 blank, 1 not_an_image"):
        reading.require(0)
    with pytest.raises(ConfigError, match="nowhere: does not exist; give a folder of scans, or one file"):
        Reading.of_path(tmp_path / "nowhere", PLAN)


def test_a_scan_that_turns_out_unusable_when_it_is_read_keeps_its_number(tmp_path: Path) -> None:
    files = sorted(volumes(tmp_path / "scans", 3).iterdir())
    files[1].write_bytes(files[1].read_bytes()[:1500])  # its header is whole
    reading = Reading.of_path(tmp_path / "scans", PLAN)
    assert [(origin.number, origin.files) for origin, _ in reading] == [(1, ("0.nii.gz",)), (3, ("2.nii.gz",))]
    assert len(reading.left_out) == 1


def medmnist(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # by its path numpy would add an ending
        np.savez(file, **{f"{part}_images": np.zeros((2, 28, 28), np.uint8) for part in ("train", "val", "test")})
    return path


@pytest.mark.parametrize("place", ["secret.npz", "secret/SECRET.NPZ"])
def test_of_a_medmnist_file_it_is_told_what_takes_it_and_not_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    file = medmnist(tmp_path / "data" / place)
    scans = file if place == "secret.npz" else tmp_path / "data"
    encoder, model = nano_checkpoint(tmp_path / "round-0001"), untrained(tmp_path / "model", LABELS)
    told = "1 .npz file(s): MedMNIST's are for `unimiss finetune` and `unimiss probe` alone"
    for command in (
        ("embed", str(encoder), str(scans), "--out", str(tmp_path / "features.npz")),
        ("predict", str(model), str(scans), "--out", str(tmp_path / "out")),
    ):
        assert main([*command]) == 3
        heard = capsys.readouterr().err
        assert told in heard
        assert "SECRET" not in heard
    assert site_main(["check", str(tmp_path / "data")]) == 3
    assert told in " ".join(capsys.readouterr().out.split())
    notes: list[object] = []
    with progress.listen(notes.append):  # as a simulation's probe reads its folder
        assert not list(read_scans([DataSource(folder=tmp_path / "data")], PLAN))
    assert progress.Note(told) in notes
