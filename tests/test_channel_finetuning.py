"""`unimiss finetune` of scans of several channels, as its user meets it."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from client.pictures import write_png
from client.research_command import main
from tests.series_files import write_series
from tests.test_finetune import PLAIN, QUICK, write_config
from tests.test_labelled import SHAPE
from tests.test_research_command import nano_checkpoint
from tests.test_several_channels import NAMES, TASK, told, write_cases
from unimiss_core import task_checkpoint
from unimiss_core.channels import SEES_THEIR_MEAN


def pairs(folder: Path, count: int = 60) -> dict[str, Any]:
    """Two pictures of each patient: noise, and noise that is brighter above or below, which is the class."""
    lines = ["scan,other,label,patient"]
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 200, (2, 40, 44))
        noise[1, 20 * (number % 2) :][:20] += 50
        for name, pixels in zip(("noise", "class"), noise.astype(np.uint8), strict=True):
            write_png(folder / f"{name}{number}.png", pixels)
        lines.append(f"noise{number}.png,class{number}.png,{['above', 'below'][number % 2]},miller{number}")
    (folder / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 2, "classes": ["above", "below"], "input_size": [40, 44]}
    data = {"table": "t.csv", "scan": ["scan", "other"]}
    return {"task": {**task, "channels": ["noise", "class"]}, "data": data, "split": {"folds": 3}}


def test_a_scan_of_which_channels_are_unnamed_is_one_scan_that_does_not_say_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path, count=6)
    told(tmp_path, {"0": "late", "1": "early", "2": "CT"})
    task = {**TASK, "channels": ["CT", "late", "early"], "input_size": [16, 33, 33]}
    split = {"folds": 3, "validation": 0.5}
    path = write_config(tmp_path, task=task, data={"name": "msd", "folder": "."}, split=split, training=QUICK)
    assert main(["finetune", str(path)]) == 0
    said = capsys.readouterr().err
    assert "\nnothing says what late, early of 6 scan(s) are; where one is CT, let its name" in said


def test_series_in_swapped_columns_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DICOM says what it is: PET would be clipped by nothing, and CT be met where training knew PET."""
    lines = ["ct,pet,label,patient"]
    for number in range(12):
        folders = [f"{kind}{number}" for kind in ("CT", "PT")]
        for place, kind in enumerate(("CT", "PT")):
            volume = np.random.default_rng([number, place]).integers(0, 900, (13, 34, 36)).astype(np.int16)
            write_series(tmp_path / folders[place], volume, attributes={"Modality": kind})
        lines.append(f"{','.join(folders[:: -1 if number == 4 else 1])},{['no', 'yes'][number % 2]},p{number}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "classes": ["no", "yes"], "channels": ["CT", "PET"], "input_size": [13, 33, 33]}
    data = {"table": "t.csv", "scan": ["ct", "pet"]}
    path = write_config(tmp_path, task=task, data=data, split={"folds": 3}, training=QUICK)
    assert main(["finetune", str(path)]) == 0
    assert "left out: 1 scan(s), unlike_channel: the file of a channel says" in capsys.readouterr().err


def test_what_stands_in_the_second_channel_alone_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nano_checkpoint(tmp_path / "round-0001")
    training = {"epochs": 5, "batch": 6, "lr": 0.003, "layer_decay": 1.0, "augmentation": PLAIN}
    settings = {**pairs(tmp_path), "init": {"folder": "round-0001"}, "training": training}
    path = write_config(tmp_path, **settings)
    assert main(["finetune", str(path)]) == 0
    area = json.loads((tmp_path / "out" / "metrics.json").read_text())["parts"]["test"]["auc"]["value"]
    assert area > 0.9
    model, manifest = task_checkpoint.load(tmp_path / "out")
    assert model.backbone.channels == 2
    assert (manifest.channels, manifest.trained_on) == ((0, 1), ("XR",))

    def begun_with_that(trains: str = "full", **task: Any) -> str:
        capsys.readouterr()
        again = {**settings, "task": {**settings["task"], **task}, "training": {**QUICK, "trains": trains}}
        again["init"] = {"folder": str(tmp_path / "out")}
        assert main(["finetune", str(write_config(tmp_path, **again)), "--out", str(tmp_path / "again")]) == 0
        for left in (tmp_path / "again").iterdir():
            left.unlink()
        return capsys.readouterr().err

    assert "fine-tuned for the same classes: its head, too" in begun_with_that()
    assert "fine-tuned for the same classes: its head, too" in begun_with_that(channels=["Class", "noise"])
    assert "a new head, for its own is for another task, other classes or other channels" in begun_with_that(
        channels=["class", "other"]
    )
    for trains, channels, is_told in (
        ("frozen", ["other", "noise"], True),
        ("linear_probe", ["other", "noise"], True),
        ("frozen", ["noise", "class"], False),
        ("frozen", ["class", "noise"], False),
        ("full", ["other", "noise"], False),
    ):
        assert (SEES_THEIR_MEAN in begun_with_that(trains, channels=channels)) == is_told


def test_a_finished_fine_tuning_knows_which_file_was_which_channel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = pairs(tmp_path)
    assert main(["finetune", str(write_config(tmp_path, **settings)), "--out", str(tmp_path / "out")]) == 0
    assert "channels: noise is column 'scan', class is column 'other'\n" in capsys.readouterr().err
    again = ["finetune", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out"), "--resume"]
    assert main(again) == 0
    raw = yaml.safe_load((tmp_path / "x.yaml").read_text())
    raw["data"]["scan"] = raw["data"]["scan"][::-1]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(raw))
    capsys.readouterr()
    assert main(again) == 2
    assert "holds another fine-tuning, which is finished" in capsys.readouterr().err


def test_masks_of_volumes_of_several_channels_lie_on_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cases(tmp_path)
    told(tmp_path, NAMES)
    path = write_config(
        tmp_path,
        task={**TASK, "input_size": [16, 33, 33]},
        data={"name": "msd", "folder": "."},
        split={"folds": 2, "validation": 0.5},
    )
    assert main(["finetune", str(path)]) == 0
    assert "\nchannels: CT is number 2, PET is number 0, T2 is number 1\n" in f"\n{capsys.readouterr().err}"
    manifest = task_checkpoint.load(tmp_path / "out")[1]
    assert manifest.channels == (2, 0, 1)
    assert manifest.channel is None
    assert manifest.trained_on == ("CT", "OT", "PT")
    drawn = sorted((tmp_path / "out" / "predictions").iterdir())
    assert len(drawn) == 4
    for mask in drawn:
        case = int(mask.name[5:10]) - 1
        source = nibabel.load(tmp_path / "imagesTr" / f"c{case}_0002.nii.gz")
        image = nibabel.load(mask)
        assert image.shape == source.shape == SHAPE[::-1]
        np.testing.assert_array_equal(image.affine, source.affine)
