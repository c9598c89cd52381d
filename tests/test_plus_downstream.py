"""What stands on a backbone, standing on MiTplus: the objective, privacy, precision, tasks and exports."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from client.onnx_export import EncoderOutputs, graph_of
from client.research_command import main
from tests.federation import small_study
from tests.small_tasks import three_answers
from tests.test_private_learner import CLIP, Recorded, clipped_and_summed, distance, in_float64, learner, patient, study
from unimiss_core import checkpoint, exported
from unimiss_core.adaptation import check_adaptation
from unimiss_core.errors import ConfigError
from unimiss_core.execution import Execution, set_up_blocks_
from unimiss_core.groups import group_of, groups_of_ranks
from unimiss_core.learner import Learner
from unimiss_core.mit_plus import MiTPlus, PlusArchitecture
from unimiss_core.network import build_network, initialise_, tensors_of
from unimiss_core.objective import new_centre
from unimiss_core.objectives import build_objective
from unimiss_core.patient_gradients import gradients_of_each
from unimiss_core.scan import Rank
from unimiss_core.study import PlanConfig
from unimiss_core.tasks import TaskModel, Trains, build_task_model, freeze_, layers_of, load_task_model

PLUS = {
    "model": {"size": "plus_nano", "prototypes": 16, "reconstruction": True},
    "objective": {"name": "unimiss_plus"},
    "views": {"image_size": [33, 40]},
}
STUDY = small_study(**PLUS)
NANO = STUDY.model
SIZES: dict[Rank, tuple[int, ...]] = {2: (37, 50), 3: (13, 33, 40)}


def scans(rank: Rank, count: int = 2) -> Tensor:
    return torch.rand(count, 1, *SIZES[rank], generator=torch.Generator().manual_seed(0))


def views(rank: Rank) -> Tensor:
    return scans(rank, 4).unflatten(0, (2, 2))


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("rank", [2, 3])
def test_the_groups_of_a_rank_are_what_autograd_reaches(rank: Rank) -> None:
    student, teacher = (build_network(NANO, seed=seed) for seed in (0, 1))
    objective = build_objective(STUDY)
    centre = new_centre(objective.representations(rank), 128, torch.device("cpu"))
    torch.autograd.backward(objective(student, teacher, views(rank), centre).total)
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in student.named_parameters() if group_of(n) in groups_of_ranks({rank})}


def test_an_objective_that_never_draws_would_leave_the_decoder_untrained_and_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unimiss never trains the decoder of model.size: plus_nano.*unimiss_plus"):
        small_study(model={"size": "plus_nano"})
    task = {"task": {"name": "classification", "kind": "binary", "rank": 2, "classes": ["no", "yes"]}}
    small_study(task="finetune", finetune=task, model={"size": "plus_nano"})  # which trains what its answer hangs on


def test_private_sums_are_those_of_one_backward_pass_for_each_patient() -> None:
    rank: Rank = 3  # which reaches the 2D path, too
    patients = [patient(rank, count, seed).double() for seed, count in enumerate((1, 2))]
    running, noise = in_float64(learner(Recorded(), study(**PLUS)))
    expected = clipped_and_summed(running, patients, rank)
    running.private_step(patients, rank=rank, step=0)
    assert distance(noise.sums[0], expected) <= 1e-9 * CLIP


@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_of_patients_worked_out_together_are_those_of_each_alone(rank: Rank) -> None:
    running, _ = in_float64(learner(Recorded(), study(**PLUS)))
    names = running.trained_names(rank, 0)
    patients = torch.stack([patient(rank, 1, seed).double() for seed in range(2)])
    for one, (_, gradients) in zip(
        patients, gradients_of_each(running.student, running._loss_of, patients, names), strict=True
    ):
        alone = running.objective(running.student, running.teacher, one, running.centre)
        expected = torch.autograd.grad(alone.total, [running.student.get_parameter(name) for name in names])
        length = sum(gradient.square().sum() for gradient in expected) ** 0.5
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10 * float(length), msg=name)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_step_in_bf16_costs_nearly_the_same_loss(rank: Rank) -> None:
    """Its gradient is further off than MiT's: twice as many norms lie one behind another."""
    reports = []
    for precision in ("fp32", "bf16"):
        made = Learner(STUDY, ranks={2, 3}, execution=Execution(precision=precision))  # type: ignore[arg-type]
        reports.append(made.step(views(rank), step=0))
    exact, rounded = reports
    assert rounded.terms == pytest.approx(exact.terms, rel=1e-2)
    assert rounded.diagnostics["grad_norm"] == pytest.approx(exact.diagnostics["grad_norm"], rel=0.15)


@pytest.mark.parametrize("rank", [2, 3])
def test_recomputed_activations_give_the_same_bits_and_keep_less_than_half(rank: Rank) -> None:
    found = []
    for recomputes in (False, True):
        backbone = build_network(NANO, seed=1).backbone
        if recomputes:
            set_up_blocks_(backbone, recomputed=True)
        kept: dict[int, Tensor] = {}

        def note(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            drawn = backbone.features(scans(rank)).decoder_map
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        torch.autograd.backward(drawn.square().sum())
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        found.append((drawn, gradients, sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)))
    (drawn, gradients, bytes_kept), (again, recomputed, bytes_left) = found
    assert torch.equal(drawn, again)
    assert all(map(torch.equal, gradients, recomputed))
    assert bytes_left < 0.5 * bytes_kept


# ------------------------------------------------------------------------------------------------- after pretraining


def made(rank: Rank, *, dense: bool) -> TaskModel:
    pretrained = tensors_of(build_network(NANO, seed=3))
    return build_task_model(NANO, three_answers(rank, dense=dense), seed=0, pretrained=pretrained)


@pytest.mark.parametrize("rank", SIZES)
def test_a_mask_is_as_large_as_its_scan_and_every_parameter_of_its_model_counts(rank: Rank) -> None:
    model = made(rank, dense=True)
    logits = model(scans(rank))
    assert logits.shape == (2, 3, *SIZES[rank])
    logits.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    found = model.backbone.features(scans(rank)).decoder_map
    expected = torch.einsum("bc...,kc->bk...", found, model.head.classes.weight.flatten(1))
    torch.testing.assert_close(logits - model.head.classes.bias.view(1, 3, *[1] * rank), expected)


@pytest.mark.parametrize("rank", SIZES)
def test_a_class_hangs_on_the_encoder_alone_and_the_decoder_stands_still(rank: Rank) -> None:
    model = made(rank, dense=False)
    freeze_(model, "full")
    model(scans(rank)).square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("backbone.decoder.")}


@pytest.mark.parametrize(
    ("trains", "prefixes"),
    [
        ("linear_probe", ("head.",)),
        ("frozen", ("head.", "backbone.decoder.")),
        ("full", ("head.", "backbone.decoder.", "backbone.encoder.")),
    ],
)
def test_of_a_mask_only_what_is_named_is_trained(trains: Trains, prefixes: tuple[str, ...]) -> None:
    model = made(2, dense=True)
    freeze_(model, trains)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def test_layers_count_what_lies_between_a_tensor_and_the_answer() -> None:
    mask, answer = (layers_of(made(3, dense=dense)) for dense in (True, False))
    for layers in (mask, answer):
        assert layers["backbone.encoder.at_full.3d.conv.weight"] == layers["backbone.encoder.class_token"] == 0
        assert layers["backbone.encoder.at_half.3d.1.conv.weight"] == 0
        assert layers["backbone.encoder.stages.3.blocks.0.mlp.0.weight"] == 4
    assert mask["backbone.decoder.stages.0.position.3d.table"] == 5
    assert mask["backbone.decoder.norm.weight"] == mask["backbone.decoder.to_full.3d.weight"] == 7
    assert (mask["head.classes.weight"], answer["head.linear.weight"]) == (8, 5)


@pytest.mark.parametrize("dense", [True, False])
def test_a_model_comes_back_from_its_own_tensors_alone(dense: bool) -> None:
    model, x = made(2, dense=dense), scans(2)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    again = load_task_model(NANO, three_answers(2, dense=dense), tensors=tensors)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def saved(folder: Path) -> Path:
    """A checkpoint whose student differs from its teacher."""
    student, teacher = (tensors_of(build_network(NANO, seed=seed)) for seed in (0, 1))
    about = {"model": NANO, "plan": PlanConfig(), "student": student, "teacher": teacher}
    checkpoint.save(folder, origin="federation", round=1, study_digest="0" * 64, **about)  # type: ignore[arg-type]
    return folder


def test_a_checkpoint_fits_every_task(tmp_path: Path) -> None:
    check_adaptation(checkpoint.load(saved(tmp_path / "round-0001")))


def test_a_checkpoint_embeds_and_its_plain_tensors_come_back(tmp_path: Path) -> None:
    folder, source = saved(tmp_path / "round-0001"), tmp_path / "scans.npy"
    np.save(source, scans(3).numpy())
    with torch.no_grad():
        expected = build_network(NANO, seed=1).backbone(scans(3))
    assert main(["embed", str(folder), str(source), "--out", str(tmp_path / "features.npz")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "features.npz")["features"], expected, atol=1e-5)
    assert main(["export", str(folder), "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    model, config = exported.load(tmp_path / "out")
    assert isinstance(model, MiTPlus)
    with torch.no_grad():
        torch.testing.assert_close(model(scans(3)), expected)
    assert (
        "| model | MiTplus `plus_nano`, encoder and decoder of the teacher" in (tmp_path / "out/README.md").read_text()
    )
    assert (config.num_features, config.architecture["widths"]) == (64, (32, 48, 64, 64))


SHALLOW = PlusArchitecture(
    stem=(4, 4), widths=(8, 8, 8, 8), encoder_depths=(1, 0, 0, 0), decoder_depths=(0, 0, 1), head_hidden=8, bottleneck=8
)
"""Every kind of layer once: tracing costs seconds for each block."""


def test_a_graph_answers_as_torch_for_scans_of_another_size_than_its_tables() -> None:
    size = (17, 40, 47)
    encoder = MiTPlus(SHALLOW, {3: (16, 64, 64)}).eval()
    initialise_(encoder, 0)
    model = EncoderOutputs(encoder.requires_grad_(False))
    graph = graph_of(model, size, channels=1, outputs=["features", "tokens"], facts={})
    session = onnxruntime.InferenceSession(graph.payload, providers=["CPUExecutionProvider"])
    x = torch.rand(4, 1, *size, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(session.run(None, {"scan": x.numpy()}), model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
