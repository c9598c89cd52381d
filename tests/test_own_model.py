"""A site that keeps its own head and loses its memory of the run: its head goes on from the model that it keeps."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client import trainer
from client.site import Site
from client.site_state import models_folder, run_folder
from client.trainer import run_round
from tests.federation import RUN
from tests.labelled_hospitals import hospital, opened, task_study
from tests.test_federated_finetuning import request_of
from tests.test_trainer import watched
from unimiss_core import task_checkpoint
from unimiss_core.groups import group_of
from unimiss_core.learner import Learner
from unimiss_core.network import tensors_of
from unimiss_core.sealing import make_key
from unimiss_core.students import build_student

STUDY = task_study(5, finetune={"head": "local"})
NEW = "north: its own head begins anew: nothing that fits is kept of this run's earlier rounds here"


def trained(folder: Path) -> Site:
    """A site after round 1."""
    site = opened(hospital(folder / "north", "north"), STUDY)
    run_round(site, request_of(STUDY))
    return site


def heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if group_of(name) == "head"}


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The head that each round begins with."""
    seen, begin = list[dict[str, Tensor]](), Learner.start_round

    def start(learner: Learner, *args: dict[str, Tensor]) -> None:
        begin(learner, *args)
        seen.append(heads(tensors_of(learner.student)))

    monkeypatch.setattr(trainer.Learner, "start_round", start)
    return seen


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def lose_memory(site: Site) -> None:
    shutil.rmtree(run_folder(site.config.state, RUN))


def damage_memory(site: Site) -> None:
    """As of a site that had other tensors then."""
    state = site.memory.before(2)
    assert state is not None
    other = {name: tensor for name, tensor in state.tensors.items() if "own." not in name}
    site.memory.remember(type(state)(1, other | {"learner/own.head.x": torch.zeros(1)}, state.facts))


@pytest.mark.parametrize("lose", [lose_memory, damage_memory])
def test_a_head_outlives_the_memory_of_its_run(
    tmp_path: Path, lose: Callable[[Site], None], began: list[dict[str, Tensor]]
) -> None:
    site = trained(tmp_path)
    kept, _ = task_checkpoint.load(models_folder(site.config.state) / RUN)
    lose(site)
    _, _, said = watched(site, request_of(STUDY, 3))
    assert equal(began[-1], heads(tensors_of(kept)))
    assert not equal(began[-1], began[0])
    assert "north: its own head goes on as it stood after round 1, from the model that is kept here" in said


def test_a_head_that_begins_anew_is_told(tmp_path: Path, began: list[dict[str, Tensor]]) -> None:
    site = trained(tmp_path)
    lose_memory(site)
    (weights,) = models_folder(site.config.state).rglob("*.safetensors")
    weights.write_bytes(b"cut")
    _, _, said = watched(site, request_of(STUDY, 2))
    assert equal(began[-1], heads(tensors_of(build_student(STUDY))))
    assert NEW in said


def test_a_sealed_site_believes_no_head_in_clear(tmp_path: Path, began: list[dict[str, Tensor]]) -> None:
    site = trained(tmp_path)
    make_key(tmp_path / "site.key")
    sealed = Site(site.config.model_copy(update={"state_key": tmp_path / "site.key"}), STUDY, RUN)
    _, _, said = watched(sealed, request_of(STUDY, 2))
    assert equal(began[-1], began[0])
    assert any(told.startswith("north: its own head begins anew: a model of this run lies in clear") for told in said)


@pytest.mark.parametrize("head", ["local", "shared"])
def test_nothing_is_told_where_no_head_was_lost(tmp_path: Path, head: str) -> None:
    study = task_study(5, finetune={"head": head})
    site = opened(hospital(tmp_path / "north", "north"), study)
    said = watched(site, request_of(study, 1 if head == "local" else 3))[2]
    assert not any("head" in told for told in said + watched(site, request_of(study, 4))[2])
