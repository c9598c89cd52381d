"""`unimiss predict` with models whose scans are several images or volumes: each case is found, read and asked as
fine-tuning did."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from client import catalogue, reading
from client.candidates import Candidate, Channel
from client.catalogue import read_one, safe_here
from client.channels import expected_names, whole
from client.inference import Inference
from client.labelled import as_stored, as_values, grid_of
from client.nifti import write_nifti
from client.pictures import write_png
from client.research_command import main
from tests.series_files import write_series
from tests.test_finetune import QUICK, write_config
from tests.test_predict import noise, rows_of, untrained
from tests.test_several_channels import NAMES, TASK, told, write_cases
from unimiss_core.plan import prepare
from unimiss_core.scan import Modality, Scan
from unimiss_core.task_checkpoint import load
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig

BALL = SegmentationConfig(classes=("ball", "cube"), channels=("CT", "PET", "T2"), input_size=(16, 33, 33))
CASE = {"CT": 2, "PET": 0, "T2": 1}
NUMBERS = tuple(CASE.values())


def model_of(folder: Path, **more: Any) -> Path:
    return untrained(folder, BALL, **{"channels": NUMBERS, **more})


def predict(model: Path, scans: Path, out: Path, *words: str) -> int:
    return main(["predict", str(model), str(scans), "--out", str(out), "--show-paths", *words])


def predicted(model: Path, scans: Path, out: Path, *words: str) -> list[dict[str, str]]:
    assert predict(model, scans, out, *words) == 0
    return rows_of(out / "predictions.csv")


def drawn(out: Path, row: dict[str, str]) -> np.ndarray:
    return np.asarray(nibabel.load(out / row["mask"]).dataobj)


def left_out(out: Path) -> dict[str, str]:
    return {row["file"]: row["reason"] for row in rows_of(out / "left_out.csv")}


def values_of(seed: int, number: int, shape: tuple[int, ...] = (20, 34, 36)) -> np.ndarray:
    """In Hounsfield units many lie beyond the window of CT, which so is not what percentiles would do."""
    return noise(shape, 10 * seed + number).astype(np.float32) * (30 if number == 2 else 1)


def write_case(folder: Path, name: str, seed: int, numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        scan = Scan(values_of(seed, number)[None], (2.0, 2.0, 2.0), "OT")
        write_nifti(folder / f"{name}_{number:04d}.nii.gz", scan)


def write_in_one(folder: Path, name: str, seed: int, numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    """The same as `write_case`, as nibabel writes it."""
    write_case(folder / "parts", "x", seed, numbers)
    parts = [nibabel.load(folder / "parts" / f"x_{number:04d}.nii.gz") for number in numbers]
    volumes = np.stack([np.asarray(part.dataobj) for part in parts], axis=-1)
    nibabel.save(nibabel.Nifti1Image(volumes, parts[0].affine), folder / f"{name}.nii.gz")
    shutil.rmtree(folder / "parts")


def by_hand(model: Path, folder: Path, case: str, modalities: dict[int, Modality | None]) -> np.ndarray:
    """The mask, in the file's order, of channels that are each read and prepared as if it stood alone."""
    network, manifest = load(model)
    scans = [read_one(folder / f"{case}_{number:04d}.nii.gz", modalities[number]) for number in NUMBERS]
    prepared = [prepare(scan, manifest.plan) for scan in scans]
    values = as_values(as_stored(np.concatenate([values for values, _ in prepared])))
    inference = Inference(BALL, BALL.input_size or (), torch.device("cpu"), "fp32", 8, manifest.overlap, ())
    found = inference.mask(network, values, grid_of(scans[0], prepared[0][1]))
    return np.asarray(found).transpose(2, 1, 0)


# -------------------------------------------------------------------------------------------------- as in fine-tuning


@pytest.mark.parametrize("in_one_file", [False, True])
def test_a_segmentation_draws_what_it_drew_when_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_one_file: bool
) -> None:
    write_cases(tmp_path, count=6, in_one_file=in_one_file)
    told(tmp_path, NAMES)
    path = write_config(
        tmp_path,
        task={**TASK, "input_size": [16, 33, 33]},
        plan={"volume_spacing_mm": [1.2, 1.2, 1.2]},
        data={"name": "msd", "folder": "."},
        inference={"keep_largest": ["ball"], "overlap": 0.25},
        split={"folds": 3, "validation": 0.5},
    )
    assert main(["finetune", str(path)]) == 0
    out, scans = tmp_path / "predicted", tmp_path / "imagesTr"
    capsys.readouterr()
    rows = {row["name"]: row for row in predicted(tmp_path / "out", scans, out, "--names", "input")}
    assert list(rows) == [f"c{number}" for number in range(6)]
    said = capsys.readouterr().err
    assert "WARNING" not in said
    assert ("of each case reads _0002 as CT, _0000 as PET, _0001 as T2\n" in said) == (not in_one_file)
    assert ("several volumes reads, counted from 0, 2 as CT, 0 as PET, 1 as T2\n" in said) == in_one_file
    measured = sorted((tmp_path / "out" / "predictions").iterdir())
    assert len(measured) == 2
    for mask in measured:
        name = f"c{int(mask.name[5:10]) - 1}"
        row, first = rows[name], name if in_one_file else f"{name}_0002"
        found, source = nibabel.load(out / "masks" / f"{name}.nii.gz"), nibabel.load(scans / f"{first}.nii.gz")
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(nibabel.load(mask).dataobj))
        np.testing.assert_allclose(found.affine, source.affine)
        assert found.shape == source.shape[:3]
        assert (row["file"], row["mask"]) == (f"{first}.nii.gz", f"masks/{name}.nii.gz")
        assert int(row["voxels/ball"]) == (np.asarray(found.dataobj) == 1).sum()


def test_a_classification_of_pictures_answers_what_it_answered_when_it_was_measured(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    lines = ["late,early,label,patient"]
    for number in range(12):
        for channel in (0, 1):
            pixels = noise((40, 44), 2 * number + channel).astype(np.uint8)
            write_png(tmp_path / "pictures" / f"c{number}_{channel:04d}.png", pixels)
        lines.append(f"c{number}_0000.png,c{number}_0001.png,{['no', 'yes'][number % 2]},p{number}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 2, "classes": ["no", "yes"], "channels": ["late", "early"]}
    path = write_config(
        tmp_path,
        task={**task, "input_size": [40, 44]},
        data={"table": "t.csv", "folder": "pictures", "scan": ["late", "early"]},
        split={"folds": 3},
        training=QUICK,
    )
    assert main(["finetune", str(path), "--show-paths"]) == 0
    rows = predicted(tmp_path / "out", tmp_path / "pictures", tmp_path / "predicted", "--names", "input")
    found = {row["file"]: row for row in rows}
    measured = rows_of(tmp_path / "out" / "predictions.csv")
    assert {row["part"] for row in measured} >= {"test"}
    for row in measured:
        for name in ("p/no", "p/yes"):
            again = found[row["file"]]
            assert float(again[name]) == pytest.approx(float(row[name]), abs=2e-5)  # another batch, other last bits
    assert sorted(row["name"] for row in rows) == sorted(f"c{number}" for number in range(12))


@pytest.mark.parametrize("said", [None, "MR"])
@pytest.mark.parametrize("here", [True, False])
def test_each_channel_is_prepared_by_its_own_kind_here_and_in_a_worker(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: Modality | None,
    here: bool,
) -> None:
    monkeypatch.setattr(reading, "safe_here", lambda _: here)
    model, scans, out = model_of(tmp_path / "model"), tmp_path / "scans", tmp_path / "out"
    for seed, name in enumerate("ab"):
        write_case(scans, name, seed)
    rows = predicted(model, scans, out, *(["--modality", said] if said else []))
    assert ("--modality: MR is said of all channels, and 'CT' is CT by its name" in capsys.readouterr().err) == bool(
        said
    )
    kinds: dict[int, Modality | None] = {2: said or "CT", 0: said or "PT", 1: said}
    for name, row in zip("ab", rows, strict=True):
        np.testing.assert_array_equal(drawn(out, row), by_hand(model, scans, name, kinds))
    other = by_hand(model, scans, "a", dict.fromkeys(NUMBERS, None if said is None else "CT"))
    assert (other != drawn(out, rows[0])).any()


@pytest.mark.parametrize("number", [-1, 10_000])
def test_a_channels_number_is_one_that_a_file_can_have(tmp_path: Path, number: int) -> None:
    model = model_of(tmp_path / "model")
    told = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**told, "channels": [number, 0, 1]}))
    write_case(tmp_path / "scans", "a", 0)
    assert predict(model, tmp_path / "scans", tmp_path / "out") == 4


def test_a_channel_that_does_not_say_where_it_lies_is_laid_nowhere(tmp_path: Path) -> None:
    """nibabel puts the middle of such a file at 0, which is no place in the patient."""
    model = untrained(tmp_path / "model", BALL.model_copy(update={"other_grids": "resample"}), channels=NUMBERS)
    scans = tmp_path / "scans"
    for name, code in (("a", 1), ("b", 0)):
        write_case(scans, name, 0)
        image = nibabel.Nifti1Image(values_of(0, 0)[:, :-4].transpose(2, 1, 0), None)
        image.header.set_zooms((2.0, 2.0, 2.0))
        image = nibabel.Nifti1Image(image.dataobj, image.header.get_base_affine(), image.header)
        image.set_qform(image.affine, code)
        image.set_sform(image.affine, code)
        nibabel.save(image, scans / f"{name}_0000.nii.gz")
        for number in (1, 2):
            whole = nibabel.load(scans / f"{name}_{number:04d}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(whole.dataobj, image.affine), scans / f"{name}_{number:04d}.nii.gz")
    (row,) = predicted(model, scans, tmp_path / "out")
    assert row["file"] == "a_0002.nii.gz"
    assert set(left_out(tmp_path / "out").values()) == {"channels_apart"}


def test_no_name_of_a_channel_steers_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model may come from anybody."""
    task = BALL.model_copy(update={"channels": ("CT\x1b[31m", "PET\nleft out: 9", "T2")})
    model, scans = untrained(tmp_path / "model", task, channels=NUMBERS), tmp_path / "scans"
    write_case(scans, "a", 0)
    write_case(scans, "b", 1, (0, 1))
    predicted(model, scans, tmp_path / "out")
    said = capsys.readouterr().err
    assert "the model reads CT" in said
    assert "\x1b" not in said
    assert "\nleft out: 9" not in said


def test_numbers_of_a_model_that_keeps_none_are_the_channels_own(tmp_path: Path) -> None:
    """As of a federation. Oracle: a model that keeps them, and the files called so."""
    shared = untrained(tmp_path / "shared", BALL)
    kept = model_of(tmp_path / "kept")
    write_case(tmp_path / "kept-scans", "a", 0)
    (tmp_path / "scans").mkdir()
    for own, number in enumerate(NUMBERS):
        shutil.copy(tmp_path / "kept-scans" / f"a_{number:04d}.nii.gz", tmp_path / "scans" / f"a_{own:04d}.nii.gz")
    (one,) = predicted(shared, tmp_path / "scans", tmp_path / "out")
    (other,) = predicted(kept, tmp_path / "kept-scans", tmp_path / "kept-out")
    np.testing.assert_array_equal(drawn(tmp_path / "out", one), drawn(tmp_path / "kept-out", other))
    assert one["key"] == other["key"]


# ------------------------------------------------------------------------------------------------- which files are one


def test_volumes_of_one_file_are_a_case_whatever_it_is_called(tmp_path: Path) -> None:
    """BRATS_0000, BRATS_0001, ... may be patients. Oracle: the same channels in files of their own."""
    model, apart, one, out = model_of(tmp_path / "model"), tmp_path / "apart", tmp_path / "one", tmp_path / "out"
    for seed in range(2):
        write_case(apart, f"{'ab'[seed]}", seed)
        write_in_one(one, f"BRATS_{seed:04d}", seed)
    write_in_one(one / "deeper", "c", 2)
    write_case(apart, "c", 2)
    found = predicted(model, one, out, "--names", "input")
    expected = predicted(model, apart, tmp_path / "expected")
    assert [row["name"] for row in found] == ["BRATS_0000", "BRATS_0001", "c"]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(drawn(out, row), drawn(tmp_path / "expected", other))
    alone = predicted(model, one / "BRATS_0001.nii.gz", tmp_path / "alone")
    assert [row["key"] for row in alone] == [found[1]["key"]]


def test_channels_along_the_fifth_axis_are_volumes_too_and_one_of_labels_is_none(tmp_path: Path) -> None:
    """ITK writes them there. Oracle: the same channels in files of their own."""
    model, apart, one, out = model_of(tmp_path / "model"), tmp_path / "apart", tmp_path / "one", tmp_path / "out"
    write_case(apart, "a", 0)
    for name in ("a_0000", "labels"):
        write_in_one(one, name, 0)
        image = nibabel.load(one / f"{name}.nii.gz")
        values = np.asarray(image.dataobj).copy()
        if name == "labels":
            values[..., 1] = values[..., 1] > 100
        nibabel.save(nibabel.Nifti1Image(values[:, :, :, None], image.affine), one / f"{name}.nii.gz")
    (row,) = predicted(model, one, out)
    assert left_out(out) == {"labels.nii.gz": "label_map"}
    (other,) = predicted(model, apart, tmp_path / "expected")
    np.testing.assert_array_equal(drawn(out, row), drawn(tmp_path / "expected", other))


def test_what_is_no_whole_case_is_left_out_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, scans, out = model_of(tmp_path / "model"), tmp_path / "scans", tmp_path / "out"
    write_case(scans, "whole", 0, (0, 1, 2, 3))
    write_case(scans, "lacking", 1, (0, 1))
    write_case(scans, "damaged", 2)
    (scans / "damaged_0001.nii.gz").write_bytes(b"none")
    write_case(scans, "shifted", 3)
    image = nibabel.load(scans / "shifted_0001.nii.gz")
    moved = image.affine + np.array([[0, 0, 0, 5.0], *np.zeros((3, 4))])
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), moved), scans / "shifted_0001.nii.gz")
    write_case(scans, "x", 4, (0,))
    (scans / "x_0000.nii.gz").rename(scans / "plain.nii.gz")
    write_in_one(scans, "two volumes", 5, (0, 1))
    write_series(scans / "series", noise((16, 34, 36)), attributes={"Modality": "MR"})
    (row,) = predicted(model, scans, out)
    assert row["file"] == "whole_0002.nii.gz"
    series = {f"series/{path.name}": "unknown_channel" for path in (scans / "series").iterdir()}
    assert left_out(out) == {
        "whole_0003.nii.gz": "other_channel",
        "lacking_0000.nii.gz": "lacks_channel",
        "lacking_0001.nii.gz": "lacks_channel",
        "damaged_0000.nii.gz": "lacks_channel",
        "damaged_0001.nii.gz": "not_an_image",
        "damaged_0002.nii.gz": "lacks_channel",
        **{f"shifted_{number:04d}.nii.gz": "channels_apart" for number in NUMBERS},
        "plain.nii.gz": "unknown_channel",
        "two volumes.nii.gz": "lacks_channel",
        **series,
    }
    told = json.loads((out / "predicted.json").read_text())
    assert told["scans"] == 1
    assert told["left_out"] == {
        "channels_apart": 1,
        "lacks_channel": 3,
        "not_an_image": 1,
        "other_channel": 1,
        "unknown_channel": 2,
    }
    said = capsys.readouterr().err
    assert "1 file(s) of other channels are not looked at" in said
    assert "the model reads CT, PET, T2: give each case as CASE_0002, CASE_0000, CASE_0001 in one folder" in said
    assert "one NIfTI file that holds them as its volumes 2, 0, 1, from 0" in said
    assert not [name for name in ("whole", "lacking", "damaged", "shifted", "plain") if f"{name}_" in said]


def test_where_no_name_says_what_is_which_nothing_is_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a _0000, with which nnU-Net's begin, four digits may be a patient's."""
    model, scans = untrained(tmp_path / "model", BALL, channels=(1, 2, 3)), tmp_path / "scans"
    write_case(scans, "patient", 0, (1, 2, 3))
    assert predict(model, scans, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert "no scan that can be used: 3 unknown_channel" in said
    assert "the model reads CT, PET, T2: give each case as CASE_0001, CASE_0002, CASE_0003" in said
    assert predict(model, scans / "patient_0001.nii.gz", tmp_path / "alone") == 3
    shutil.copy(scans / "patient_0001.nii.gz", scans / "patient_0000.nii.gz")
    (row,) = predicted(model, scans, tmp_path / "again")
    assert row["file"] == "patient_0001.nii.gz"
    assert left_out(tmp_path / "again") == {"patient_0000.nii.gz": "other_channel"}


def test_what_names_are_expected_is_said_in_the_models_order() -> None:
    own = [Channel(name, number, None) for number, name in enumerate(("FLAIR", "T1"))]
    assert "the model reads FLAIR, T1: give each case as CASE_0000, CASE_0001 in one folder" in expected_names(own)
    assert "or as one NIfTI file of 2 volumes" in expected_names(own)
    assert "CASE_0000" in expected_names([Channel("T1", 1, None), Channel("T2", 2, None)])  # or none is a channel


@pytest.mark.parametrize("number", [0, 2])
def test_a_file_of_a_case_stands_for_all_of_it(tmp_path: Path, number: int) -> None:
    model, scans, out = model_of(tmp_path / "model"), tmp_path / "scans", tmp_path / "out"
    for seed, name in enumerate(("a", "b", "a_b")):
        write_case(scans, name, seed, (0, 1, 2, 3))
    by_name = {row["name"]: row for row in predicted(model, scans, tmp_path / "all", "--names", "input")}
    assert by_name.keys() == {"a", "b", "a_b"}
    (row,) = predicted(model, scans / f"a_{number:04d}.nii.gz", out, "--names", "input")
    assert (row["name"], row["key"], row["file"]) == ("a", by_name["a"]["key"], "a_0002.nii.gz")
    np.testing.assert_array_equal(drawn(out, row), drawn(tmp_path / "all", by_name["a"]))
    assert not (out / "left_out.csv").exists()
    (scans / "a_0001.nii.gz").unlink()
    assert predict(model, scans / f"a_{number:04d}.nii.gz", tmp_path / "lacking") == 3
    assert left_out(tmp_path / "lacking") == {f"a_{n:04d}.nii.gz": "lacks_channel" for n in (0, 2)}


# --------------------------------------------------------------------------------------------------- what is told of it


def test_the_key_hangs_on_every_file_and_its_place_and_on_no_name(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model")
    write_case(tmp_path / "scans", "a", 0)
    keys = []
    for name, swaps in (("same", {}), ("swapped", {0: 1, 1: 0}), ("other", {1: 3})):
        write_case(tmp_path / "more", "a", 0, (3,))
        folder = tmp_path / name / "deeper"
        folder.mkdir(parents=True)
        for number in NUMBERS:
            taken = swaps.get(number, number)
            source = tmp_path / ("more" if taken == 3 else "scans") / f"a_{taken:04d}.nii.gz"
            shutil.copy(source, folder / f"z_{number:04d}.nii.gz")
        keys += [row["key"] for row in predicted(model, tmp_path / name, tmp_path / f"{name}-out")]
    (first,) = predicted(model, tmp_path / "scans", tmp_path / "out")
    assert keys[0] == first["key"]
    assert len({*keys}) == 3
    assert all(len(key) == 32 for key in keys)


def test_two_cases_that_would_be_called_alike_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, scans = model_of(tmp_path / "model"), tmp_path / "scans"
    write_case(scans / "one", "case", 0)
    write_case(scans / "two", "Case", 1)
    assert predict(model, scans, tmp_path / "out", "--names", "input") == 2
    assert "scans 1 and 2 would be called alike" in capsys.readouterr().err


def test_a_kind_that_no_channel_was_trained_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    for seed, name in enumerate("ab"):
        write_case(scans, name, seed)
    # What says nothing may be MR.
    for name, trained_on, unlike in (("mr", ("MR",), {"CT": 2, "PT": 2}), ("all", ("CT", "OT", "PT"), {})):
        model = model_of(tmp_path / name, trained_on=trained_on)
        predicted(model, scans, tmp_path / f"{name}-out")
        assert json.loads((tmp_path / f"{name}-out" / "predicted.json").read_text())["unlike_training"] == unlike
        assert capsys.readouterr().err.count("WARNING: 2 scan(s) are of another kind") == len(unlike)


def test_it_makes_no_dicom_seg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = model_of(tmp_path / "model"), tmp_path / "out"
    assert predict(model, tmp_path, out, "--dicom-seg") == 2
    assert (
        "--dicom-seg: is of DICOM series, and of a folder the model reads the channels of a scan from other files"
        in (capsys.readouterr().err)
    )
    assert not out.exists()


def test_numbers_that_are_not_the_tasks_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(tmp_path / "model")
    manifest = json.loads((model / "model.json").read_text())
    for numbers in ([0, 1], [0, 1, 1]):
        (model / "model.json").write_text(json.dumps({**manifest, "channels": numbers}))
        assert predict(model, tmp_path, tmp_path / "out") == 4
        assert "is no description of a fine-tuned model" in capsys.readouterr().err


def test_what_is_read_here_is_counted_with_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Candidate(Path(), ("a.nii",), "nifti", "", "OT", (10, 10, 10), (1.0, 1.0, 1.0))
    monkeypatch.setattr(catalogue, "FEW_BYTES", 2 * 4 * 1000)
    assert safe_here([one, one])
    assert not safe_here([whole([one] * 3, Path())])
    large = replace(one, files=("b.nii",), shape=(20, 20, 20))
    assert not safe_here([whole([one, large], Path())])
    assert not safe_here([whole([large, one], Path())])
    assert whole([one, replace(one, compressed=True)], Path()).compressed
    assert one.modalities == ("OT",)
    assert whole([replace(one, modality="CT"), one], Path()).modalities == ("CT", "OT")


def test_a_classification_names_a_case_without_its_ending(tmp_path: Path) -> None:
    task = ClassificationConfig(rank=2, classes=("no", "yes"), channels=("a", "b"), input_size=(40, 44))
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in (0, 1):
        write_png(scans / f"case.one_{number:04d}.png", noise((40, 44), number).astype(np.uint8))
    (row,) = predicted(untrained(tmp_path / "model", task), scans, tmp_path / "out", "--names", "input")
    assert row["name"] == "case.one"


@pytest.mark.parametrize("beside", ["scans", "."])
@pytest.mark.parametrize("one_file", [False, True])
def test_a_dataset_json_of_the_scans_says_which_is_which_whatever_the_model_was_taught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: str, one_file: bool
) -> None:
    """A federation's model does not know any hospital's numbers."""
    model, scans = untrained(tmp_path / "model", BALL), tmp_path / "scans"
    write_case(scans, "c", 1)
    asked = scans / "c_0001.nii.gz" if one_file else scans
    (without,) = predicted(model, asked, tmp_path / "without")
    told(tmp_path / beside, NAMES)
    capsys.readouterr()
    (row,) = predicted(model, asked, tmp_path / "out")
    assert "dataset.json of the scans numbers the channels otherwise" in capsys.readouterr().err
    expected = by_hand(model, scans, "c", {0: "PT", 1: None, 2: "CT"})
    assert np.array_equal(drawn(tmp_path / "out", row), expected)
    assert not np.array_equal(drawn(tmp_path / "without", without), expected)
    told(tmp_path / beside, {"0": "PET", "1": "FLAIR", "2": "CT"})  # says nothing of T2
    (row,) = predicted(model, asked, tmp_path / "other")
    assert np.array_equal(drawn(tmp_path / "other", row), drawn(tmp_path / "without", without))
    (tmp_path / beside / "dataset.json").write_text("[]")
    (row,) = predicted(model, asked, tmp_path / "none")
    assert row["file"] == "c_0000.nii.gz"


def test_only_channels_of_which_nothing_says_what_they_are_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = SegmentationConfig(classes=("ball",), channels=("early", "late"), input_size=(16, 33, 33))
    model, scans = untrained(tmp_path / "model", plain), tmp_path / "scans"
    write_case(scans, "c", 1, (0, 1))
    predicted(model, scans, tmp_path / "out")
    assert "nothing says what early, late of 1 scan(s) are; where all are CT, say so" in capsys.readouterr().err
    predicted(model, scans, tmp_path / "said", "--modality", "MR")
    assert "nothing says" not in capsys.readouterr().err
