import json
import math
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from unimiss_core import gathering
from unimiss_core.config import parse
from unimiss_core.errors import CheckpointError, NonFiniteLossError
from unimiss_core.execution import Execution
from unimiss_core.groups import group_of
from unimiss_core.learner import Learner
from unimiss_core.local_state import LearnerState
from unimiss_core.network import build_network, tensors_of
from unimiss_core.objective import UniMiSS
from unimiss_core.schedule import learning_rate, teacher_momentum, weight_decay
from unimiss_core.study import StudyConfig


def study(**optimiser: object) -> StudyConfig:
    raw = {
        "name": "toy",
        "model": {"prototypes": 16},
        "optimiser": {"warmup_steps": 2, **optimiser},
        "schedule": {"rounds": 2, "local_steps": 6},
    }
    return parse(StudyConfig, raw, where="test")


def images(seed: int = 0, scans: int = 3) -> Tensor:
    return torch.rand(scans, 2, 1, 33, 40, generator=torch.Generator().manual_seed(seed))


def volumes(seed: int = 0, scans: int = 2) -> Tensor:
    return torch.rand(scans, 2, 1, 13, 33, 40, generator=torch.Generator().manual_seed(seed))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def plus_study(**optimiser: object) -> StudyConfig:
    """The same under the second objective."""
    raw = study(**optimiser).model_dump(mode="json")
    raw["model"]["reconstruction"], raw["objective"] = True, {"name": "unimiss_plus"}
    raw["views"]["image_size"] = [33, 40]  # of radiographs
    return parse(StudyConfig, raw, where="test")


def apart(learner: Learner) -> Learner:
    """The learner with a teacher that differs from its student, as in any later round."""
    other = tensors_of(build_network(learner.study.model, seed=1, ranks=learner.student.ranks))
    learner.start_round(copied(tensors_of(learner.student)), other)
    return learner


def in_float64(learner: Learner) -> Learner:
    learner.student.double()
    learner.teacher.double()
    learner.centre = {name: centre.double() for name, centre in learner.centre.items()}
    return learner


def everything(learner: Learner) -> dict[str, Tensor]:
    return copied(learner.state(weights=True).tensors)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_step_is_clipped_adamw_then_the_teachers_average_then_the_centre() -> None:
    """Two steps against the formulas, written out tensor by tensor in float64."""
    learner = in_float64(apart(Learner(study(), ranks={2})))
    student, teacher = copied(tensors_of(learner.student)), copied(tensors_of(learner.teacher))
    moment1 = {name: torch.zeros_like(tensor) for name, tensor in student.items()}
    moment2 = {name: torch.zeros_like(tensor) for name, tensor in student.items()}
    centre = torch.zeros(128, dtype=torch.float64)
    oracle = in_float64(Learner(study(), ranks={2}))
    for step in range(2):
        oracle.start_round(student, teacher)
        views = images(step).double()
        loss = UniMiSS(learner.study.objective)(oracle.student, oracle.teacher, views, {"image": centre})
        oracle.student.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.total)
        rate, decay = learning_rate(learner.study, step), weight_decay(learner.study, step)
        for name, parameter in oracle.student.named_parameters():
            assert parameter.grad is not None
            grad = parameter.grad * min(1.0, 0.3 / (parameter.grad.norm().item() + 1e-6))
            moment1[name] = 0.9 * moment1[name] + 0.1 * grad
            moment2[name] = 0.999 * moment2[name] + 0.001 * grad.square()
            ahead = moment1[name] / (1 - 0.9 ** (step + 1))
            spread = (moment2[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            shrunk = student[name] * (1 - rate * decay * (parameter.ndim > 1))
            student[name] = shrunk - rate * ahead / spread
            keep = teacher_momentum(learner.study, step)
            teacher[name] = keep * teacher[name] + (1 - keep) * student[name]
        with torch.no_grad():
            mean = oracle.teacher.bottleneck(views.flatten(0, 1)).mean(0)
        centre = 0.9 * centre + 0.1 * mean

        report = learner.step(views, step=step)

        assert report.total == pytest.approx(loss.total.item())
        torch.testing.assert_close(learner.centre["image"], centre)
        torch.testing.assert_close(tensors_of(learner.student), student, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(tensors_of(learner.teacher), teacher, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip_norm", [0.01, None])
def test_a_head_moved_in_blocks_ends_where_its_whole_gradients_take_it(
    clip_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in one process without FedProx those are at no time there as a whole."""
    monkeypatch.setattr(gathering, "BLOCK_VALUES", 99)
    blocks, whole = (in_float64(apart(Learner(study(clip_norm=clip_norm), ranks={2}))) for _ in range(2))
    monkeypatch.setattr(whole, "_keeps_apart", lambda _: False)
    held: list[bool] = []
    matrices = [p for p in blocks.student.head.parameters() if p.ndim == 2]
    seen = lambda _: held.append(any(p.grad is not None for p in matrices)) or {}  # noqa: E731
    monkeypatch.setattr(blocks._proximal, "pull_", seen)
    for step in range(2):
        expected, report = whole.step(images(step).double(), step=step), blocks.step(images(step).double(), step=step)
        assert report.diagnostics == pytest.approx(expected.diagnostics, rel=1e-9)
        torch.testing.assert_close(everything(blocks), everything(whole), rtol=1e-9, atol=1e-12)
    assert held == [False, False]


@pytest.mark.parametrize("batch", [images(), volumes()], ids=["images", "volumes"])
def test_convolutions_whose_windows_are_few_are_moved_in_blocks_in_bf16(
    batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, in which everything is rounded alike; of what the batch does not reach nothing is gathered."""
    bf16 = Execution(precision="bf16", views_in_turn=True)
    blocks, whole = (apart(Learner(study(), ranks={2, 3}, execution=bf16)) for _ in range(2))
    monkeypatch.setattr(whole, "_keeps_apart", lambda _: False)
    gathered: list[str] = []
    names = {p: name for name, p in blocks.student.named_parameters()}
    kept = blocks._keeps_apart
    monkeypatch.setattr(blocks, "_keeps_apart", lambda one: gathered.append(names[one.weight]) or kept(one))
    expected, report = whole.step(batch, step=0), blocks.step(batch, step=0)
    convolutions = [name for name in gathered if "conv" in name]
    assert {name.split(".")[-3] for name in convolutions} == ({"2d"} if batch.ndim == 5 else {"2d", "3d"})
    assert report.diagnostics == pytest.approx(expected.diagnostics, rel=1e-5)
    torch.testing.assert_close(everything(blocks), everything(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["images in unlike parts", "slices and radiographs"])
def test_a_weight_that_meets_few_rows_here_and_many_there_moves_once(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of its gradient is gathered, the other is not."""
    in_parts = what == "images in unlike parts"
    of, batch = (study(), images(scans=5)) if in_parts else (plus_study(), volumes())
    bf16 = Execution(precision="bf16", micro_batch={2: 4})
    learner, whole = (apart(Learner(of, ranks={2, 3}, execution=bf16)) for _ in range(2))
    monkeypatch.setattr(whole, "_keeps_apart", lambda _: False)
    expected, report = whole.step(batch, step=0), learner.step(batch, step=0)
    assert {state["step"].item() for state in learner._optimiser.state.values()} == {1.0}
    assert report.diagnostics == pytest.approx(expected.diagnostics, rel=1e-5)
    torch.testing.assert_close(everything(learner), everything(whole), rtol=1e-4, atol=1e-6)


def test_a_2d_step_touches_nothing_of_3d() -> None:
    learner = apart(Learner(study(), ranks={2, 3}))
    learner.step(volumes(), step=0)
    before = everything(learner)
    learner.step(images(), step=1)
    after = everything(learner)
    for name in before:
        of_3d = not {"3d", "volume", "slices"}.isdisjoint(name.split("."))
        assert torch.equal(before[name], after[name]) == of_3d, name


def test_a_3d_step_trains_every_group() -> None:
    learner = apart(Learner(study(), ranks={3}))
    before = copied(tensors_of(learner.student))
    report = learner.step(volumes(), step=0)
    assert {name for name, tensor in tensors_of(learner.student).items() if torch.equal(tensor, before[name])} == set()
    assert set(report.terms) == {"volume", "volume_to_slices", "slices_to_volume", "slices"}
    assert report.total == pytest.approx(sum(report.terms.values()), rel=1e-5)


def test_a_site_without_volumes_trains_as_a_mixed_one_does_on_images_and_holds_no_3d_tensor() -> None:
    flat, mixed = apart(Learner(study(), ranks={2})), apart(Learner(study(), ranks={2, 3}))
    for step in range(2):
        assert flat.step(images(step), step=step) == mixed.step(images(step), step=step)
    assert {group_of(name) for name in tensors_of(flat.student)} == {"shared", "2d", "head"}
    of_mixed = tensors_of(mixed.student)
    assert_same(tensors_of(flat.student), {name: of_mixed[name] for name in tensors_of(flat.student)})


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("batch", [images(scans=5), volumes(scans=3)], ids=["images", "volumes"])
def test_a_batch_met_in_parts_gives_the_same_step(batch: Tensor) -> None:
    whole = apart(Learner(study(), ranks={2, 3}))
    parts = apart(Learner(study(), ranks={2, 3}, execution=Execution(micro_batch={2: 2, 3: 2})))
    expected, report = whole.step(batch, step=0), parts.step(batch, step=0)
    assert report.terms == pytest.approx(expected.terms, rel=1e-5)
    assert report.diagnostics == pytest.approx(expected.diagnostics, rel=1e-4)
    for name, centre in whole.centre.items():
        torch.testing.assert_close(parts.centre[name], centre)
    moments = (parts.state().tensors, whole.state().tensors)
    for name in (name for name in moments[0] if name.startswith("adam_moment1")):
        torch.testing.assert_close(moments[0][name], moments[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("batch", [images(scans=5), volumes(scans=3)], ids=["images", "volumes"])
def test_a_batch_met_in_parts_gives_the_same_step_of_the_second_objective(batch: Tensor) -> None:
    """In float64, so that nothing but rounding may differ; the moments after a step are the clipped gradients."""
    whole = in_float64(apart(Learner(plus_study(), ranks={2, 3})))
    parts = in_float64(apart(Learner(plus_study(), ranks={2, 3}, execution=Execution(micro_batch={2: 2, 3: 2}))))
    expected, report = whole.step(batch.double(), step=0), parts.step(batch.double(), step=0)
    assert report.terms == pytest.approx(expected.terms, rel=1e-9)
    assert report.total == pytest.approx(expected.total, rel=1e-9)
    torch.testing.assert_close(parts.centre, whole.centre)
    torch.testing.assert_close(parts.state().tensors, whole.state().tensors, rtol=1e-6, atol=1e-12)


def test_the_second_objective_trains_every_group_by_volumes_and_nothing_of_3d_by_images() -> None:
    learner = apart(Learner(plus_study(), ranks={2, 3}))
    before = everything(learner)
    report = learner.step(volumes(), step=0)
    middle = everything(learner)
    unmoved = {name for name in before if torch.equal(before[name], middle[name])}
    assert unmoved == {"centre.image"}
    assert report.terms.keys() == {
        "volume",
        "radiograph_to_volume",
        "slices_to_volume",
        "volume_reconstruction",
        "radiograph_reconstruction",
    }
    assert learner.step(images(), step=1).terms.keys() == {"image", "image_reconstruction"}
    after = everything(learner)
    for name in middle:
        of_3d = not {"3d", "volume"}.isdisjoint(name.split("."))
        assert torch.equal(middle[name], after[name]) == of_3d, name
    figures = learner.round_diagnostics()
    assert {key.rpartition("_")[2] for key in figures} == {"image", "volume"}


def test_the_teachers_reconstruction_follows_the_students_like_everything_else() -> None:
    learner = in_float64(apart(Learner(plus_study(), ranks={2, 3})))
    teacher = copied(tensors_of(learner.teacher))
    learner.step(volumes().double(), step=0)
    keep, student = teacher_momentum(learner.study, 0), tensors_of(learner.student)
    for name, tensor in tensors_of(learner.teacher).items():
        expected = keep * teacher[name] + (1 - keep) * student[name]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_a_site_without_volumes_holds_no_3d_tensor_of_the_second_objective() -> None:
    flat = apart(Learner(plus_study(), ranks={2}))
    flat.step(images(), step=0)
    assert {group_of(name) for name in tensors_of(flat.student)} == {"shared", "2d", "head"}
    assert {name for name in tensors_of(flat.student) if name.startswith("reconstruction")} == {
        "reconstruction.patch.2d.weight",
        "reconstruction.patch.2d.bias",
    }


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("batch", [images(scans=8), volumes(scans=3)], ids=["images", "volumes"])
def test_a_batch_can_be_learned_by_heart_under_the_second_objective(batch: Tensor) -> None:
    coarse = 4 * batch[..., ::8, ::8].flatten(0, -3)[:, None] - 2  # smooth, for noise cannot be drawn again
    smooth = torch.nn.functional.interpolate(coarse, batch.shape[-2:], mode="bilinear").view(batch.shape)
    learner = Learner(plus_study(lr=3e-3, warmup_steps=0), ranks={2, 3})
    reports = [learner.step(smooth, step=step) for step in range(12)]
    first, last = reports[0], reports[-1]
    assert last.total < 0.9 * first.total
    for name in last.terms:
        if name.endswith("_reconstruction"):
            assert last.terms[name] < 0.85 * first.terms[name], name


def test_state_of_another_objective_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of another model and objective"):
        Learner(plus_study(), ranks={2}).restore(Learner(study(), ranks={2}).state())


def test_bf16_keeps_the_reconstruction_and_its_error_in_float32() -> None:
    exact = apart(Learner(plus_study(), ranks={3})).step(volumes(), step=0)
    learner = apart(Learner(plus_study(), ranks={3}, execution=Execution(precision="bf16")))
    assert learner.step(volumes(), step=0).terms == pytest.approx(exact.terms, rel=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        h, drawn = learner.student.bottleneck_and_reconstruction(volumes().flatten(0, 1))
    assert h.dtype == drawn.dtype == torch.float32


@pytest.mark.usefixtures("shallow")
def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    learner = apart(Learner(study(), ranks={2, 3}))
    learner.step(images(0), step=0)
    learner.step(volumes(1), step=1)
    state = learner.state(weights=True)
    on_disk = (save(state.tensors), json.dumps(state.facts))
    again = Learner(study(), ranks={2, 3})
    again.restore(LearnerState(load(on_disk[0]), json.loads(on_disk[1])))
    for step, batch in ((2, volumes(2)), (3, images(3))):
        assert again.step(batch, step=step) == learner.step(batch, step=step)
    assert_same(everything(again), everything(learner))


def test_state_without_weights_holds_none_and_keeps_the_received_ones() -> None:
    learner = apart(Learner(study(), ranks={2}))
    learner.step(images(), step=0)
    state = learner.state()
    assert not [name for name in state.tensors if name.startswith(("student.", "teacher."))]
    again = apart(Learner(study(), ranks={2}))
    before = copied(tensors_of(again.student))
    again.restore(state)
    assert_same(tensors_of(again.student), before)


def test_state_of_other_ranks_or_of_another_model_is_refused() -> None:
    state = Learner(study(), ranks={2}).state()
    with pytest.raises(CheckpointError, match=r"of another ranks; expected \[\[2, 3\]\], got \[\[2\]\]"):
        Learner(study(), ranks={2, 3}).restore(state)
    damaged = LearnerState({"centre.image": torch.zeros(3)}, state.facts)
    with pytest.raises(CheckpointError, match="local state is damaged"):
        Learner(study(), ranks={2}).restore(damaged)


@pytest.mark.parametrize("part", ["student", "teacher", "watch", "adam_moment2"])
def test_a_damaged_state_of_a_rounds_middle_changes_nothing(part: str) -> None:
    learner = apart(Learner(study(), ranks={2}))
    learner.step(images(), step=0)
    state = learner.state(weights=True)
    lost = max(name for name in state.tensors if name.startswith(f"{part}."))
    again = Learner(study(), ranks={2})
    before = everything(again)
    with pytest.raises(CheckpointError):
        again.restore(LearnerState({name: state.tensors[name] for name in state.tensors.keys() - {lost}}, state.facts))
    assert_same(everything(again), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    learner = apart(Learner(study(), ranks={2}))
    learner.step(images(0), step=0)
    before = everything(learner)
    poisoned = images(1)
    poisoned[1, 0, 0, 5, 5] = bad
    with pytest.raises(NonFiniteLossError, match="step 1: loss nan"):
        learner.step(poisoned, step=1)
    assert_same(everything(learner), before)
    assert all(parameter.grad is None for parameter in learner.student.parameters())


@pytest.mark.parametrize("frozen", [0, 9])
def test_a_gradient_that_is_not_finite_beside_a_finite_loss_changes_nothing(frozen: int) -> None:
    learner = apart(Learner(study(freeze_prototypes_steps=frozen), ranks={2}))
    learner.step(images(0), step=0)
    before, figures = everything(learner), learner.round_diagnostics()
    poison = learner.student.get_parameter("backbone.encoder.class_token").register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteLossError, match=r"step 1: loss [0-9.]+, gradient norm nan"):
        learner.step(images(1), step=1)
    assert_same(everything(learner), before)
    assert learner.round_diagnostics() == figures
    poison.remove()
    learner.step(images(1), step=1)


def test_a_round_has_collapse_figures_of_each_representation_and_begins_without() -> None:
    learner = apart(Learner(study(), ranks={2, 3}))
    learner.step(images(), step=0)
    learner.step(volumes(), step=1)
    figures = learner.round_diagnostics()
    assert {key.rpartition("_")[2] for key in figures} == {"image", "volume", "slices"}
    assert 0 < figures["target_entropy_image"] <= figures["mean_target_entropy_image"] <= math.log(16) + 1e-5
    assert apart(learner).round_diagnostics() == {}


def test_frozen_prototypes_stay_until_their_step() -> None:
    learner = Learner(study(freeze_prototypes_steps=2), ranks={2})
    first = tensors_of(learner.student)["head.prototypes.weight"].clone()
    for step in range(2):
        learner.step(images(step), step=step)
        assert torch.equal(tensors_of(learner.student)["head.prototypes.weight"], first)
    learner.step(images(2), step=2)
    assert not torch.equal(tensors_of(learner.student)["head.prototypes.weight"], first)


def test_a_round_begins_with_exactly_the_tensors_of_the_network() -> None:
    learner = Learner(study(), ranks={2})
    tensors = copied(tensors_of(learner.student))
    with pytest.raises(CheckpointError, match=r"unexpected backbone\.encoder\.stem\.3d"):
        learner.start_round({**tensors, "backbone.encoder.stem.3d.conv.weight": torch.zeros(1)}, tensors)


def test_bf16_costs_nearly_the_same_loss_and_keeps_float32_where_it_matters() -> None:
    exact, half = (
        apart(Learner(study(), ranks={3})),
        apart(Learner(study(), ranks={3}, execution=Execution(precision="bf16"))),
    )
    expected, report = exact.step(volumes(), step=0), half.step(volumes(), step=0)
    assert report.terms == pytest.approx(expected.terms, rel=0.02)
    assert {tensor.dtype for tensor in half.state(weights=True).tensors.values()} == {torch.float32}
    assert half.objective(half.student, half.teacher, volumes(), half.centre).total.dtype == torch.float32


def test_views_of_another_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected views \(B, V, C, H, W\) or"):
        Learner(study(), ranks={2}).step(torch.rand(2, 1, 33, 40), step=0)
    with pytest.raises(ValueError, match="the model takes 2D"):
        Learner(study(), ranks={2}).step(volumes(), step=0)


def test_the_student_learns_to_predict_its_teacher() -> None:
    learner = Learner(study(lr=3e-3, warmup_steps=0), ranks={2})
    batch = images(scans=8)
    first = learner.step(batch, step=0).total
    assert all(learner.step(batch, step=step).diagnostics["target_entropy_image"] > 0 for step in range(1, 11))
    assert learner.step(batch, step=11).total < first
