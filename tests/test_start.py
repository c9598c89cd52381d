"""A run that begins from a checkpoint: its teacher is what sites receive; another model is told."""

from pathlib import Path

import pytest
import torch

from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import StubSite, small_study, stub_app
from unimiss_core import checkpoint, progress
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.study import StudyConfig

pytestmark = pytest.mark.usefixtures("narrow")


def run(
    out: Path, site: StubSite, start: Path | None, study: StudyConfig | None = None, *, resume: bool = False
) -> int:
    config = CoordinatorConfig(study=Path("unused"), out=out, start=start, retry_s=0.0, round_tries=1)
    with LocalGrid(stub_app({site.name: site}), {"a": {"name": site.name}}, run_config={}) as grid:
        return Federation(grid, study or small_study(), config).run(resume=resume).round


def test_sites_receive_the_teacher_of_the_checkpoint_and_a_resumed_run_does_not_begin_again(tmp_path: Path) -> None:
    run(tmp_path / "public", StubSite("a", {2: 3}), None)
    start = tmp_path / "public" / "checkpoints" / "round-0002"
    site = StubSite("a", {2: 3})
    run(tmp_path / "out", site, start)
    begun = checkpoint.load(start).teacher
    received = site.requests[0].student
    assert received is not None
    assert not torch.equal(begun["head.mlp.0.weight"], checkpoint.load(start).student["head.mlp.0.weight"])
    for name, tensor in received.items():
        assert torch.equal(tensor, begun[name].bfloat16().float()), name
    first = checkpoint.load(tmp_path / "out" / "checkpoints" / "round-0000")
    assert all(torch.equal(first.student[name], begun[name]) for name in begun)
    site.requests.clear()
    assert run(tmp_path / "out", site, start, resume=True) == 2
    assert site.requests == []


def test_a_start_of_another_model_and_one_that_is_not_there_are_told(tmp_path: Path) -> None:
    run(tmp_path / "public", StubSite("a", {2: 3}), None)
    start = tmp_path / "public" / "checkpoints" / "round-0002"
    other = small_study(model={"prototypes": 8})
    with pytest.raises(ConfigError, match=r"holds another model .*\"prototypes\":16.* than the study asks for"):
        run(tmp_path / "out", StubSite("a", {2: 3}), start, other)
    with pytest.raises(CheckpointError, match="nothing: does not exist; check the path"):
        run(tmp_path / "out", StubSite("a", {2: 3}), tmp_path / "nothing")


PRIVACY = {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 1.0, "centre_noise": 5.0}


@pytest.mark.parametrize(
    ("trained", "mode", "warned"),
    [
        ("norms_and_biases", "patient", True),
        ("last_stages", "patient", True),
        ("all", "patient", False),
        (0, "", False),
    ],
)
def test_whoever_trains_a_part_of_random_weights_is_warned_when_the_run_begins(
    tmp_path: Path, trained: str, mode: str, warned: bool
) -> None:
    privacy = {"privacy": {**PRIVACY, "trained": trained}} if mode else {}
    study = small_study(1, batch={"images": 128, "volumes": 128}, **privacy)

    def said(out: str, start: Path | None, *, resume: bool = False) -> list[str]:
        heard: list[progress.Event] = []
        with progress.listen(heard.append):
            run(tmp_path / out, StubSite("a", {2: 1}), start, study, resume=resume)
        return [event.text for event in heard if isinstance(event, progress.Note) and "random" in event.text]

    told = said("a", None)
    assert bool(told) == warned
    if warned:
        assert f"trains {trained.replace('_', ' ')} alone" in told[0]
        assert "give the coordinator file a `start:`" in told[0]
    assert said("a", None, resume=True) == []
    assert said("b", tmp_path / "a" / "checkpoints" / "round-0001") == []
