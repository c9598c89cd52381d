"""The auditor on the engine of a study that fine-tunes: it runs, agrees with the engine, and sees a broken one."""

from typing import Any

import pytest

from client.audited_engine import Engine
from client.findings import Finding
from client.privacy_audit import (
    a_patient_moves_a_release_by_its_bound,
    one_process_adds_the_noise,
    patients_do_not_touch_each_other,
)
from tests.labelled_hospitals import masks_study, task_study
from unimiss_core import private_learner
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
