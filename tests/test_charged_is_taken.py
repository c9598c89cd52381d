"""What a private round charges against what it takes, counted where steps add their noise and patients are drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from client import accounting, patient_draws, private_round, trainer
from tests.federation import RUN, random_tensors, whole_layout
from tests.test_planted_faults import planted
from tests.test_private_rounds import Hospital, facts_of, private_study, remembered_epsilon
from unimiss_core import privacy, private_learner
from unimiss_core.noise import GaussianNoise
from unimiss_core.privacy import Mechanism
from unimiss_core.study import StudyConfig
from unimiss_core.wire import TrainRequest

STEPS = {"rounds": 2, "local_steps": 4, "alternate": [1, 3]}


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", remembered_epsilon)


class Heard:
    """Noise as it is, and the deviations that were asked for, of which each step asks for two."""

    asked: list[float]

    def __init__(self, device: object) -> None:
        self._noise = GaussianNoise(device)  # type: ignore[arg-type]

    def add_(self, sums: Sequence[Tensor], deviation: float) -> None:
        Heard.asked.append(deviation)
        self._noise.add_(sums, deviation)


def study_of_both() -> StudyConfig:
    promise = private_study().privacy.model_dump() | {"sampling_rate": {"images": 0.5, "volumes": 0.25}}
    return private_study(privacy=promise, schedule=STEPS)


def charged_and_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Mechanism], list[Mechanism]]:
    """Of one round at a site that declares both ranks: what its ledger says, and what its steps did."""
    study, hospital = study_of_both(), Hospital(folder, privacy={"holds": ["images", "volumes"]})
    promise, drawn = study.privacy, list[int]()
    assert promise.mode == "patient"
    draw = patient_draws.PatientDraws.draw

    def counted(self: patient_draws.PatientDraws, step: int, attempt: int = 0) -> patient_draws.PatientDraw:
        drawn.append((made := draw(self, step, attempt)).rank)
        return made

    monkeypatch.setattr(patient_draws.PatientDraws, "draw", counted)
    monkeypatch.setattr(private_learner, "GaussianNoise", Heard)
    Heard.asked = []
    tensors = {name: 0.02 * tensor for name, tensor in random_tensors(whole_layout(), 0).items()}
    with hospital.asked() as ask:
        reply = ask(TrainRequest(study, RUN, 1, tensors, None, {}).pack(whole_layout()), "train")
    assert facts_of(reply)["status"] == "ok"
    noises = np.array(Heard.asked).reshape(-1, 2) / (promise.clip_norm, 1.0)
    assert len(noises) == len(drawn)
    taken = [
        Mechanism(
            float((noises[place] ** -2.0 @ (1, centres)) ** -0.5), promise.sampling_rate.of(rank), drawn.count(rank)
        )
        for rank, centres in ((2, 1), (3, 2))
        for place in [drawn.index(rank)]
    ]
    return [Mechanism(*each) for each in hospital.entries[0]["mechanisms"]], taken


def agree(charged: Sequence[Mechanism], taken: Sequence[Mechanism]) -> bool:
    return len(charged) == len(taken) and bool(np.allclose(charged, taken, rtol=1e-9))


def test_a_round_charges_the_steps_and_the_noise_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged, taken = charged_and_taken(tmp_path, monkeypatch)
    assert agree(charged, taken)
    assert [each.steps for each in taken] == [1, 3]


@pytest.mark.parametrize(
    ("fault", "old", "new"),
    [
        ("half the steps", "            taken[rank],", "            (taken[rank] + 1) // 2,"),
        ("one rank alone", "for rank in sorted(present)\n", "for rank in sorted(present)[:1]\n"),
        ("the gradient alone", "gradient**-2 + representations * centre**-2", "gradient**-2"),
        ("one centre of two", "len(objective.representations(rank))", "1"),
    ],
)
def test_a_ledger_that_charges_less_is_seen(
    fault: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_round, "mechanisms", planted(privacy, old, new).mechanisms)
    assert not agree(*charged_and_taken(tmp_path, monkeypatch)), fault


def test_a_round_that_takes_more_steps_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "steps_of_round(study.schedule, round)[figures.steps :]"
    faulty = planted(trainer, steps, f"[*{steps}, *{steps}]")
    monkeypatch.setattr(private_round, "run_round", faulty.run_round)
    assert not agree(*charged_and_taken(tmp_path, monkeypatch))
