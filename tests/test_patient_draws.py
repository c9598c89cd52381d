"""Draws of patients: each by the study's chance, of all their scans, the same in a team and never the same twice."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from client import devices, patient_draws
from client.cache import Library
from client.patient_draws import PatientDraws
from client.site import Site
from client.site_config import DataSource, SiteConfig
from tests.federation import Placed
from tests.test_private_rounds import private_study
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

CPU = torch.device("cpu")
STEPS = 400


class Scan:
    """As much of a cached scan as a draw looks at; its pixels tell which it is."""

    def __init__(self, patient: str, number: int, rank: Rank) -> None:
        self.patient, self.number, self.rank = patient, number, rank
        self.shape = (1, *[64] * rank)

    def read(self, *_: Any) -> np.ndarray:
        return np.zeros(self.shape, np.float32)


def site(study: StudyConfig, patients: dict[str, int], ranks: tuple[Rank, ...] = (2,)) -> Any:
    """patients: name -> scans of each rank."""
    scans = [Scan(name, number, rank) for rank in ranks for name, count in patients.items() for number in range(count)]
    library = SimpleNamespace(
        ranks=frozenset(ranks), of_rank=lambda rank: tuple(scan for scan in scans if scan.rank == rank)
    )
    return SimpleNamespace(study=study, ranks=library.ranks, library=library, config=SimpleNamespace(name="north"))


def with_rates(images: float, volumes: float = 0.5, most: int = 4, **changes: object) -> StudyConfig:
    study = private_study(**changes)
    rates = {"images": images, "volumes": volumes}
    privacy = study.privacy.model_copy(
        update={"sampling_rate": type(study.privacy.sampling_rate)(**rates), "scans_per_patient": most}  # type: ignore[union-attr]
    )
    return study.model_copy(update={"privacy": privacy})


def drawn_patients(draws: PatientDraws, steps: int = STEPS) -> list[list[str]]:
    return [[drawn.scans[0].patient for drawn in draws.draw(step).patients] for step in range(steps)]


def test_each_patient_takes_part_by_the_chance_that_is_accounted_and_by_itself() -> None:
    """Binomial counts for each patient, and pairs as often as independence says; however many scans one has."""
    patients = {f"p{number}": 1 + number % 7 for number in range(30)}
    found = drawn_patients(PatientDraws(site(with_rates(0.2), patients), Placed(0, 1), CPU))
    counts = Counter(name for step in found for name in step)
    for name in patients:
        assert stats.binomtest(counts[name], STEPS, 0.2).pvalue > 1e-6, name
    together = sum({"p0", "p1"} <= set(step) for step in found)
    assert stats.binomtest(together, STEPS, 0.04).pvalue > 1e-6
    sizes = [len(step) for step in found]
    assert np.var(sizes) == pytest.approx(30 * 0.2 * 0.8, rel=0.5)  # a fixed batch would vary by nothing


def test_a_draw_may_be_empty() -> None:
    found = drawn_patients(PatientDraws(site(with_rates(0.01), {"a": 1, "b": 1}), Placed(0, 1), CPU))
    assert [] in found
    assert list(PatientDraws(site(with_rates(0.01), {}), Placed(0, 1), CPU).draw(0).views()) == []


def test_a_patient_brings_different_scans_of_its_own_and_no_more_than_the_study_says() -> None:
    draws = PatientDraws(site(with_rates(1.0, most=3), {"many": 9, "few": 2}), Placed(0, 1), CPU)
    seen: set[int] = set()
    for step in range(60):
        by_patient = {drawn.scans[0].patient: drawn.scans for drawn in draws.draw(step).patients}
        assert {scan.patient for scan in by_patient["many"]} == {"many"}
        numbers = [scan.number for scan in by_patient["many"]]  # type: ignore[attr-defined]
        assert len(set(numbers)) == 3
        assert len(by_patient["few"]) == 2
        seen |= set(numbers)
    assert seen == set(range(9))


def test_nobody_who_knows_the_study_can_draw_again() -> None:
    hospital = site(with_rates(0.5), {f"p{number}": 1 for number in range(20)})
    first, second = (drawn_patients(PatientDraws(hospital, Placed(0, 1), CPU), 20) for _ in range(2))
    assert first != second
    again = PatientDraws(hospital, Placed(0, 1), CPU)
    assert [drawn.seed for drawn in again.draw(1).patients] != [drawn.seed for drawn in again.draw(1).patients]


def test_a_team_draws_together_and_takes_turns() -> None:
    """The key of the first process, summed, is everybody's; none of the others adds to it."""
    keys: list[torch.Tensor] = []

    class Told(Placed):
        def sum_(self, tensors: Any) -> None:
            if self.place == 0:
                keys.append(tensors[0].clone())
            else:
                assert not tensors[0].any()
                tensors[0].copy_(keys[0])

    hospital = site(with_rates(0.5), {f"p{number}": 1 for number in range(25)})
    team = [PatientDraws(hospital, Told(place, 3), CPU) for place in range(3)]
    alone = PatientDraws(hospital, SimpleNamespace(place=0, size=1, sum_=lambda t: t[0].copy_(keys[0])), CPU)  # type: ignore[arg-type]
    for step in range(30):
        whole = [drawn.seed for drawn in alone.draw(step).patients]
        parts = [[drawn.seed for drawn in each.draw(step).patients] for each in team]
        assert sorted(whole) == sorted(seed for part in parts for seed in part)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert int(keys[0].bitwise_right_shift(32).abs().sum()) == 0  # four words of 32 bits, so that sums keep them


def test_a_team_is_sent_the_library_that_was_read() -> None:
    """Had each process read the folders, a file that came in between would shift the turns, and a patient take two."""
    config = SiteConfig(name="north", data=(DataSource(folder=Path("nowhere")),), state=Path("nowhere"))
    hospital, read = Site(config, with_rates(0.5), "0" * 16), Library((), {"unreadable": 3})
    hospital.__dict__["library"] = read
    assert devices._unpacked(devices._packed(hospital)).library == read


def test_the_views_of_a_patient_do_not_hang_on_who_else_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they drawn from one stream in turn, leaving one patient out would change all the gradients after it."""

    def traced(scans: Any, _: object, generator: torch.Generator, __: object) -> torch.Tensor:
        return torch.cat([torch.tensor([float(scans[0].number)]), torch.rand(3, generator=generator)])

    monkeypatch.setattr(patient_draws, "draw_views", traced)
    draw = PatientDraws(site(with_rates(1.0), {f"p{n}": 1 for n in range(5)}), Placed(0, 1), CPU).draw(0)
    every = list(draw.views())
    without = list(type(draw)(draw.rank, [*draw.patients[:1], *draw.patients[2:]], draw.study, draw.device).views())
    assert all(torch.equal(a, b) for a, b in zip([*every[:1], *every[2:]], without, strict=True))


def test_ranks_take_turns_as_in_any_study_and_have_rates_of_their_own() -> None:
    study = with_rates(0.9, 0.1)
    draws = PatientDraws(site(study, {f"p{n}": 1 for n in range(50)}, (2, 3)), Placed(0, 1), CPU)
    by_rank: dict[int, list[int]] = {2: [], 3: []}
    for step in range(40):
        draw = draws.draw(step)
        by_rank[draw.rank].append(len(draw.patients))
    assert np.mean(by_rank[2]) > 35
    assert np.mean(by_rank[3]) < 15


def test_a_study_without_privacy_has_no_such_draws() -> None:
    plain = private_study(privacy={"mode": "none"})
    with pytest.raises(ValueError, match="none, not patient"):
        PatientDraws(site(plain, {"a": 1}), Placed(0, 1), CPU)
