"""Masks: their loss, their inference by overlapping windows, their measures. The one file that knows MONAI and SciPy.

Legend of shapes: B windows, K classes with the background first, C channels, S spatial axes - (H, W) or (D, H, W).
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from client.labelled import Grid
from unimiss_core import progress
from unimiss_core.device import is_out_of_memory
from unimiss_core.plan import resample
from unimiss_core.tasks import TaskModel
from unimiss_core.views import standardise

_MOST_FLOAT32 = 2**28
"""Values (K x S) up to which probabilities are gathered in float32; above it in float16, which halves the memory."""
_NOTHING = -2.0
"""What value 0 of a prepared scan is to the model (`standardise`): windows are filled up with it."""

TELL_EVERY_S = 20.0

Measures = Mapping[str, float | None]
"""Of one class in one scan: dice, hd95_mm, surface_dice; None where it has none."""


class DiceCE:
    """The sum of Dice loss and cross-entropy, as nnU-Net trains with (Isensee et al. 2021).

    Dice is of the classes without the background, over all windows of a batch together: a window without a class
    would otherwise have no Dice.
    """

    def __init__(self) -> None:
        self._loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def __call__(self, logits: Tensor, classes: Tensor) -> Tensor:
        """logits (B, K, *S), classes (B, *S) -> a number."""
        loss: Tensor = self._loss(logits, classes[:, None])
        return loss


@torch.inference_mode()
def probabilities(
    model: TaskModel,
    values: NDArray[np.float32],
    size: Sequence[int],
    *,
    overlap: float,
    windows: int,
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> Tensor:
    """Of each class at each voxel: values (C, *S) in [0, 1] -> (K, *S) on the CPU, in float32, or float16 if many.

    Windows of `size` overlap and count most in their middle (Gaussian weights); so many `windows` at a time are on the
    device, while sums are gathered on the CPU: memory grows with K x S, not with the number of windows. Where memory
    runs out, half as many are met at a time, down to one; only then that is raised.
    """
    outputs, many = model.head.outputs, _windows_of(values.shape[1:], size, overlap)
    kind = torch.float32 if outputs * math.prod(values.shape[1:]) <= _MOST_FLOAT32 else torch.float16
    scan = torch.from_numpy(values).to(kind)
    scan = standardise(scan, out=scan)  # in place: the scan may be large

    def joined(windows: int) -> Tensor:
        tell = _Windows(many)

        def of_windows(x: Tensor) -> Tensor:
            with autocast:
                logits: Tensor = model(x.float())
            tell.add(len(x))
            return torch.softmax(logits, 1).to(kind)

        return _joined(of_windows, scan, size, overlap=overlap, windows=windows, device=device)

    windows = min(windows, many)
    while True:
        try:
            return joined(windows)
        except (MemoryError, RuntimeError) as error:
            if windows == 1 or not is_out_of_memory(error):
                raise
        windows //= 2  # out of this clause, for until then the error holds on to the activations
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _joined(
    of_windows: Callable[[Tensor], Tensor],
    scan: Tensor,
    size: Sequence[int],
    *,
    overlap: float,
    windows: int,
    device: torch.device,
) -> Tensor:
    """What is said of each window (B, C, *S) -> (B, K, *S), joined to that of the scan (C, *S): (K, *S)."""
    found = sliding_window_inference(
        scan[None],
        roi_size=tuple(size),
        sw_batch_size=windows,
        predictor=of_windows,
        overlap=overlap,
        mode="gaussian",
        padding_mode="constant",
        cval=_NOTHING,
        sw_device=device,
        device="cpu",
    )
    assert isinstance(found, Tensor)
    return found[0]


class _Windows:
    """Says how far a scan is that takes long: nothing within TELL_EVERY_S, then a line for each."""

    def __init__(self, many: int) -> None:
        self._many, self._done, self._told = many, 0, time.monotonic()

    def add(self, windows: int) -> None:
        self._done += windows
        if (now := time.monotonic()) - self._told > TELL_EVERY_S:
            self._told = now
            progress.report(progress.Note(f"a scan's windows: {self._done} of {self._many}"))


def _windows_of(spatial: Sequence[int], size: Sequence[int], overlap: float) -> int:
    """How many windows of `size` MONAI lays over a scan, padded to one where it is smaller."""
    steps = [max(1, int(side * (1 - overlap))) for side in size]
    return math.prod(1 + math.ceil(max(0, n - k) / step) for n, k, step in zip(spatial, size, steps, strict=True))


def likeliest(chances: Tensor) -> NDArray[np.uint8]:
    """(K, *S) -> the class of each voxel (*S)."""
    return np.asarray(chances.argmax(0).to(torch.uint8).numpy())


def likeliest_at_source(chances: Tensor, grid: Grid) -> NDArray[np.uint8]:
    """(K, *S) on a prepared scan's grid -> the likeliest class of each voxel of its source: (*grid.shape).

    Probabilities are taken back linearly, one class at a time: edges come out smoother than those of a mask that is
    resampled, and memory holds two classes at once.
    """
    best = np.full(grid.shape, -1.0, dtype=np.float32)
    classes = np.zeros(grid.shape, dtype=np.uint8)
    for number, chance in enumerate(chances):
        there = chance.float().numpy()
        for axis, (length, step) in enumerate(zip(grid.shape, grid.steps, strict=True)):
            there = resample(there, axis, length, 1 / step)
        above = there > best
        classes[above] = number
        np.maximum(best, there, out=best)
    return classes


def keep_largest(classes: NDArray[np.uint8], numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Of each class in `numbers` only the largest connected part, corners touching; the rest becomes background."""
    kept = classes.copy()
    touching = np.ones((3,) * classes.ndim, dtype=bool)
    for number in numbers:
        parts, count = ndimage.label(classes == number, structure=touching)
        if count > 1:
            sizes = np.bincount(parts.ravel())[1:]
            kept[(parts > 0) & (parts != 1 + int(sizes.argmax()))] = 0
    return kept


def measures(
    found: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    number: int,
    *,
    spacing_mm: Sequence[float] | None,
    tolerance_mm: float,
) -> Measures:
    """How well one class was found in one scan; both masks (*S).

    dice. hd95_mm: 95th percentile of the distances between the surfaces, of both directions the larger. surface_dice:
    share of both surfaces that lies within the tolerance of the other (Nikolov et al. 2021). Where the class is in
    neither, nothing can be said; where it is in one alone, Dice and surface Dice are 0, and there is no distance.
    Where the spacing is not known, there is Dice alone.
    """
    one, other = found == number, truth == number
    if not one.any() and not other.any():
        return {"dice": None, "hd95_mm": None, "surface_dice": None}
    if spacing_mm is None:
        return {"dice": dice(found, truth, number), "hd95_mm": None, "surface_dice": None}
    if not one.any() or not other.any():
        return {"dice": 0.0, "hd95_mm": None, "surface_dice": 0.0}
    masks = torch.from_numpy(one)[None, None].float(), torch.from_numpy(other)[None, None].float()
    spacing = list(spacing_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI about its own calls
        far = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing)
        near = compute_surface_dice(*masks, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing)
    return {"dice": dice(found, truth, number), "hd95_mm": float(far.item()), "surface_dice": float(near.item())}


def dice(found: NDArray[np.uint8], truth: NDArray[np.uint8], number: int) -> float | None:
    """2 |A and B| / (|A| + |B|) of one class; None where it is in neither mask."""
    one, other = (torch.from_numpy(mask == number)[None, None].float() for mask in (found, truth))
    if not one.any() and not other.any():
        return None
    return float(compute_dice(one, other, include_background=True, ignore_empty=False).item())
