"""Federated fine-tuning of tasks whose scans are several images or volumes, each site's in files of its own order."""

import contextlib
import csv
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from client import audit_command, held_out, site_labels
from client.audited_engine import Engine, Silence
from client.canaries import canary_scans, canary_site, numbers_of
from client.catalogue import read_one
from client.drawing import draw_views
from client.label_config import LabelsConfig
from client.nifti import write_nifti
from client.patient_draws import PatientDraws
from client.pictures import read_picture, write_png
from client.policy import beyond
from client.privacy_audit import check_engine
from client.reasons import REASONS
from client.research_command import main as unimiss
from client.site import Site
from client.site_config import SitePolicy
from client.site_labels import LabelledScan, check_labels, labels_told, open_labelled
from server.beginning import first_student
from server.coordinator_config import CoordinatorConfig
from server.judging import can_judge
from server.run_folder import RunFolder
from server.simulate import simulate
from tests.federation import metric_rows, saved_checkpoint, small_study
from tests.labelled_hospitals import CLASSES, PLAIN, opened, task_study
from tests.series_files import write_series
from tests.test_federated_finetuning import NOISE_OF_SITES, PRIVATE, federate
from tests.test_several_channels import FILES, write_cases
from unimiss_core import progress, task_checkpoint
from unimiss_core.channels import SEES_THEIR_MEAN, for_channels_of
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError, NoUsableScanError, WireError
from unimiss_core.execution import Execution
from unimiss_core.network import build_network, tensors_of
from unimiss_core.plan import prepare, prepare_channels
from unimiss_core.private_learner import PrivateLearner
from unimiss_core.scan import Modality, Rank, Scan
from unimiss_core.students import build_student, shape_of_views
from unimiss_core.study import PlanConfig, StudyConfig
from unimiss_core.supervised import Supervised
from unimiss_core.tuned_round import load_tuned
from unimiss_core.views import whole

NAMES = ("CT", "PET", "T2")
KINDS: tuple[Modality | None, ...] = ("CT", "PT", None)
NORTH, SOUTH = {"CT": 2, "PET": 0, "T2": 1}, {"CT": 0, "PET": 1, "T2": 2}
"""Which number each has at two sites."""
SHAPE = (14, 36, 40)
MASKS = {"name": "segmentation", "rank": 3, "classes": ["ball"], "channels": NAMES, "input_size": [13, 33, 33]}
PICTURES = {**MASKS, "name": "classification", "kind": "binary", "rank": 2, "classes": CLASSES, "input_size": [40, 44]}
FOLDER = {"data": {"name": "msd", "folder": ".", "patient_pattern": "(?P<patient>.+)"}, "classes": ["ball"]}
COLUMNS = {"data": {"table": "labels.csv", "scan": ["ct", "pet", "t2"]}, "classes": CLASSES, "channels": list(NAMES)}


def study_of(task: Mapping[str, Any], rounds: int = 1, *, finetune: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"plan": {"volume_spacing_mm": [2.0, 1.0, 1.0]}, "batch": {"volumes": 2, "images": 2}, **more}
    return task_study(rounds, finetune={"task": dict(task), "augmentation": PLAIN, **(finetune or {})}, **given)


def volumes_of(seed: int, case: int) -> dict[str, NDArray[np.float32]]:
    """Of other ranges, so that no channel could be taken for another; a ball is in PET alone."""
    random = np.random.default_rng([seed, case])
    pet = random.normal(0, 0.1, SHAPE)
    pet[3:9, 10:22, 8 + case % 5 : 20 + case % 5] += 1
    found = {"CT": random.normal(40, 400, SHAPE), "PET": pet, "T2": random.normal(1000, 50, SHAPE)}
    return {name: values.astype(np.float32) for name, values in found.items()}


def site_file(folder: Path, labels: Mapping[str, Any], **settings: Any) -> Path:
    raw = {"name": folder.name, "data": [{"folder": "imagesTr"}], "labels": labels, "state": "state", "devices": "cpu"}
    (folder / "imagesTr").mkdir(exist_ok=True)
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(raw | {"workers": 1} | settings))
    return path


def told(folder: Path, numbers: Mapping[str, int]) -> None:
    names = {str(number): name for name, number in numbers.items()}
    said = {"labels": {"background": 0, "ball": 1}, "channel_names": names}
    (folder / "dataset.json").write_text(json.dumps(said), encoding="utf-8")


def of_volumes(
    folder: Path, *, numbers: Mapping[str, int] = NORTH, cases: int = 3, seed: int = 0, **settings: Any
) -> Path:
    """A site with nnU-Net's folder of volumes, each channel by its number; its site file."""
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(cases):
        for name, values in volumes_of(seed, case).items():
            path = folder / "imagesTr" / f"c{case}_{numbers[name]:04d}.nii.gz"
            write_nifti(path, Scan(values[None], (2.0, 1.0, 1.0), "OT"))
        ball = (volumes_of(seed, case)["PET"] > 0.5).astype(np.float32)
        write_nifti(folder / "labelsTr" / f"c{case}.nii.gz", Scan(ball[None], (2.0, 1.0, 1.0), "OT"))
    told(folder, numbers)
    return site_file(folder, settings.pop("labels", FOLDER), **settings)


def of_pictures(folder: Path, *, cases: int = 4, seed: int = 0, **settings: Any) -> Path:
    """A site with a table of pictures, three for each patient."""
    (folder / "imagesTr").mkdir(parents=True)
    rows = []
    for case in range(cases):
        row = {"label": CLASSES[case % 2], "patient": f"P{case}"}
        for place, column in enumerate(("ct", "pet", "t2")):
            noise = np.random.default_rng([seed, case, place]).integers(0, 255 - 50 * place, (48, 52))
            row[column] = f"imagesTr/{column}-{case}.png"
            write_png(folder / row[column], noise.astype(np.uint8))
        rows.append(row)
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return site_file(folder, COLUMNS, **settings)


def scans_of(path: Path, study: StudyConfig) -> list[LabelledScan]:
    return [scan for scan in open_labelled(opened(path, study).config, study).scans if isinstance(scan, LabelledScan)]


def alone(folder: Path, study: StudyConfig, case: int, numbers: Mapping[str, int] = NORTH) -> NDArray[np.float32]:
    """(C, *S): each channel prepared as if it were all there is."""
    files = [folder / "imagesTr" / f"c{case}_{numbers[name]:04d}.nii.gz" for name in NAMES]
    pairs = zip(files, KINDS, strict=True)
    return np.concatenate([prepare(read_one(path, kind), study.plan)[0] for path, kind in pairs])


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_site_prepares_each_channel_as_if_it_stood_alone_whatever_its_number(tmp_path: Path) -> None:
    study = study_of(MASKS)
    north = of_volumes(tmp_path / "north", numbers=NORTH)
    south = of_volumes(tmp_path / "south", numbers=SOUTH)
    columns = {"data": {**FOLDER["data"], "channels": [2, 0, 1]}, "classes": ["ball"], "channels": ["ct", "Pet", "T2"]}
    numbered = of_volumes(tmp_path / "numbered", numbers=NORTH, labels=columns)
    (tmp_path / "numbered" / "dataset.json").unlink()
    found = [scans_of(path, study) for path in (north, south, numbered)]
    for case, (one, *others) in enumerate(zip(*found, strict=True)):
        np.testing.assert_allclose(one.whole(), alone(north.parent, study, case), atol=1e-4)
        assert one.modalities == ("CT", "PT", "OT")
        assert all(np.array_equal(one.whole(), other.whole()) for other in others)
        assert all(np.array_equal(one.classes(), other.classes()) for other in others)
        assert np.array_equal(one.classes(), volumes_of(0, case)["PET"] > 0.5)


def test_a_site_may_have_all_channels_as_volumes_of_one_file(tmp_path: Path) -> None:
    """Oracle: the same channels in files of their own."""
    study, found = study_of(MASKS), []
    for name, in_one_file in (("apart", False), ("together", True)):
        (tmp_path / name).mkdir()
        write_cases(tmp_path / name, count=2, in_one_file=in_one_file)
        told(tmp_path / name, FILES)
        found.append(scans_of(site_file(tmp_path / name, FOLDER), study))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.whole(), other.whole())
        assert one.modalities == other.modalities == ("CT", "PT", "OT")


def test_headers_that_round_the_spacing_otherwise_are_of_one_grid() -> None:
    """By itself the second would be a voxel shorter."""
    values, plan = (
        np.random.default_rng(0).random((1, 14, 33, 35)).astype(np.float32),
        PlanConfig(volume_spacing_mm=(1.0, 1.0, 2.0)),
    )
    one, other = (Scan(values, (1.0, 1.0, step), "OT") for step in (1.0, 0.9992))
    assert prepare(other, plan)[0].shape != prepare(one, plan)[0].shape
    found, spacing = prepare_channels([one, other], plan)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[:1], prepare(one, plan)[0])
    assert spacing == (1.0, 1.0, 2.0)


def test_a_view_brings_all_channels_and_the_label_after_them(tmp_path: Path) -> None:
    study, path = study_of(PICTURES), of_pictures(tmp_path / "north")
    scans = scans_of(path, study)
    views = draw_views(scans, study, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert views.shape[1:] == shape_of_views(study, 2) == (1, 4, 40, 44)
    expected = pictures_of(path.parent, study, 4)
    torch.testing.assert_close(views[:, 0, :3], expected, atol=2e-4, rtol=0)
    assert views[:, 0, 3].flatten(1)[:, :2].tolist() == [[1, 0], [0, 1]] * 2


def pictures_of(folder: Path, study: StudyConfig, cases: int) -> Tensor:
    """(N, C, *S) as the model takes them, without the site's own reading of its table."""

    def values(case: int) -> NDArray[np.float32]:
        paths = [folder / "imagesTr" / f"{column}-{case}.png" for column in ("ct", "pet", "t2")]
        scans = [read_picture(path, kind or "XR") for path, kind in zip(paths, KINDS, strict=True)]
        return np.concatenate([prepare(scan, study.plan)[0] for scan in scans])

    return torch.stack([whole(values(case), study.size_of(2)) for case in range(cases)])


def test_series_are_held_against_the_names_that_a_study_gives_their_columns(tmp_path: Path) -> None:
    """Again with each study, whatever is kept of an earlier one: they say themselves that they are CT and PET."""
    folder, lines = tmp_path / "north", ["a,b,label,patient"]
    for case in range(2):
        for place, kind in enumerate(("CT", "PT")):
            volume = np.random.default_rng([case, place]).integers(0, 900, (13, 34, 36)).astype(np.int16)
            write_series(folder / f"{kind}{case}", volume, attributes={"Modality": kind})
        lines.append(f"CT{case},PT{case},{CLASSES[case]},P{case}")
    (folder / "labels.csv").write_text("\n".join(lines))
    found = []
    for names in (["CT", "PET"], ["PET", "CT"], ["early", "late"]):
        data = {"table": "labels.csv", "scan": ["a", "b"], "modality": "OT"}
        path = site_file(folder, {"data": data, "classes": CLASSES, "channels": names})
        study = study_of({**PICTURES, "rank": 3, "channels": names, "input_size": None})
        with contextlib.suppress(NoUsableScanError):
            found.append((names[0], [scan.modalities for scan in scans_of(path, study)]))
    assert found == [("CT", [("CT", "PT")] * 2), ("early", [("CT", "PT")] * 2)]


def test_what_changes_of_any_channel_is_read_again_and_nothing_else_is(tmp_path: Path) -> None:
    study, path = study_of(MASKS), of_volumes(tmp_path / "north", cases=2)
    first = [scan.path for scan in scans_of(path, study)]
    assert [scan.path for scan in scans_of(path, study)] == first
    changed = tmp_path / "north" / "imagesTr" / "c0_0001.nii.gz"
    write_nifti(changed, Scan(volumes_of(9, 0)["T2"][None], (2.0, 1.0, 1.0), "OT"))
    again = scans_of(path, study)
    assert [scan.path == old for scan, old in zip(again, first, strict=True)] == [False, True]
    np.testing.assert_allclose(again[0].whole(), alone(path.parent, study, 0), atol=1e-4)
    turned = scans_of(path, study_of({**MASKS, "channels": NAMES[::-1]}))
    assert np.array_equal(turned[1].whole(), again[1].whole()[::-1])
    told(path.parent, {"MR": 2, "PET": 0, "T2": 1})  # no longer in Hounsfield units
    other_kind = scans_of(path, study_of({**MASKS, "channels": ("MR", "PET", "T2")}))
    assert other_kind[1].modalities == ("MR", "PT", "OT")
    assert not np.array_equal(other_kind[1].whole()[0], again[1].whole()[0])


@pytest.mark.parametrize(
    ("labels", "asked", "message"),
    [
        (COLUMNS, {"channels": None}, "scans of one image or volume each, and labels.channels of the site file is CT"),
        (COLUMNS, {"channels": ("PET", "CT", "T2")}, "the channels PET, CT, T2, and labels.channels .* is CT, PET, T2"),
        (COLUMNS, {"channels": ("CT", "PET")}, "of the channels CT, PET, and labels.channels .* is CT, PET, T2"),
        (
            {"data": {"table": "labels.csv"}, "classes": CLASSES},
            {},
            "CT, PET, T2; make labels.data.scan of the site file a list of as many, and name them in labels.channels",
        ),
        (
            {**FOLDER, "data": {**FOLDER["data"], "channels": [0, 1, 2]}, "channels": ["PET", "T2", "CT"]},
            {},
            "the channels CT, PET, T2, and labels.channels of the site file is PET, T2, CT",
        ),
        (
            FOLDER,
            {"channels": ("CT", "T1\x1b[2J")},
            r"dataset.json names CT, PET, T2, which does not say which channel T1\S+ is",
        ),
        (
            {**FOLDER, "data": {**FOLDER["data"], "channels": [0, 2, 1]}, "channels": list(NAMES)},
            {},
            "data.channels: CT is 0, and dataset.json says it is 2",
        ),
        ({**FOLDER, "data": {**FOLDER["data"], "channel": 1}}, {}, "data.channel: is of a task without channels"),
    ],
)
def test_other_channels_are_answered_as_other_classes_are_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    """The study's names do nothing to the screen."""
    tmp_path = tmp_path / "north"
    tmp_path.mkdir()
    study = study_of({**(MASKS if labels["data"].get("name") else PICTURES), **asked})
    told(tmp_path, NORTH)
    (tmp_path / "labels.csv").touch()
    site = opened(site_file(tmp_path, labels), study)
    monkeypatch.setattr(site_labels, "labels_in", lambda *_, **__: pytest.fail("read"))
    heard: list[str] = []
    for _ in range(2):
        with progress.listen(lambda event: heard.append(getattr(event, "text", ""))):
            with pytest.raises(WireError) as refused:
                check_labels(site.config, study)
            assert refused.value.reason == "no_labels"
    (said,) = heard
    assert said.isprintable()
    assert re.search(message, said)
    why = said.partition("study 'toy': ")[2]
    assert list(labels_told(site.config, study)) == [f"Study 'toy': no; {why}."]


def test_what_a_site_has_labels_for_is_told_with_its_channels(tmp_path: Path) -> None:
    site = opened(of_pictures(tmp_path / "north"), study_of(PICTURES))
    (told,) = labels_told(site.config, None)
    assert told == "Studies that fine-tune: those for clear, lesion, of scans of CT, PET, T2 (labels)."
    (told,) = labels_told(site.config, site.study)
    assert told == "Study 'toy': 4 labelled scans of 4 patients: clear 2, lesion 2."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": None}, "name what the 3 of data.scan are, in their order, as studies do"),
        ({"channels": ["CT", "PET"]}, "name what the 3 of data.scan are"),
        ({"data": {"table": "labels.csv"}}, "say where each of them is, by a list of as many in data.scan"),
        ({"data": {"name": "msd", "folder": "."}}, "by a list of as many in data.channels"),
        ({"data": {"name": "msd", "folder": ".", "channels": [0, 1]}}, "name what the 2 of data.channels are"),
    ],
)
def test_a_site_names_what_each_of_its_channels_is(changes: dict[str, Any], message: str) -> None:
    parse(LabelsConfig, COLUMNS, where="test")
    with pytest.raises(ConfigError, match=message):
        parse(LabelsConfig, COLUMNS | changes, where="test")


def test_a_study_may_have_channels_of_other_grids_laid_on_the_first(tmp_path: Path) -> None:
    """The same files: what one study leaves out is read again for the other."""
    path, found = of_volumes(tmp_path / "north"), {}
    write_nifti(path.parent / "imagesTr" / "c0_0001.nii.gz", Scan(volumes_of(0, 0)["T2"][None], (2.0, 1.0, 1.5), "OT"))
    for other_grids in ("refuse", "resample", "refuse"):
        scans = scans_of(path, study_of({**MASKS, "other_grids": other_grids}))
        assert all(scan.shape[0] == 3 for scan in scans)
        found.setdefault(other_grids, []).append({scan.key for scan in scans})
    (refused, again), (laid,) = found.values()
    assert refused == again < laid
    assert len(laid) == len(refused) + 1


# ------------------------------------------------------------------------------------------------------------ privacy


LEFT_OUT = f"line 1: channels_apart ({REASONS['channels_apart']}); line 3: blank (shows one value everywhere); line 4: "


def broken(folder: Path) -> None:
    """Of six cases the first four: channels apart, one channel less, one that shows nothing, one that is none."""
    images = folder / "imagesTr"
    write_nifti(images / "c0_0001.nii.gz", Scan(volumes_of(0, 0)["T2"][None], (2.0, 1.0, 1.5), "OT"))
    (images / "c1_0001.nii.gz").unlink()
    write_nifti(images / "c2_0001.nii.gz", Scan(np.ones((1, *SHAPE), np.float32), (2.0, 1.0, 1.0), "OT"))
    (images / "c3_0001.nii.gz").write_bytes(b"no scan")


def test_in_a_private_study_wrong_channels_cost_their_own_patient_and_are_told_at_the_site_alone(
    tmp_path: Path,
) -> None:
    study, holds = study_of(MASKS, **PRIVATE), {"privacy": {"holds": ["images", "volumes"]}}
    whole, damaged = (of_volumes(tmp_path / name, cases=6, **holds) for name in ("whole", "damaged"))
    broken(damaged.parent)
    secret = b"\1" * 32
    for path in (whole, damaged):
        (path.parent / "state").mkdir(mode=0o700)
        (path.parent / "state" / "patient_secret").write_bytes(secret)
        (path.parent / "state" / "patient_secret").chmod(0o600)
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(getattr(event, "text", ""))):
        library = open_labelled(opened(damaged, study).config, study)
    expected = scans_of(whole, study)[4:]
    assert [scan.patient for scan in library.scans] == [scan.patient for scan in expected]
    assert [scan.key for scan in library.scans] == [scan.key for scan in expected]
    left_out = {"blank": 1, "channels_apart": 1, "label_unfit": 1}
    assert {reason: library.left_out[reason] for reason in left_out} == left_out
    assert sum(library.left_out.values()) == 4
    assert "damaged: labels left out: case 2: has no channel 1 (data.channels: T2)" in heard
    (lines,) = (line for line in heard if line.startswith("damaged: labelled scans left out: "))
    assert LEFT_OUT in lines
    federate(tmp_path / "out", [whole, damaged], study, least=2)
    rows = metric_rows(tmp_path / "out")[0]["sites"]
    for line in (rows["whole"], rows["damaged"]):
        assert (line["status"], line["scans"], line["losses"], line["seconds"]) == ("ok", {"2d": 0, "3d": 1}, {}, 0.0)
    assert rows["whole"]["bytes_up"] == rows["damaged"]["bytes_up"]


def test_otherwise_a_site_names_the_lines_that_it_leaves_out(tmp_path: Path) -> None:
    study, path = study_of(MASKS), of_volumes(tmp_path / "north", cases=6)
    broken(path.parent)
    heard: list[str] = []
    with progress.listen(lambda event: heard.append(getattr(event, "text", ""))):
        assert len(scans_of(path, study)) == 2
    assert any(LEFT_OUT in line for line in heard)
    lacking = "case 2: has no channel 1 (data.channels: T2)"
    assert f"north: labels left out: {lacking}" in heard
    told = labels_told(opened(path, study).config, study)
    assert list(told) == ["Study 'toy': 5 labelled scans of 5 patients.", f"Left out: {lacking}."]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(("task", "rank"), [(PICTURES, 2), (MASKS, 3)], ids=["images", "volumes"])
def test_a_patients_gradient_is_that_of_the_patients_loss_alone(task: dict[str, Any], rank: Rank, at_once: int) -> None:
    """Three patients with 1, 2 and 1 scans, without noise, beside autograd over each by itself."""
    study = study_of(task, **PRIVATE)
    execution = Execution(device=torch.device("cpu"), patients_at_once=at_once)
    learner = PrivateLearner(study, noise=Silence(), ranks={rank}, execution=execution)
    generator = torch.Generator().manual_seed(0)
    one = shape_of_views(study, rank)
    assert one[:2] == (1, 4)
    patients = [torch.randn(count, *one, generator=generator) for count in (1, 2, 1)]
    for views in patients:
        views[:, :, 3] = (views[:, :, 3] > 0).float() if rank == 3 else 0.0
        views[:, 0, 3].view(len(views), -1)[:, 1] = 1.0
    model, objective = build_student(study), Supervised(study.finetune)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    lengths = []
    for views in patients:
        loss = objective(model, None, views, {}).total  # type: ignore[arg-type]
        gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        lengths.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient * min(1.0, 0.5 / lengths[-1])
    assert max(lengths) > 0.5  # or nothing was clipped
    kernel = next(name for name in expected if name.endswith(f"stem.{rank}d.conv.weight"))
    assert (expected[kernel].abs().flatten(2).amax((0, 2)) > 0).all()  # of each channel
    learner.private_step(iter(patients), rank=rank, step=0)
    for name, parameter in learner.student.named_parameters():
        moved = dict(model.named_parameters())[name] - 0.1 * expected[name] / 2
        assert torch.allclose(parameter, moved, atol=4e-6), name


def test_the_audit_of_such_a_study_feeds_canaries_of_its_channels_and_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    privacy = {"mode": "patient", "max_epsilon": 50.0, "noise_multiplier": 1.0, "delta": 1e-4, "scans_per_patient": 2}
    adamw = {"optimiser": {"warmup_steps": 0, "clip_norm": None}, "privacy": privacy}
    for task, rank in ((PICTURES, 2), (MASKS, 3)):
        study = study_of(task, **adamw)
        scans = canary_scans(study, 5, 2, rank)
        assert scans[0].shape[0] == scans[0].whole().shape[0] == 3
        draws = PatientDraws(site_of(study, scans), Engine(study, rank).learner().team, torch.device("cpu"))
        drawn = next(views for step in range(200) for views in draws.draw(step).views())
        assert drawn.shape[1:3] == (1, 4)
        assert numbers_of(drawn).tolist() == [5] * len(drawn)
    study = study_of(PICTURES, **adamw)
    (tmp_path / "study.yaml").write_text(dump_yaml(study))
    monkeypatch.setattr(audit_command, "check_engine", partial(check_engine, releases=4))
    asked = ["audit-privacy", "--study", str(tmp_path / "study.yaml"), "--steps", "2", "--canaries", "20"]
    assert unimiss(asked) == 0
    assert "no measure contradicts the claim" in capsys.readouterr().out


def site_of(study: StudyConfig, scans: list[Any]) -> Site:
    from client.cache import Library

    return canary_site(study, Library(tuple(scans), {}))


def test_a_sites_policy_counts_the_voxels_of_all_channels() -> None:
    study = study_of(MASKS)
    voxels = 2 * 4 * 13 * 33 * 33
    assert list(beyond(SitePolicy(most_voxels=voxels), study)) == []
    (told,) = beyond(SitePolicy(most_voxels=voxels - 1), study)
    assert f"it asks for {voxels:,} voxels in a step" in told


def test_noise_that_hides_a_site_is_on_the_kernel_of_all_channels(tmp_path: Path) -> None:
    study = study_of(PICTURES, privacy=NOISE_OF_SITES, aggregation={"max_size_ratio": None})
    federate(tmp_path / "out", [of_pictures(tmp_path / "north")], study, identity="believed")
    before, after = (RunFolder(tmp_path / "out").load(round).student for round in (0, 1))
    kernel = next(name for name in after if name.endswith("stem.2d.conv.weight"))
    assert after[kernel].shape[1] == 3
    assert ((after[kernel] - before[kernel]).flatten(2).std((0, 2)) > 1e-4).all()


# ------------------------------------------------------------------------------------------------------------- start


def test_a_run_begins_from_what_knows_other_channels(tmp_path: Path) -> None:
    study = study_of(MASKS)
    kernel = "backbone.encoder.stem.3d.conv.weight"
    pretraining = small_study()
    network = tensors_of(build_network(pretraining.model, seed=3))
    start = saved_checkpoint(tmp_path / "begun", study=pretraining, student=network, teacher=network)

    def begun(study: StudyConfig, folder: Path) -> Mapping[str, Tensor]:
        return first_student(study, CoordinatorConfig(study=Path("unused"), out=tmp_path, start=folder))

    first = begun(study, start)
    torch.testing.assert_close(first[kernel], (network[kernel] / 3).expand(-1, 3, -1, -1, -1))
    assert all(torch.equal(tensor, network[name]) for name, tensor in first.items() if same(name, kernel))
    random = tensors_of(build_student(study))
    assert all(torch.equal(tensor, random[name]) for name, tensor in first.items() if name.startswith("head."))
    tuned = {**first, kernel: torch.randn(first[kernel].shape, generator=torch.Generator().manual_seed(0))}
    folder = saved_checkpoint(
        tmp_path / "run" / "checkpoints" / "round-0001", study=study, student=tuned, teacher=tuned
    )
    (tmp_path / "run" / "study.yaml").write_text(dump_yaml(study))
    assert torch.equal(begun(study, folder)[kernel], tuned[kernel])
    frozen, heard = study_of(MASKS, finetune={"trains": "frozen"}), []
    with progress.listen(heard.append):
        for beside, is_told in ((start, True), (folder, False)):
            heard.clear()
            begun(frozen, beside)
            assert (progress.Note(SEES_THEIR_MEAN) in heard) == is_told
    reordered = study_of({**MASKS, "channels": NAMES[::-1]})
    assert torch.equal(begun(reordered, folder)[kernel], tuned[kernel].flip(1))
    for channels in ((*NAMES[:-1], "DWI"), ("CT", "PET"), None):
        other = study_of({**MASKS, "channels": channels})
        found = begun(other, folder)[kernel]
        assert found.shape[1] == (len(channels) if channels else 1)
        torch.testing.assert_close(found.sum(1), tuned[kernel].sum(1))
        assert (found == found[:, :1]).all()


def same(name: str, kernel: str) -> bool:
    return name.startswith("backbone.") and name != kernel


def test_a_start_that_nobody_knows_the_channels_of_is_parted_anew(tmp_path: Path) -> None:
    """As many may be others, or in another order; so it is of pretraining, where three channels of a picture are
    one."""
    kernel, study = "backbone.encoder.stem.2d.conv.weight", study_of(PICTURES)
    tuned = tensors_of(build_student(study))
    folder = saved_checkpoint(tmp_path / "tuned", study=study, student=tuned, teacher=tuned)
    network = tensors_of(build_network(study.model, seed=3))
    start = saved_checkpoint(tmp_path / "begun", study=small_study(), student=network, teacher=network)
    config = partial(CoordinatorConfig, study=Path("unused"), out=tmp_path)
    parted = first_student(study, config(start=folder))[kernel]
    torch.testing.assert_close(parted, tuned[kernel].mean(1, keepdim=True).expand_as(parted))
    found = first_student(study, config(start=start))[kernel]
    assert found.shape == network[kernel].shape
    assert study.finetune is not None
    expected = for_channels_of(study.finetune.task, study.model, network, None)[kernel]
    assert torch.equal(found, expected)
    assert not torch.equal(found, network[kernel])


def test_sets_of_one_channel_do_not_judge_a_model_of_several() -> None:
    several, one = study_of(PICTURES).finetune, study_of({**PICTURES, "channels": None}).finetune
    assert (can_judge(several), can_judge(one)) == (False, True)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_figures_of_held_out_patients_are_of_all_channels(tmp_path: Path) -> None:
    """Oracle: the model's own answers to the pictures, read here."""
    study = study_of(PICTURES, finetune={"validation": 0.5})
    site = opened(of_pictures(tmp_path / "north", cases=48), study)
    out = [number for number, scan in enumerate(site.everything.scans) if held_out.is_held_out(scan.patient, study)]
    student = tensors_of(build_student(study))
    figures = held_out.measured(site.config, study, site.everything, student, torch.device("cpu"))
    model = build_student(study).eval()
    with torch.no_grad():
        chances = model(pictures_of(tmp_path / "north", study, 48)[out]).softmax(-1)[:, 1]
    expected = roc_auc_score([number % 2 for number in out], chances)
    steps = 20 if len(out) < 25 else 100
    assert figures["validation_auc"] == pytest.approx(round(expected * steps) / steps, abs=1e-9)
    assert len(site.library.scans) == 48 - len(out)


def test_masks_of_held_out_patients_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    study = study_of(MASKS, finetune={"validation": 0.9})
    site = opened(of_volumes(tmp_path / "north", cases=8), study)
    student = tensors_of(build_student(study))
    assert held_out.measured(site.config, study, site.everything, student, torch.device("cpu")).keys() == {
        "validation_dice"
    }


def test_a_site_keeps_a_model_of_all_its_kinds(tmp_path: Path) -> None:
    study = study_of(MASKS, finetune={"head": "local"})
    path = of_volumes(tmp_path / "north")
    federate(tmp_path / "out", [path], study)
    model, manifest = task_checkpoint.load(tmp_path / "north" / "state" / "models" / RunFolder(tmp_path / "out").run)
    assert manifest.trained_on == ("CT", "OT", "PT")
    assert manifest.task.channels == NAMES
    assert manifest.channel_numbers == tuple(NORTH[name] for name in NAMES) != (0, 1, 2)
    assert model(torch.zeros(1, 3, 13, 33, 33)).shape == (1, 2, 13, 33, 33)


def test_a_simulation_of_two_sites_goes_from_a_pretrained_start_to_a_model(tmp_path: Path) -> None:
    study = study_of(MASKS, rounds=2, local_steps=2)
    for seed, (name, numbers) in enumerate({"north": NORTH, "south": SOUTH}.items()):
        of_volumes(tmp_path / name, numbers=numbers, seed=seed)
    pretraining = small_study()
    network = tensors_of(build_network(pretraining.model, seed=3))
    saved_checkpoint(tmp_path / "begun", study=pretraining, student=network, teacher=network)
    (tmp_path / "study.yaml").write_text(dump_yaml(study))
    sites = [
        {
            "name": name,
            "data": [{"folder": f"{name}/imagesTr"}],
            "labels": {**FOLDER, "data": {**FOLDER["data"], "folder": name}},
            "workers": 1,
            "devices": "cpu",
        }
        for name in ("north", "south")
    ]
    simulation, out = {"study": "study.yaml", "start": "begun", "sites": sites}, tmp_path / "out"
    (tmp_path / "simulation.yaml").write_text(yaml.safe_dump(simulation))
    simulate(tmp_path / "simulation.yaml", out)
    rows = metric_rows(out)
    losses = [value for row in rows for site in ("north", "south") for value in row["sites"][site]["losses"].values()]
    assert len(losses) == 8
    assert np.isfinite(losses).all()
    first, last = (RunFolder(out).load(round).student for round in (0, 2))
    kernel = "backbone.encoder.stem.3d.conv.weight"
    torch.testing.assert_close(first[kernel], (network[kernel] / 3).expand(-1, 3, -1, -1, -1))
    parts = (last[kernel] - first[kernel]).flatten(2).abs().amax((0, 2))
    assert (parts > 0).all()
    assert len(set(parts.tolist())) == 3  # each learned of its own channel
    model, manifest = task_checkpoint.load(out / "model")
    assert (manifest.task.channels, manifest.channels) == (NAMES, ())
    scan = torch.from_numpy(alone(tmp_path / "south", study, 0, SOUTH))[None, :, :13, :33, :33]
    with torch.inference_mode():
        answer = model.eval()(4 * scan - 2)
        assert torch.equal(load_tuned(out / "model")[0].eval()(4 * scan - 2), answer)
    assert answer.shape == (1, 2, 13, 33, 33)
    assert answer.isfinite().all()
