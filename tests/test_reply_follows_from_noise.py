"""A private site's replies are made of its noise and of what everybody knows: where noise takes the place of the sums,
a site with patients and one with none answer alike, bit for bit, whatever lies between the sums and the wire."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import accounting, private_round, trainer
from client.audited_engine import Overwriting
from client.private_round import undisclosed
from tests.federation import RUN
from tests.test_planted_faults import planted
from tests.test_private_rounds import Hospital, bytes_of, facts_of, private_study, remembered_epsilon, request
from unimiss_core import private_learner
from unimiss_core.chain import Head
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello

UPDATE = "trained[name].cpu() - tensor"
STEPS = "steps_of_round(study.schedule, round)[figures.steps :]"


@pytest.fixture(autouse=True)
def noise_in_place_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon", remembered_epsilon)
    monkeypatch.setattr(private_learner, "GaussianNoise", lambda _: Overwriting())


def answers(folder: Path, study: StudyConfig, *, scans: int, rounds: int = 1) -> list[tuple[Any, Any]]:
    """To an introduction and to rounds, of a site with so many pictures: all facts and all bytes. Of the ledger's head
    the number alone: its digest is over a file whose two headings safetensors writes in an order by chance."""
    with Hospital(folder, scans=scans).asked() as ask:
        told = [ask(Hello(study, RUN).pack(), "query")]
        told += [ask(request(study, round), "train") for round in range(1, rounds + 1)]
    assert all(facts_of(each)["status"] == "ok" for each in told[1:])
    return [({**facts_of(each), "ledger": Head.of(facts_of(each)["ledger"]).seq}, bytes_of(each)) for each in told]


def tells_of_patients(folder: Path, study: StudyConfig, *, rounds: int = 1) -> bool:
    many, none = (answers(folder / str(scans), study, scans=scans, rounds=rounds) for scans in (5, 0))
    return many != none


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_site_with_patients_and_one_without_answer_alike(tmp_path: Path, dtype: str) -> None:
    """Over two rounds, so that what a site remembers is in the second."""
    assert not tells_of_patients(tmp_path, private_study(wire={"dtype": dtype}), rounds=2)


@pytest.mark.parametrize("field", ["losses", "diagnostics", "scans", "seconds"])
def test_whatever_is_not_taken_out_is_seen(tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(reply: Any, ranks: Any) -> Any:
        return replace(undisclosed(reply, ranks), **{field: getattr(reply, field)})

    monkeypatch.setattr(private_round, "undisclosed", told)
    assert tells_of_patients(tmp_path, private_study())


@pytest.mark.parametrize(
    ("fault", "old", "new"),
    [
        ("updates weighed by scans", UPDATE, f"({UPDATE}) * (1 + 1e-3 * len(site.library.scans))"),
        ("as many steps as patients", STEPS, f"{STEPS}[: 1 + len(site.library.scans)]"),
    ],
)
def test_a_trainer_that_looks_at_the_scans_is_seen(
    tmp_path: Path, fault: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Any] = planted(trainer, old, new).run_round
    monkeypatch.setattr(private_round, "run_round", run)
    assert tells_of_patients(tmp_path, private_study()), fault
