"""Federated fine-tuning by the real site over the in-process grid: what is learned, what leaves, what is refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from client.app import app
from client.audited_engine import Silence
from client.drawing import draw_views
from client.pictures import read_picture, write_png
from client.site_command import main
from client.site_labels import LabelledScan, check_labels, open_labelled
from client.telling import tell_of_scans
from client.trainer import run_round
from server.app import _probe_of
from server.beginning import first_student
from server.coordinator_config import CoordinatorConfig
from server.global_state import GlobalState
from server.judging import judge
from server.local_grid import LocalGrid
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.federation import RUN, metric_rows, small_study
from tests.labelled_hospitals import CLASSES, hospital, masks_study, opened, task_study
from unimiss_core import checkpoint, progress, task_checkpoint
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError, UnknownPatientError, WireError
from unimiss_core.execution import Execution
from unimiss_core.groups import group_of
from unimiss_core.network import below, tensors_of
from unimiss_core.plan import prepare
from unimiss_core.privacy import mechanisms
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.students import build_student, travelling_layout, update_layout
from unimiss_core.study import StudyConfig
from unimiss_core.views import whole
from unimiss_core.wire import TrainRequest, arrays_in, facts_in

PRIVATE: dict[str, Any] = {
    "privacy": {"mode": "patient", "max_epsilon": 50.0, "noise_multiplier": 1.0, "clip_norm": 0.5, "delta": 1e-4}
}


def federate(
    out: Path, sites: list[Path], study: StudyConfig, *, least: int = 1, resume: bool = False, **settings: Any
) -> GlobalState:
    nodes = {path.parent.name: {"site": str(path)} for path in sites}
    quorum = {"min_sites": least, "min_replies": least, "wait_s": 0.1, "retry_s": 0.0, "deadline_s": 600.0}
    config = CoordinatorConfig(study=Path("unused"), out=out, **quorum, **settings)
    with LocalGrid(app, nodes, run_config={}) as grid:
        return Federation(grid, study, config).run(resume=resume)


def request_of(study: StudyConfig, round: int = 1) -> TrainRequest:
    names = {spec.name for specs in travelling_layout(study).values() for spec in specs}
    student = {name: tensor for name, tensor in tensors_of(build_student(study)).items() if name in names}
    return TrainRequest(study, RUN, round, student, None, {})


def pictures_of(site: Path, study: StudyConfig, count: int = 4) -> Tensor:
    """(N, 1, *S): whole pictures as the model takes them, without the site's own reading of its table."""
    scans = (read_picture(site.parent / "scans" / f"{number}.png", "XR") for number in range(count))
    kept = (np.rint(prepare(scan, study.plan)[0] * 65535) / np.float32(65535) for scan in scans)  # in 16 bits
    return torch.stack([whole(values, study.size_of(2)) for values in kept])


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], StudyConfig]:
    """Two sites with labels and one without, one step of gradient descent in one round."""
    folder, study = tmp_path_factory.mktemp("one-round"), task_study()
    sites = [hospital(folder / name, name, seed=seed) for seed, name in enumerate(("north", "south"))]
    sites.append(hospital(folder / "mute", "mute", labels=None))
    federate(folder / "out", [sites[2], *sites[:2]], study, least=2)  # asked in turn: who says no has said so by then
    return folder / "out", sites, study


def test_a_step_of_two_sites_is_the_step_of_one_that_holds_all_their_scans(
    one_round: tuple[Path, list[Path], StudyConfig],
) -> None:
    out, sites, study = one_round
    model = build_student(study)
    x = torch.cat([pictures_of(site, study) for site in sites[:2]])
    truth = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    F.cross_entropy(model(x), truth).backward()
    after = RunFolder(out).load(1).student
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = (parameter - 0.1 * parameter.grad).detach()
        assert torch.allclose(after[name], expected, atol=1e-6), name


def test_the_run_ends_in_a_model_that_everyone_can_load(one_round: tuple[Path, list[Path], StudyConfig]) -> None:
    out, _, study = one_round
    model, manifest = task_checkpoint.load(out / "model")
    released = RunFolder(out).load(1).student
    assert all(torch.equal(parameter, released[name]) for name, parameter in model.named_parameters())
    assert study.finetune is not None
    assert (manifest.task, manifest.plan, manifest.began_with) == (study.finetune.task, study.plan, "scratch")
    assert (manifest.epoch, manifest.trained_in) == (1, "rounds")


def test_without_a_teacher_none_is_kept_and_the_student_stands_in_its_place(
    one_round: tuple[Path, list[Path], StudyConfig],
) -> None:
    out, sites, study = one_round
    found = RunFolder(out).load(1)
    assert all(torch.equal(found.teacher[name], tensor) for name, tensor in found.student.items())
    state = opened(sites[0], study, run=RunFolder(out).run).memory.before(2)
    assert state is not None
    assert not below("teacher/", state.tensors)


def test_a_site_without_labels_says_so_and_is_not_asked(one_round: tuple[Path, list[Path], StudyConfig]) -> None:
    rows = metric_rows(one_round[0])
    assert rows[0]["sites"]["mute"]["reason"] == "no_labels"
    assert rows[0]["sites"]["mute"]["bytes_down"] == 0
    assert rows[0]["sites"]["north"]["losses"].keys() == {"cross_entropy"}


@pytest.mark.parametrize(("trains", "still"), [("linear_probe", "backbone."), ("frozen", "backbone.encoder.")])
def test_what_the_study_leaves_alone_stays_as_it_began(tmp_path: Path, trains: str, still: str) -> None:
    study = task_study(finetune={"trains": trains})
    request = request_of(study)
    reply = run_round(opened(hospital(tmp_path / "north", "north"), study), request)
    moved = {name for name, change in reply.update.items() if bool(change.any())}
    assert moved
    assert not [name for name in moved if name.startswith(still)]
    assert {spec.name for specs in update_layout(study).values() for spec in specs} == {
        name for name in reply.update if not name.startswith(still)
    }


def test_what_the_study_leaves_alone_is_not_sent_back(tmp_path: Path) -> None:
    """One step of the head alone: its gradient by autograd, and a reply that has no room for more."""
    study = task_study(finetune={"trains": "linear_probe"})
    site = hospital(tmp_path / "north", "north")
    federate(tmp_path / "out", [site], study)
    model = build_student(study)
    F.cross_entropy(model(pictures_of(site, study)), torch.tensor([0, 1, 0, 1])).backward()
    after = RunFolder(tmp_path / "out").load(1).student
    for name, parameter in model.named_parameters():
        expected = parameter.detach() if parameter.grad is None else (parameter - 0.1 * parameter.grad).detach()
        assert torch.allclose(after[name], expected, atol=1e-6), name
    line = metric_rows(tmp_path / "out")[0]["sites"]["north"]
    head = sum(tensor.numel() for name, tensor in after.items() if name.startswith("head."))
    assert 4 * head <= line["bytes_up"] < 4 * head + 4000 < line["bytes_down"] / 10


NOISE_OF_SITES = {
    "mode": "site",
    "sites": 1,
    "max_epsilon": 50.0,
    "noise_multiplier": 1.0,
    "clip_norm": 0.5,
    "delta": 1e-4,
}


def test_noise_that_hides_a_site_is_on_what_the_study_trains_alone(tmp_path: Path) -> None:
    study = task_study(finetune={"trains": "frozen"}, privacy=NOISE_OF_SITES, aggregation={"max_size_ratio": None})
    federate(tmp_path / "out", [hospital(tmp_path / "north", "north")], study, identity="believed")
    before, after = (RunFolder(tmp_path / "out").load(round).student for round in (0, 1))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if not name.startswith("backbone.encoder.")}


def test_masks_are_laid_beside_their_pictures(tmp_path: Path) -> None:
    study = masks_study(local_steps=2)
    site = opened(hospital(tmp_path / "north", "north", masks=True), study)
    scans = site.library.scans
    view = draw_views(scans[2:3], study, torch.Generator().manual_seed(0), torch.device("cpu"))[0, 0, 1]
    expected = (np.add.outer(np.arange(64), np.arange(64)) < 56).astype(np.float32)
    assert torch.equal(view, torch.from_numpy(expected))
    assert isinstance(scans[0], LabelledScan)
    again = open_labelled(site.config, study).scans
    assert [scan.path for scan in again] == [scan.path for scan in scans]
    assert run_round(site, request_of(study)).losses.keys() == {"cross_entropy", "dice"}


def test_the_model_is_judged_on_public_scans_as_its_own_probabilities_say(
    one_round: tuple[Path, list[Path], StudyConfig], tmp_path: Path
) -> None:
    out, _, study = one_round
    generator = torch.Generator().manual_seed(3)
    scans, names = torch.randn(12, 1, 64, 64, generator=generator), np.array([f"P{n}" for n in range(12)])
    labels = np.array(CLASSES * 6)
    np.savez(tmp_path / "public.npz", scans=scans.numpy(), labels=labels, patients=names)
    model, _ = task_checkpoint.load(out / "model")
    with torch.no_grad():
        expected = roc_auc_score(labels == "lesion", model(scans).softmax(-1)[:, 1])
    folder = RunFolder(out)
    figures = judge(folder, [tmp_path / "public.npz"], study, folder.load(1).teacher, is_last=True)["public"]
    assert figures["auc"] == pytest.approx(expected)
    overflows = {name: torch.full_like(tensor, 3e38) for name, tensor in folder.load(1).teacher.items()}  # each finite
    figures = judge(folder, [tmp_path / "public.npz"], study, overflows, is_last=False)["public"]
    assert (figures["auc"], figures["gain"]) == (None, None)
    assert figures["reason"] == "the model's answers are not finite: it diverged"
    np.savez(tmp_path / "other.npz", scans=scans.numpy(), labels=np.array(["ill"] * 12), patients=names)
    with pytest.raises(ConfigError, match="no class of the study, as 'ill'"):
        judge(folder, [tmp_path / "other.npz"], study, folder.load(1).teacher, is_last=True)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "public.npz").read_bytes()[:500])
    for name, told in {"other": "no class of the study", "cut": r"expected an \.npz"}.items():
        config = CoordinatorConfig(study=Path("unused"), out=out, probe=(tmp_path / f"{name}.npz",))
        with pytest.raises(ConfigError, match=told):  # before anything is trained
            _probe_of(config, study)


def test_a_start_gives_its_encoder_and_nothing_else(tmp_path: Path) -> None:
    """Prototypes may be of another number; a checkpoint of a task, which lacks them, starts no pretraining."""
    pretrained = small_study(model={"prototypes": 8})
    begun = tensors_of(build_student(pretrained))
    checkpoint.save(tmp_path / "round-0001", **saved(pretrained, begun))
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, start=tmp_path / "round-0001")
    study = task_study()
    found = first_student(study, config)
    assert all(torch.equal(found[name], begun[name]) for name in found if name.startswith("backbone."))
    plain = tensors_of(build_student(study))
    assert all(torch.equal(found[name], plain[name]) for name in found if name.startswith("head."))
    assert found.keys() == plain.keys()
    checkpoint.save(tmp_path / "round-0002", **saved(study, found))
    config = config.model_copy(update={"start": tmp_path / "round-0002"})
    with pytest.raises(ConfigError, match="give a checkpoint of pretraining"):
        first_student(small_study(model=json.loads(study.model.model_dump_json())), config)


def saved(study: StudyConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    said = {
        "origin": "federation",
        "round": 1,
        "study_digest": study.digest(),
        "model": study.model,
        "plan": study.plan,
    }
    return {**said, "student": tensors, "teacher": tensors}


def test_a_task_of_volumes_trains_volumes_alone(tmp_path: Path) -> None:
    """Its model has no tensor of images, and the site's images are not asked for."""
    study = task_study(
        finetune={"task": {"name": "segmentation", "rank": 3, "classes": ["disc"]}}, batch={"volumes": 2}
    )
    federate(tmp_path / "out", [hospital(tmp_path / "north", "north", pictures=2, masks=True, rank=3)], study)
    line = metric_rows(tmp_path / "out")[0]
    assert line["sites"]["north"]["scans"] == {"2d": 0, "3d": 2}
    assert {group for group, norm in line["global"]["update_norm"].items() if norm > 0} == {"shared", "3d", "head"}
    model, _ = task_checkpoint.load(tmp_path / "out" / "model")
    assert model(torch.zeros(1, 1, *study.size_of(3))).shape == (1, 2, *study.size_of(3))


# ---------------------------------------------------------------------------------------------------------- own heads


def test_a_local_head_stays_learns_on_and_never_leaves(tmp_path: Path) -> None:
    study = task_study(2, finetune={"head": "local"})
    often = {"checkpoint_minutes": 0}  # a round at work is kept, too
    sites = [hospital(tmp_path / name, name, seed=seed, **often) for seed, name in enumerate(("north", "south"))]
    federate(tmp_path / "out", sites, study, least=2)
    folder = RunFolder(tmp_path / "out")
    assert not [name for name in folder.load(2).manifest.tensors if group_of(name) == "head"]
    assert not (tmp_path / "out" / "model").exists()
    heads: list[list[Tensor]] = []
    for site in sites:
        memory = opened(site, study, run=folder.run).memory
        states = [memory.before(round + 1) for round in (1, 2)]
        heads.append([state.tensors["learner/own.head.linear.weight"] for state in states if state is not None])
    own, told = task_checkpoint.load(sites[0].parent / "state" / "models" / folder.run)
    assert torch.equal(dict(own.named_parameters())["head.linear.weight"], heads[0][1])
    assert (told.epoch, told.trained_in) == (2, "rounds")
    first = dict(build_student(study).named_parameters())["head.linear.weight"]
    assert not torch.equal(heads[0][1], heads[1][1])
    for after_one, after_two in heads:
        assert not torch.equal(after_one, first)
        assert torch.dist(after_two, after_one) < torch.dist(after_two, first)  # it went on from its own


def test_no_byte_of_a_local_head_is_in_the_message(tmp_path: Path) -> None:
    study = task_study(finetune={"head": "local"})
    site = opened(hospital(tmp_path / "north", "north"), study)
    layout = travelling_layout(study)
    content = run_round(site, request_of(study)).pack(layout, "fp32")
    assert {group for record in arrays_in(content).values() for group in record} == {"shared", "2d"}
    state = site.memory.before(2)
    assert state is not None
    head = state.tensors["learner/own.head.linear.weight"].numpy().tobytes()[:64]
    sent = b"".join(array.data for record in arrays_in(content).values() for array in record.values())
    assert head not in sent
    assert head not in json.dumps(facts_in(content)).encode()


# ---------------------------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_private_step_is_the_sum_of_clipped_gradients_by_hand(at_once: int) -> None:
    """Three patients with 1, 2 and 1 scans, without noise, beside autograd over each by itself."""
    study = task_study(finetune={"class_weights": [1.0, 3.0]}, **PRIVATE)
    execution = Execution(device=torch.device("cpu"), patients_at_once=at_once)
    learner = PrivateLearner(study, noise=Silence(), ranks={2}, execution=execution)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(count, 1, 64, 64, generator=generator) for count in (1, 2, 1)]
    targets = [torch.tensor([0]), torch.tensor([1, 0]), torch.tensor([1])]
    model = build_student(study)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    lengths = []
    for x, truth in zip(pictures, targets, strict=True):
        weights = torch.tensor([1.0, 3.0])[truth]
        loss = (weights * F.cross_entropy(model(x), truth, reduction="none")).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        lengths.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient * min(1.0, 0.5 / lengths[-1])
    assert max(lengths) > 0.5  # or nothing was clipped

    def views(x: Tensor, truth: Tensor) -> Tensor:
        channel = torch.zeros_like(x)
        for place, number in enumerate(truth):
            channel[place].view(-1)[number] = 1.0
        return torch.cat([x, channel], dim=1)[:, None]

    report = learner.private_step(map(views, pictures, targets), rank=2, step=0)
    for name, parameter in learner.student.named_parameters():
        assert torch.allclose(parameter, dict(model.named_parameters())[name] - 0.1 * expected[name] / 4, atol=2e-6)
    assert report.terms.keys() == {"cross_entropy"}


def test_the_head_is_trained_whatever_else_a_private_study_leaves_alone() -> None:
    privacy = {"privacy": PRIVATE["privacy"] | {"trained": "norms_and_biases"}}
    names = PrivateLearner(task_study(**privacy), ranks={2}).trained_names(2, 0)
    assert {"head.linear.weight", "head.linear.bias"} <= set(names)
    whole = dict(build_student(task_study()).named_parameters())
    assert all(name.startswith("head.") or whole[name].ndim == 1 for name in names)


def test_without_a_centre_the_gradients_noise_is_all_there_is_to_charge() -> None:
    (each,) = mechanisms(task_study(**PRIVATE), {2}, [1])
    assert each.noise_multiplier == pytest.approx(1.0)


def test_counts_losses_and_times_of_a_private_site_do_not_leave(tmp_path: Path) -> None:
    study = task_study(**PRIVATE)
    site = hospital(tmp_path / "north", "north", privacy={"holds": ["images", "volumes"]})
    federate(tmp_path / "out", [site], study)
    line = metric_rows(tmp_path / "out")[0]["sites"]["north"]
    assert (line["status"], line["scans"], line["losses"], line["seconds"]) == ("ok", {"2d": 1, "3d": 0}, {}, 0.0)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_names_of_classes_that_a_study_brings_do_nothing_to_the_sites_screen(tmp_path: Path) -> None:
    task = {"name": "classification", "rank": 2, "classes": ["a\nnorth: admitted", "\x1b[2Jb\u202e"]}
    study, heard = task_study(finetune={"task": task}), list[str]()
    for name, labels in (("mute", None), ("other", {"data": {"table": "labels.csv"}, "classes": ["healthy", "ill"]})):
        site = opened(hospital(tmp_path / name, name, labels=labels), study)
        with progress.listen(lambda event: heard.append(getattr(event, "text", ""))), pytest.raises(WireError):
            check_labels(site.config, study)
    assert [one.partition(":")[0] for one in heard] == ["mute", "other"]
    assert all(one.isprintable() for one in heard)


def test_a_site_with_other_classes_is_told_what_is_asked_for(tmp_path: Path) -> None:
    settings = {"labels": {"data": {"table": "labels.csv"}, "classes": ["healthy", "ill"]}}
    site = opened(hospital(tmp_path / "north", "north", **settings), task_study())
    heard: list[str] = []
    for _ in range(2):  # as in two rounds
        with progress.listen(lambda event: heard.append(str(event))), pytest.raises(WireError) as refused:
            check_labels(site.config, site.study)
        assert refused.value.reason == "no_labels"
    assert len(heard) == 1
    assert "clear, lesion" in heard[0]
    assert "healthy, ill" in heard[0]


def test_a_scan_under_two_patients_is_told_in_a_private_study(tmp_path: Path) -> None:
    site, heard = hospital(tmp_path / "north", "north", privacy={"holds": ["images"]}), list[str]()
    shutil.copyfile(tmp_path / "north" / "scans" / "0.png", tmp_path / "north" / "scans" / "1.png")
    private = opened(site, task_study(**PRIVATE))
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        tell_of_scans(private, private.library)
    assert any("1 scans stand under several patients each" in told for told in heard)


def test_masks_of_nobody_known_are_refused_in_a_private_study(tmp_path: Path) -> None:
    (tmp_path / "msd").mkdir()
    settings = {"labels": {"data": {"name": "msd", "folder": "../msd"}, "classes": ["disc"]}}
    site = opened(hospital(tmp_path / "north", "north", **settings), masks_study(**PRIVATE))
    with pytest.raises(UnknownPatientError, match=r"patient_pattern"):
        check_labels(site.config, site.study)


def test_a_label_that_is_no_class_is_told_by_its_line(tmp_path: Path) -> None:
    path = hospital(tmp_path / "north", "north")
    table = tmp_path / "north" / "labels.csv"
    table.write_text(table.read_text().replace("lesion", "leison", 1))
    told = r"labels: table labels.csv: 1 problem.*\n.*line 3: column 'label' holds another class than clear"
    with pytest.raises(ConfigError, match=told):
        open_labelled(opened(path, task_study()).config, task_study())


def test_in_a_private_study_a_wrong_line_is_left_out_and_told_at_the_site_alone(tmp_path: Path) -> None:
    """That it refused the whole table would be told to the coordinator, of a line that one patient brought."""
    study = task_study(**PRIVATE)
    site = hospital(tmp_path / "north", "north", privacy={"holds": ["images", "volumes"]})
    (tmp_path / "north" / "labels.csv").write_text(
        (tmp_path / "north" / "labels.csv").read_text().replace("lesion", "leison", 1) + f"{'x' * 300}.png,clear,P9\n"
    )
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        library = open_labelled(opened(site, study).config, study)
    assert len(library.scans) == 3
    assert library.left_out == {"cannot_open": 1, "label_unfit": 1}
    assert "north: labels left out: line 3: column 'label' holds another class than clear, lesion" in heard
    federate(tmp_path / "out", [site], study)
    line = metric_rows(tmp_path / "out")[0]["sites"]["north"]
    assert (line["status"], line["scans"], line["losses"], line["seconds"]) == ("ok", {"2d": 1, "3d": 0}, {}, 0.0)


def test_a_mask_of_another_shape_is_left_out_and_told(tmp_path: Path) -> None:
    path = hospital(tmp_path / "north", "north", masks=True)
    write_png(tmp_path / "north" / "scans" / "mask-1.png", np.ones((32, 64), dtype=np.uint8))
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(str(event))):
        library = open_labelled(opened(path, masks_study()).config, masks_study())
    assert library.left_out == {"mask_unfit": 1}
    assert len(library.scans) == 3
    assert any("line 3: the scan has (64, 64) voxels, its mask (32, 64)" in told for told in heard)


def test_a_mask_that_does_not_say_that_its_picture_is_stored_turned_is_left_out_and_told(tmp_path: Path) -> None:
    path, exif = hospital(tmp_path / "north", "north", masks=True), Image.Exif()
    exif[274] = 3
    for name in ("1.png", "2.png", "mask-2.png"):
        with Image.open(tmp_path / "north" / "scans" / name) as picture:
            picture.load()
        picture.save(tmp_path / "north" / "scans" / name, exif=exif)
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(str(event))):
        library = open_labelled(opened(path, masks_study()).config, masks_study())
    assert library.left_out == {"mask_unfit": 1}
    assert any("line 3: the picture is stored turned, and its mask does not say so" in told for told in heard)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": {"centre_momentum": 0.5}}, "objective: is of pretraining"),
        ({"views": {"views": 3}}, "views: is of pretraining"),
        ({"task": "pretrain"}, "need each other"),
        ({"finetune": None}, "need each other"),
        ({"optimiser": {"freeze_prototypes_steps": 1, "warmup_steps": 0}}, "has no prototypes"),
    ],
)
def test_what_a_study_of_a_task_contradicts_is_refused(changes: dict[str, Any], told: str) -> None:
    raw = json.loads(task_study().canonical()) | changes
    with pytest.raises(ConfigError, match=told):
        parse(StudyConfig, raw, where="test")


@pytest.mark.parametrize(
    ("finetune", "told"),
    [
        ({"head": "local", "trains": "linear_probe"}, "nothing would be joined"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "expected 2"),
        ({"task": {"name": "segmentation", "classes": [str(n) for n in range(256)]}}, "masks have 8 bits, so 255"),
    ],
)
def test_what_a_task_contradicts_is_refused(finetune: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        task_study(finetune=finetune)


def test_of_mitplus_a_frozen_encoder_leaves_a_classification_nothing_to_join_but_its_head() -> None:
    plus = {"size": "plus_nano", "prototypes": 16}
    with pytest.raises(ConfigError, match="reads the encoder alone, so nothing would be joined"):
        task_study(model=plus, finetune={"head": "local", "trains": "frozen"})
    shared = update_layout(task_study(model=plus, finetune={"trains": "frozen"}))
    assert shared.keys() == {"head"}
    whole = update_layout(task_study(model=plus, finetune={"head": "local"}))
    names = [spec.name for specs in whole.values() for spec in specs]
    assert names
    assert all(name.startswith("backbone.encoder.") for name in names)


def test_studies_of_pretraining_say_nothing_of_tasks_and_keep_their_digests() -> None:
    assert not {"task", "finetune"} & json.loads(small_study().canonical()).keys()
    assert CLASSES == list(json.loads(task_study().canonical())["finetune"]["task"]["classes"])


def test_scans_that_a_table_keeps_for_judging_are_told_once_and_may_be_left_out(tmp_path: Path) -> None:
    site, study, heard = hospital(tmp_path / "north", "north"), task_study(), list[str]()
    lines = (tmp_path / "north" / "labels.csv").read_text().splitlines()
    parts = ["split", "train", "train", "val", "test"]
    split = "\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True))
    (tmp_path / "north" / "labels.csv").write_text(split)
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        assert len(opened(site, study).library.scans) == 4
        assert len(opened(site, study).library.scans) == 4
    assert len([told for told in heard if "keeps 2 of 4 labelled scans for validation or test" in told]) == 1
    chosen = site.read_text().replace("table: labels.csv", "table: labels.csv\n    where: {split: [train]}")
    site.write_text(chosen)
    assert len(opened(site, study).library.scans) == 2


def test_check_says_what_the_table_has_for_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hospital(tmp_path / "north", "north", pictures=3)
    asked = tmp_path / "study.yaml"
    asked.write_text(dump_yaml(task_study()))
    assert main(["check", str(path), "--study", str(asked)]) == 0
    assert "Study 'toy': 3 labelled scans of 3 patients: clear 2, lesion 1." in capsys.readouterr().out
