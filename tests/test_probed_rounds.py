"""A round is finished before it is measured: whatever ends the measuring costs no site's work, and is made up for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.coordinator_config import CoordinatorConfig
from server.global_state import GlobalState
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.federation import StubSite, metric_rows, small_study, stub_app
from tests.test_rounds import xray
from unimiss_core.study import StudyConfig

pytestmark = pytest.mark.usefixtures("narrow")

BY_SITE = {
    "privacy": {"mode": "site", "max_epsilon": 50.0, "noise_multiplier": 2.0, "clip_norm": 1.0, "sites": 1},
    "aggregation": {"max_size_ratio": None},
}


class Measure:
    """Tells the sum of a teacher's values, so that whose figures they are can be seen; killed in one round's."""

    def __init__(self, killed_in: int = 0) -> None:
        self.killed_in = killed_in
        self.asked: list[bool] = []

    def __call__(self, teacher: Mapping[str, Tensor], *, is_last: bool) -> dict[str, Any]:
        self.asked.append(is_last)
        if len(self.asked) == self.killed_in:
            raise KeyboardInterrupt
        return {"sum": sum_of(teacher)}


def sum_of(teacher: Mapping[str, Tensor]) -> float:
    return math.fsum(float(tensor.double().sum()) for tensor in teacher.values())


def federate(
    out: Path, site: StubSite, measure: Any, *, resume: bool = False, study: StudyConfig | None = None
) -> GlobalState:
    config = CoordinatorConfig(
        study=Path("unused"), out=out, wait_s=0.1, probe=(Path("unused"),), probe_every=1, identity="simulated"
    )
    with LocalGrid(stub_app({site.name: site}), {site.name: {"name": site.name}}, run_config={}, workers=1) as grid:
        return Federation(grid, study or small_study(3), config, measure).run(resume=resume)


def assert_each_round_has_its_own_figures(out: Path) -> None:
    rows = metric_rows(out)
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["global"]["probe"] == {"sum": sum_of(RunFolder(out).load(row["round"]).teacher)}


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_round_whose_probe_was_cut_off_is_not_trained_again(tmp_path: Path, killed_in: int) -> None:
    unbroken = federate(tmp_path / "unbroken", xray(), Measure())
    assert_each_round_has_its_own_figures(tmp_path / "unbroken")
    out, site = tmp_path / "cut", xray()
    with pytest.raises(KeyboardInterrupt):
        federate(out, site, Measure(killed_in))
    assert [row["round"] for row in metric_rows(out)] == list(range(1, killed_in + 1))
    assert RunFolder(out).checkpoint_of(killed_in).is_dir()
    with pytest.raises(KeyboardInterrupt):  # as often as it is cut off
        federate(out, site, Measure(1), resume=True)
    again = Measure()
    resumed = federate(out, site, again, resume=True)
    assert [request.round for request in site.requests] == [1, 2, 3]
    assert again.asked == [False] * (3 - killed_in) + [True]
    assert_each_round_has_its_own_figures(out)
    for part in ("student", "teacher"):
        ours, theirs = getattr(resumed, part), getattr(unbroken, part)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    federate(tmp_path, xray(), Measure())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = Measure()
    federate(tmp_path, xray(), again, resume=True)
    assert again.asked == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_round_whose_probe_was_cut_off_is_released_once(tmp_path: Path) -> None:
    study = small_study(3, **BY_SITE)
    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            federate(tmp_path, xray(), Measure(1), resume=number > 0, study=study)
    federate(tmp_path, xray(), Measure(), resume=True, study=study)
    assert json.loads((tmp_path / "released.json").read_text())["rounds"] == [1, 2, 3]


def test_figures_that_no_file_can_hold_cost_no_round(tmp_path: Path) -> None:
    def odd(_: Mapping[str, Tensor], *, is_last: bool) -> dict[str, float]:
        return {"sum": 1.0 if is_last else math.nan}

    assert federate(tmp_path, xray(), odd).round == 3
    assert [row["global"].get("probe") for row in metric_rows(tmp_path)] == [None, None, {"sum": 1.0}]
