"""What a GPU computes is what a CPU computes, and what only a GPU has - its memory's end, its compiler, its sums."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.devices import run_team
from client.execution import MEMORY, learner_for
from client.segmenting import probabilities
from client.site_config import SiteConfig
from tests import team_members
from tests.small_tasks import three_answers
from tests.test_learner import apart, copied, everything, images, in_float64, plus_study, study, volumes
from tests.test_patient_gradients import taking
from tests.test_private_learner import distance, ward
from unimiss_core.config import parse
from unimiss_core.execution import Execution
from unimiss_core.layers import ConvBlock
from unimiss_core.learner import Learner
from unimiss_core.local_state import LearnerState
from unimiss_core.model_config import AnySize
from unimiss_core.network import tensors_of
from unimiss_core.noise import GaussianNoise
from unimiss_core.objective import Loss
from unimiss_core.scan import Rank
from unimiss_core.students import shape_of_views
from unimiss_core.study import ModelConfig, StudyConfig
from unimiss_core.tasks import build_task_model
from unimiss_core.team import Alone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
SCANS = pytest.mark.parametrize("scans", [images(), volumes()], ids=["images", "volumes"])


def on_gpu(of: StudyConfig, **settings: object) -> Learner:
    return apart(Learner(of, ranks={2, 3}, execution=Execution(device=GPU, **settings)))  # type: ignore[arg-type]


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def of_gradients(learner: Learner) -> dict[str, Tensor]:
    """After one step the moments are the clipped gradients; and the centre."""
    return {
        name: tensor for name, tensor in on_cpu(everything(learner)).items() if "moment" in name or "centre" in name
    }


@SCANS
@pytest.mark.parametrize(
    "settings",
    [{}, {"views_in_turn": True}, {"activation_checkpointing": True}],
    ids=["whole", "in turn", "recomputed"],
)
@pytest.mark.parametrize(
    ("objective", "size"), [("unimiss", "nano"), ("unimiss_plus", "nano"), ("unimiss_plus", "plus_nano")]
)
def test_a_step_is_the_one_of_a_cpu(scans: Tensor, objective: str, size: AnySize, settings: dict[str, bool]) -> None:
    of = study() if objective == "unimiss" else plus_study()
    of = of.model_copy(update={"model": of.model.model_copy(update={"size": size})})
    expected, ours = (in_float64(learner) for learner in (apart(Learner(of, ranks={2, 3})), on_gpu(of, **settings)))
    reports = [learner.step(scans.double(), step=0) for learner in (expected, ours)]
    assert reports[1].terms == pytest.approx(reports[0].terms, rel=1e-7)  # of radiographs, views are drawn in float32
    torch.testing.assert_close(of_gradients(ours), of_gradients(expected), rtol=1e-4, atol=1e-8)


@SCANS
@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_half_precision_costs_nearly_the_same_loss(scans: Tensor, precision: str, near: float) -> None:
    expected = apart(Learner(study(), ranks={2, 3})).step(scans, step=0)
    report = on_gpu(study(), precision=precision).step(scans, step=0)
    assert report.terms == pytest.approx(expected.terms, rel=near)
    assert report.diagnostics["grad_norm"] == pytest.approx(expected.diagnostics["grad_norm"], rel=10 * near)


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many, of its own parts
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_compiled_steps_are_the_same(precision: str, near: float) -> None:
    """The second of a rank is recorded."""
    told: list[str] = []
    execution = Execution(device=GPU, precision=precision, compile=True)  # type: ignore[arg-type]
    ours = apart(Learner(study(), ranks={2, 3}, execution=execution, tell=told.append))
    plain = apart(Learner(study(), ranks={2, 3}))
    for step, scans in enumerate((images(), volumes(), images(seed=1), volumes(seed=1))):
        expected, report = plain.step(scans, step=step), ours.step(scans, step=step)
        assert report.terms == pytest.approx(expected.terms, rel=near)
    assert told == []


def test_a_round_goes_on_from_what_was_kept() -> None:
    running, resumed = on_gpu(study()), on_gpu(study())
    running.step(volumes(), step=0)
    state = running.state(weights=True)
    resumed.restore(LearnerState(copied(on_cpu(state.tensors)), json.loads(json.dumps(state.facts))))
    expected, report = running.step(images(), step=1), resumed.step(images(), step=1)
    assert report.terms == pytest.approx(expected.terms, rel=1e-6)
    torch.testing.assert_close(on_cpu(everything(resumed)), on_cpu(everything(running)), rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- recorded steps


ALTERNATING = [images(), images(seed=1), volumes(), volumes(seed=1), images(seed=2), volumes(seed=2), volumes(seed=3)]
"""The second batch of a rank is recorded, later ones are replayed."""


def taken(learner: Learner, batches: Sequence[Tensor]) -> list[float]:
    return [learner.step(scans.double(), step=step).total for step, scans in enumerate(batches)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch": {2: 1, 3: 1}}, {"views_in_turn": True}, {"activation_checkpointing": True}],
    ids=["whole", "in parts", "in turn", "recomputed"],
)
@pytest.mark.parametrize("objective", ["unimiss", "slices", "unimiss_plus", "proximal"])
def test_recorded_steps_are_those_launched_one_by_one(objective: str, settings: dict[str, object]) -> None:
    of = plus_study() if objective == "unimiss_plus" else study()
    if objective == "slices":
        of = of.model_copy(update={"objective": of.objective.model_copy(update={"slices_per_volume": 5})})
    if objective == "proximal":
        of = of.model_copy(update={"local": of.local.model_copy(update={"proximal": 0.1})})
    told: list[str] = []
    learners = [in_float64(on_gpu(of, **settings, cuda_graphs=recorded)) for recorded in (True, False)]
    for learner in learners:
        learner._tell = told.append
        learner.stay_near({name: tensor.clone() for name, tensor in tensors_of(learner.student).items()})
    losses, expected_losses = (taken(learner, ALTERNATING) for learner in learners)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert learners[0]._graphs._recorded.keys() == {2, 3}
    # But for the keys' bias, on which softmax does not hang: its gradient is rounding, and to AdamW as long as any.
    ours, expected = (
        {name: tensor for name, tensor in everything(learner).items() if not name.endswith("key_value.bias")}
        for learner in learners
    )
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    assert told == []


@pytest.mark.parametrize("ranks", [{2, 3}, {2}], ids=["both", "images"])
def test_for_other_shapes_and_places_steps_are_recorded_anew(ranks: set[Rank]) -> None:
    told: list[str] = []
    learners = [
        in_float64(apart(Learner(study(), ranks=ranks, execution=Execution(device=GPU, cuda_graphs=recorded))))
        for recorded in (True, False)
    ]
    for learner in learners:
        learner._tell = told.append
    batches = [images(seed=seed, scans=scans) for seed, scans in enumerate([3, 3, 3, 2, 2, 2, 3, 3])]
    if 3 in ranks:
        batches = [*ALTERNATING, *batches]
    for learner in learners:
        taken(learner, batches)
        learner.centre = {name: centre + 0.1 for name, centre in learner.centre.items()}
    before = learners[0]._graphs._recorded[2].graph
    ours, expected = (taken(learner, batches) for learner in learners)
    assert ours == pytest.approx(expected, rel=1e-9)
    assert learners[0]._graphs._recorded[2].graph is not before
    assert told == []


def test_steps_are_recorded_in_another_thread() -> None:
    """As a site's are, which are watched from beside (`client.watch`)."""
    ours, expected = (in_float64(on_gpu(study(), cuda_graphs=recorded)) for recorded in (True, False))
    with ThreadPoolExecutor(max_workers=1) as beside:
        losses = beside.submit(taken, ours, ALTERNATING).result()
    assert losses == pytest.approx(taken(expected, ALTERNATING), rel=1e-9)
    assert ours._graphs._recorded.keys() == {2, 3}


@SCANS
def test_recorded_steps_in_bfloat16_are_those_launched_one_by_one(scans: Tensor) -> None:
    ours, expected = (on_gpu(study(), precision="bf16", cuda_graphs=recorded) for recorded in (True, False))
    for step in range(4):
        theirs, report = expected.step(scans, step=step), ours.step(scans, step=step)
        assert report.terms == pytest.approx(theirs.terms, rel=2e-3)
        assert report.diagnostics["grad_norm"] == pytest.approx(theirs.diagnostics["grad_norm"], rel=2e-2)
    assert ours._graphs._recorded


@pytest.mark.parametrize("rank", [2, 3])
def test_layers_that_are_others_in_bfloat16_are_near_those_in_float32(rank: Rank) -> None:
    """Far from the weights that a network begins with: a stem and its norm."""
    layer = ConvBlock(rank, 3 if rank == 2 else 1, 16, 7, 2 if rank == 2 else (1, 2, 2)).to(GPU)
    generator = torch.Generator(GPU).manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(4, 1, *((33, 40) if rank == 2 else (13, 33, 40)), device=GPU, generator=generator) + 2
    found = []
    for enabled in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            y = layer(x)
        gradients = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
        found.append([y.detach().float(), *gradients])
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize(
    "task",
    [{"name": "classification", "kind": "binary", "classes": ["clear", "lesion"]}, {"name": "segmentation"}],
    ids=["class", "mask"],
)
def test_fine_tuning_is_recorded(task: dict[str, object]) -> None:
    of = parse(
        StudyConfig,
        {
            "name": "toy",
            "task": "finetune",
            "finetune": {"task": {"rank": 3, "classes": ["lesion"], **task}, "class_weights": [1.0, 2.0]},
        },
        where="test",
    )
    scans = torch.rand((2, *shape_of_views(of, 3)), generator=torch.Generator().manual_seed(0)).round()
    told: list[str] = []
    learners = [
        Learner(of, ranks={3}, execution=Execution(device=GPU, cuda_graphs=recorded), tell=told.append)
        for recorded in (True, False)
    ]
    ours, expected = ([learner.step(scans, step=step).total for step in range(4)] for learner in learners)
    assert ours == pytest.approx(expected, rel=1e-3)
    assert learners[0]._graphs._recorded.keys() == {3}
    assert told == []


def test_what_cannot_be_recorded_is_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its memory is given back."""
    told: list[str] = []
    ours, expected = on_gpu(study()), on_gpu(study(), cuda_graphs=False)
    ours._tell = told.append
    scans = torch.rand(300, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = ours.objective.__call__

    def reading(*args: Any) -> Loss:
        loss = plain(*args)
        loss.total.item()
        return loss

    monkeypatch.setattr(ours, "objective", reading)
    held = []
    for step in range(3):
        assert ours.step(scans, step=step).total == pytest.approx(expected.step(scans, step=step).total, rel=1e-4)
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(GPU) // 2**20)
    assert len(told) == 1
    assert told[0].startswith("a step could not be recorded, going on without that: ")
    assert not ours._graphs.on
    assert held[2] <= held[0] + 20 + 32  # which cuBLAS keeps on a Hopper card for the stream of the recording


def test_recorded_steps_make_room_where_memory_runs_out() -> None:
    told: list[str] = []
    ours, expected = on_gpu(study()), on_gpu(study(), cuda_graphs=False)
    ours._tell = told.append
    few, many = (torch.rand(scans, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) for scans in (300, 500))
    for step in range(2):
        assert ours.step(few, step=step).total == pytest.approx(expected.step(few, step=step).total, rel=1e-4)
    needed = _megabytes_of(lambda: expected.step(many, step=2))
    with room(needed * 3 // 4):
        assert ours.step(many, step=2).total > 0
    assert told == []
    assert ours.micro_batch == {}
    assert not ours._graphs._recorded


def _megabytes_of(step: Callable[[], object]) -> int:
    """That it needs at most, beyond what is held."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved(GPU)
    step()
    return (torch.cuda.max_memory_reserved(GPU) - before) // 2**20


# -------------------------------------------------------------------------------------------------------------- memory


@contextmanager
def room(megabytes: int) -> Iterator[None]:
    """Let this process have no more of the card than this beyond what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + megabytes * 2**20) / total, GPU)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_largest_micro_batch_that_fits_is_found_once_and_trains(
    tmp_path: Path, rank: Rank, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {"name": "north", "data": [{"folder": str(tmp_path)}], "state": str(tmp_path), "precision": precision}
    site, whole = parse(SiteConfig, raw, where="site.yaml"), 1500 if rank == 2 else 150
    raw = study().model_dump(mode="json") | {"batch": {"images": whole, "volumes": whole}}
    of = parse(StudyConfig, raw, where="study.yaml")
    told: list[str] = []
    with room(1_000):
        learner = learner_for(site, of, {2, 3}, device=GPU, team=Alone())
        found = learner.micro_batch[rank]
        assert 1 <= found < whole
        assert not learner.fits(rank, -(-whole // (-(-whole // found) - 1)))  # one part fewer would be too large
        learner._tell = told.append
        shape = (whole, *shape_of_views(of, rank))
        expected = learner.step(torch.rand(shape, generator=torch.Generator().manual_seed(1)), step=0)
        assert told == []
        monkeypatch.setattr(Learner, "fits", lambda *_: pytest.fail("tried again"))
        assert learner_for(site, of, {2, 3}, device=GPU, team=Alone()).micro_batch == learner.micro_batch
    assert json.loads((tmp_path / MEMORY).read_text())
    assert expected.total > 0


def test_a_step_that_runs_out_of_memory_is_taken_in_parts() -> None:
    told: list[str] = []
    scans = torch.rand(1500, 2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = on_gpu(study()).step(scans, step=0)
    short = on_gpu(study())
    short._tell = told.append
    with room(1_000):
        report = short.step(scans, step=0)
    assert told[0] == "out of memory: 2D batches are met in parts of 750, not 1500 scans"
    assert report.terms == pytest.approx(expected.terms, rel=1e-4)
    assert report.diagnostics["grad_norm"] == pytest.approx(expected.diagnostics["grad_norm"], rel=1e-2)


# -------------------------------------------------------------------------------------------------- private, in teams


@pytest.mark.parametrize("rank", [2, 3])
def test_a_private_step_is_the_one_of_a_cpu_however_many_are_worked_out_together(rank: Rank) -> None:
    """In float64, for these weights enlarge what is rounded."""
    steps = [taking(1, double=True), taking(1, double=True, device=GPU), taking(3, double=True, device=GPU)]
    patients = [views.double() for views in ward(rank)]
    reports = [made.private_step(iter(patients), rank=rank, step=0) for made, _, _ in steps]
    near = 1e-6
    expected = steps[0][1].sums
    for report, (_, noise, told) in zip(reports[1:], steps[1:], strict=True):
        for ours, theirs in zip(noise.sums, expected, strict=True):
            length = sum(total.square().sum().item() for total in theirs) ** 0.5
            assert distance([total.cpu() for total in ours], theirs) <= near * length
        assert report.total == pytest.approx(reports[0].total, rel=near)
        assert told == []


def test_noise_on_a_gpu_is_of_the_claimed_size_and_never_the_same() -> None:
    draws = [torch.zeros(1_000_000, device=GPU) for _ in range(2)]
    for total in draws:
        GaussianNoise(GPU).add_([total], 3.0)
    for total in draws:
        assert total.std().item() == pytest.approx(3.0, rel=0.01)
        assert total.mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.corrcoef(torch.stack(draws))[0, 1].abs().item() < 0.01


def test_one_process_of_a_team_sums_with_nccl(tmp_path: Path) -> None:
    of, batches = study(), [images(), volumes()]
    alone = team_members.train(of, batches, torch.float64, device=GPU, team=Alone())
    ours = run_team(team_members.train, (of, batches, torch.float64), devices=(GPU,), state=tmp_path)
    torch.testing.assert_close(on_cpu(ours), on_cpu(alone), rtol=1e-5, atol=1e-8)


# --------------------------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize("rank", [2, 3])
def test_a_mask_is_the_one_of_a_cpu(rank: Rank) -> None:
    model = build_task_model(
        ModelConfig(prototypes=16), three_answers(rank, dense=True), seed=0, pretrained=None
    ).eval()
    values = np.random.default_rng(0).random((1, *(20, 90, 75)[-rank:]), dtype=np.float32)
    found = [
        probabilities(
            model.to(device),
            values.copy(),
            (13, 40, 48)[-rank:],
            overlap=0.5,
            windows=2,
            device=device,
            autocast=nullcontext(),
        ).cpu()
        for device in (torch.device("cpu"), GPU)
    ]
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=0)
