import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates

import client.labelled
from client import workers
from client.catalogue import read_one
from client.dicom import write_dicom
from client.finetune_config import AugmentationConfig, FinetuneConfig
from client.label_tables import Case, label_table
from client.labelled import Grid, Labelled, MaskError, labels_of, mask_at, mask_beside, prepare_cases, read_cases
from client.masks import write_at_source
from client.nifti import write_nifti
from client.pictures import write_png
from client.splits import split_cases
from client.training_views import crop_of, window_of
from tests import crashing_reader
from tests.series_files import write_radiograph
from tests.test_label_tables import configured
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.plan import prepare, prepare_channels, resample_labels
from unimiss_core.progress import Note, listen
from unimiss_core.scan import Scan
from unimiss_core.study import PlanConfig
from unimiss_core.views import standardise

PLAN = PlanConfig(volume_spacing_mm=(2.0, 2.0, 2.0))
TASK = {"name": "segmentation", "rank": 3, "classes": ["ball"]}
SHAPE = (20, 22, 24)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2).astype(np.uint8)


def write_case(
    folder: Path, name: str, seed: int, *, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), **mask: Any
) -> None:
    """A noisy volume with a bright ball, and the ball as its mask. mask: shift_mm or values instead of its own."""
    inside = ball(SHAPE, (10, 11, 8), 5)
    noise = np.random.default_rng(seed).normal(0, 0.1, SHAPE)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    write_nifti(folder / "imagesTr" / f"{name}.nii.gz", Scan((inside + noise)[None].astype(np.float32), spacing, "OT"))
    labels = mask.get("values", inside).astype(np.float32)
    affine = None
    if "shift_mm" in mask:
        affine = np.array([[0, 0, -1.0, mask["shift_mm"]], [0, -1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]])
    write_nifti(folder / "labelsTr" / f"{name}.nii.gz", Scan(labels[None], spacing, "OT", affine))


def read(folder: Path, config: FinetuneConfig | None = None, plan: PlanConfig = PLAN, **more: Any) -> dict:
    config = config or configured(folder, TASK, {"name": "msd", "folder": "."}, split={"folds": 2, "validation": 0.5})
    config = config.model_copy(update=more)
    table = label_table(config)
    return prepare_cases(split_cases(table.cases, config), table, plan, config, folder / "prepared")


def test_scan_and_mask_are_prepared_onto_one_grid(tmp_path: Path) -> None:
    for number in range(8):
        write_case(tmp_path, f"c{number}", number, spacing=(1.0, 1.5, 0.8))
    parts = read(tmp_path)
    assert {part: len(found) for part, found in parts.items()} == {"train": 2, "validation": 2, "test": 4}
    one = parts["test"][0]
    assert one.mask.shape == one.shape[1:] == (10, 16, 10)
    bright = one.whole()[0]
    assert bright[one.mask == 1].mean() - bright[one.mask == 0].mean() > 0.5
    np.testing.assert_array_equal(one.reference, ball(SHAPE, (10, 11, 8), 5))


def test_labels_go_to_the_nearest_point_of_the_scans_own_grid() -> None:
    """Oracle: scipy's nearest label at the places where the scan's values are taken."""
    labels = np.random.default_rng(0).integers(0, 4, (23, 24, 25)).astype(np.uint8)
    scan = Scan(labels[None].astype(np.float32), (2.6, 2.3, 0.9), "OT")
    values, spacing = prepare(scan, PLAN)
    steps = [new / old for new, old in zip(spacing, scan.spacing_mm, strict=True)]
    axes = [
        (np.arange(n) - (n - 1) / 2) * s + (m - 1) / 2
        for n, s, m in zip(values.shape[1:], steps, labels.shape, strict=True)
    ]
    places = np.array(np.meshgrid(*axes, indexing="ij"))
    clear = ~np.isclose(places % 1, 0.5).any(0)  # of a point halfway between two none is the nearest
    found = resample_labels(labels, values.shape[1:], steps)
    np.testing.assert_array_equal(found[clear], map_coordinates(labels, places, order=0, mode="nearest")[clear])
    assert clear.mean() > 0.9


@pytest.mark.parametrize(("old", "new"), [(0.5, 1.0), (1.0, 3.0), (0.5, 2.0), (1.0, 0.5)])
def test_labels_move_no_way_where_points_lie_between_two_old_ones(old: float, new: float) -> None:
    rng, shape, moved = np.random.default_rng(0), (40, 44), []
    for _ in range(200):
        centre = np.array(shape) / 2 + rng.uniform(-4, 4, 2)
        disc = ball(shape, tuple(centre), 11)
        grid = [round(n * old / new) for n in shape]
        found = np.argwhere(resample_labels(disc, grid, [new / old] * 2)).mean(0)
        back = (found - (np.array(grid) - 1) / 2) * new / old + (np.array(shape) - 1) / 2
        moved.append(back - np.argwhere(disc).mean(0))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.1


@pytest.mark.parametrize("step", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_labels_keep_their_volume_and_thin_ones_do_not_vanish(step: float, width: int) -> None:
    kept = []
    for place in range(12):
        sheet = np.zeros((40, 48), np.uint8)
        sheet[:, 15 + place : 15 + place + width] = 1
        grid = (40, round(48 / step))
        kept.append(resample_labels(sheet, grid, (1.0, 48 / grid[1])).sum() * step / sheet.sum())
    assert np.mean(kept) == pytest.approx(1, abs=0.01)
    assert min(kept) > 0 or (step != 2 and width < step)  # then it may lie between two points, none of them halfway


def test_labels_stay_on_a_grid_that_stays() -> None:
    labels = np.random.default_rng(0).integers(0, 5, SHAPE).astype(np.uint8)
    np.testing.assert_array_equal(resample_labels(labels, SHAPE, (1.0, 1.0, 1.0)), labels)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ({"shift_mm": 7.0}, r"lie up to 7\.0 mm apart"),
        ({"values": np.zeros((20, 22, 23))}, r"has \(20, 22, 24\) voxels, its mask \(20, 22, 23\)"),
        ({"values": np.zeros(SHAPE)}, "the mask is empty"),
        ({"values": ball(SHAPE, (10, 11, 8), 5) * 3 - ball(SHAPE, (10, 11, 8), 2)}, "values from 0 to 3; expected"),
        ({"values": ball(SHAPE, (10, 11, 8), 5) * 2}, "values from 0 to 2; expected"),
    ],
)
def test_a_mask_that_does_not_go_with_its_scan_is_refused(tmp_path: Path, mask: dict[str, Any], told: str) -> None:
    for number in range(7):
        write_case(tmp_path, f"c{number}", number)
    write_case(tmp_path, "miller", 9, **mask)
    with pytest.raises(ConfigError, match=told) as error:
        read(tmp_path)
    assert "1 labelled scan(s) do not fit" in str(error.value)
    assert "line 8" in str(error.value)
    assert "miller" not in str(error.value)


@pytest.mark.parametrize(
    ("scan", "alone"), [("s.png", "mask"), ("s.nii", "scan"), ("xray.dcm", "mask"), ("ct.dcm", "scan")]
)
def test_a_mask_of_another_kind_than_its_scan_is_refused_for_nothing_says_how_it_is_turned(
    tmp_path: Path, scan: str, alone: str
) -> None:
    """Square, so that even a transposed one would pass unseen."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)
    write_png(tmp_path / "s.png", pixels)
    write_nifti(tmp_path / "s.nii", Scan(pixels[None].astype(np.float32), (1.0, 1.0), "OT"))
    write_radiograph(tmp_path / "xray.dcm", pixels.astype(np.uint16))
    lies = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    write_dicom(tmp_path / "ct.dcm", pixels.astype(np.int16), {"Modality": "CT", "RescaleIntercept": 0, **lies})
    inside = ball((40, 40), (10, 20), 5)
    write_png(tmp_path / "m.png", inside)
    write_nifti(tmp_path / "m.nii", Scan(inside[None].astype(np.float32), (1.0, 1.0), "OT"))
    found, of_kind = read_one(tmp_path / scan), ("m.png", "m.nii")[alone == "scan"]
    other = ("m.nii", "m.png")[alone == "scan"]
    with pytest.raises(MaskError, match=f"^the {alone} alone says where it lies"):
        labels_of(found, masked(tmp_path / other), classes=1, may_be_empty=False)
    if scan != "ct.dcm":
        np.testing.assert_array_equal(
            labels_of(found, masked(tmp_path / of_kind), classes=1, may_be_empty=False), inside
        )


@pytest.mark.parametrize("scan", ["s.jpg", "s.png", "s.tif", "folder"])
@pytest.mark.parametrize("says", [None, 1, 3])
def test_a_mask_of_a_picture_that_is_stored_turned_must_say_so_too(tmp_path: Path, scan: str, says: int | None) -> None:
    """By half a turn, which leaves the shape as it is."""
    pixels = np.random.default_rng(0).integers(0, 100, (40, 40)).astype(np.uint8)
    inside = ball((40, 40), (8, 12), 5)
    pixels[inside > 0] = 255
    turned = Image.Exif()
    turned[274] = 3
    (tmp_path / "folder").mkdir()
    for name in ("s.jpg", "s.png", "folder/s.png"):
        Image.fromarray(pixels).save(tmp_path / name, exif=turned)
    Image.fromarray(pixels).save(tmp_path / "s.tif", tiffinfo={274: 3})
    exif = Image.Exif()
    if says:
        exif[274] = says
    Image.fromarray(inside).save(tmp_path / "m.png", exif=exif)
    Image.fromarray(inside).save(tmp_path / "m.tif", tiffinfo={274: says} if says else {})
    for file in ("m.png", "m.tif"):
        mask = mask_beside([tmp_path / scan], tmp_path / file)
        if says == 3:
            assert isinstance(mask, Scan)
            found = read_one(tmp_path / scan).voxels[0]
            labels = labels_of(read_one(tmp_path / scan), mask, classes=1, may_be_empty=False)
            np.testing.assert_array_equal(labels, inside[::-1, ::-1])
            assert found[labels > 0].min() > 200
        else:
            assert str(mask) == "the picture is stored turned, and its mask does not say so; save both upright"
        assert isinstance(mask_beside([tmp_path / ("m.png" if says != 3 else "m.tif")], tmp_path / file), Scan)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_that_is_made_lies_on_the_picture_as_it_is_shown(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "s.png", exif=exif)
    scan = read_one(tmp_path / "s.png")
    made = write_at_source(
        tmp_path / "masks", "s", (scan.voxels[0] > 99).astype(np.uint8), scan.affine, tmp_path / "s.png"
    )
    with Image.open(tmp_path / "s.png") as stored, Image.open(made) as mask:
        assert "exif" not in mask.info
        np.testing.assert_array_equal(np.asarray(mask), np.asarray(ImageOps.exif_transpose(stored)) > 99)


def masked(path: Path) -> Scan:
    mask = mask_at(path)
    assert isinstance(mask, Scan)
    return mask


@pytest.mark.parametrize(
    "orientation", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (0, 0, 1, 1, 0, 0)]
)
def test_a_nifti_mask_with_a_dicom_slices_own_geometry_lies_on_it(tmp_path: Path, orientation: tuple[int, ...]) -> None:
    """Made as a converter does: the slice's pixels as they are stored, its geometry as the standard defines it."""
    pixels = np.random.default_rng(0).integers(0, 999, (30, 20)).astype(np.int16)
    lies = {"ImagePositionPatient": [5, 6, 7], "ImageOrientationPatient": list(orientation), "PixelSpacing": [1.5, 0.5]}
    write_dicom(tmp_path / "s.dcm", pixels, {"Modality": "MR", **lies})
    affine = np.eye(4)
    row, column = np.reshape(orientation, (2, 3)).astype(float)
    affine[:3] = np.stack([row * 0.5, column * 1.5, np.cross(row, column) * 4, [5, 6, 7]], axis=1)
    affine[:2] *= -1
    nibabel.save(nibabel.Nifti1Image((pixels.T[..., None] > 500).astype(np.uint8), affine), tmp_path / "m.nii")
    scan = read_one(tmp_path / "s.dcm")
    labels = labels_of(scan, masked(tmp_path / "m.nii"), classes=1, may_be_empty=False)
    np.testing.assert_array_equal(labels, scan.voxels[0] > 500)


def test_an_empty_mask_may_be_allowed_but_not_a_class_that_nobody_has(tmp_path: Path) -> None:
    for number in range(8):
        write_case(tmp_path, f"c{number}", number, values=np.zeros(SHAPE))
    with pytest.raises(ConfigError, match="no training mask holds ball"):
        read(tmp_path, allow_empty_masks=True)


def test_a_scan_of_another_rank_than_the_task_is_refused(tmp_path: Path) -> None:
    lines = ["scan,label,patient"]
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50)).astype(np.uint8)
        write_png(tmp_path / f"{number}.png", pixels)
        lines.append(f"{number}.png,{['no', 'yes'][number // 4]},p{number}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 3, "classes": ["no", "yes"]}
    split = {"folds": 2, "validation": 0.5}
    config = configured(tmp_path, task, {"table": "t.csv", "folder": "."}, split=split)
    with pytest.raises(ConfigError, match=r"8 labelled scan\(s\)[\s\S]*is an image \(rank 2\), expected a volume"):
        read(tmp_path, config)


def test_an_unreadable_scan_is_left_out_with_its_line(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50)).astype(np.uint8)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = ["scan,label,patient,split", "broken.png,no,0,train"]
    for number in range(8):
        write_png(tmp_path / f"{number}.png", pixels + number)
        lines.append(f"{number}.png,{['no', 'yes'][number % 2]},p{number},{['train', 'val'][number // 4]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 2, "classes": ["no", "yes"]}
    config = configured(tmp_path, task, {"table": "t.csv", "folder": "."}, split={"name": "given"})
    notes: list[Any] = []
    with listen(notes.append):
        parts = read(tmp_path, config)
    assert [len(parts[p]) for p in ("train", "validation", "test")] == [4, 4, 0]
    told = "left out: 1 scan(s), not_an_image: neither DICOM nor NIfTI, PNG, JPEG or TIFF (line 2)"
    assert [n.text for n in notes if isinstance(n, Note)] == [told]
    np.testing.assert_allclose(
        parts["train"][0].whole(), prepare(Scan(pixels[None].astype(np.float32), (1, 1), "XR"), PLAN)[0], atol=1e-5
    )
    volumes = configured(tmp_path, {**task, "rank": 3}, {"table": "t.csv", "folder": "."}, split={"name": "given"})
    with pytest.raises(ConfigError, match=r"8 labelled scan\(s\) are not of the task's rank"):
        read(tmp_path, volumes)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(NoUsableScanError, match="none of the labelled scans"):
        read(tmp_path, config)


def test_a_scan_that_crashes_its_decoder_is_left_out_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where native codecs take part another process reads; where none do this one reads the same."""
    lines = ["scan,label,patient,split"]
    for number in range(4):
        write_png(tmp_path / f"{number}.png", np.random.default_rng(number).integers(0, 255, (40, 50)).astype(np.uint8))
        lines.append(f"{number}.png,{['no', 'yes'][number % 2]},p{number},{['train', 'val'][number // 2]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {"name": "classification", "rank": 2, "classes": ["no", "yes"]}
    config = configured(tmp_path, task, {"table": "t.csv", "folder": "."}, split={"name": "given"})
    expected = [one.whole() for part in read(tmp_path, config).values() for one in part]
    crashing_reader.write_compressed(tmp_path / "bad.dcm")
    (tmp_path / "t.csv").write_text("\n".join([*lines[:2], "bad.dcm,no,p9,train", *lines[2:]]))
    monkeypatch.setattr(client.labelled, "read_pair", crashing_reader.read_pair)
    notes: list[Any] = []
    with listen(notes.append):
        parts = read(tmp_path, config)
    assert [n.text for n in notes if isinstance(n, Note)] == [
        "left out: 1 scan(s), reader_crashed: made its decoder crash (line 3)"
    ]
    found = [one.whole() for part in parts.values() for one in part]
    np.testing.assert_array_equal(found, expected)


def test_a_mask_that_may_take_long_is_read_by_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        write_case(tmp_path, f"c{number}", number)
    config = configured(tmp_path, TASK, {"name": "msd", "folder": "."}, split={"folds": 2, "validation": 0.5})
    table = label_table(config)
    monkeypatch.setattr(workers, "run", lambda *_, **__: iter([(0, ScanError("timed_out"))]))

    def outcome() -> tuple[Scan, ...] | ScanError:
        return next(read_cases(table.cases[:1], table, config, PLAN))[1]

    assert isinstance(outcome(), tuple)
    Image.fromarray(np.zeros((9, 7), np.uint8)).save(tmp_path / "labelsTr" / "c0.nii.gz", "TIFF")
    assert isinstance(outcome(), ScanError)


def test_a_scan_that_cannot_be_prepared_in_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        write_case(tmp_path, f"c{number}", number)
    small, calls = prepare_channels, []

    def first_too_large(*asked: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise MemoryError
        return small(*asked)

    monkeypatch.setattr(client.labelled, "prepare_channels", first_too_large)
    notes: list[Any] = []
    with listen(notes.append):
        parts = read(tmp_path)
    assert sum(map(len, parts.values())) == 7
    assert "1 scan(s), out_of_memory" in next(n.text for n in notes if isinstance(n, Note))


def test_a_medmnist_image_counts_as_on_the_plans_grid(tmp_path: Path) -> None:
    each = np.random.default_rng(0).integers(0, 255, (3, 4, 14, 15, 16)).astype(np.uint8)
    images, labels = each[2], np.array([[0], [1], [0], [1]])
    arrays = {f"{name}_images": of for name, of in zip(("train", "val", "test"), each, strict=True)}
    np.savez(tmp_path / "m.npz", **arrays, train_labels=labels, val_labels=labels, test_labels=labels)
    task = {"name": "classification", "rank": 3, "classes": ["no", "yes"]}
    config = configured(tmp_path, task, {"name": "medmnist", "file": "m.npz"}, split={"name": "given"})
    parts = read(tmp_path, config, PLAN.model_copy(update={"percentiles": (0.0, 100.0)}))
    low, high = images[2].min(), images[2].max()
    np.testing.assert_allclose(parts["test"][2].whole()[0], (images[2] - low) / (high - low), atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- views


def labelled(shape: tuple[int, ...] = (10, 30, 20)) -> Labelled:
    """Values and mask tell the same: value 1 in class 1, 0 elsewhere; the class is a single voxel's neighbourhood."""
    mask = ball(shape, (8, 25, 3), 2)
    places = {1: np.argwhere(mask == 1).astype(np.int32)}
    values = mask[None].astype(np.uint16) * 65535
    return Labelled(Case(1, "", ""), values, Grid(shape, (1.0,) * 3, (1.0,) * 3, None), mask, places=places)


def test_a_window_holds_scan_and_mask_of_one_place() -> None:
    plain = AugmentationConfig(flip=(0.5, 0.5, 0.5), intensity=0.0)
    generator = torch.Generator().manual_seed(0)
    held = []
    for _ in range(60):
        view, classes = window_of(labelled(), (14, 12, 20), plain, generator, foreground=0.5)
        torch.testing.assert_close(view[0], standardise(classes.float()))
        held.append(bool(classes.any()))
    assert 35 < sum(held) < 60
    always = [window_of(labelled(), (14, 12, 20), plain, generator, foreground=1.0)[1].any() for _ in range(20)]
    assert all(always)


def test_a_crop_without_change_is_the_whole_scan_and_its_draws_follow_the_generator() -> None:
    still = AugmentationConfig(area=(1.0, 1.0), flip=(0.0, 0.0, 0.0), intensity=0.0)
    one = labelled()
    crop = crop_of(one, (10, 30, 20), still, torch.Generator().manual_seed(1))
    torch.testing.assert_close(crop, standardise(torch.from_numpy(one.whole())))
    moved = AugmentationConfig(area=(0.3, 0.9), intensity=1.0)
    first, again, other = (crop_of(one, (13, 20, 20), moved, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("of", ["crop", "window"])
def test_channels_are_shaded_each_by_itself_where_that_is_asked_for(of: str) -> None:
    """Noise has no mean: two channels that are alike stay so on average, unless their brightness was drawn apart."""
    one = np.linspace(10_000, 50_000, 40 * 40).reshape(40, 40).astype(np.uint16)
    scan = Labelled(Case(1, "", ""), np.stack([one, one]), Grid((40, 40), (1.0,) * 2, (1.0,) * 2, None))
    scan = replace(scan, mask=np.zeros((40, 40), np.uint8))
    config, apart = AugmentationConfig(intensity=1.0), {False: 0, True: 0}
    for shades_apart, seed in itertools.product(apart, range(20)):
        drawn = torch.Generator().manual_seed(seed)
        view = (
            crop_of(scan, (36, 36), config, drawn, shades_apart=shades_apart)
            if of == "crop"
            else window_of(scan, (36, 36), config, drawn, foreground=0.0, shades_apart=shades_apart)[0]
        )
        first, second = view.mean((1, 2))
        apart[shades_apart] += int(abs(first - second) > 0.05)
    assert apart[False] == 0
    assert apart[True] > 10
