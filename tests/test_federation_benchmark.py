"""The benchmark of what a round costs measures rounds that count, and its baseline joins updates as the mean does."""

from pathlib import Path

import pytest
import torch

from benchmarks.federation import Case, KeepAll, measure
from server.aggregation import WeightedMean
from tests.federation import random_tensors, whole_layout
from unimiss_core import checkpoint
from unimiss_core.groups import GROUPS


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_every_site_counts_in_every_measured_round(rule: str, tmp_path: Path) -> None:
    case = Case(
        sites=3,
        variant="ours",
        rule=rule,
        model="nano",
        prototypes=16,
        rounds=2,
        threads=torch.get_num_threads(),
        out=str(tmp_path / "run"),
    )
    result = measure(case)
    parameters = sum(spec.size for specs in whole_layout(case.study().model).values() for spec in specs)
    assert result.wall_s >= 0
    assert result.peak_mb >= 0  # of a process that may have held more before
    assert result.disk_mb == (0 if rule == "mean" else pytest.approx(3 * 4 * parameters / 1e6))
    student = checkpoint.load(tmp_path / "run" / "checkpoints" / "round-0002").student
    start = checkpoint.load(tmp_path / "run" / "checkpoints" / "round-0000").student
    assert not any(torch.equal(student[name], start[name]) for name in student)


def test_the_baseline_gives_the_weighted_mean() -> None:
    mean, naive = WeightedMean(whole_layout(), largest=1e3), KeepAll()
    for seed, weight in enumerate((1.0, 3.0, 0.5)):
        update = random_tensors(whole_layout(), seed)
        for rule in (mean, naive):
            rule.fold(update, dict.fromkeys(GROUPS, weight))
    joined = naive.result()
    for name, tensor in mean.result().items():
        torch.testing.assert_close(joined[name], tensor, rtol=1e-5, atol=1e-6)
