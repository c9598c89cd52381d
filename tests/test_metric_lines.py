"""metrics.jsonl: a line that is damaged costs no other, whoever reads it."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.artefacts import read_artefacts
from server.home import Home
from server.run_folder import RunFolder
from server.running import status
from server.validation import Best, best_in
from tests.federation import small_study
from tests.test_rounds import federate, xray
from unimiss_core import metric_lines, trained_by

AUC = "validation_auc"


def row(round: int, auc: float = 0.5) -> dict[str, Any]:
    site = {"status": "ok", "scans": {"2d": 1}, "diagnostics": {AUC: auc}}
    return {"round": round, "sites": dict.fromkeys("abc", site), "global": {}}


def write(out: Path, rows: list[dict[str, Any]], **damaged: bytes) -> list[bytes]:
    """damaged: by `line3`, what stands there instead."""
    lines = [damaged.get(f"line{number}", json.dumps(one).encode()) for number, one in enumerate(rows, start=1)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return lines


DEEP = pytest.param(b"[" * 50_000, id="deep")
DAMAGED = [b'{"round": 2, "si', b"\xff\xfe\x00", b"", b"[2]", b'{"rou": 2}', DEEP]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_costs_no_other(tmp_path: Path, damaged: bytes) -> None:
    folder = RunFolder(tmp_path)
    lines = write(tmp_path, [row(number) for number in range(1, 8)], line2=damaged)
    assert [one["round"] for one in folder.metric_rows()] == [1, 3, 4, 5, 6, 7]
    assert [one.round for one in read_artefacts(tmp_path).rounds] == [1, 3, 4, 5, 6, 7]
    metric_lines.forget_rounds_after(folder.metrics, 5)  # as resuming does
    assert folder.metrics.read_bytes().splitlines() == lines[:5]
    folder.add_to_metrics(4, {"probe": {"x": 0.5}})
    changed = folder.metrics.read_bytes().splitlines()
    assert [one for place, one in enumerate(changed) if place != 3] == [*lines[:3], lines[4]]
    assert json.loads(changed[3]) == row(4) | {"global": {"probe": {"x": 0.5}}}
    told = trained_by.of_run(tmp_path, 5)
    assert told is not None
    assert told.sites == 3


@pytest.mark.parametrize("torn", [b'{"round": 3', b"\xff", DEEP])
def test_a_torn_last_line_goes_and_a_whole_one_stays_though_its_end_is_missing(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(tmp_path, [row(1), row(2)])
    for tail in (b"", torn):
        path.write_bytes(b"\n".join(lines) + (b"\n" + tail if tail else b""))
        metric_lines.forget_rounds_after(path, 3)
        assert path.read_bytes() == b"".join(line + b"\n" for line in lines)
    path.write_bytes(b"")
    metric_lines.forget_rounds_after(path, 3)
    assert path.read_bytes() == b""


def test_status_tells_of_metrics_that_are_a_folder_and_of_all_else(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (home.run("first") / "metrics.jsonl").mkdir(parents=True)
    write(home.run("second"), [row(1)])
    assert list(status(home, at_work=False, now=datetime.now(UTC)))[1:] == [
        "first: its metrics cannot be read (Is a directory)",
        "second: 1 round finished, the last with a, b, c",
    ]


def test_the_best_round_before_a_damaged_line_and_after_it_is_found(tmp_path: Path) -> None:
    """In its reply to round 6 a site tells of the model of round 5."""
    folder = RunFolder(tmp_path)
    write(tmp_path, [row(number, 0.9 if number == 6 else 0.5) for number in range(1, 9)], line3=b"\xff")
    assert best_in(folder.metric_rows(), AUC) == Best(5, pytest.approx(0.9), 3)


@pytest.mark.parametrize("odd", [{"status": "ok"}, {"status": 7}, {"status": "ok", "diagnostics": None}, None])
def test_a_site_whose_figures_are_missing_costs_no_other(tmp_path: Path, odd: object) -> None:
    rows = [row(2), row(3)]
    rows[1]["sites"]["a"] = odd
    write(tmp_path, rows)
    assert best_in(RunFolder(tmp_path).metric_rows(), AUC) == Best(1, 0.5, 3, gone=1)
    del rows[1]["sites"], rows[0]["global"]
    write(tmp_path, rows)
    assert [one["sites"].keys() for one in RunFolder(tmp_path).metric_rows()] == [{"a", "b", "c"}, set()]


@pytest.mark.parametrize("damaged", [b'{"round": 1, "sites": {"xray": {"status": "ok\xff"}}', DEEP])
def test_status_and_a_resumed_run_go_on_over_a_damaged_line(tmp_path: Path, damaged: bytes) -> None:
    home = Home(tmp_path)
    out = home.run("toy")
    federate(out, [xray()], small_study(rounds=2))
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    write(out, [{}, {}], line1=damaged, line2=lines[1])
    shutil.rmtree(out / "checkpoints" / "round-0002")
    federate(out, [xray()], small_study(rounds=2), resume=True)
    first, second = (out / "metrics.jsonl").read_bytes().splitlines()
    assert first == damaged
    assert json.loads(second)["round"] == 2
    assert "toy: 2 of 2 rounds finished, the last with xray" in status(home, at_work=False, now=datetime.now(UTC))
