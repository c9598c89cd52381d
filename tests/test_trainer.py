"""A site's part of a round: which scans a batch holds, which teacher the round begins with, what a small site does."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from client.batches import sample
from client.cache import CachedScan
from client.pictures import write_png
from client.site import Site
from client.site_config import DataSource, SiteConfig
from client.site_state import Remembered
from client.trainer import _round_teacher, run_round
from tests.federation import small_study
from unimiss_core.errors import WireError
from unimiss_core.groups import group_of
from unimiss_core.network import build_network, tensors_of
from unimiss_core.study import BatchConfig, StudyConfig
from unimiss_core.wire import TrainRequest


def held(patient: str, number: int) -> CachedScan:
    return CachedScan(f"{patient}{number}", patient, "XR", (1, 9, 7), (1.0, 1.0), Path("none"), 0)


SCANS = [*(held("many", number) for number in range(9)), held("one", 0), held("two", 0), held("two", 1)]


def drawn(count: int, sampling: str, seeds: int = 300) -> list[list[CachedScan]]:
    batch = BatchConfig.model_validate({"images": count, "sampling": sampling})
    return [sample(SCANS, batch, 2, torch.Generator().manual_seed(seed)) for seed in range(seeds)]


def test_patients_are_drawn_alike_however_many_scans_they_have() -> None:
    patients = Counter(scan.patient for (scan,) in drawn(1, "patients"))
    assert all(abs(count / 300 - 1 / 3) < 0.09 for count in patients.values())  # three standard deviations
    scans = Counter(scan.key for (scan,) in drawn(1, "patients") if scan.patient == "many")
    assert len(scans) == 9
    assert 0.6 < sum(scan.patient == "many" for (scan,) in drawn(1, "scans")) / 300 < 0.9


def test_a_batch_holds_no_patient_or_scan_twice_while_there_are_others() -> None:
    assert all(len({scan.patient for scan in batch}) == 3 for batch in drawn(3, "patients"))
    assert all(len({scan.key for scan in batch}) == 12 for batch in drawn(12, "scans"))
    assert all(len(batch) == 20 for sampling in ("scans", "patients") for batch in drawn(20, sampling, seeds=3))


def test_the_same_generator_draws_the_same_batch() -> None:
    assert drawn(4, "patients", seeds=5) == drawn(4, "patients", seeds=5)
    assert len({tuple(scan.key for scan in batch) for batch in drawn(4, "scans", seeds=5)}) > 1


STUDY = small_study(3, batch={"images": 5})


def request_of(round: int, *, study: StudyConfig = STUDY, fill: float = 1.0, **changes: object) -> TrainRequest:
    student = {"shared.a": torch.full((2, 3), fill), "image.b": torch.full((4,), fill)}
    return TrainRequest(
        **{"study": study, "round": round, "student": student, "teacher": None, "teacher_retention": {}, **changes}
    )


def remembered(round: int, **tensors: torch.Tensor) -> Remembered:
    return Remembered(round, {f"teacher/{name}": tensor for name, tensor in tensors.items()}, {})


def test_a_teacher_that_came_is_the_teacher() -> None:
    teacher = {"shared.a": torch.zeros(2, 3)}
    assert _round_teacher(request_of(2, teacher=teacher), None) is teacher


def test_in_round_one_the_student_is_the_teacher() -> None:
    request = request_of(1)
    assert _round_teacher(request, None) is request.student


def test_a_teacher_is_rebuilt_from_the_round_before() -> None:
    student = tensors_of(build_network(STUDY.model, seed=1, ranks={2}))
    before = tensors_of(build_network(STUDY.model, seed=2, ranks={2}))
    groups = {group_of(name) for name in student}
    untouched = min(groups)
    request = request_of(3, student=student, teacher_retention=dict.fromkeys(groups - {untouched}, 0.9))
    rebuilt = _round_teacher(request, remembered(2, **before))
    assert rebuilt.keys() == student.keys()
    for name, tensor in rebuilt.items():
        if group_of(name) == untouched:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * student[name])


@pytest.mark.parametrize(
    "memory", [None, remembered(1, **{"shared.a": torch.ones(2, 3)}), remembered(2, **{"shared.a": torch.ones(2, 3)})]
)
def test_a_site_without_the_teacher_asks_for_it(memory: Remembered | None) -> None:
    with pytest.raises(WireError, match="needs_teacher") as error:
        _round_teacher(request_of(3), memory)
    assert error.value.reason == "needs_teacher"


@pytest.mark.parametrize("sampling", ["scans", "patients"])
def test_a_site_with_fewer_scans_than_the_batch_trains(tmp_path: Path, sampling: str) -> None:
    (tmp_path / "scans").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (41, 35)).astype(np.uint8)
        write_png(tmp_path / "scans" / f"{number}.png", pixels)
    study = small_study(1, batch={"images": 3, "sampling": sampling})
    config = SiteConfig(
        name="small", data=(DataSource(folder=tmp_path / "scans"),), state=tmp_path / "state", devices=("cpu",)
    )
    student = tensors_of(build_network(study.model, seed=0, ranks={2}))
    reply = run_round(Site(config, study), request_of(1, study=study, student=student))
    assert reply.scans == {2: 2, 3: 0}
    assert reply.update.keys() == student.keys()
    assert any(tensor.abs().max() > 0 for tensor in reply.update.values())
    assert all(tensor.isfinite().all() for tensor in reply.update.values())
