"""`unimiss predict --names input`: masks and lines are called as their scans, and none as another's."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.nifti import write_nifti
from client.pictures import write_png
from client.research_command import main
from tests.series_files import write_series
from tests.test_predict import BALL, LABELS, noise, rows_of, untrained
from unimiss_core.scan import Scan
from unimiss_core.task_config import SegmentationConfig


def volume(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, Scan(noise((1, 16, 33, 33), seed).astype(np.float32), (2.0, 2.0, 2.0), "MR", np.eye(4)))
    return path


def predict(model: Path, scans: Path, out: Path, *words: str) -> int:
    return main(["predict", str(model), str(scans), "--out", str(out), *words])


def test_masks_are_called_as_their_files_and_those_of_series_as_their_folders(tmp_path: Path) -> None:
    scans, model, out = tmp_path / "scans", untrained(tmp_path / "model", BALL), tmp_path / "out"
    volume(scans / "case.one.nii.gz")
    volume(scans / "deeper" / "Zwei.NII", 1)
    write_series(scans / "series of three", noise((16, 34, 35)), gap_mm=2.0)
    assert predict(model, scans, out, "--names", "input") == 0
    called = ["case.one", "Zwei", "series of three"]
    rows = rows_of(out / "predictions.csv")
    assert [row["name"] for row in rows] == called
    assert [row["mask"] for row in rows] == [f"masks/{name}.nii.gz" for name in called]
    assert {path.name for path in (out / "masks").iterdir()} == {f"{name}.nii.gz" for name in called}
    assert predict(model, scans, tmp_path / "numbers") == 0
    for row, other in zip(rows, rows_of(tmp_path / "numbers" / "predictions.csv"), strict=True):
        assert row["key"] == other["key"]
        assert "name" not in other
        ours, theirs = nibabel.load(out / row["mask"]), nibabel.load(tmp_path / "numbers" / other["mask"])
        np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))


def test_a_series_that_lies_in_no_folder_of_its_own_is_called_as_the_folder_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained(tmp_path / "model", BALL)
    write_series(tmp_path / "given", noise((16, 34, 35)), gap_mm=2.0)
    monkeypatch.chdir(tmp_path / "given")
    assert predict(model, Path(), tmp_path / "out", "--names", "input") == 0
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["given.nii.gz"]


@pytest.mark.parametrize("other", ["b/case.nii.gz", "a/CASE.nii", "series"])
def test_two_that_would_be_called_alike_are_refused_without_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    scans, model, out = tmp_path / "scans", untrained(tmp_path / "model", BALL), tmp_path / "out"
    volume(scans / "a" / "case.nii.gz")
    if other == "series":
        for number in range(2):
            write_series(scans / "together" / "x", noise((16, 34, 35), number), gap_mm=2.0)
            for file in list((scans / "together" / "x").iterdir()):
                shutil.move(file, scans / "together" / f"{number}-{file.name}")
    else:
        volume(scans / other, 1)
    assert predict(model, scans, out, "--names", "input") == 2
    heard = capsys.readouterr().err
    numbers = "2 and 3" if other == "series" else "1 and 2"
    assert f"--names input: scans {numbers} would be called alike" in heard
    assert "case" not in heard.lower()
    assert "together" not in heard
    assert not list(out.iterdir())
    assert predict(model, scans, out) == 0


def test_a_table_of_classes_names_the_files_with_their_endings(tmp_path: Path) -> None:
    scans, model, out = tmp_path / "scans", untrained(tmp_path / "model", LABELS), tmp_path / "out"
    scans.mkdir()
    for seed, name in enumerate(("a.png", "a.PNG.png", "b.png")):
        write_png(scans / name, noise((60, 70), seed).astype(np.uint16))
    volume(scans / "b.nii.gz")  # of the other rank: it is not asked about, and called nothing
    assert predict(model, scans, out, "--names", "input") == 0
    assert {row["name"] for row in rows_of(out / "predictions.csv")} == {"a.png", "a.PNG.png", "b.png"}


def test_a_pictures_mask_is_called_as_the_picture(tmp_path: Path) -> None:
    task = SegmentationConfig(rank=2, classes=("ball",), input_size=(40, 44))
    scans, model, out = tmp_path / "scans", untrained(tmp_path / "model", task), tmp_path / "out"
    scans.mkdir()
    write_png(scans / "left hand.png", noise((60, 70)).astype(np.uint16))
    assert predict(model, scans, out, "--names", "input") == 0
    assert [path.name for path in (out / "masks").iterdir()] == ["left hand.png"]


def test_a_dicom_seg_lies_beside_the_mask_under_its_name(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="the extra dicomseg, which CI installs, is not there")
    facts = dict.fromkeys(
        ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"), ""
    )
    facts |= {"ReferringPhysicianName": "", "SliceThickness": 2}
    write_series(tmp_path / "scans" / "head", noise((16, 34, 35)), gap_mm=2.0, attributes=facts)
    model, out = untrained(tmp_path / "model", BALL), tmp_path / "out"
    assert predict(model, tmp_path / "scans", out, "--names", "input", "--dicom-seg") == 0
    assert {path.name for path in (out / "masks").iterdir()} == {"head.nii.gz", "head.dcm"}
