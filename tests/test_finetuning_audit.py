"""The auditor on the engine of a study that fine-tunes: it runs, agrees with the engine, and sees a broken one."""

from pathlib import Path
from typing import Any

import pytest

from client import audit_command
from client.audited_engine import Engine
from client.findings import Finding
from client.privacy_audit import (
    a_patient_moves_a_release_by_its_bound,
    noise_is_as_claimed,
    one_process_adds_the_noise,
    patients_do_not_touch_each_other,
)
from client.research_command import main
from tests.labelled_hospitals import masks_study, task_study
from unimiss_core import private_learner
from unimiss_core.config import dump_yaml
from unimiss_core.students import build_student
from unimiss_core.study import StudyConfig

PRIVACY = {"mode": "patient", "max_epsilon": 50.0, "noise_multiplier": 1.0, "delta": 1e-4, "scans_per_patient": 2}
ADAMW: dict[str, Any] = {"optimiser": {"warmup_steps": 0, "clip_norm": None}, "privacy": PRIVACY}


def findings(study: StudyConfig) -> list[Finding]:
    engine = Engine(study, 2)
    checks = (a_patient_moves_a_release_by_its_bound, patients_do_not_touch_each_other, one_process_adds_the_noise)
    return [finding for check in checks for finding in check(engine)]


@pytest.mark.parametrize("study", [task_study(**ADAMW), masks_study(**ADAMW)], ids=["classes", "masks"])
def test_the_engine_releases_what_it_claims(study: StudyConfig) -> None:
    found = findings(study)
    assert [each.what for each in found if not each.agrees] == []
    assert not any("bottleneck" in each.what for each in found)


def test_a_clip_that_is_forgotten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_learner, "_scale", lambda length, limit: 1.0)  # noqa: ARG005
    odd = [
        each.what for each in a_patient_moves_a_release_by_its_bound(Engine(task_study(**ADAMW), 2)) if not each.agrees
    ]
    assert odd


def test_of_a_linear_probe_one_tensor_is_all_there_is_to_measure() -> None:
    study = task_study(finetune={"trains": "linear_probe"}, **ADAMW)
    assert [each.what for each in noise_is_as_claimed(Engine(study, 2), releases=2) if not each.agrees] == []


def test_there_are_as_many_canaries_as_the_head_has_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More are refused before anything is measured."""
    study = task_study(**ADAMW)
    path, asked = tmp_path / "study.yaml", ["audit-privacy", "--steps", "1", "--study"]
    path.write_text(dump_yaml(study))
    room = dict(build_student(study).named_parameters())["head.linear.weight"].numel()
    monkeypatch.setattr(audit_command, "check_engine", lambda _: pytest.fail("measured"))
    assert main([*asked, str(path), "--canaries", str(room + 1)]) == 2
    assert f"--canaries {room + 1}: the model has no room for so many; give {room} at most" in capsys.readouterr().err
    monkeypatch.setattr(audit_command, "check_engine", lambda _: [])
    assert main([*asked, str(path)]) == 0
    said = capsys.readouterr()
    assert f"what 1 steps tell of {room} canaries, all that the model has room for" in said.err
    assert f"guesses about {room} canaries were right" in said.out
