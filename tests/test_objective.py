import math
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.gradients import assert_same_gradients
from tests.naive_unimiss import naive_loss_terms
from tests.published import SIZES, Published, centre_logits, measured, needs_reference, network, published_model, views
from unimiss_core.network import Network, build_network
from unimiss_core.objective import (
    UniMiSS,
    cross_entropy_name,
    log_prediction,
    move_centre,
    representations,
    target_distribution,
    view_cross_entropy,
)
from unimiss_core.released import released_names
from unimiss_core.scan import Rank
from unimiss_core.study import ModelConfig, UniMiSSConfig

pytestmark = pytest.mark.usefixtures("shallow")  # of nano; what is made of a network's answers is looked at

CONFIG = UniMiSSConfig()
NANO = ModelConfig(prototypes=24)


# -- the published step ------------------------------------------------------------------------------------------------


def published_step(size: Published, rank: Rank) -> tuple[dict[str, float], dict[str, float]]:
    """(loss terms, gradient norms by released name) of the published step, whose centre is a vector of logits."""
    student, teacher = network(size, "student/"), network(size, "teacher/")
    student.zero_grad(set_to_none=True)
    with torch.no_grad():
        targets = {
            name: target_distribution(teacher.prototypes(h) - centre_logits(), CONFIG.teacher_temperature)
            for name, h in representations(teacher, views(rank)).items()
        }
    terms = {
        cross_entropy_name(mine, theirs): view_cross_entropy(
            log_prediction(student.prototypes(h), CONFIG.student_temperature), target
        )
        for mine, h in representations(student, views(rank)).items()
        for theirs, target in targets.items()
    }
    torch.autograd.backward(list(terms.values()))
    names = released_names(published_model(size))
    norms = {names[name]: p.grad.norm().item() for name, p in student.named_parameters() if p.grad is not None}
    return {name: term.item() for name, term in terms.items()}, norms


@needs_reference
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rank", [2, 3])
def test_loss_terms_and_gradient_norms_are_the_published_ones(size: Published, rank: Rank) -> None:
    expected = measured(size)
    names = {"image": "loss2d"} if rank == 2 else {}
    terms, norms = published_step(size, rank)
    for name, value in terms.items():
        assert value == pytest.approx(expected[names.get(name, name)], abs=1e-4), name
    assert norms.keys() == expected[f"gradnorm{rank}d"].keys()
    for name, value in norms.items():
        assert value == pytest.approx(expected[f"gradnorm{rank}d"][name], rel=0.01, abs=1e-6), name


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_a_centre_kept_on_bottlenecks_moves_as_the_published_one_does_on_logits(size: Published) -> None:
    teacher = network(size, "teacher/")
    with torch.no_grad():
        mean = representations(teacher, views(2))["image"].mean((0, 1))
        moved = move_centre(centre_logits(), teacher.prototypes(mean), 0.9)
    expected = torch.tensor(measured(size)["center_after_one_2d_update_first8"])
    torch.testing.assert_close(moved[:8], expected, atol=1e-6, rtol=0)


# -- the naive step ----------------------------------------------------------------------------------------------------

CASES = {
    "images": (2, 2, 1, 37, 50),
    "colour, three views": (1, 3, 3, 33, 40),
    "volumes": (2, 2, 1, 13, 33, 40),
    "volumes, three views": (1, 3, 1, 14, 36, 33),
}


@cache
def networks() -> tuple[Network, Network]:
    return build_network(NANO, seed=0).double(), build_network(NANO, seed=1).double()


def case(shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Views of `shape` and a centre for each representation of their rank."""
    generator = torch.Generator().manual_seed(sum(shape))
    names = UniMiSS(CONFIG).representations(2 if len(shape) == 5 else 3)
    centre = {name: 0.1 * torch.randn(128, generator=generator, dtype=torch.float64) for name in names}
    return torch.rand(shape, generator=generator, dtype=torch.float64), centre


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_loss_and_gradients_are_those_of_the_naive_step(shape: tuple[int, ...]) -> None:
    (student, teacher), (batch, centre) = networks(), case(shape)
    naive = naive_loss_terms(
        student,
        teacher,
        batch,
        {name: teacher.prototypes(h) for name, h in centre.items()},
        student_temperature=CONFIG.student_temperature,
        teacher_temperature=CONFIG.teacher_temperature,
    )
    fast = UniMiSS(CONFIG)(student, teacher, batch, centre)
    assert fast.terms.keys() == naive.keys()
    for name, term in fast.terms.items():
        assert term.item() == pytest.approx(naive[name].item(), rel=1e-5), name
    total = torch.stack(list(naive.values())).sum()
    assert_same_gradients((student, fast.total), (student, total), rtol=1e-5, least=1e-6)


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_in_float32_loss_and_gradients_are_those_of_float64(shape: tuple[int, ...]) -> None:
    exact, (batch, centre) = networks(), case(shape)
    single = (build_network(NANO, seed=0), build_network(NANO, seed=1))
    expected = UniMiSS(CONFIG)(*exact, batch, centre)
    fast = UniMiSS(CONFIG)(*single, batch.float(), {name: value.float() for name, value in centre.items()})
    for name, term in fast.terms.items():
        assert term.item() == pytest.approx(expected.terms[name].item(), rel=1e-3), name
    assert_same_gradients((single[0], fast.total), (exact[0], expected.total), rtol=1e-3, least=1e-3)


@pytest.mark.parametrize(("kind", "expected"), [("images", 0.03), ("volumes", 0.07)])
def test_volumes_may_have_a_teacher_temperature_of_their_own(kind: str, expected: float) -> None:
    (student, teacher), (batch, centre) = networks(), case(CASES[kind])
    naive = naive_loss_terms(
        student,
        teacher,
        batch,
        {name: teacher.prototypes(h) for name, h in centre.items()},
        student_temperature=0.1,
        teacher_temperature=expected,
    )
    objective = UniMiSS(UniMiSSConfig(teacher_temperature=0.03, volume_teacher_temperature=0.07))
    found = objective(student, teacher, batch, centre)
    assert {name: term.item() for name, term in found.terms.items()} == pytest.approx(
        {name: term.item() for name, term in naive.items()}, rel=1e-5
    )


def test_the_total_is_the_sum_of_the_terms() -> None:
    loss = UniMiSS(CONFIG)(*networks(), *case(CASES["volumes"]))
    assert loss.total.item() == pytest.approx(sum(term.item() for term in loss.terms.values()))


def test_the_order_of_scans_and_of_views_does_not_matter() -> None:
    batch, centre = case(CASES["volumes"])
    expected = UniMiSS(CONFIG)(*networks(), batch, centre).terms
    flipped = UniMiSS(CONFIG)(*networks(), batch.flip(0, 1), centre).terms
    for name, term in expected.items():
        torch.testing.assert_close(flipped[name], term)


def test_slices_are_the_mean_over_a_volume_and_so_shorter_than_one() -> None:
    batch, _ = case(CASES["volumes"])
    found = representations(networks()[0], batch)
    slices = torch.stack([networks()[0].bottleneck(batch[:, 1, :, d]) for d in range(batch.shape[3])])
    torch.testing.assert_close(found["slices"][:, 1], slices.mean(0))
    assert (found["slices"].norm(dim=-1) < 1).all()
    torch.testing.assert_close(found["volume"].norm(dim=-1), torch.ones(2, 2, dtype=torch.float64))


def test_a_subset_of_slices_is_evenly_spaced_and_all_of_them_is_the_default() -> None:
    batch, _ = case(CASES["volumes"])
    network = networks()[0]
    found = representations(network, batch, slices=4)["slices"]
    chosen = torch.stack([network.bottleneck(batch[:, 0, :, d]) for d in (1, 4, 8, 11)])
    torch.testing.assert_close(found[:, 0], chosen.mean(0))
    every = representations(network, batch)["slices"]
    torch.testing.assert_close(representations(network, batch, slices=99)["slices"], every)


def test_targets_and_centre_have_no_gradient_and_are_not_moved() -> None:
    (student, teacher), (batch, centre) = networks(), case(CASES["images"])
    before = {name: value.clone() for name, value in centre.items()}
    loss = UniMiSS(CONFIG)(student, teacher, batch, centre)
    assert not any(value.requires_grad for value in (loss.observed["image"].bottleneck, loss.observed["image"].target))
    torch.testing.assert_close(centre, before)


def test_what_is_observed_are_means_over_scans_and_views() -> None:
    (student, teacher), (batch, centre) = networks(), case(CASES["images"])
    seen = UniMiSS(CONFIG)(student, teacher, batch, centre).observed["image"]
    targets = [
        target_distribution(teacher.prototypes(teacher.bottleneck(view[None])[0] - centre["image"]), 0.04)
        for view in batch.flatten(0, 1)
    ]
    torch.testing.assert_close(seen.target, torch.stack(targets).mean(0))
    entropy = sum(-(target * target.log()).sum().item() for target in targets) / len(targets)
    assert seen.target_entropy.item() == pytest.approx(entropy)


def test_one_view_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="got 1 view, needs at least 2"):
        view_cross_entropy(torch.zeros(3, 1, 5), torch.zeros(3, 1, 5))


def test_uniform_answers_cost_log_k() -> None:
    uniform = torch.full((2, 3, 8), 1 / 8)
    assert view_cross_entropy(uniform.log(), uniform).item() == pytest.approx(math.log(8))
