"""The benchmark of private steps compares the same loss over the same patients, and writes what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unimiss_core.scan import Rank

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # the script finds its neighbours there
NANO = "--model nano --patients 3 --prototypes 32 --repeats 1 --threads 1 --device cpu"


def test_it_runs_and_writes_its_figures(tmp_path: Path) -> None:
    """In processes of its own, as it is typed: memory of this one would count in the figures."""
    command = [sys.executable, BENCHMARKS / "privacy.py", *NANO.split(), "--at-once", "2"]
    command += ["--json", tmp_path / "privacy.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert [line.split(": ")[1] for line in verdicts] == ["3D, time", "3D, memory", "2D, time", "2D, memory"]
    results = json.loads((tmp_path / "privacy.json").read_text())["results"]
    found = [(result["case"]["rank"], result["case"]["private"], result["case"]["at_once"]) for result in results]
    assert found == [(3, False, 2), (3, True, 2), (2, False, 2), (2, True, 2)]
    for plain, private in (results[:2], results[2:]):
        assert private["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)  # the mean over the same scans
        assert all(result["wall_s"] > 0 and result["peak_mb"] > 0 for result in (plain, private))


@pytest.mark.parametrize("rank", [2, 3])
def test_patients_worked_out_alone_have_the_plain_steps_loss(rank: Rank) -> None:
    """As its processes build the steps, without the processes."""
    import privacy

    settings = {"model": "nano", "patients": 3, "views": 2, "precision": "fp32", "prototypes": 32, "device": "cpu"}
    plain, private = (
        privacy._build(privacy.Case(private=private, rank=rank, threads=1, at_once=1, **settings))()
        for private in (False, True)
    )
    assert private == pytest.approx(plain, rel=1e-4)


def test_a_number_of_patients_that_is_none_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import privacy

    monkeypatch.setattr(sys, "argv", ["privacy.py", "--patients", "0"])
    with pytest.raises(SystemExit, match="2"):
        privacy.main()
    assert "expected a whole number above 0, got 0" in capsys.readouterr().err.splitlines()[-1]
