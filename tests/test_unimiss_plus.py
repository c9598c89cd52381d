"""UniMiSS+ against its naive form: one scan, view, pair, ray and patch at a time."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.federation import small_study
from tests.gradients import assert_same_gradients
from tests.naive_unimiss import naive_plus_terms
from unimiss_core.config import parse
from unimiss_core.loss_terms import is_reconstruction, mean_cross_entropy
from unimiss_core.network import Network, build_network, tensors_of
from unimiss_core.objective import Loss
from unimiss_core.objectives import build_objective
from unimiss_core.radiograph import Radiographer
from unimiss_core.study import StudyConfig, UniMiSSPlusConfig
from unimiss_core.unimiss_plus import UniMiSSPlus

CASES = {
    "images": (2, 2, 1, 37, 50),
    "colour, three views": (1, 3, 3, 33, 41),
    "volumes": (2, 2, 1, 13, 33, 40),
    "volumes, three views": (1, 3, 1, 14, 36, 33),
}
WEIGHTS = {
    "image": 1.0,
    "volume": 1.0,
    "radiograph_to_volume": 0.5,
    "slices_to_volume": 0.1,
    "image_reconstruction": 5.0,
    "volume_reconstruction": 5.0,
    "radiograph_reconstruction": 5.0,
}


def plus_study(**objective: object) -> StudyConfig:
    """Radiographs are (33, 47)."""
    return small_study(
        model={"prototypes": 24, "reconstruction": True},
        views={"image_size": [33, 47]},
        objective={"name": "unimiss_plus", **objective},
    )


STUDY = plus_study()


@cache
def networks() -> tuple[Network, Network]:
    return build_network(STUDY.model, seed=0).double(), build_network(STUDY.model, seed=1).double()


def case(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Views of a case, in the range that the model takes, and a centre for what the teacher sees."""
    shape = CASES[name]
    generator = torch.Generator().manual_seed(sum(shape))
    centre = 0.1 * torch.randn(128, generator=generator, dtype=torch.float64)
    views = 4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 2
    return views, {"image" if len(shape) == 5 else "volume": centre}


def loss_of(name: str, study: StudyConfig = STUDY) -> Loss:
    return build_objective(study)(*networks(), *case(name))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_naive_step(name: str) -> None:
    (student, teacher), (views, centre) = networks(), case(name)
    naive = naive_plus_terms(
        student,
        teacher,
        views,
        {own: teacher.prototypes(h) for own, h in centre.items()},
        student_temperature=0.1,
        teacher_temperature=0.04,
        radiograph_size=(33, 47),
        ct_window_hu=(-1024.0, 1024.0),
        slice_stride=2,
    )
    fast = loss_of(name)
    assert fast.terms.keys() == naive.keys()
    for term, value in fast.terms.items():
        assert value.item() == pytest.approx(naive[term].item(), rel=1e-5), term
    total = torch.stack([WEIGHTS[term] * value for term, value in naive.items()]).sum()
    assert fast.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert_same_gradients((student, fast.total), (student, total), rtol=1e-5, least=1e-6)


def test_the_studys_weights_weigh_the_total_and_leave_the_terms_as_they_are() -> None:
    weighed = plus_study(radiograph_weight=2.0, slices_weight=3.0, reconstruction_weight=7.0)
    loss, plain = loss_of("volumes", weighed), loss_of("volumes")
    assert {name: term.item() for name, term in loss.terms.items()} == {
        name: term.item() for name, term in plain.terms.items()
    }
    weights = {**WEIGHTS, "radiograph_to_volume": 2.0, "slices_to_volume": 3.0}
    expected = sum((7.0 if is_reconstruction(name) else weights[name]) * t.item() for name, t in loss.terms.items())
    assert loss.total.item() == pytest.approx(expected)


def test_the_teacher_sees_scans_alone_and_draws_nothing() -> None:
    (student, teacher), (views, centre) = networks(), case("volumes")
    before = {name: h.clone() for name, h in centre.items()}
    loss = build_objective(STUDY)(student, teacher, views, centre)
    torch.testing.assert_close(centre, before)
    assert loss.observed.keys() == {"volume"} == set(build_objective(STUDY).representations(3))
    assert build_objective(STUDY).representations(2) == ("image",)
    bare = small_study(model={"prototypes": 24})
    eyes_only = build_network(bare.model, seed=1, ranks=(3,)).double()  # neither a 2D path nor a reconstruction
    alone = build_objective(STUDY)(student, eyes_only, views, centre)
    torch.testing.assert_close(alone.terms, loss.terms)
    torch.testing.assert_close(alone.observed["volume"].bottleneck, loss.observed["volume"].bottleneck)
    teacher.zero_grad(set_to_none=True)
    torch.autograd.backward(loss.total)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    student.zero_grad(set_to_none=True)


def test_the_network_runs_once_for_class_token_and_map() -> None:
    student, teacher = networks()
    passes: list[tuple[int, ...]] = []
    for network in (student, teacher):
        network.backbone.encoder.stem.register_forward_pre_hook(lambda _, x: passes.append(tuple(x[0].shape)))
    views, centre = case("volumes")
    build_objective(STUDY)(student, teacher, views, centre)
    volumes, radiographs, slices = (4, 1, 13, 33, 40), (4, 1, 33, 47), (4 * 7, 1, 33, 40)
    assert passes == [volumes, volumes, radiographs, slices]  # the teacher's, then the student's


def test_the_order_of_scans_and_of_views_does_not_matter() -> None:
    views, centre = case("volumes")
    flipped = build_objective(STUDY)(*networks(), views.flip(0, 1), centre)
    torch.testing.assert_close(flipped.terms, loss_of("volumes").terms)


def test_a_radiograph_from_the_side_is_another_picture() -> None:
    side = loss_of("volumes", plus_study(radiograph_angle_deg=90.0)).terms
    front = loss_of("volumes").terms
    assert {name for name, term in side.items() if term.item() != front[name].item()} == {
        "radiograph_to_volume",
        "radiograph_reconstruction",
    }


def test_radiographs_are_taken_as_plan_views_and_objective_say() -> None:
    raw = plus_study(radiograph_angle_deg=-20.0).model_dump(mode="json")
    raw["plan"] |= {"volume_spacing_mm": [4.0, 1.5, 1.2], "ct_window_hu": [-900.0, 1100.0]}
    objective = build_objective(parse(StudyConfig, raw, where=""))
    expected = Radiographer(size=(33, 47), ct_window_hu=(-900.0, 1100.0), spacing_mm=(1.5, 1.2), angle_deg=-20.0)
    assert isinstance(objective, UniMiSSPlus)
    assert objective.radiographer == expected


@pytest.mark.parametrize("name", ["images", "colour, three views", "volumes"])
def test_what_is_drawn_has_the_size_of_what_was_seen_and_the_class_token_is_the_same(name: str) -> None:
    network, x = networks()[0], case(name)[0].flatten(0, 1)
    h, drawn = network.bottleneck_and_reconstruction(x)
    torch.testing.assert_close(h, network.bottleneck(x))
    assert drawn.shape == (len(x), 3 if x.ndim == 4 else 1, *x.shape[2:])
    assert ((drawn > 0) & (drawn < 1)).all()


def test_a_network_draws_only_where_its_study_asks_for_it() -> None:
    bare, whole = (tensors_of(build_network(one.model, seed=3)) for one in (small_study(), plus_study()))
    added = whole.keys() - bare.keys()
    assert added == {f"reconstruction.patch.{rank}.{kind}" for rank in ("2d", "3d") for kind in ("weight", "bias")}
    flat = tensors_of(build_network(plus_study().model, seed=3, ranks=(2,)))
    assert {name for name in flat if name.startswith("reconstruction.")} == {name for name in added if "2d" in name}
    assert all(torch.equal(flat[name], whole[name]) for name in flat)


def test_the_mean_that_people_watch_is_of_cross_entropies() -> None:
    assert mean_cross_entropy({"image": 6.0, "slices_to_volume": 4.0, "volume_reconstruction": 0.1}) == 5.0
    assert math.isnan(mean_cross_entropy({"volume_reconstruction": 0.1}))


def test_the_defaults_are_the_published_ones() -> None:
    config = UniMiSSPlusConfig()
    assert (config.radiograph_weight, config.slices_weight, config.reconstruction_weight) == (0.5, 0.1, 5.0)
    assert (config.slice_stride, config.radiograph_angle_deg) == (2, 0.0)
