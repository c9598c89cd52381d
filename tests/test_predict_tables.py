"""`unimiss predict` of scans that a table names: DICOM series as channels, lines for names, nothing guessed."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import generate_uid

from client import case_tables, reading
from client.candidates import Channel
from client.catalogue import read_one, read_whole
from client.inference import Inference
from client.labelled import as_stored, as_values, grid_of
from client.pictures import write_png
from client.research_command import main
from tests.series_files import write_radiograph, write_series
from tests.test_finetune import QUICK, write_config
from tests.test_predict import noise, rows_of, untrained
from tests.test_predict_channels import BALL, NUMBERS, write_case, write_in_one
from unimiss_core.plan import prepare
from unimiss_core.study import PlanConfig
from unimiss_core.task_checkpoint import load
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig

PET_CT = SegmentationConfig(classes=("ball", "cube"), channels=("CT", "PET"), input_size=(16, 33, 33))
ONE = SegmentationConfig(classes=("ball", "cube"), input_size=(16, 33, 33))


def write_table(path: Path, header: Sequence[str], *lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def write_patient(folder: Path, name: str, seed: int, **attributes: Any) -> None:
    """CT in folder/name/ct, PET in folder/name/pet, on one grid."""
    for place, kind in enumerate(("CT", "PT")):
        volume = noise((20, 34, 36), 10 * seed + place) * (1 if kind == "PT" else 12)
        facts = {"Modality": kind, "PatientID": f"invented-{name}", **attributes}
        write_series(folder / name / {"CT": "ct", "PT": "pet"}[kind], volume, attributes=facts)


def predict(model: Path, scans: Path, out: Path, *words: str) -> int:
    return main(["predict", str(model), str(scans), "--out", str(out), *words])


def by_hand(model: Path, scans: Sequence[Path]) -> np.ndarray:
    """The mask (D, H, W) of channels that are each read and prepared as if it stood alone."""
    network, manifest = load(model)
    read = [read_one(path) for path in scans]
    prepared = [prepare(scan, manifest.plan) for scan in read]
    values = as_values(as_stored(np.concatenate([values for values, _ in prepared])))
    size = manifest.task.input_size or ()
    inference = Inference(manifest.task, size, torch.device("cpu"), "fp32", 8, manifest.overlap, ())
    return np.asarray(inference.mask(network, values, grid_of(read[0], prepared[0][1])))


# -------------------------------------------------------------------------------------------------- as in fine-tuning


def test_a_table_of_series_is_answered_as_it_was_when_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [[f"p{number}/ct", f"p{number}/pet", ["no", "yes"][number % 2], f"p{number}"] for number in range(12)]
    for number in range(12):
        write_patient(tmp_path / "scans", f"p{number}", number)
    table = write_table(tmp_path / "t.csv", ["anatomy", "uptake", "label", "patient"], *lines)
    task = {"name": "classification", "classes": ["no", "yes"], "channels": ["CT", "PET"], "input_size": [16, 33, 33]}
    data = {"table": "t.csv", "folder": "scans", "scan": ["anatomy", "uptake"]}
    path = write_config(tmp_path, task=task, data=data, split={"folds": 3}, training=QUICK)
    assert main(["finetune", str(path)]) == 0
    capsys.readouterr()
    columns = ["--root", str(tmp_path / "scans"), "--scan", "PET=uptake", "--scan", "CT=anatomy"]
    assert predict(tmp_path / "out", table, tmp_path / "asked", *columns) == 0
    assert "WARNING" not in capsys.readouterr().err
    answers = rows_of(tmp_path / "asked" / "predictions.csv")
    assert [row["line"] for row in answers] == [str(number) for number in range(2, 14)]
    assert "file" not in answers[0]
    measured = {row["line"]: row for row in rows_of(tmp_path / "out" / "predictions.csv") if row["part"] == "test"}
    assert len(measured) == 4
    found = {row["line"]: row for row in answers}
    for line, row in measured.items():
        assert float(found[line]["p/yes"]) == pytest.approx(float(row["p/yes"]), abs=2e-6)
    assert len({row["p/yes"] for row in answers}) == 12
    assert len({row["key"] for row in answers}) == 12
    told = json.loads((tmp_path / "asked" / "predicted.json").read_text())
    assert (told["scans"], told["left_out"], told["unlike_training"]) == (12, {}, {})


def test_masks_lie_on_the_first_channel_and_are_called_by_the_line(tmp_path: Path) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    for number in (1, 2):
        write_patient(tmp_path, f"p{number}", number)
    table = write_table(tmp_path / "t.tsv", ["PET", "CT"], ["p2/pet", "p2/ct"], [], ["./p1/pet", "p1//ct/"])
    assert predict(model, table, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [(row["scan"], row["line"], row["mask"]) for row in rows] == [
        ("1", "2", "masks/line-00002.nii.gz"),
        ("2", "4", "masks/line-00004.nii.gz"),
    ]
    for row, name in zip(rows, ("p2", "p1"), strict=True):
        mask = nibabel.load(tmp_path / "out" / row["mask"])
        expected = by_hand(model, [tmp_path / name / "ct", tmp_path / name / "pet"])
        np.testing.assert_array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0), expected)
        assert set(np.unique(expected)) >= {1, 2}


def test_a_dicom_seg_is_of_the_first_channels_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("highdicom", reason="the extra dicomseg, which CI installs, is not there")
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    facts = {"PatientName": "Miller", "PatientBirthDate": "", "PatientSex": "", "AccessionNumber": "", "StudyID": ""}
    facts |= {"StudyDate": "", "StudyTime": "", "ReferringPhysicianName": "", "SliceThickness": 2}
    write_patient(tmp_path, "p1", 1, StudyInstanceUID=generate_uid(), FrameOfReferenceUID=generate_uid(), **facts)
    table = write_table(tmp_path / "t.csv", ["CT", "PET"], ["p1/ct", "p1/pet"])
    assert predict(model, table, tmp_path / "out", "--dicom-seg") == 0
    assert "no DICOM SEG" not in capsys.readouterr().err
    seg = pydicom.dcmread(tmp_path / "out" / "masks" / "line-00002.dcm")
    (series,) = seg.ReferencedSeriesSequence
    slices = {str(pydicom.dcmread(path).SOPInstanceUID) for path in (tmp_path / "p1" / "ct").iterdir()}
    assert {str(one.ReferencedSOPInstanceUID) for one in series.ReferencedInstanceSequence} == slices
    mask = np.asarray(nibabel.load(tmp_path / "out" / "masks" / "line-00002.nii.gz").dataobj)
    frames = [
        int(one.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for one in seg.PerFrameFunctionalGroupsSequence
    ]
    for number in (1, 2):
        drawn = sum(int(frame.sum()) for frame, of in zip(seg.pixel_array, frames, strict=True) if of == number)
        assert drawn == (mask == number).sum() > 0


def test_files_by_any_name_and_volumes_of_one_file_are_channels_too(tmp_path: Path) -> None:
    """Oracle: the same scans in a folder, by nnU-Net's names, where `predict` reads each case as fine-tuning did."""
    model = untrained(tmp_path / "model", BALL, channels=NUMBERS)
    write_case(tmp_path / "scans", "a", 1)
    write_in_one(tmp_path / "scans", "b", 2)
    assert predict(model, tmp_path / "scans", tmp_path / "folder") == 0
    of_folder = [nibabel.load(path).get_fdata() for path in sorted((tmp_path / "folder" / "masks").iterdir())]
    for number in range(3):
        (tmp_path / "scans" / f"a_{number:04d}.nii.gz").rename(tmp_path / "scans" / f"of {'xyz'[number]}.nii.gz")
    lines = (["of z.nii.gz", "of x.nii.gz", "of y.nii.gz"], ["b.nii.gz"] * 3)
    table = write_table(tmp_path / "tables" / "t.CSV", ["CT", "PET", "T2"], *lines)
    assert predict(model, table, tmp_path / "table", "--root", str(tmp_path / "scans"), "--show-paths") == 0
    rows = rows_of(tmp_path / "table" / "predictions.csv")
    assert [row["file"] for row in rows] == ["of z.nii.gz", "b.nii.gz"]
    for row, expected in zip(rows, of_folder, strict=True):
        np.testing.assert_array_equal(nibabel.load(tmp_path / "table" / row["mask"]).get_fdata(), expected)


def test_a_model_of_one_image_reads_the_column_that_is_named(tmp_path: Path) -> None:
    model = untrained(tmp_path / "model", ONE)
    write_case(tmp_path / "scans", "a", 1, (0, 1))
    write_patient(tmp_path / "scans", "p1", 3)
    assert predict(model, tmp_path / "scans", tmp_path / "folder", "--show-paths") == 0
    by_file = {row["file"]: row for row in rows_of(tmp_path / "folder" / "predictions.csv")}
    table = write_table(tmp_path / "t.csv", ["id", "volume"], ["1", "p1/pet"], ["2", "a_0001.nii.gz"])
    words = ("--root", str(tmp_path / "scans"), "--scan", "volume", "--show-paths")
    assert predict(model, table, tmp_path / "out", *words) == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["mask"] for row in rows] == ["masks/line-00002.nii.gz", "masks/line-00003.nii.gz"]
    for row in rows:
        same = by_file[row["file"]]
        assert (row["key"], row["voxels/ball"]) == (same["key"], same["voxels/ball"])
    assert predict(model, table, tmp_path / "again", "--root", str(tmp_path / "scans")) == 2


def test_values_and_missing_slices_are_those_of_a_folder(tmp_path: Path) -> None:
    """Oracle: the folder that holds nothing else; and both options change what is drawn."""
    write_patient(tmp_path, "p1", 3)
    (tmp_path / "p1" / "ct" / "file007").unlink()
    plan = PlanConfig(volume_spacing_mm=(2, 2, 2), missing_slices="interpolate")
    filled = untrained(tmp_path / "filled", ONE, plan=plan)
    table = write_table(tmp_path / "t.csv", ["scan"], ["p1/ct"])
    assert predict(filled, table, tmp_path / "by-table") == 0
    assert predict(filled, tmp_path / "p1" / "ct", tmp_path / "by-folder") == 0
    write_case(tmp_path / "nifti", "a", 1, (2,))
    model = untrained(tmp_path / "model", ONE)
    table = write_table(tmp_path / "u.csv", ["scan"], ["nifti/a_0002.nii.gz"])
    for kind in ("CT", "MR"):
        assert predict(model, table, tmp_path / f"{kind}-table", "--modality", kind) == 0
        assert predict(model, tmp_path / "nifti", tmp_path / f"{kind}-folder", "--modality", kind) == 0
    for one, other in (("by-table", "by-folder"), ("CT-table", "CT-folder"), ("MR-table", "MR-folder")):
        mask = np.asarray(nibabel.load(tmp_path / one / "masks" / "line-00002.nii.gz").dataobj)
        same = np.asarray(nibabel.load(tmp_path / other / "masks" / "scan-00001.nii.gz").dataobj)
        np.testing.assert_array_equal(mask, same)
    of_kinds = [(tmp_path / f"{kind}-table" / "predictions.csv").read_bytes() for kind in ("CT", "MR")]
    assert of_kinds[0] != of_kinds[1]


@pytest.mark.parametrize("here", [True, False])
def test_what_files_do_not_say_the_channels_names_say_or_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: bool
) -> None:
    monkeypatch.setattr(reading, "safe_here", lambda _: here)
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    write_case(tmp_path, "a", 1, (0, 2))
    write_patient(tmp_path, "p1", 1)
    table = write_table(tmp_path / "t.csv", ["CT", "PET"], ["a_0002.nii.gz", "a_0000.nii.gz"], ["p1/ct", "p1/pet"])
    masks = {}
    for said in (None, "MR"):
        out = tmp_path / f"said-{said}"
        assert predict(model, table, out, *(["--modality", said] if said else [])) == 0
        told = "prepared as MR all the same, where its file does not say what it is"
        assert (told in capsys.readouterr().err) == bool(said)
        for row in rows_of(out / "predictions.csv"):
            masks[said, row["line"]] = np.asarray(nibabel.load(out / row["mask"]).dataobj)
    assert (masks[None, "2"] != masks["MR", "2"]).any()
    np.testing.assert_array_equal(masks[None, "3"], masks["MR", "3"])


def test_no_dataset_json_decides_about_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    write_in_one(tmp_path / "scans", "b", 2, (2, 0))
    table = write_table(tmp_path / "scans" / "t.csv", ["CT", "PET"], ["b.nii.gz"] * 2)
    assert predict(model, table, tmp_path / "out") == 0
    assert "counted from 0, 0 as CT, 1 as PET" in capsys.readouterr().err
    channels = {"channel_names": {"0": "PET", "1": "CT"}}
    (tmp_path / "scans" / "dataset.json").write_text(json.dumps({**channels, "labels": {"background": 0, "ball": 1}}))
    assert predict(model, table, tmp_path / "again") == 0
    first, again = ((tmp_path / name / "predictions.csv").read_text() for name in ("out", "again"))
    assert first == again


def test_pictures_are_channels_too_and_one_file_is_not_two(tmp_path: Path) -> None:
    task = ClassificationConfig(rank=2, classes=("no", "yes"), channels=("early", "late"), input_size=(40, 44))
    model = untrained(tmp_path / "model", task, channels=(0, 1))
    for number in range(2):
        write_png(tmp_path / f"{number}.png", noise((40, 44), number).clip(0, 255).astype(np.uint8))
    write_radiograph(tmp_path / "xr" / "one.dcm", noise((40, 44), 3))
    lines = (["0.png", "1.png"], ["1.png", "0.png"], ["xr", "xr/one.dcm"], ["xr", "1.png"])
    table = write_table(tmp_path / "t.csv", ["early", "late"], *lines)
    assert predict(model, table, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["line"] for row in rows] == ["2", "3", "5"]
    assert len({(row["p/yes"], row["key"]) for row in rows}) == 3
    assert rows_of(tmp_path / "out" / "left_out.csv") == [{"line": "4", "reason": "lacks_channel"}]


def test_a_key_is_of_every_channels_frames(tmp_path: Path) -> None:
    write_patient(tmp_path, "p1", 1)
    table = case_tables.CaseTable(tmp_path, {2: ("p1/ct", "p1/pet")})
    found = case_tables.cases_of_table(table, [Channel("CT", 0, None), Channel("PET", 1, None)], interpolate=False)
    ((origin, scans),) = reading.Reading(found).each(read_whole)
    assert (len(scans), len(origin.files), len(origin.frames)) == (2, 40, 40)
    assert found.files_seen == 40


# ---------------------------------------------------------------------------------------------------- what is left out


def test_what_a_line_lacks_is_told_by_its_number_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    for number in range(4):
        write_patient(tmp_path, f"miller{number}", number)
    write_patient(tmp_path / "miller3" / "ct", "again", 7)
    write_case(tmp_path, "brown", 1, (0,))
    (tmp_path / "miller2" / "pet" / "file007").unlink()
    table = write_table(
        tmp_path / "t.csv",
        ["CT", "PET", "note"],
        ["miller0/ct", "miller0/pet", ""],
        ["miller0/ct", "", ""],
        ["miller1/pet", "miller1/ct", "swapped"],
        ["nowhere", "miller1/pet", ""],
        ["miller3/ct", "miller3/pet", "two series"],
        ["miller2/ct", "miller2/pet", "a slice is missing"],
        ["brown_0000.nii.gz", "brown_0000.nii.gz", "one volume for both"],
        ["brown_0000.nii.gz", "miller1/pet", "apart"],
        ["miller0/ct", "miller0/ct", "one series for both"],
        ["m" * 300, "miller0/pet", "no name that a disk can have"],
    )
    assert predict(model, table, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert [row["line"] for row in rows_of(out / "predictions.csv")] == ["2"]
    assert rows_of(out / "left_out.csv") == [
        {"line": "3", "reason": "lacks_channel"},
        {"line": "4", "reason": "unlike_channel"},
        {"line": "5", "reason": "missing_file"},
        {"line": "6", "reason": "several_scans"},
        {"line": "7", "reason": "missing_slices"},
        {"line": "8", "reason": "lacks_channel"},
        {"line": "9", "reason": "channels_apart"},
        {"line": "10", "reason": "lacks_channel"},
        {"line": "11", "reason": "cannot_open"},
    ]
    told = json.loads((out / "predicted.json").read_text())
    assert sum(told["left_out"].values()) == 9
    said = capsys.readouterr()
    assert "left out: 3 lacks_channel: " in said.err
    assert "give each case as" not in said.err
    written = [path.read_text() for path in (out / "predictions.csv", out / "left_out.csv", out / "predicted.json")]
    assert not any("miller" in text or "brown" in text for text in (said.err, said.out, *written))


def test_lines_that_are_hardly_one_patients_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    for name in ("miller", "brown"):
        write_patient(tmp_path, name, 1)
    (tmp_path / "brown").rename(tmp_path / "p1")
    (tmp_path / "miller").rename(tmp_path / "p2")
    table = write_table(tmp_path / "t.csv", ["CT", "PET"], ["p1/ct", "p1/pet"], ["p1/ct", "p2/pet"])
    assert predict(model, table, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "WARNING: 1 line(s) (3) hold series of which DICOM does not say that they are of one patient" in said
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 2


def test_a_file_of_several_volumes_beside_others_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    write_in_one(tmp_path, "b", 2, (2, 0))
    write_case(tmp_path, "a", 1, (0, 2))
    lines = (["b.nii.gz", "b.nii.gz"], ["a_0002.nii.gz", "b.nii.gz"], ["a_0002.nii.gz", "a_0000.nii.gz"])
    assert predict(model, write_table(tmp_path / "t.csv", [" CT", "PET "], *lines), tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "channels: CT is column 'CT', PET is column 'PET'" in said
    assert "WARNING: 1 line(s) (3) name a file of several volumes beside others, of which the first volume" in said
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 3


def test_no_line_is_in_neither_table_when_it_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    write_patient(tmp_path, "p1", 1)
    line = ["p1/ct", "p1/pet"]
    table = write_table(tmp_path / "t.csv", ["CT", "PET"], ["p1/ct", ""], line, line)
    really, asked = Inference.mask, []

    def mask(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(Inference, "mask", mask)
    assert predict(model, table, tmp_path / "out") == 130
    assert [row["line"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["3"]
    assert rows_of(tmp_path / "out" / "left_out.csv") == [{"line": "2", "reason": "lacks_channel"}]
    assert not (tmp_path / "out" / "predicted.json").exists()


def test_paths_that_begin_elsewhere_are_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", ONE)
    table = write_table(tmp_path / "t.csv", ["scan"], ["miller/a.nii"], ["miller/b.nii"])
    assert predict(model, table, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "nothing lies where the table says, below the folder that its paths begin from; --root names another" in said
    assert "miller" not in said


@pytest.mark.parametrize(
    ("header", "line", "words", "said"),
    [
        (["ct", "PET"], ["a", "b"], [], "no column 'CT' (did you mean 'ct'?); name a column with --scan"),
        (
            ["CT", "PET"],
            ["/a", "../b"],
            [],
            "line 2: 'CT' must be a relative path that stays below the folder\n  - line 2: 'PET'",
        ),
        (["CT", "PET"], ["a", "b", "c"], [], "line 2: has more cells than the header line"),
        (["CT", "PET", "n"], ["", "", "x"], [], "line 2: 'CT' is blank, and must be a path"),
        (["CT", "PET"], None, [], "holds no rows"),
        (["CT", "PET"], ["a", "b"], ["--scan", "PET"], "--scan: give CHANNEL=COLUMN, once for each of CT, PET whose"),
        (["CT", "PET"], ["a", "b"], ["--scan", "CT=a", "--scan", "CT=b"], "--scan: give CHANNEL=COLUMN, once for each"),
        (["CT", "PET"], ["a", "b"], ["--root", "none"], "--root: none is no folder"),
        (["CT", "PET"], ["a", "b"], ["--scan", "CT=x y"], "no column 'x y'"),
        (["CT;PET"], ["a;b"], [], "its header is a single column; separate columns by commas"),
        (
            ["miller/CT", "miller/PET"],
            ["a", "b"],
            [],
            "table t.csv: its first line must name the columns, and is one of",
        ),
        (["miller.CT/x", "note"], ["a", "b"], [], "no column 'CT'; no column 'PET'; name"),
        (["CT", "PET"], ["a", "b"], ["--names", "input"], "--names input: masks of a table's scans are called by its"),
    ],
)
def test_a_table_that_is_wrong_is_told_before_anything_is_looked_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    header: list[str],
    line: list[str] | None,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(case_tables, "catalogue_each", None)
    model = untrained(tmp_path / "model", PET_CT, channels=(0, 1))
    table = write_table(tmp_path / "t.csv", header, *([] if line is None else [line]))
    assert predict(model, table, tmp_path / "out", *words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "miller" not in told
    assert not (tmp_path / "out").exists()


def test_columns_are_a_tables_and_one_images_model_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", ONE)
    write_case(tmp_path / "scans", "a", 1, (0,))
    for words in (("--scan", "x"), ("--root", str(tmp_path))):
        assert predict(model, tmp_path / "scans", tmp_path / "out", *words) == 2
        assert "--root, --scan: are of a table, and SCANS is no file whose name ends in .csv" in capsys.readouterr().err
    table = write_table(tmp_path / "t.csv", ["scan"], ["scans/a_0000.nii.gz"])
    assert predict(model, table, tmp_path / "out", "--scan", "x", "--scan", "y") == 2
    assert "--scan: 2 columns, but the model reads one image or volume" in capsys.readouterr().err
    assert predict(model, table, tmp_path / "out") == 0
    assert predict(model, tmp_path / "typo.csv", tmp_path / "again", "--root", str(tmp_path)) == 2
    assert "typo.csv: does not exist; give a folder of scans, one file, or a table" in capsys.readouterr().err


def test_two_files_for_three_channels_are_no_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = untrained(tmp_path / "model", BALL, channels=NUMBERS)
    table = write_table(tmp_path / "t.csv", ["CT", "PET", "T2"], ["a.nii", "./a.nii", "b.nii"])
    assert predict(model, table, tmp_path / "out") == 2
    assert "line 2: names one file for two channels" in capsys.readouterr().err
