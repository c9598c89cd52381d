"""A coordinator that is killed at any instant goes on where it was, and ends with the bits of an unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = 24


def test_runs_that_are_killed_again_and_again_end_bit_identical(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed_coordinator", str(tmp_path), str(KILLS), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=280, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= KILLS
    assert told["same"]
    assert len(told["after_rounds"]) > 2  # instants fell into different rounds
