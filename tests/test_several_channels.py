"""Models of tasks whose scans are several images or volumes of one patient."""

import json
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from client import catalogue, workers
from client.catalogue import read_one
from client.finetune_config import FinetuneConfig
from client.label_tables import label_table
from client.labelled import Labelled, prepare_cases, read_cases
from client.nifti import write_nifti
from client.splits import split_cases
from tests.test_label_tables import configured
from tests.test_labelled import write_case
from unimiss_core.backbone import scan_kernel
from unimiss_core.channels import for_channels_of
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.network import build_network, tensors_of
from unimiss_core.plan import affine_of_prepared, prepare, prepare_channels
from unimiss_core.progress import Note, listen
from unimiss_core.scan import Modality, Rank, Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig
from unimiss_core.tasks import TaskModel, build_task_model

SIZES: dict[Rank, tuple[int, ...]] = {2: (33, 47), 3: (13, 35, 41)}
MODELS = [ModelConfig(prototypes=16), ModelConfig(size="plus_nano", prototypes=16)]
SEQUENCES = ("FLAIR", "T1", "T1gd", "T2")


def segmentation(rank: Rank, channels: tuple[str, ...] | None = SEQUENCES) -> SegmentationConfig:
    return SegmentationConfig(rank=rank, classes=("a", "b"), channels=channels)


def begun(model: ModelConfig, task: SegmentationConfig, seed: int = 1) -> TaskModel:
    """On a network of pretraining, of another seed than the head."""
    pretrained = tensors_of(build_network(model, seed=seed))
    return build_task_model(model, task, seed=0, pretrained=for_channels_of(task, model, pretrained, None)).eval()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.size)
@pytest.mark.parametrize("rank", SIZES)
@pytest.mark.parametrize("channels", [("T1", "T2"), ("R", "G", "B"), SEQUENCES])
def test_a_scan_whose_channels_are_alike_is_seen_as_the_one_that_pretraining_knows(
    model: ModelConfig, rank: Rank, channels: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    one = torch.randn(2, 1, *SIZES[rank])
    alike = one.expand(-1, len(channels), *[-1] * rank)
    pretrained = build_network(model, seed=1).backbone.eval()
    with torch.inference_mode():
        expected, found = pretrained.features(one), begun(model, segmentation(rank, channels)).backbone.features(alike)
    torch.testing.assert_close(found.class_token, expected.class_token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.decoder_map, expected.decoder_map, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.size)
@pytest.mark.parametrize("rank", SIZES)
def test_every_channel_counts_and_learns(model: ModelConfig, rank: Rank) -> None:
    found = build_task_model(model, segmentation(rank), seed=0, pretrained=None)
    x = torch.randn(2, 4, *SIZES[rank], generator=torch.Generator().manual_seed(0)).requires_grad_()
    answer = found(x)
    assert answer.shape == (2, 3, *SIZES[rank])
    answer.square().sum().backward()
    assert x.grad is not None
    assert all(x.grad[:, channel].abs().max() > 0 for channel in range(4))
    for channels in (1, 3, 5):
        with pytest.raises(ValueError, match=f"needs 4 channels; got {channels}"):
            found(torch.zeros(1, channels, *SIZES[rank]))


@pytest.mark.parametrize("rank", SIZES)
def test_weights_of_the_same_channels_stay_and_of_others_are_parted_anew(rank: Rank) -> None:
    model = MODELS[0]
    tensors = tensors_of(begun(model, segmentation(rank)))
    kernel = f"backbone.encoder.stem.{rank}d.conv.weight"
    tensors[kernel] = torch.randn(tensors[kernel].shape, generator=torch.Generator().manual_seed(0))
    same = for_channels_of(segmentation(rank), model, tensors, SEQUENCES)
    assert torch.equal(same[kernel], tensors[kernel])
    whole = tensors[kernel].sum(1)
    for other in (None, ("T1", "T2"), ("T1", "T2", "T1gd", "DWI")):
        task = segmentation(rank, other)
        parted = for_channels_of(task, model, tensors, SEQUENCES)[kernel]
        torch.testing.assert_close(parted.sum(1), whole)
        build_task_model(model, task, seed=0, pretrained={**tensors, kernel: parted})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.size)
@pytest.mark.parametrize("rank", SIZES)
def test_channels_keep_their_weights_wherever_they_stand(model: ModelConfig, rank: Rank) -> None:
    """A model of the same channels in another order, asked about the scan in that order, answers as the first did."""
    order = ("t2 ", "FLAIR", "T1GD", "T1")
    network = begun(model, segmentation(rank))
    tensors = tensors_of(network)
    kernel = f"backbone.{scan_kernel(model, rank)}"
    tensors[kernel] = torch.randn(tensors[kernel].shape, generator=torch.Generator().manual_seed(0)) / 10
    scan = torch.randn(1, 4, *SIZES[rank], generator=torch.Generator().manual_seed(1))
    places = [["FLAIR", "T1", "T1gd", "T2"].index(name) for name in ("T2", "FLAIR", "T1gd", "T1")]
    known = build_task_model(model, segmentation(rank), seed=0, pretrained=tensors, takes_head=True).eval()
    moved = for_channels_of(segmentation(rank, order), model, tensors, SEQUENCES)
    assert not torch.equal(moved[kernel], tensors[kernel])
    asked = build_task_model(model, segmentation(rank, order), seed=2, pretrained=moved, takes_head=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(asked(scan[:, places]), known(scan), rtol=1e-4, atol=1e-4)


def test_a_task_of_one_channel_is_written_as_it_always_was() -> None:
    plain = ClassificationConfig(classes=("a", "b"))
    assert "channels" not in plain.model_dump()
    assert plain.channel_count is None
    assert "channels" in ClassificationConfig(classes=("a", "b"), channels=("T1", "T2")).model_dump()


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (("T1",), "at least 2"),
        (("T1", "t1"), "each name may stand once"),
        (("T1", "t1 "), "each name may stand once"),
        ((" ", "T1"), "is no blank"),
        (tuple(map(str, range(17))), "at most 16"),
    ],
)
def test_channels_that_cannot_be(channels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClassificationConfig(classes=("a", "b"), channels=channels)


# ------------------------------------------------------------------------------------------------------ labelled scans

PLAN = PlanConfig(volume_spacing_mm=(2.0, 2.0, 2.0))
TASK = {"name": "segmentation", "rank": 3, "classes": ["ball"], "channels": ["CT", "PET", "T2"]}
FILES = {"CT": 2, "PET": 0, "T2": 1}
"""Which number each has in a folder of nnU-Net's."""
NAMES = {str(number): name for name, number in FILES.items()}


def write_cases(folder: Path, *, count: int = 8, in_one_file: bool = False) -> None:
    """nnU-Net's folder: each case of three channels of other ranges, with the ball in the second alone."""
    for case in range(count):
        write_case(folder, f"c{case}", case)
        path = folder / "imagesTr" / f"c{case}.nii.gz"
        scan, random = read_one(path), np.random.default_rng(100 + case)
        other = [random.normal(centre, width, scan.voxels.shape) for centre, width in ((40, 400), (1e3, 50))]
        channels = [scan.voxels, *(values.astype(np.float32) for values in other)]
        path.unlink()
        if in_one_file:
            volumes = np.concatenate([values.transpose(0, 3, 2, 1) for values in channels])
            image = nibabel.load(folder / "labelsTr" / f"c{case}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(np.moveaxis(volumes, 0, -1), image.affine), path)
            continue
        for number, values in enumerate(channels):
            write_nifti(folder / "imagesTr" / f"c{case}_{number:04d}.nii.gz", Scan(values, scan.spacing_mm, "OT"))


def told(folder: Path, names: dict[str, str]) -> None:
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "ball": 1}, "channel_names": names}), encoding="utf-8"
    )


def of_folder(folder: Path, **data: Any) -> FinetuneConfig:
    split = {"folds": 2, "validation": 0.5}
    return configured(folder, TASK, {"name": "msd", "folder": ".", **data}, split=split)


def prepared(folder: Path, config: FinetuneConfig) -> list[Labelled]:
    table = label_table(config)
    parts = prepare_cases(split_cases(table.cases, config), table, PLAN, config, folder / "prepared")
    return sorted((one for found in parts.values() for one in found), key=lambda one: one.case.number)


def alone(path: Path, modality: Modality | None) -> np.ndarray:
    """A channel prepared as if it were all there is."""
    return prepare(read_one(path, modality), PLAN)[0][0]


def test_each_channel_is_prepared_by_its_own_kind_as_if_it_stood_alone(tmp_path: Path) -> None:
    write_cases(tmp_path)
    told(tmp_path, NAMES)
    found = prepared(tmp_path, of_folder(tmp_path))
    assert len(found) == 8
    for case, one in enumerate(found):
        kinds: list[tuple[int, Modality | None]] = [(2, "CT"), (0, "PT"), (1, None)]
        files = [(tmp_path / "imagesTr" / f"c{case}_{number:04d}.nii.gz", kind) for number, kind in kinds]
        np.testing.assert_allclose(one.whole(), [alone(*file) for file in files], atol=1e-4)
        assert one.modalities == ("CT", "PT", "OT")
        bright = one.whole()[1]
        assert bright[one.mask == 1].mean() - bright[one.mask == 0].mean() > 0.5


def test_volumes_of_one_file_are_its_channels(tmp_path: Path) -> None:
    """Oracle: the same channels in files of their own."""
    (tmp_path / "apart").mkdir()
    (tmp_path / "one").mkdir()
    write_cases(tmp_path / "apart")
    write_cases(tmp_path / "one", in_one_file=True)
    expected = prepared(tmp_path / "apart", of_folder(tmp_path / "apart", channels=[2, 0, 1]))
    told(tmp_path / "one", NAMES)
    for one, other in zip(prepared(tmp_path / "one", of_folder(tmp_path / "one")), expected, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.mask, other.mask)
    notes: list[Any] = []
    (tmp_path / "one" / "dataset.json").unlink()
    with pytest.raises(NoUsableScanError), listen(notes.append):
        prepared(tmp_path / "one", of_folder(tmp_path / "one", channels=[0, 1, 3]))
    assert any("lacks_channel" in note.text for note in notes if isinstance(note, Note))


def test_columns_of_a_table_are_channels(tmp_path: Path) -> None:
    write_cases(tmp_path)
    lines = ["pet,ct,t2,label,patient"]
    lines += [
        ",".join([*(f"imagesTr/c{n}_{k:04d}.nii.gz" for k in (0, 2, 1)), f"labelsTr/c{n}.nii.gz", f"p{n}"])
        for n in range(8)
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    split, data = {"folds": 2, "validation": 0.5}, {"table": "t.csv", "scan": ["ct", "pet", "t2"]}
    by_table = prepared(tmp_path, configured(tmp_path, TASK, data, split=split))
    by_name = prepared(tmp_path, of_folder(tmp_path, channels=[2, 0, 1]))
    for one, other in zip(by_table, by_name, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_channels_that_do_not_lie_on_one_grid_are_left_out(tmp_path: Path) -> None:
    write_cases(tmp_path)
    for number, more in ((0, {"spacing": (1.0, 1.0, 1.5)}), (1, {"offset": 3.0}), (2, {"cut": 1})):
        path = tmp_path / "imagesTr" / f"c{number}_0001.nii.gz"
        scan = read_one(path)
        affine = scan.affine.copy()  # type: ignore[union-attr]
        affine[0, 3] += more.get("offset", 0.0)
        values = scan.voxels[..., int(more.get("cut", 0)) :]
        if "spacing" in more:
            write_nifti(path, Scan(values, more["spacing"], "OT"))  # type: ignore[arg-type]
        else:
            write_nifti(path, Scan(values, scan.spacing_mm, "OT", affine))
    notes: list[Any] = []
    with listen(notes.append):
        found = prepared(tmp_path, of_folder(tmp_path, channels=[2, 0, 1]))
    assert [one.case.number for one in found] == [4, 5, 6, 7, 8]
    assert sum("channels_apart" in note.text for note in notes if isinstance(note, Note)) == 1


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        ({}, None, "task.channels: no dataset.json says which channel CT, PET, T2 is; give data.channels"),
        ({"0": "PET", "1": "T2w", "2": "ct"}, None, "names PET, T2w, ct, which does not say which channel T2 is"),
        (NAMES, [0, 2, 1], "CT is 0, and dataset.json says it is 2"),
        (NAMES, [2, 0], "expected 3 different numbers, of CT, PET, T2, in this order"),
        (NAMES, [2, 0, 0], "expected 3 different numbers"),
        ({**NAMES, "7": " pet"}, None, "does not say which channel PET is"),
        ({}, [2, 0, 7], "has no channel 7 .data.channels"),
    ],
)
def test_which_file_is_which_channel_is_never_guessed(
    tmp_path: Path, names: dict[str, str], channels: list[int] | None, message: str
) -> None:
    write_cases(tmp_path, count=2)
    if names:
        told(tmp_path, names)
    with pytest.raises(ConfigError, match=message):
        label_table(of_folder(tmp_path, channels=channels))


def heard_of(config: FinetuneConfig) -> tuple[list[int], str]:
    notes: list[Any] = []
    with listen(notes.append):
        found = label_table(config)
    return [case.number for case in found.cases], "\n".join(note.text for note in notes if isinstance(note, Note))


def test_a_case_that_lacks_a_channel_is_left_out_and_costs_no_other(tmp_path: Path) -> None:
    write_cases(tmp_path, count=4)
    told(tmp_path, NAMES)
    for lacking in ("c1_0001", "c3_0002"):
        (tmp_path / "imagesTr" / f"{lacking}.nii.gz").unlink()
    numbers, said = heard_of(of_folder(tmp_path))
    assert numbers == [1, 3]
    assert (
        "2 scan(s) that lack a channel (case 2: has no channel 1 (data.channels: T2); case 4: has no channel 2" in said
    )
    lines = [f"{'' if n == 1 else f'a{n}'},b{n},c{n},m{n},p{n}" for n in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["ct,pet,t2,label,patient", *lines, ",,,m9,p9"]))
    data = {"table": "t.csv", "scan": ["ct", "pet", "t2"]}
    with pytest.raises(ConfigError, match="problem") as refused:
        label_table(configured(tmp_path, TASK, data))
    assert "line 5: 'ct' is blank" in str(refused.value)  # of which nothing is said is a mistake, not a patient
    (tmp_path / "t.csv").write_text("\n".join(["ct,pet,t2,label,patient", *lines]))
    numbers, said = heard_of(configured(tmp_path, TASK, data))
    assert numbers == [2, 4]
    assert "left out: 1 scan(s) that lack a channel (line 3: 'ct' is blank)" in said
    (tmp_path / "t.csv").write_text("\n".join(["ct,pet,t2,label,patient", ",b,c,m,p"]))
    with pytest.raises(ConfigError, match="line 2: 'ct' is blank, and must be a path"):
        label_table(configured(tmp_path, TASK, data))


def test_two_channels_are_not_the_same_file(tmp_path: Path) -> None:
    """But all of them may be one, as its volumes."""
    lines = ["ct,pet,t2,label,patient", "a,a,a,m0,p0", "b,./b,c,m1,p1"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    config = configured(tmp_path, TASK, {"table": "t.csv", "scan": ["ct", "pet", "t2"]})
    with pytest.raises(ConfigError, match=r"1 problem\(s\)\n  - line 3: names one file for two channels"):
        label_table(config)


def test_whose_grid_a_mask_lies_on_is_said(tmp_path: Path) -> None:
    write_cases(tmp_path, count=6)
    path = tmp_path / "imagesTr" / "c0_0002.nii.gz"
    scan = read_one(path)
    write_nifti(path, Scan(scan.voxels[:, ::2, ::2, ::2], (2.0, 2.0, 2.0), "OT"))
    config = configured(
        tmp_path,
        {**TASK, "other_grids": "resample"},
        {"name": "msd", "folder": ".", "channels": [2, 0, 1]},
        split={"folds": 2, "validation": 0.5},
    )
    with pytest.raises(ConfigError, match=r"line 1: the scan's first channel \(CT\) has .* begin with the one"):
        prepared(tmp_path, config)


def test_a_table_has_a_column_for_each_channel(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,label,patient\n")
    for columns in ("a", ["a", "b"], ["a", "b", "b"]):
        with pytest.raises(
            ConfigError, match=r"data\.scan: expected a list of 3 columns, of CT, PET, T2, in this order"
        ):
            configured(tmp_path, TASK, {"table": "t.csv", "scan": columns})
    plain = {**TASK, "channels": None}
    with pytest.raises(ConfigError, match="a list of columns is of a task with channels"):
        configured(tmp_path, plain, {"table": "t.csv", "scan": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"data\.channels: the task has none"):
        configured(tmp_path, plain, {"name": "msd", "folder": ".", "channels": [0, 1]})


def test_all_volumes_of_a_file_count_where_it_is_asked_whether_a_worker_should_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path, count=2, in_one_file=True)
    told(tmp_path, NAMES)
    config = of_folder(tmp_path)
    table = label_table(config)
    mask = nibabel.load(tmp_path / "labelsTr" / "c0.nii.gz")
    volume = 4 * math.prod(mask.shape)
    easily_packed = np.arange(3 * math.prod(mask.shape), dtype=np.int16).reshape(*mask.shape, 3) % 100
    nibabel.save(nibabel.Nifti1Image(easily_packed, mask.affine), tmp_path / "imagesTr" / "c0.nii.gz")
    stored = sum((tmp_path / f"{kind}Tr" / "c0.nii.gz").stat().st_size for kind in ("images", "labels"))
    assert 3 * stored < 4 * volume
    for volumes, here in ((4, True), (3, False)):
        monkeypatch.setattr(catalogue, "FEW_BYTES", volumes * volume)
        monkeypatch.setattr(workers, "run", lambda *_, **__: iter([(0, ScanError("timed_out"))]))
        found = next(read_cases(table.cases[:1], table, config, PLAN))[1]
        assert isinstance(found, tuple) == here


def test_one_file_is_all_channels_or_one_of_them(tmp_path: Path) -> None:
    """Two alike would be twice the first volume of their file, and nobody would see it."""
    data = {"table": "t.csv", "scan": ["ct", "pet", "t2"], "label": "mask"}
    for files in ("a.nii,a.nii,b.nii", "a.nii,b.nii,./a.nii"):
        (tmp_path / "t.csv").write_text(f"ct,pet,t2,mask,patient\n{files},m.nii,1\n")
        with pytest.raises(ConfigError, match="line 2: names one file for two channels"):
            label_table(configured(tmp_path, TASK, data))
    (tmp_path / "t.csv").write_text("ct,pet,t2,mask,patient\na.nii,a.nii,a.nii,m.nii,1\n")
    assert label_table(configured(tmp_path, TASK, data)).cases[0].files == ("a.nii",) * 3


def test_no_channel_is_of_two_patients(tmp_path: Path) -> None:
    """Or training would see what testing is measured by. Of one patient it may belong to several scans."""
    data = {"table": "t.csv", "scan": ["ct", "pet", "t2"], "label": "mask"}

    def cases(patients: str) -> int:
        lines = ["a.nii,b.nii,c.nii,m.nii,1", f"d.nii,./b.nii,e.nii,n.nii,{patients}"]
        (tmp_path / "t.csv").write_text("\n".join(["ct,pet,t2,mask,patient", *lines]))
        return len(label_table(configured(tmp_path, TASK, data)).cases)

    assert cases("1") == 2
    with pytest.raises(ConfigError, match="line 3: names a file of line 2, which is of another patient"):
        cases("2")


def test_no_other_patients_file_decides_what_four_digits_are(tmp_path: Path) -> None:
    for kind, names in {"imagesTr": ["p_1234", "q_0000", "q_0001"], "labelsTr": ["p_1234", "q"]}.items():
        (tmp_path / kind).mkdir()
        for name in names:
            (tmp_path / kind / f"{name}.nii.gz").touch()
    several = configured(
        tmp_path, TASK | {"channels": ["CT", "PET"]}, {"name": "msd", "folder": ".", "channels": [1, 0]}
    )
    second = configured(tmp_path, TASK | {"channels": None}, {"name": "msd", "folder": ".", "channel": 1})
    lone, *both = (f"imagesTr/{name}.nii.gz" for name in ("p_1234", "q_0001", "q_0000"))
    assert [case.files for case in label_table(several).cases] == [(lone, lone), tuple(both)]
    for _ in range(2):
        assert [case.file for case in label_table(second).cases] == [lone, both[0]]
        (tmp_path / both[1]).unlink(missing_ok=True)


def test_of_several_endings_the_first_is_read(tmp_path: Path) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
        for name in ("p.nii", "p.nii.gz"):
            (tmp_path / kind / name).touch()
    config = configured(tmp_path, {**TASK, "channels": None}, {"name": "msd", "folder": "."})
    assert [(one.file, one.mask) for one in label_table(config).cases] == [("imagesTr/p.nii", "labelsTr/p.nii")]


@pytest.mark.parametrize("data", [{"table": "t.csv", "scan": ["a", "b", "c"]}, {"name": "msd", "folder": "."}])
def test_no_channel_is_said_to_be_what_its_name_denies(tmp_path: Path, data: dict[str, Any]) -> None:
    """Of all that is said CT, PET would be clipped to the window of CT, in silence."""
    for said, name in (("CT", "'PET' is PT"), ("MR", "'CT' is CT")):
        with pytest.raises(
            ConfigError, match=rf"data\.modality: {said} is said of all channels, and {name} by its name"
        ):
            configured(tmp_path, TASK, {**data, "modality": said})
    configured(tmp_path, TASK, {**data, "modality": "OT"})
    configured(tmp_path, {**TASK, "channels": ["late", "CT", "early"]}, {**data, "modality": "CT"})


# ---------------------------------------------------------------------------------------------- channels of other grids


def turned(degrees: float, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """An affine of (d, h, w): superior, posterior, left, turned about the first axis."""
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    axes = np.array([[0, sine, -cosine], [0, -cosine, -sine], [1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing, origin
    return affine


def smooth(affine: np.ndarray, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Scan:
    """A volume of a function that is smooth in the patient, in HU."""
    return Scan(hu(affine, shape)[None].astype(np.float32), spacing, "CT", affine)


def hu(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(indices @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    return 300 * np.sin(x / 15 + 0.3) + 200 * np.cos(y / 12) + 250 * np.sin((z + y) / 20)


def test_a_prepared_scan_lies_where_its_affine_says() -> None:
    """Oracle: the function itself, at the places that the affine gives; a grid of another length than its step."""
    scan = smooth(turned(0, (1.5, 0.93, 0.87), (20, 30, -40)), (40, 53, 47), (1.5, 0.93, 0.87))
    values, spacing = prepare(scan, PLAN)
    affine = affine_of_prepared(scan, values.shape[1:], spacing)
    assert affine is not None
    inner = (slice(2, -2),) * 3
    expected = (hu(affine, values.shape[1:]) + 1024) / 2048
    np.testing.assert_allclose(values[0][inner], expected[inner], atol=0.004)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)


@pytest.mark.parametrize("degrees", [0, 25])
def test_a_channel_of_another_grid_is_laid_where_its_file_says(degrees: float) -> None:
    """Oracle: the function itself, at the first channel's prepared places."""
    first = smooth(turned(0, (3.0, 1.0, 1.2), (20, 30, -40)), (20, 50, 40), (3.0, 1.0, 1.2))
    other = smooth(turned(degrees, (2.5, 2.0, 2.1), (45, 55, -55)), (40, 60, 60), (2.5, 2.0, 2.1))
    with pytest.raises(ScanError, match="channels_apart"):
        prepare_channels([first, other], PLAN)
    values, spacing = prepare_channels([first, other], PLAN, "resample")
    np.testing.assert_array_equal(values[:1], prepare(first, PLAN)[0])
    affine = affine_of_prepared(first, values.shape[1:], spacing)
    assert affine is not None
    expected = (hu(affine, values.shape[1:]) + 1024) / 2048
    shift = np.eye(4)
    shift[:3, 3] = 0.5
    seen = values[1] > 0
    assert seen.mean() > 0.7
    inner = seen & np.pad(seen[2:-2, 2:-2, 2:-2], 2)
    moved = (hu(affine @ shift, values.shape[1:]) + 1024) / 2048
    error, error_of_half_a_voxel = (np.abs(values[1] - one)[inner].mean() for one in (expected, moved))
    assert error < 0.25 * error_of_half_a_voxel


def test_channels_that_hardly_meet_or_say_nothing_of_where_they_lie_are_left_out() -> None:
    first = smooth(turned(0, (3.0, 1.0, 1.2), (20, 30, -40)), (20, 50, 40), (3.0, 1.0, 1.2))
    beside = smooth(turned(0, (3.0, 1.0, 1.2), (20, 30, 40)), (20, 50, 40), (3.0, 1.0, 1.2))
    nowhere = Scan(first.voxels[:, :15], first.spacing_mm, "CT")
    for other in (beside, nowhere):
        with pytest.raises(ScanError, match="channels_apart"):
            prepare_channels([first, other], PLAN, "resample")


def test_a_slab_of_one_prepared_slice_lies_in_that_slice_alone() -> None:
    spacing = (2.0, 2.0, 2.0)
    first = smooth(turned(0, spacing, (0, 0, 0)), (40, 40, 40), spacing)
    thin = (0.6, 2.0, 2.0)
    slab = smooth(turned(0, thin, (0, 0, 39.4)), (3, 40, 40), thin)
    assert prepare(slab, PLAN)[0].shape == (1, 1, 40, 40)
    values, _ = prepare_channels([first, slab], PLAN, "resample")
    assert np.flatnonzero(values[1].any((1, 2))).tolist() == [20]
    np.testing.assert_allclose(values[1, 20], values[0, 20], atol=0.01)


def test_the_outermost_voxels_of_a_channel_are_not_darkened_where_it_is_laid() -> None:
    """Both fields of view are the same in the patient; everything is of one value, but for a point to be seen."""
    spacing, other = (2.0, 2.0, 2.0), (2.0, 1.95, 1.95)
    voxels = [np.full((1, 30, n, n), 300.0, dtype=np.float32) for n in (40, 41)]
    for one in voxels:
        one[0, 15, 20, 20] = 400.0
    first = Scan(voxels[0], spacing, "CT", turned(0, spacing, (0, 0, 0)))
    second = Scan(voxels[1], other, "CT", turned(0, other, (0.025, 0.025, 0)))
    values, _ = prepare_channels([first, second], PLAN, "resample")
    np.testing.assert_allclose(values[1].min(), values[0].min(), atol=1e-4)


def test_a_grid_that_differs_by_rounding_stays_one() -> None:
    spacing = (3.0, 1.0, 1.0)
    first = smooth(turned(0, spacing, (0, 0, 0)), (20, 501, 40), spacing)
    near = (3.0, 1.00015, 1.0)
    other = Scan(first.voxels, near, "CT", turned(0, near, (0, 0, 0)))
    plan = PlanConfig(volume_spacing_mm=(3.0, 1.0, 1.0))
    assert prepare(other, plan)[0].shape[1:] == first.voxels.shape[1:]
    values, _ = prepare_channels([first, other], plan)
    np.testing.assert_array_equal(values[0], values[1])


def test_only_volumes_of_several_channels_can_be_laid_on_one_grid() -> None:
    for more in ({"channels": None}, {"rank": 2}):
        told = {"classes": ("ball",), "channels": ("CT", "PET"), "other_grids": "resample", **more}
        with pytest.raises(ValidationError, match="other_grids: resample is of volumes of several channels"):
            SegmentationConfig(**told)
