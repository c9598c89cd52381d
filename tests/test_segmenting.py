import re
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor

from client import segmenting
from client.labelled import Grid
from client.nifti import read_nifti, write_mask
from client.segmenting import (
    DiceCE,
    dice,
    keep_largest,
    likeliest,
    likeliest_at_source,
    measures,
    probabilities,
)
from unimiss_core import progress
from unimiss_core.plan import prepare, resample_labels
from unimiss_core.scan import Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_config import SegmentationConfig
from unimiss_core.tasks import TaskModel, build_task_model
from unimiss_core.views import standardise

NANO = ModelConfig(prototypes=16)


def model(rank: int = 2) -> TaskModel:
    return build_task_model(NANO, SegmentationConfig(rank=rank, classes=("a", "b")), seed=0, pretrained=None).eval()  # type: ignore[arg-type]


def inferred(
    net: TaskModel, values: np.ndarray, size: tuple[int, ...], overlap: float = 0.5, windows: int = 2
) -> Tensor:
    cpu, scan = torch.device("cpu"), values.copy()
    return probabilities(net, scan, size, overlap=overlap, windows=windows, device=cpu, autocast=nullcontext())


def test_a_scan_of_one_window_is_what_the_model_says_of_it() -> None:
    net, values = model(), np.random.default_rng(0).random((1, 40, 48), dtype=np.float32)
    with torch.no_grad():
        expected = net(standardise(torch.from_numpy(values))[None]).softmax(1)[0]
    torch.testing.assert_close(inferred(net, values, (40, 48)), expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(likeliest(expected), expected.argmax(0).numpy())


def test_windows_join_into_the_mean_of_what_each_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows change nothing of a model that answers voxel by voxel, neither at edges nor where the scan is small."""
    net = model()
    monkeypatch.setattr(net, "forward", lambda x: torch.cat([x, -x, 0 * x], 1))
    for size in ((90, 75), (20, 100)):
        values = np.random.default_rng(0).random((1, *size), dtype=np.float32)
        x = standardise(torch.from_numpy(values))
        torch.testing.assert_close(inferred(net, values, (40, 48)), torch.cat([x, -x, 0 * x]).softmax(0))


def test_where_memory_runs_out_fewer_windows_are_met_at_a_time_with_the_same_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, values = model(), np.random.default_rng(0).random((1, 90, 75), dtype=np.float32)
    expected, forward = inferred(net, values, (40, 48), windows=1), net.forward
    sizes: list[int] = []

    def most_of(limit: int, error: Exception) -> None:
        def tight(x: Tensor) -> Tensor:
            sizes.append(len(x))
            if len(x) > limit:
                raise error
            return forward(x)

        sizes.clear()
        monkeypatch.setattr(net, "forward", tight)

    most_of(1, torch.OutOfMemoryError("CUDA out of memory"))
    torch.testing.assert_close(inferred(net, values, (40, 48), windows=64), expected)
    assert sizes == [12, 6, 3, *[1] * 12]  # the scan has 12 windows
    most_of(0, RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"))
    with pytest.raises(RuntimeError, match="DEVICE_ALLOCATION_FAILED"):
        inferred(net, values, (40, 48), windows=2)
    assert sizes == [2, 1]
    most_of(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        inferred(net, values, (40, 48), windows=2)
    assert sizes == [2]


@pytest.mark.parametrize(("size", "overlap"), [((90, 75), 0.5), ((20, 100), 0.25), ((40, 48), 0.5), ((121, 48), 0.0)])
def test_a_scan_that_takes_long_tells_how_far_it_is(
    size: tuple[int, int], overlap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenting, "TELL_EVERY_S", -1.0)
    told: list[str] = []
    with progress.listen(lambda event: told.append(str(event))):
        inferred(model(), np.zeros((1, *size), dtype=np.float32), (40, 48), overlap)
    done, of = re.findall(r"windows: (\d+) of (\d+)", told[-1])[0]
    assert done == of  # what MONAI did, and what was counted beforehand


def test_many_classes_are_gathered_in_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net, values = model(), np.random.default_rng(0).random((1, 70, 60), dtype=np.float32)
    whole = inferred(net, values, (40, 48))
    monkeypatch.setattr("client.segmenting._MOST_FLOAT32", 0)
    half = inferred(net, values, (40, 48))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), whole, atol=5e-3, rtol=0)


def test_the_loss_is_dice_and_cross_entropy() -> None:
    logits, classes = torch.randn(2, 3, 6, 7), torch.randint(0, 3, (2, 6, 7))
    chances, truth = logits.softmax(1), torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    axes = (0, 2, 3)
    overlap = (2 * (chances * truth).sum(axes) + 1e-5) / ((chances + truth).sum(axes) + 1e-5)
    expected = (1 - overlap[1:]).mean() - (truth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(DiceCE()(logits, classes), expected)


def blocks() -> tuple[np.ndarray, np.ndarray]:
    """Two boxes that are three voxels apart along the first axis."""
    found, truth = np.zeros((20, 12, 10), np.uint8), np.zeros((20, 12, 10), np.uint8)
    found[3:9, 2:9, 2:8] = 1
    truth[6:12, 2:9, 2:8] = 1
    return found, truth


def test_measures_are_those_of_a_plain_computation() -> None:
    found, truth = blocks()
    spacing = (2.0, 1.0, 0.5)
    told = measures(found, truth, 1, spacing_mm=spacing, tolerance_mm=1.0)
    edges = [np.argwhere(m & ~binary_erosion(m)) * np.array(spacing) for m in (found == 1, truth == 1)]
    apart = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=-1)
    there, back = apart.min(1), apart.min(0)
    assert told["dice"] == pytest.approx(0.5)
    assert told["hd95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
    within = ((there <= 1).sum() + (back <= 1).sum()) / (len(there) + len(back))
    assert told["surface_dice"] == pytest.approx(within)


def test_a_class_that_is_missing_is_told_apart_from_one_that_was_missed() -> None:
    found, truth = blocks()
    nothing = np.zeros_like(found)
    assert measures(nothing, nothing, 1, spacing_mm=(1, 1, 1), tolerance_mm=1)["dice"] is None
    missed = measures(nothing, truth, 1, spacing_mm=(1, 1, 1), tolerance_mm=1)
    assert missed == {"dice": 0.0, "hd95_mm": None, "surface_dice": 0.0}
    without = measures(truth, truth, 1, spacing_mm=None, tolerance_mm=1)  # pixels are no millimetres
    assert without == {"dice": 1.0, "hd95_mm": None, "surface_dice": None}
    assert dice(found, truth, 2) is None


def test_only_the_largest_part_of_a_class_is_kept() -> None:
    classes = np.zeros((10, 10), np.uint8)
    classes[1:4, 1:4], classes[4, 4], classes[7:9, 7:9], classes[0, 9] = 1, 1, 1, 2
    kept = keep_largest(classes, [1])
    assert kept.sum() == 10 + 2
    assert (kept[4, 4], kept[8, 8], kept[0, 9]) == (1, 0, 2)


def test_a_mask_goes_back_to_the_grid_it_came_from() -> None:
    """A ball taken to the plan's grid and back is nearly the ball."""
    axes = np.meshgrid(*(np.arange(n) for n in (30, 41, 38)), indexing="ij")
    ball = (sum((a - c) ** 2 for a, c in zip(axes, (14, 20, 22), strict=True)) < 100).astype(np.uint8)
    scan = Scan(ball[None].astype(np.float32), (1.4, 0.8, 0.9), "OT")
    values, spacing = prepare(scan, PlanConfig(volume_spacing_mm=(1.37, 1.43, 1.31)))
    steps = tuple(new / old for new, old in zip(spacing, scan.spacing_mm, strict=True))
    beside = resample_labels(ball, values.shape[1:], steps)
    chances = torch.stack([torch.from_numpy(beside == number).float() for number in (0, 1)])
    back = likeliest_at_source(chances, Grid(ball.shape, scan.spacing_mm, steps, None))
    assert back.shape == ball.shape
    assert dice(back, ball, 1) > 0.94  # type: ignore[operator]
    np.testing.assert_allclose(np.argwhere(back).mean(0), (14, 20, 22), atol=0.25)


@pytest.mark.parametrize("order", ["RAS", "LPS", "SRA", "PIR"])
def test_a_mask_is_written_in_the_axes_of_its_scans_file(tmp_path: Path, order: str) -> None:
    """Oracle: nibabel's own reorientation. What is 1 where the scan is bright is so voxel by voxel in the file."""
    values = np.random.default_rng(0).random((7, 8, 9)).astype(np.float32)
    turned = nibabel.Nifti1Image(values, np.diag([2.0, 1.5, 1.0, 1.0])).as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(order)
        )
    )
    nibabel.save(turned, tmp_path / "scan.nii.gz")
    scan = read_nifti(tmp_path / "scan.nii.gz", "OT")
    assert scan.affine is not None
    labels = (scan.voxels[0] > 0.5).astype(np.uint8)
    write_mask(tmp_path / "mask.nii.gz", labels, scan.affine, like=tmp_path / "scan.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(turned.dataobj) > 0.5)
    np.testing.assert_allclose(mask.affine, turned.affine)
    write_mask(tmp_path / "plain.nii.gz", labels, scan.affine)
    np.testing.assert_array_equal(read_nifti(tmp_path / "plain.nii.gz", "OT").voxels[0], labels)
