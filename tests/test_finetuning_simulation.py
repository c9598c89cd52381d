"""A simulation of a federation that fine-tunes: what it refuses before it writes, and what its last lines name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from server import app
from server.simulate_command import main
from tests.labelled_hospitals import CLASSES, hospital, task_study
from unimiss_core import task_checkpoint
from unimiss_core.config import dump_yaml
from unimiss_core.tuned_round import load_tuned

PHANTOM = {"kind": "cr", "patients": 2}
LOCAL, MASKS = {"head": "local"}, {"task": {"name": "segmentation", "rank": 2, "classes": ["disc"]}}
CANNOT = "'probe': the model of study 'toy' cannot be judged by sets of classes"


def simulation(folder: Path, finetune: dict[str, Any], site: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(dump_yaml(task_study(finetune=finetune)))
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump({"study": "study.yaml", "sites": [site], **changes}))
    return path


@pytest.mark.parametrize(
    ("finetune", "rank", "told"),
    [({}, 3, "probe 'public': its rank is 3, the task's 2"), (LOCAL, 2, CANNOT), (MASKS, 2, CANNOT)],
    ids=["rank", "local", "masks"],
)
def test_a_probe_that_cannot_judge_is_refused_before_a_hospital_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finetune: dict[str, Any], rank: int, told: str
) -> None:
    probe = {"name": "public", "rank": rank, "label": "lesion", "phantom": PHANTOM}
    path = simulation(tmp_path, finetune, {"name": "north", "phantom": PHANTOM}, probe=[probe])
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["local", "shared"])
def test_the_last_lines_name_a_model_that_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    hospital(tmp_path / "data", "north")
    labels = {"data": {"table": "data/labels.csv", "folder": "data"}, "classes": CLASSES}
    site = {"name": "north", "data": [{"folder": "data/scans"}], "labels": labels, "workers": 1}
    path, out = simulation(tmp_path, {"head": head}, site), tmp_path / "out"
    assert main([str(path), "--out", str(out)]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[-4:])
    named = Path(lines["Model:"])
    if head == "shared":
        assert load_tuned(named)[1].epoch == 1
        return
    assert named.is_relative_to(out / "sites" / "north" / "state" / "models")
    assert task_checkpoint.load(named)[1].epoch == 1
    assert lines["Encoder:"] == str(out / "checkpoints" / "round-0001")


def test_that_no_volume_is_trained_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "untaught", lambda study: f"{study.name}: no volume")
    path = simulation(tmp_path, {}, {"name": "north", "data": [{"folder": "none"}]}, quorum={})
    assert main([str(path), "--out", str(tmp_path / "out")]) == 5
    assert "toy: no volume" in capsys.readouterr().out
