"""`unimiss plan-privacy`, as it is typed."""

import re
from pathlib import Path

import pytest

from client.accounting import study_epsilon
from client.research_command import main
from unimiss_core.config import load
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.study import StudyConfig

SHIPPED = Path(__file__).parents[1] / "configs" / "study"


def test_the_noise_that_epsilons_need(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "--patients 500 --batch 64 --steps 1000 --epsilon 8 3 --parameters 200000"
    assert main(["plan-privacy", *numbers.split()]) == 0
    said = capsys.readouterr().out
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [float(row[0]) for row in rows] == [8.0, 3.0]
    assert [float(row[1]) for row in rows] == pytest.approx([2.6, 5.8], rel=0.02)
    assert [float(row[2]) for row in rows] == pytest.approx([float(r[1]) * 200_000**0.5 / 64 for r in rows], rel=0.01)
    assert "drowns" in rows[1][3]


def test_a_study_is_told_what_it_costs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "name: toy\nschedule: {rounds: 10, local_steps: 20}\noptimiser: {warmup_steps: 5}\n"
        "batch: {images: 256, volumes: 256}\n"
        "privacy: {mode: patient, max_epsilon: 1.0, noise_multiplier: 1.0}\n"
    )
    assert main(["plan-privacy", "--study", str(path)]) == 0
    said = capsys.readouterr().out
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["images", "volumes", "both", "images", "volumes"]
    learner = PrivateLearner(load(StudyConfig, path), ranks={2, 3})
    for rank, row in ((2, rows[3]), (3, rows[4])):
        values = sum(learner.student.get_parameter(name).numel() for name in learner.trained_names(rank, 10**9))
        assert row[1:3] == [f"{values:,}", "256"]
        assert float(row[3]) == pytest.approx(values**0.5 / 256, rel=0.01)
        assert "drowns" in row[4] or "exceeds" in row[4]
    assert "drawn" not in said  # how many are is known of a site's patients alone
    assert "exceeded" in said
    assert "delta 1e-05 is for sites of 10,000 patients at most" in said
    enough = re.search(r"noise_multiplier ([0-9.]+) would keep epsilon 1$", said, re.MULTILINE)
    assert enough is not None
    path.write_text(path.read_text().replace("noise_multiplier: 1.0", f"noise_multiplier: {float(enough[1]) * 1.001}"))
    assert main(["plan-privacy", "--study", str(path), "--patients", "10000"]) == 0
    said = capsys.readouterr().out
    assert "a step at a site of 10,000 patients" in said
    assert "drawn" in said
    assert "exceeded" not in said
    assert "is for sites of" not in said
    assert main(["plan-privacy", "--study", str(path), "--patients", "20000"]) == 2
    assert "privacy.delta: delta 1e-05 is weak for 20,000 patients" in (told := capsys.readouterr().err)
    assert "expected at most 5e-06, a tenth of one over the patients" in told
    path.write_text("name: toy\n")
    assert main(["plan-privacy", "--study", str(path)]) == 2
    assert "promises no privacy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "give either --study (and --patients), or --patients, --batch and --steps"),
        ("--patients 500 --batch 64", "give either --study"),
        ("--study x.yaml --batch 5", "give either --study"),
        ("--patients 5 --batch 64 --steps 10", "--batch 64 must not be above --patients 5"),
        ("--patients 50000 --batch 64 --steps 10", "--delta: delta 1e-05 is weak for 50,000 patients"),
    ],
)
def test_what_makes_no_sense_is_told(options: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-privacy", *options.split()]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["private", "private_adaptation", "private_demo"])
def test_studies_that_are_shipped_keep_their_promise_without_a_lot_to_spare(name: str) -> None:
    study = load(StudyConfig, SHIPPED / f"{name}.yaml")
    assert study.privacy.mode == "patient"
    assert 0.9 < study_epsilon(study) / study.privacy.max_epsilon <= 1
