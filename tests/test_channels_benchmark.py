"""benchmarks/channels.py: what it writes is a fine-tuning's, and what it tells is what the folds say."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.channels import ARMS, folder_of, rows_of, write_settings, write_table
from benchmarks.paired import SECONDS
from client.finetune_config import load_finetune
from client.label_tables import label_table


def meta(path: Path, patients: int) -> Path:
    lines = ["patient_id,modality,file,mask"]
    lines += [
        f"P{number},{kind},P{number}_{kind}.nii.gz,P{number}_{kind}_mask.nii.gz"
        for number in range(patients)
        for kind in ("MR_T1", "CT", "PET")
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_fine_tuning_of_its_channels_on_the_same_patients_and_masks(tmp_path: Path, arm: str) -> None:
    patients = write_table(meta(tmp_path / "meta.csv", 7), tmp_path / "table.csv")
    (tmp_path / "sts_ct_pet_mr" / "volumes").mkdir(parents=True)
    config = load_finetune(write_settings(tmp_path, arm, 1, tmp_path / "table.csv"), data_root=tmp_path)
    table = label_table(config)
    assert {case.number: case.patient for case in table.cases} == patients
    called = {"CT": "CT", "PET": "PET", "MR": "MR_T1"}
    expected = [tuple(f"P{number}_{called[name]}.nii.gz" for name in ARMS[arm]) for number in range(7)]
    assert [case.files for case in table.cases] == expected
    assert {case.mask for case in table.cases} == {f"P{number}_CT_mask.nii.gz" for number in range(7)}


def test_arms_are_compared_patient_by_patient(tmp_path: Path) -> None:
    """Oracle: the second arm is better by 0.1 of each patient, who differ by far more."""
    patients = write_table(meta(tmp_path / "meta.csv", 10), tmp_path / "table.csv")
    dice = np.linspace(0.1, 0.8, 10)
    for arm, more in (("CT", 0.0), ("CT, PET", 0.1)):
        for fold in range(5):
            folder = folder_of(tmp_path, arm, 0) / f"fold-{fold}"
            folder.mkdir(parents=True)
            with (folder / "cases.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["line", "part", "dice", "hd95_mm"])
                writer.writerows([2 + n, "test", dice[n] + more, 5.0] for n in range(fold, 10, 5))
                writer.writerow([2, "validation", 0.0, 99.0])
        (folder.parent / SECONDS).write_text(json.dumps({"cpu_s": 100.0 + more}))
    options = Namespace(out=tmp_path, arms=["CT", "CT, PET"], seeds=[0])
    alone, both = (row for row in rows_of(options, patients) if row.figure == "dice")
    assert (alone.cpu_s, both.cpu_s) == (100.0, 100.1)
    assert alone.value == pytest.approx(dice.mean())
    assert alone.difference is None
    assert both.difference == pytest.approx(0.1)
    assert both.difference_interval == pytest.approx((0.1, 0.1))
    assert alone.interval[1] - alone.interval[0] > 0.2
