"""What a fine-tuning leaves alone comes back in no update: whichever rule joins them, and in runs that older versions
of the program began."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.run_folder import RunFolder
from tests.federation import metric_rows
from tests.labelled_hospitals import hospital, task_study
from tests.test_federated_finetuning import federate
from unimiss_core import progress
from unimiss_core.students import travelling_layout


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sites")
    return [hospital(folder / name, name, seed=seed) for seed, name in enumerate(("north", "south"))]


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": {"rule": "median", "server_optimiser": "fedadam"}, "local": {"proximal": 0.1}},
        {"aggregation": {"rule": "norm_bounded_mean", "server_optimiser": "fedavgm"}, "wire": {"dtype": "int8"}},
        {"aggregation": {"late_weight": 0.5}, "local": {"divergence_scale": 0.5}, "wire": {"dtype": "bf16"}},
    ],
)
def test_every_way_to_join_updates_moves_the_head_alone(
    tmp_path: Path, sites: list[Path], settings: dict[str, Any]
) -> None:
    study = task_study(2, finetune={"trains": "linear_probe"}, **settings)
    federate(tmp_path / "out", sites, study, least=2)
    before, after = (RunFolder(tmp_path / "out").load(round).student for round in (0, 2))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if name.startswith("head.")}


def test_a_run_that_an_older_version_began_goes_on(
    tmp_path: Path, sites: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There all that travels came back, what the study leaves alone as zeros."""

    def stop(event: progress.Event) -> None:
        if isinstance(event, progress.RoundDone) and event.round == 3:
            raise KeyboardInterrupt

    study = task_study(4, finetune={"trains": "linear_probe"})
    with monkeypatch.context() as older, progress.listen(stop):
        for place in ("server.rounds", "client.app", "client.feedback"):
            older.setattr(f"{place}.update_layout", travelling_layout)
        with pytest.raises(KeyboardInterrupt):
            federate(tmp_path / "out", sites[:1], study)
    federate(tmp_path / "out", sites[:1], study, resume=True)
    lines = [row["sites"]["north"] for row in metric_rows(tmp_path / "out")]
    assert [line["status"] for line in lines] == ["ok"] * 4
    assert lines[3]["bytes_up"] < lines[2]["bytes_up"] / 10
