"""What `benchmarks/downstream.py` and `benchmarks/inference.py` claim: who tests, what an interval is, same masks."""

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks.downstream import ARMS, TASKS, Run, write_settings
from benchmarks.paired import draws, interval, mean_of_known, scan_means
from client.finetune_config import load_finetune
from client.label_tables import label_table
from client.splits import split_cases
from tests.shared_files import DATA, needs
from unimiss_core import resampling
from unimiss_core.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # the script finds its neighbour there


def test_an_interval_is_that_of_a_mean_over_patients_not_scans() -> None:
    """Oracle: the standard error of a mean of 300 patients, each with three scans of one value."""
    values = np.random.default_rng(0).normal(0.6, 0.2, 300)
    patients = [f"p{number}" for number in range(300) for _ in range(3)]
    drawn, seeds = draws([mean_of_known(values.repeat(3))], patients, stream=0)
    low, high = interval(drawn)
    reach = 1.96 * values.std() / np.sqrt(300)
    assert drawn[0] == pytest.approx(values.mean()) == pytest.approx(seeds[0])
    assert (low, high) == (
        pytest.approx(values.mean() - reach, abs=reach / 8),
        pytest.approx(values.mean() + reach, abs=reach / 8),
    )


def test_seeds_widen_an_interval_and_patients_are_the_same_for_both_arms() -> None:
    values = np.random.default_rng(1).random(50)
    patients = [str(number) for number in range(50)]
    one, _ = draws([mean_of_known(values)], patients, stream=0)
    better, _ = draws([mean_of_known(values + 0.1)], patients, stream=1)
    np.testing.assert_allclose(better - one, 0.1)
    apart, seeds = draws([mean_of_known(values + shift) for shift in (-0.4, 0.0, 0.4)], patients, stream=0)
    assert seeds.tolist() == pytest.approx([values.mean() - 0.4, values.mean(), values.mean() + 0.4])
    assert apart[1:].std() == pytest.approx(np.hypot(one[1:].std(), 0.4 * np.sqrt(2 / 3) / np.sqrt(3)), rel=0.1)


def test_a_scan_is_the_mean_of_its_classes_and_missing_ones_count_for_nothing() -> None:
    rows = [{"line": "4", "dice": "0.5"}, {"line": "2", "dice": "0.2"}, {"line": "2", "dice": "0.4"}]
    rows += [{"line": "4", "dice": ""}, {"line": "7", "dice": ""}]
    means = scan_means(rows, "dice", [2, 4, 7])
    np.testing.assert_allclose(means, [0.3, 0.5, np.nan])
    plain = np.ones((1, 3))
    assert mean_of_known(means)(plain) == pytest.approx(0.4)
    assert mean_of_known(means)(np.array([[3.0, 1.0, 9.0]])) == pytest.approx((3 * 0.3 + 0.5) / 4)
    assert resampling.DRAWS >= 1000


@needs(DATA)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_the_shipped_file_and_its_test_patients_are_nobodys_at_pretraining(tmp_path: Path, task: str) -> None:
    parts = {}
    for seed, arm in ((1, "scratch"), (2, "frozen")):
        path = write_settings(Run(task, arm, seed, tmp_path / arm), DATA)
        raw, shipped = yaml.safe_load(path.read_text()), read_yaml(ROOT / "configs" / "finetune" / f"{task}.yaml")
        assert (raw["seed"], raw["training"].pop("trains")) == (seed, ARMS[arm].trains)
        assert {key for key in raw if raw[key] != shipped.get(key)} <= {"seed", "split", "data"}
        config = load_finetune(path, data_root=DATA)
        parts[arm] = split_cases(label_table(config).cases, config)
        assert not (tmp_path / arm).exists()  # or the fine-tuning takes it for somebody else's
    held = {part: {case.patient for case in cases} for part, cases in parts["scratch"].items()}
    assert held == {part: {case.patient for case in cases} for part, cases in parts["frozen"].items()}
    if task in ("sts_ct", "sts_mr", "nih_findings"):
        assert all(_place(patient) >= 0.7 for patient in held["test"])
        assert all(_place(patient) < 0.7 for patient in held["train"] | held["validation"])
        with path.with_suffix(".csv").open(newline="") as file:
            assert {row["split"] for row in csv.DictReader(file)} == {"train", "test"}


def _place(patient: str) -> float:
    """As docs/site.md has it of `patient_range`: where a hash of the patient's text falls."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64


def test_a_large_volume_gets_the_mask_of_the_plain_way() -> None:
    """Windows side by side: where they overlap, the one joins probabilities, the other logits."""
    from inference import Case, ours, plain, volume

    from tests.small_tasks import three_answers
    from unimiss_core.study import ModelConfig
    from unimiss_core.tasks import build_task_model

    case = Case("ours", "nano", (16, 40, 80), (16, 40, 40), 0.0, 2, 2, 1)
    model = build_task_model(ModelConfig(prototypes=16), three_answers(3, dense=True), seed=0, pretrained=None).eval()
    with torch.no_grad():
        model.head.classes.weight.mul_(50)  # type: ignore[union-attr, operator]
    values = volume(case.shape)
    assert values.shape == (1, *case.shape)
    mine, theirs = ours(model, values.copy(), case), plain(model, values.copy(), case)
    assert len(np.unique(theirs)) > 1
    assert (mine == theirs).mean() > 0.999
