"""Server optimisers against their papers' algorithms written out, and over rounds that train only some groups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.global_state import GlobalState
from server.optimisers import build_optimiser
from server.round_sum import RoundSum
from server.rules import opened_aggregate
from server.run_folder import RunFolder
from tests.federation import RUN, random_tensors, saved_checkpoint, small_study, whole_layout
from tests.test_rules import RULES
from unimiss_core import checkpoint
from unimiss_core.errors import CheckpointError
from unimiss_core.groups import group_of
from unimiss_core.scan import Rank
from unimiss_core.study import FedAdamConfig, FedAvgMConfig, StudyConfig
from unimiss_core.wire import TrainReply

OPTIMISERS: dict[str, object] = {
    "none": "none",
    "fedavgm": {"name": "fedavgm", "lr": 0.7, "momentum": 0.6},
    "fedadam": {"name": "fedadam", "lr": 0.02, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
}
NUMBERS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6)


def after(config: FedAvgMConfig | FedAdamConfig, updates: list[float]) -> float:
    """Where a parameter that began at 0 stands."""
    optimiser, state, x = build_optimiser(config), {}, 0.0  # type: ignore[var-annotated]
    for update in updates:
        step, state = optimiser.step({"a": torch.tensor([update])}, state)  # type: ignore[assignment]
        x += step["a"].item()
    return x


@given(NUMBERS)
@settings(max_examples=50, deadline=None)
def test_fedavgm_is_the_algorithm_written_out(updates: list[float]) -> None:
    x = v = 0.0
    for update in updates:
        v = 0.6 * v + update
        x += 0.7 * v
    assert after(FedAvgMConfig(lr=0.7, momentum=0.6), updates) == pytest.approx(x, rel=1e-4, abs=1e-4)


@given(NUMBERS)
@settings(max_examples=50, deadline=None)
def test_fedadam_is_the_algorithm_written_out(updates: list[float]) -> None:
    x, m, v = 0.0, 0.0, 0.01**2
    for update in updates:
        m = 0.8 * m + 0.2 * update
        v = 0.95 * v + 0.05 * update**2
        x += 0.02 * m / (np.sqrt(v) + 0.01)
    config = FedAdamConfig(lr=0.02, beta1=0.8, beta2=0.95, tau=0.01)
    assert after(config, updates) == pytest.approx(x, rel=1e-4, abs=1e-5)


def study_with(rule: str, optimiser: str) -> StudyConfig:
    return small_study(aggregation={"rule": RULES[rule], "server_optimiser": OPTIMISERS[optimiser]})


def start(study: StudyConfig) -> GlobalState:
    return GlobalState.initial(random_tensors(whole_layout(), 0), study, whole_layout())


def one_round(state: GlobalState, study: StudyConfig, scratch: Path, *sites: dict[Rank, int]) -> GlobalState:
    """With one update for each of `sites`, which are told by their scans."""
    with opened_aggregate(study, whole_layout(), scratch) as aggregate:
        total = RoundSum(study, aggregate)
        for index, scans in enumerate(sites):
            total.fold(
                TrainReply(
                    site=f"site-{index}",
                    run=RUN,
                    round=state.round + 1,
                    study_digest=study.digest(),
                    update=random_tensors(whole_layout(), 100 * state.round + index + 1),
                    scans=scans,
                    steps=2,
                    seconds=1.0,
                    losses={},
                    diagnostics={},
                )
            )
        return total.applied_to(state, state.round + 1)[0]


def of_group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Parameters, or their states with any prefix."""
    names = {spec.name for specs in whole_layout().values() for spec in specs}
    own = {name: name if name in names else name.partition(".")[2] for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if group_of(own[name]) == group}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_nobody_trained_keeps_every_bit(rule: str, optimiser: str, tmp_path: Path) -> None:
    """Value, teacher, momentum and second moment, with a momentum that would move it; the others all move."""
    study = study_with(rule, optimiser)
    both = one_round(start(study), study, tmp_path / "s", {2: 5, 3: 0}, {2: 0, 3: 4})
    images = one_round(both, study, tmp_path / "s", {2: 5, 3: 0}, {2: 3, 3: 0})
    for before, now in (
        (both.student, images.student),
        (both.teacher, images.teacher),
        (dict(both.optimiser), dict(images.optimiser)),
    ):
        untouched = of_group(before, "3d")
        assert untouched or optimiser == "none"
        assert all(torch.equal(now[name], tensor) for name, tensor in untouched.items())
        assert not any(torch.equal(now[name], tensor) for name, tensor in of_group(before, "head").items())


def test_a_group_that_was_never_trained_has_no_state(tmp_path: Path) -> None:
    study = study_with("mean", "fedadam")
    state = one_round(start(study), study, tmp_path / "s", {2: 5, 3: 0})
    assert not of_group(dict(state.optimiser), "3d")
    assert of_group(dict(state.optimiser), "2d").keys() == {
        f"{prefix}.{spec.name}" for prefix in ("momentum", "second_moment") for spec in whole_layout()["2d"]
    }


def test_without_rule_and_optimiser_one_site_alone_gives_its_own_model(tmp_path: Path) -> None:
    study = small_study()
    state = start(study)
    update = random_tensors(whole_layout(), 1)
    now = one_round(state, study, tmp_path / "s", {2: 1, 3: 5})
    assert all(torch.equal(now.student[name], state.student[name] + update[name]) for name in update)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_state_that_was_saved_goes_on_bit_for_bit(optimiser: str, tmp_path: Path) -> None:
    study = study_with("trimmed_mean", optimiser)
    sites: list[dict[Rank, int]] = [{2: 5, 3: 0}, {2: 0, 3: 4}, {2: 0, 3: 2}]
    first = one_round(start(study), study, tmp_path / "s", *sites)
    folder = RunFolder(tmp_path / "run")
    first.save(folder, study)
    saved = folder.checkpoint_of(1)
    restored = GlobalState.restored(checkpoint.load(saved, to_resume=True), study, whole_layout())
    ours, theirs = (one_round(state, study, tmp_path / "s", *sites) for state in (restored, first))
    for mine, other in ((ours.student, theirs.student), (ours.optimiser, theirs.optimiser)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)
    assert (saved / "server.safetensors").exists() == (optimiser != "none")


@pytest.mark.parametrize(
    "book", ["{}", "[1]", "[" * 50_000, '{"retention": {}, "taught": {}, "attendance": []}'], ids=range(4)
)
def test_a_state_that_is_none_is_a_bad_checkpoint(tmp_path: Path, book: str) -> None:
    study = study_with("trimmed_mean", "none")
    saved_checkpoint(tmp_path / "round-0007", round=7, server_json=book)
    with pytest.raises(CheckpointError, match=r"round 7: its server\.json is not what a coordinator goes on from"):
        GlobalState.restored(checkpoint.load(tmp_path / "round-0007", to_resume=True), study, whole_layout())
