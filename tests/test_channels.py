"""nnU-Net's folders: of a case's channels one is read and asked about; labels that are no plain values are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.label_tables import label_table
from client.nifti import write_nifti
from client.research_command import main
from tests.test_finetune import QUICK, write_config
from tests.test_label_tables import MASKS, configured, msd
from tests.test_labelled import write_case
from tests.test_predict import BALL, noise, rows_of, untrained
from unimiss_core.errors import ConfigError
from unimiss_core.progress import Note, listen
from unimiss_core.scan import Scan
from unimiss_core.task_checkpoint import load


def write_channels(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for seed, name in enumerate(names):
        values = noise((20, 22, 24), seed).astype(np.float32)[None]
        write_nifti(folder / f"{name}.nii.gz", Scan(values, (2.0, 2.0, 2.0), "OT"))
    return folder


def predicted(model: Path, scans: Path, out: Path) -> dict[str, dict[str, str]]:
    assert main(["predict", str(model), str(scans), "--out", str(out), "--show-paths"]) == 0
    return {row["file"]: row for row in rows_of(out / "predictions.csv")}


def test_a_channel_of_each_case_is_predicted_as_if_it_stood_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same files in a folder that has no others."""
    model = untrained(tmp_path / "model", BALL, channel=1)
    scans = write_channels(tmp_path / "imagesTs", ["a_0000", "a_0001", "b_0000", "b_0001", "c_0000"])
    alone = tmp_path / "alone"
    alone.mkdir()
    for case in "ab":
        shutil.copy(scans / f"{case}_0001.nii.gz", alone / f"{case}.nii.gz")
    expected = predicted(model, alone, tmp_path / "expected")
    capsys.readouterr()
    found = predicted(model, scans, tmp_path / "out")
    assert "reads channel 1 of each case, on which the model was fine-tuned; 3 file(s)" in capsys.readouterr().err
    assert found.keys() == {"a_0001.nii.gz", "b_0001.nii.gz"}
    for case in "ab":
        one, other = found[f"{case}_0001.nii.gz"], expected[f"{case}.nii.gz"]
        assert {k: v for k, v in one.items() if k not in ("file", "scan", "mask")} == {
            k: v for k, v in other.items() if k not in ("file", "scan", "mask")
        }
    left_out = {row["file"]: row["reason"] for row in rows_of(tmp_path / "out" / "left_out.csv")}
    assert left_out == {f"{case}_0000.nii.gz": "other_channel" for case in "abc"}


@pytest.mark.parametrize(
    ("names", "channel"),
    [
        (["a_0000", "a_0001", "b"], 0),  # b is called otherwise
        (["a_0001", "a_0002"], 1),  # nnU-Net's channels begin with _0000
        (["a_0000", "a_0001"], None),  # nothing says which one the model read
    ],
)
def test_files_that_may_be_cases_of_their_own_are_each_predicted(
    tmp_path: Path, names: list[str], channel: int | None
) -> None:
    model = untrained(tmp_path / "model", BALL, channel=channel)
    found = predicted(model, write_channels(tmp_path / "scans", names), tmp_path / "out")
    assert found.keys() == {f"{name}.nii.gz" for name in names}


def test_a_channel_whose_first_file_is_damaged_stays_a_channel(tmp_path: Path) -> None:
    model = untrained(tmp_path / "model", BALL, channel=1)
    scans = write_channels(tmp_path / "scans", ["a_0001", "a_0002"])
    (scans / "a_0000.nii.gz").write_bytes(b"none")
    assert predicted(model, scans, tmp_path / "out").keys() == {"a_0001.nii.gz"}


def test_a_fine_tuning_of_one_channel_says_so_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        write_case(tmp_path, f"c{number}_0000", number)
        (tmp_path / "labelsTr" / f"c{number}_0000.nii.gz").rename(tmp_path / "labelsTr" / f"c{number}.nii.gz")
        source = tmp_path / "imagesTr" / f"c{number}_0000.nii.gz"
        shutil.copy(source, source.with_name(f"c{number}_0001.nii.gz"))
    names = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "ball": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    path = write_config(
        tmp_path,
        task={"name": "segmentation", "rank": 3, "classes": ["ball"], "input_size": [16, 33, 33]},
        plan={"volume_spacing_mm": [2.0, 2.0, 2.0]},
        data={"name": "msd", "folder": ".", "channel": 1},
        split={"folds": 3, "validation": 0.5},
        training={**QUICK, "epochs": 1},
    )
    assert main(["finetune", str(path)]) == 0
    assert "2 channels per case: 1 (PET) is read, 0 (CT) is not looked at" in capsys.readouterr().err
    assert load(tmp_path / "out")[1].channel == 1


@pytest.mark.parametrize(
    ("images", "channel"),
    [(["a_0000.nii.gz", "b_0000.nii.gz"], 0), (["a.nii.gz", "b.nii.gz"], None), (["a_0001.nii", "b_0002.nii"], None)],
)
def test_what_ends_in_four_digits_is_a_channel_where_the_first_is_there(
    tmp_path: Path, images: list[str], channel: int | None
) -> None:
    masks = [name.replace("_0000", "") for name in images]
    msd(tmp_path, images, masks)
    notes: list[Any] = []
    with listen(notes.append):
        found = label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": "."}))
    assert (len(found.cases), found.channel) == (2, channel)
    assert not [note for note in notes if isinstance(note, Note)]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"background": 0, "front": [1, 2], "back": 2}, r"1 label\(s\) .* of several values .* a label of its own"),
        ({"background": 0, "front": 1, "ignore": 2}, "'ignore', .* would be trained as a class"),
        ({"background": 0, "front": 1, "back": 2, "Ignore": 3}, "leave out cases that hold any"),
        ({"0": "background", "1": "back", "2": "front"}, "is value 1, and dataset.json says it is 2"),
    ],
)
@pytest.mark.parametrize("modality", [None, "MR"])
def test_labels_that_are_no_plain_classes_are_refused(
    tmp_path: Path, labels: dict[str, Any], told: str, modality: str | None
) -> None:
    """Also where the file says what the scans are, so that dataset.json need not."""
    msd(tmp_path, ["a.nii"], ["a.nii"], {"labels": labels, "regions_class_order": [1, 2]})
    with pytest.raises(ConfigError, match=told):
        label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": ".", "modality": modality}))
