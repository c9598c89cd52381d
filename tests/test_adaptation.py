"""Before pretraining, its own initial weights are tried in both tasks of both ranks, and what fails is told at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server import rounds
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import StubSite, small_study, stub_app
from unimiss_core import checkpoint, tasks
from unimiss_core.adaptation import check_adaptation
from unimiss_core.checkpoint import Checkpoint
from unimiss_core.errors import CheckpointError
from unimiss_core.network import build_network, tensors_of

Change = Callable[[torch.Tensor], torch.Tensor | None]


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    study, folder = small_study(), tmp_path_factory.mktemp("initial") / "round-0000"
    begun = tensors_of(build_network(study.model, seed=0))
    same = {"model": study.model, "plan": study.plan, "student": begun, "teacher": begun}
    checkpoint.save(folder, origin="federation", round=0, study_digest=study.digest(), **same)  # type: ignore[arg-type]
    return checkpoint.load(folder)


def with_teacher(found: Checkpoint, **changed: torch.Tensor | None) -> Checkpoint:
    teacher = {name: changed.get(name, tensor) for name, tensor in found.teacher.items()}
    return replace(found, teacher={name: tensor for name, tensor in teacher.items() if tensor is not None})


def test_initial_weights_load_into_both_tasks(initial: Checkpoint) -> None:
    check_adaptation(initial)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: None, r"fit no 2D classification: .*encoder.class_token"),
        (lambda tensor: tensor[:, :3], r"fit no 2D classification: .*encoder.class_token"),
        (lambda tensor: tensor * torch.nan, r"fit no 2D classification: its answer holds a value that is not"),
    ],
    ids=["missing", "of another shape", "not finite"],
)
def test_what_no_task_could_use_is_told(initial: Checkpoint, change: Change, told: str) -> None:
    name = "backbone.encoder.class_token"
    with pytest.raises(CheckpointError, match=told):
        check_adaptation(with_teacher(initial, **{name: change(initial.teacher[name])}))


def test_a_run_that_would_fit_no_task_asks_no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one file of another version of the program was installed."""
    monkeypatch.setattr(rounds, "check_adaptation", check_adaptation)  # whatever was found good in other tests
    monkeypatch.setattr(tasks, "STEM_STRIDE", {2: (1, 1), 3: (1, 1, 1)})
    site = StubSite("a", {2: 3})
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, retry_s=0.0, round_tries=1)
    told = pytest.raises(CheckpointError, match=r"fit no 2D segmentation.*Nothing was trained")
    with LocalGrid(stub_app({"a": site}), {"a": {"name": "a"}}, run_config={}) as grid, told:
        Federation(grid, small_study(), config).run()
    assert site.requests == []
