"""`unimiss predict`: a fine-tuning's own answers again, in each scan's own geometry, whatever lies beside the scans."""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from client import research_command
from client.dicom import write_dicom
from client.nifti import write_nifti
from client.research_command import main
from tests.series_files import write_series
from tests.test_finetune import QUICK, pictures, write_config
from tests.test_labelled import write_case
from tests.test_research_command import nano_checkpoint
from unimiss_core import task_checkpoint
from unimiss_core.scan import Modality, Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig, TaskConfig
from unimiss_core.tasks import build_task_model

LABELS = ClassificationConfig(kind="multi_label", rank=2, classes=("a", "b", "c"), input_size=(40, 44))
BALL = SegmentationConfig(classes=("ball", "cube"), input_size=(16, 33, 33))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def untrained(
    folder: Path, task: TaskConfig, *, diverged: bool = False, plan: PlanConfig | None = None, **more: Any
) -> Path:
    """A model of this task that never saw a scan, as fine-tuning would write it."""
    model = ModelConfig(prototypes=16)
    made = build_task_model(model, task, seed=0, pretrained=None)
    manifest = TaskManifest(
        task=task,
        model=model,
        plan=plan or PlanConfig(volume_spacing_mm=(2.0, 2.0, 2.0)),
        began_with="scratch",
        pretrained_digest=None,
        trained="full",
        seed=0,
        epoch=0,
        **more,
    )
    if diverged:
        next(made.parameters()).data[0] = float("nan")
    folder.mkdir()
    task_checkpoint.save(folder, dict(made.named_parameters()), manifest)
    return folder


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 30, shape).astype(np.int16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_classification_answers_what_it_answered_when_it_was_measured(
    tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, **pictures(tmp_path, 18), training={**QUICK, "precision": precision})
    assert main(["finetune", str(path), "--show-paths"]) == 0
    out = tmp_path / "predicted"
    measured = rows_of(tmp_path / "out" / "predictions.csv")
    asked = ["predict", str(tmp_path / "out"), str(tmp_path / "pictures"), "--out", str(out), "--show-paths"]
    capsys.readouterr()
    assert main([*asked, "--batch", "5"]) == 0
    assert "another version of this program" not in capsys.readouterr().err
    found = {row["file"]: row for row in rows_of(out / "predictions.csv")}
    assert len(found) == 18
    for row in measured:
        again = found[row["file"]]
        for name in ("p/fine", "p/coarse"):
            assert float(again[name]) == pytest.approx(float(row[name]), abs=2e-5)  # another batch, other last bits
        assert again["predicted"] == max(("fine", "coarse"), key=lambda name: float(again[f"p/{name}"]))


def test_a_segmentation_draws_what_it_drew_when_it_was_measured(tmp_path: Path) -> None:
    for number in range(6):
        write_case(tmp_path, f"c{number}", number, spacing=(1.0, 0.9, 1.1))
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]},
        plan={"volume_spacing_mm": [1.0, 1.0, 1.0]},
        inference={"keep_largest": ["ball"], "overlap": 0.25},
        data={"name": "msd", "folder": ".", "modality": "MR"},
        split={"folds": 3, "validation": 0.5},
    )
    assert main(["finetune", str(path)]) == 0
    out = tmp_path / "predicted"
    assert main(["predict", str(tmp_path / "out"), str(tmp_path / "imagesTr"), "--out", str(out), "--show-paths"]) == 0
    lines = {row["file"]: row for row in rows_of(out / "predictions.csv")}
    measured = sorted((tmp_path / "out" / "predictions").iterdir())
    assert len(measured) == 2
    for mask in measured:
        name = f"c{int(mask.name[5:10]) - 1}.nii.gz"
        source, again = nibabel.load(tmp_path / "imagesTr" / name), nibabel.load(out / lines[name]["mask"])
        drawn = np.asarray(again.dataobj)
        np.testing.assert_array_equal(drawn, np.asarray(nibabel.load(mask).dataobj))
        np.testing.assert_allclose(again.affine, source.affine)
        assert again.shape == source.shape
        assert int(lines[name]["voxels/ball"]) == (drawn == 1).sum()
        assert float(lines[name]["ml/ball"]) == pytest.approx((drawn == 1).sum() * 0.99 / 1000, abs=1e-3)


def test_a_mask_of_a_dicom_series_lies_where_its_slices_lie(tmp_path: Path) -> None:
    """Oracle: the position of each slice's corner, by the DICOM standard's own formula (C.7.6.2.1.1)."""
    model = untrained(tmp_path / "model", BALL)
    row, column, positions = (0.0, 1.0, 0.0), (0.0, 0.0, -1.0), [[10.0 - 2 * k, -40.0, 70.0] for k in range(30)]
    write_series(tmp_path / "scans", noise((30, 40, 36)), positions=positions, gap_mm=2.0, orientation=(*row, *column))
    assert main(["predict", str(model), str(tmp_path / "scans"), "--out", str(tmp_path / "out")]) == 0
    (line,) = rows_of(tmp_path / "out" / "predictions.csv")
    mask = nibabel.load(tmp_path / "out" / line["mask"])
    corners = set()
    for k in (0, 29):
        for i in (0, 39):
            for j in (0, 35):
                x, y, z = (
                    positions[k][a] + row[a] * 0.7 * j + column[a] * 0.9 * i for a in range(3)
                )  # rows 0.9 mm apart, columns 0.7
                corners.add((round(-x, 3), round(-y, 3), round(z, 3)))  # LPS to NIfTI's RAS
    ends = [(0, n - 1) for n in mask.shape]
    found = {
        tuple(np.round(mask.affine @ [a, b, c, 1.0], 3)[:3].tolist()) for a in ends[0] for b in ends[1] for c in ends[2]
    }
    assert found == corners


def turned(degrees: tuple[float, float, float]) -> list[float]:
    """ImageOrientationPatient of an axial series that was turned about x, then y, then z."""
    x, y, z = np.radians(degrees)
    about = [
        np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]]),
        np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]),
        np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]),
    ]
    turn = about[2] @ about[1] @ about[0]
    return [round(float(value), 6) for value in (*turn[:, 0], *turn[:, 1])]


@pytest.mark.parametrize(
    ("orientation", "backwards"),
    [
        ([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], True),  # axial, from head to feet
        ([0.0, 1.0, 0.0, 0.0, 0.0, -1.0], True),  # sagittal, from left to right
        (turned((14.0, -9.0, 21.0)), False),
        (turned((14.0, -9.0, 21.0)), True),
        (turned((74.0, 18.0, -12.0)), False),  # nearest to coronal
    ],
)
def test_a_dicom_seg_says_of_each_voxel_of_its_series_what_the_nifti_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], orientation: list[float], backwards: bool
) -> None:
    """Each voxel of each source slice, taken to millimetres by the DICOM standard's formula (C.7.6.2.1.1), lies in the
    class of the NIfTI mask that both pydicom's frames and highdicom's answer for that slice's own SOP instance say."""
    highdicom = pytest.importorskip("highdicom", reason="the extra dicomseg, which CI installs, is not there")
    model, row, column = untrained(tmp_path / "model", BALL), np.array(orientation[:3]), np.array(orientation[3:])
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    facts = {"PatientName": "Miller", "PatientBirthDate": "", "PatientSex": "", "AccessionNumber": "", "StudyID": ""}
    facts |= {"StudyDate": "", "StudyTime": "", "ReferringPhysicianName": "", "SliceThickness": 2, **uids}
    along = 2.0 * np.cross(row, column) * (-1 if backwards else 1)
    positions = [np.round([-40.0, 10.0, 70.0] + k * along, 4).tolist() for k in range(30)]
    axes = {"positions": positions, "orientation": orientation, "order": np.random.default_rng(0).permutation(30)}
    write_series(tmp_path / "scans", noise((30, 40, 36)), attributes=facts, **axes)
    out = tmp_path / "out"
    assert main(["predict", str(model), str(tmp_path / "scans"), "--out", str(out), "--dicom-seg"]) == 0
    assert "no DICOM SEG" not in capsys.readouterr().err
    mask = nibabel.load(out / "masks" / "scan-00001.nii.gz")
    drawn, to_voxels = np.asarray(mask.dataobj), np.linalg.inv(mask.affine)
    sources = [pydicom.dcmread(path) for path in sorted((tmp_path / "scans").iterdir())]
    i, j = np.indices((40, 36)).reshape(2, -1)
    expected = np.zeros((30, 40, 36), np.uint8)
    for number, source in enumerate(sources):
        corner = np.array(source.ImagePositionPatient, dtype=float)
        places = corner + np.outer(0.7 * j, row) + np.outer(0.9 * i, column)  # rows 0.9 mm apart, columns 0.7
        voxels = np.rint(np.c_[places * [-1, -1, 1], np.ones(len(i))] @ to_voxels.T)[:, :3].astype(int)
        expected[number, i, j] = drawn[tuple(voxels.T)]
    assert set(np.unique(expected)) >= {1, 2}

    seg = pydicom.dcmread(out / "masks" / "scan-00001.dcm")
    assert (seg.Modality, seg.StudyInstanceUID) == ("SEG", uids["StudyInstanceUID"])
    assert seg.FrameOfReferenceUID == uids["FrameOfReferenceUID"]
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["ball", "cube"]
    told = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose(np.array(told, dtype=float), orientation, atol=1e-5)
    referenced = {
        str(one.ReferencedSOPInstanceUID) for one in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced == {str(source.SOPInstanceUID) for source in sources}
    of_instance = {str(source.SOPInstanceUID): number for number, source in enumerate(sources)}
    found = np.zeros_like(expected)
    for frame, about in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (of,) = about.DerivationImageSequence[0].SourceImageSequence
        number = of_instance[str(of.ReferencedSOPInstanceUID)]
        corner = np.array(about.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        np.testing.assert_allclose(corner, np.array(sources[number].ImagePositionPatient, dtype=float), atol=1e-3)
        found[number][frame == 1] = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    np.testing.assert_array_equal(found, expected)
    read = highdicom.seg.segread(out / "masks" / "scan-00001.dcm")
    again = read.get_pixels_by_source_instance(
        list(of_instance), combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(again, expected)


def test_an_enhanced_object_gets_no_dicom_seg_and_its_files_are_not_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each frame says for itself how it lies, as makers write it."""
    pytest.importorskip("highdicom", reason="the extra dicomseg, which CI installs, is not there")

    def enhance(dataset: Dataset) -> None:
        frames = []
        for number in range(30):
            frame, place, lies, measures = Dataset(), Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient, lies.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
            measures.PixelSpacing = [1, 1]
            frame.PlanePositionSequence, frame.PlaneOrientationSequence = [place], [lies]
            frame.PixelMeasuresSequence = [measures]
            frames.append(frame)
        dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [Dataset()], frames

    (tmp_path / "scans").mkdir()
    facts = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "PatientID": "miller"}
    write_dicom(tmp_path / "scans" / "a.dcm", noise((30, 40, 36)).astype(np.int16), facts, adjust=enhance)
    model, out = untrained(tmp_path / "model", BALL), tmp_path / "out"
    assert main(["predict", str(model), str(tmp_path / "scans"), "--out", str(out), "--dicom-seg"]) == 0
    said = capsys.readouterr().err
    assert "scan 1: no DICOM SEG, which highdicom does not make of such an enhanced (multi-frame) object; the" in said
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["scan-00001.nii.gz"]


def test_dicom_seg_without_highdicom_or_masks_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, drawer = untrained(tmp_path / "classifier", LABELS), untrained(tmp_path / "drawer", BALL)
    asked = [str(tmp_path), "--out", str(tmp_path / "out"), "--dicom-seg"]
    assert main(["predict", str(classifier), *asked]) == 2
    assert "--dicom-seg: the model draws no masks of volumes" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "highdicom" else find(name))
    assert main(["predict", str(drawer), *asked]) == 2
    assert "pip install -e '.[dicomseg]' in this program's folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_used_is_counted_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, scans, out = untrained(tmp_path / "model", LABELS), tmp_path / "scans", tmp_path / "out"
    (scans / "miller").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(noise((50, 60), number).astype(np.uint8)).save(scans / "miller" / f"{number}.png")
    Image.fromarray(np.full((50, 60), 7, np.uint8)).save(scans / "miller" / "blank.png")
    (scans / "miller" / "cut.png").write_bytes((scans / "miller" / "0.png").read_bytes()[:900])
    write_nifti(scans / "volume.nii.gz", Scan(noise((9, 30, 30))[None].astype(np.float32), (1.0, 1.0, 1.0), "MR"))
    (scans / "notes.txt").write_text("no scan")
    assert main(["predict", str(model), str(scans), "--out", str(out)]) == 0
    told = json.loads((out / "predicted.json").read_text())
    assert told["scans"] == 3
    assert told["left_out"] == {"blank": 1, "cannot_decode": 1, "not_an_image": 1, "other_rank": 1}
    lines = rows_of(out / "predictions.csv")
    for line in lines:
        likely = [name for name in "abc" if float(line[f"p/{name}"]) >= 0.5]
        assert line["predicted"] == ";".join(likely)
    said = capsys.readouterr()
    assert "left out: 1 cannot_decode: its compressed pixels cannot be decoded" in said.err
    assert "fine-tuned by another version of this program" in said.err  # which it does not say
    assert "miller" not in said.out + said.err + "".join(p.read_text() for p in out.iterdir())
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == 3
    alone = tmp_path / "alone"
    assert main(["predict", str(model), str(scans / "miller" / "1.png"), "--out", str(alone), "--show-paths"]) == 0
    (again,) = rows_of(alone / "predictions.csv")
    assert (again["key"], again["file"]) == (keys[1], "1.png")
    assert float(again["p/a"]) == pytest.approx(float(lines[1]["p/a"]), abs=2e-6)
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "told"), "--show-paths"]) == 0
    assert {"file": "miller/blank.png", "reason": "blank"} in rows_of(tmp_path / "told" / "left_out.csv")


def test_what_a_model_took_values_for_is_remembered(tmp_path: Path) -> None:
    """CT by the model's own word is windowed in HU; a mask of an MR would be another."""
    scans = tmp_path / "scans"
    scans.mkdir()
    values = np.random.default_rng(0).normal(0, 900, (20, 34, 36)).astype(np.float32)
    write_nifti(scans / "a.nii.gz", Scan(values[None], (2.0, 2.0, 2.0), "CT"))
    drawn = []
    for name, more, asked in (
        ("known", {"modality": "CT"}, []),
        ("said", {}, ["--modality", "CT"]),
        ("other", {}, []),
    ):
        model, out = untrained(tmp_path / name, BALL, **more), tmp_path / f"{name}-out"
        assert main(["predict", str(model), str(scans), "--out", str(out), *asked]) == 0
        drawn.append(np.asarray(nibabel.load(out / "masks" / "scan-00001.nii.gz").dataobj))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    features = []
    for name, asked in (("known", []), ("said", ["--modality", "CT"]), ("other", [])):
        out = tmp_path / f"{name}.npz"
        assert main(["embed", str(tmp_path / name), str(scans), "--out", str(out), *asked]) == 0
        features.append(np.load(out)["features"])
    np.testing.assert_array_equal(features[0], features[1])
    assert (features[0] != features[2]).any()


@pytest.mark.parametrize(
    ("trained_on", "told"),
    [
        (("CT",), ["1 scan(s) are of another kind (MR)", "2 scan(s) are of another kind (not stated)"]),
        (("MR", "PT"), []),
        (("OT",), []),  # what did not say may have been MR
        ((), []),
    ],
)
def test_scans_of_another_kind_than_the_model_was_tuned_on_are_told_by_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_on: tuple[Modality, ...], told: list[str]
) -> None:
    """MR by its header, NIfTI that says nothing; a picture, which the model of volumes leaves out, is told as that."""
    model, scans, out = untrained(tmp_path / "model", BALL, trained_on=trained_on), tmp_path / "scans", tmp_path / "out"
    write_series(scans / "mr", noise((16, 34, 36)), attributes={"Modality": "MR"})
    for number in range(2):
        values = noise((16, 34, 36), number)[None].astype(np.float32)
        write_nifti(scans / f"{number}.nii.gz", Scan(values, (2.0, 2.0, 2.0), "OT"))
    Image.fromarray(noise((50, 60)).astype(np.uint8)).save(scans / "picture.png")
    assert main(["predict", str(model), str(scans), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert [line.split(" than ")[0] for line in said.splitlines() if "WARNING" in line] == [
        f"WARNING: {one}" for one in told
    ]
    unnamed = not trained_on  # nothing is known that they could be unlike
    assert ("2 scan(s) do not say what they are" in said) == unnamed
    assert ("--modality CT" in said) == (bool(told) or unnamed)
    found = json.loads((out / "predicted.json").read_text())
    assert (found["scans"], found["unlike_training"]) == (3, {"MR": 1, "OT": 2} if told else {})


def test_a_scan_that_does_not_fit_into_memory_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import inference

    model, scans = untrained(tmp_path / "model", BALL), tmp_path / "scans"
    scans.mkdir()
    for number in range(2):
        values = noise((20, 34, 36), number)[None].astype(np.float32)
        write_nifti(scans / f"{number}.nii.gz", Scan(values, (2.0, 2.0, 2.0), "MR"))
    mask, calls = inference.Inference.mask, []

    def first_too_large(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return mask(*arguments)

    monkeypatch.setattr(inference.Inference, "mask", first_too_large)
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "predicted.json").read_text())
    assert (told["scans"], told["left_out"]) == (1, {"out_of_memory": 1})
    assert [line["scan"] for line in rows_of(tmp_path / "out" / "predictions.csv")] == ["2"]


def test_a_picture_that_does_not_fit_into_memory_leaves_those_of_its_batch_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is too large to be prepared, another for the model; three are as they are without the two."""
    from client import inference, predicting

    model, scans = untrained(tmp_path / "model", LABELS), tmp_path / "scans"
    scans.mkdir()
    for number, width in enumerate((60, 61, 60, 62, 60)):
        Image.fromarray(noise((50, width), number).astype(np.uint8)).save(scans / f"{number}.png")
    prepare, chances = predicting.prepare_channels, inference.Inference.chances

    def fits(scans: tuple[Scan, ...], *how: Any) -> Any:
        if scans[0].voxels.shape[2] == 61:
            raise MemoryError
        return prepare(scans, *how)

    def seen(self: inference.Inference, model: Any, values: list[np.ndarray]) -> np.ndarray:
        if any(one.shape[2] == 62 for one in values):
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return chances(self, model, values)

    monkeypatch.setattr(predicting, "prepare_channels", fits)
    monkeypatch.setattr(inference.Inference, "chances", seen)
    assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "predicted.json").read_text())
    assert (told["scans"], told["left_out"]) == (3, {"out_of_memory": 2})
    lines = rows_of(tmp_path / "out" / "predictions.csv")
    assert [line["scan"] for line in lines] == ["1", "3", "5"]
    assert main(["predict", str(model), str(scans / "2.png"), "--out", str(tmp_path / "alone")]) == 0
    (alone,) = rows_of(tmp_path / "alone" / "predictions.csv")
    assert float(alone["p/a"]) == pytest.approx(float(lines[1]["p/a"]), abs=2e-6)


def test_what_is_no_model_of_this_program_is_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()

    def refused(model: Path, told: str, code: int = 4) -> None:
        assert main(["predict", str(model), str(scans), "--out", str(tmp_path / "out")]) == code
        said = capsys.readouterr().err
        assert told in said, said
        assert said.count("\n") == 1

    refused(tmp_path / "nowhere", "nowhere: does not exist")
    refused(scans, "holds no model; give the folder that `unimiss finetune` wrote")
    refused(nano_checkpoint(tmp_path / "round-0001"), "is a checkpoint of pretraining, which answers no task")
    refused(untrained(tmp_path / "diverged", BALL, diverged=True), "its weights are not all numbers")
    model = untrained(tmp_path / "model", LABELS)
    refused(model, "no scan that can be used: there is none", 3)
    described = model / "model.json"
    told = json.loads(described.read_text())
    described.write_text(json.dumps({**told, "format_version": 2, "new": True}))
    refused(model, "has format version 2, this program reads 1")
    described.write_text(json.dumps({**told, "task": 7}))
    refused(model, "is no description of a fine-tuned model")
    described.write_text(json.dumps(told))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1] + b"\x01")
    refused(model, "was changed after it was written")


def test_the_command_line_knows_every_modality() -> None:
    assert get_args(Modality) == research_command._MODALITIES


def test_an_output_that_holds_something_and_scans_that_are_nowhere_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained(tmp_path / "model", LABELS)
    assert main(["predict", str(model), str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere: does not exist; give a folder of scans, or one file" in capsys.readouterr().err
    assert main(["predict", str(model), str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "exists and is not empty; give a new folder" in capsys.readouterr().err
