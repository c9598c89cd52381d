"""The benchmark of private steps compares the same loss over the same patients, and writes what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "privacy.py"
NANO = "--model nano --patients 3 --prototypes 32 --repeats 1 --threads 1 --device cpu"


def said_of(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize("at_once", [1, 2])
def test_it_runs_and_writes_its_figures(tmp_path: Path, at_once: int) -> None:
    done = said_of(*NANO.split(), "--at-once", at_once, "--json", tmp_path / "privacy.json")
    assert done.returncode == 0, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert [line.split(": ")[1] for line in verdicts] == ["3D, time", "3D, memory", "2D, time", "2D, memory"]
    results = json.loads((tmp_path / "privacy.json").read_text())["results"]
    found = [(result["case"]["rank"], result["case"]["private"]) for result in results]
    assert found == [(3, False), (3, True), (2, False), (2, True)]
    for plain, private in (results[:2], results[2:]):
        assert private["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)  # the mean over the same scans
        assert all(result["wall_s"] > 0 and result["peak_mb"] > 0 for result in (plain, private))


def test_a_number_of_patients_that_is_none_is_told_at_once() -> None:
    done = said_of("--patients", "0")
    assert done.returncode == 2
    assert "expected a whole number above 0, got 0" in done.stderr.splitlines()[-1]
