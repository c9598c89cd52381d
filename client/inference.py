"""How a task's model is asked about prepared scans: the same way in fine-tuning, where it is measured, as afterwards.

Legend of shapes: N scans, K outputs of the model, C channels, S spatial axes - (H, W) or (D, H, W).
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client import merit
from client.labelled import Grid
from client.task_training import autocast
from unimiss_core import progress
from unimiss_core.errors import ConfigError, NonFiniteLossError
from unimiss_core.extras import way_to
from unimiss_core.resampling import as_they_are
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, SegmentationConfig, TaskConfig
from unimiss_core.tasks import TaskModel
from unimiss_core.views import whole

Precision = Literal["fp32", "bf16"]


class WholeScan(Protocol):
    """A prepared scan, read when it is looked at."""

    def whole(self) -> NDArray[np.float32]:
        """(C, *S) in [0, 1]."""
        ...


@dataclass(frozen=True)
class Inference:
    """All that an answer hangs on besides the model and the scan."""

    task: TaskConfig
    size: tuple[int, ...]
    """S that the model sees."""
    device: torch.device
    precision: Precision
    batch: int
    """Scans, or windows of a scan, at a time."""
    overlap: float
    """Of neighbouring windows, as a share of their sides."""
    keep_largest: tuple[str, ...]
    """Classes of a mask of which only the largest connected part is kept."""

    @torch.inference_mode()
    def chances(self, model: TaskModel, scans: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """(N, K) of a classification, each scan (C, *S) in [0, 1] seen whole, all at a time.

        Raises NonFiniteLossError: some answer is no number.
        """
        assert isinstance(self.task, ClassificationConfig)
        x = torch.stack([whole(values, self.size) for values in scans])
        with autocast(self.device, self.precision):
            logits = model.eval()(x.to(self.device)).float()
        require_numbers([logits])
        found = logits.sigmoid() if self.task.kind == "multi_label" else logits.softmax(1)
        return np.asarray(found.cpu().double().numpy())

    def chances_of_all(self, model: TaskModel, scans: Sequence[WholeScan]) -> NDArray[np.float64]:
        """`chances` of any number of scans, of which so many are in memory as are looked at together."""
        found = []
        for start in range(0, len(scans), self.batch):
            found.append(self.chances(model, [one.whole() for one in scans[start : start + self.batch]]))
            progress.report(progress.Working())
        return np.concatenate(found)

    def truth(self, targets: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """(N, K) of 0 and 1, or UNKNOWN, what `chances` would say if it knew. targets: of each scan its labels, or its
        class."""
        assert isinstance(self.task, ClassificationConfig)
        found = np.array(targets, dtype=np.int64)
        one_of = np.eye(len(self.task.classes), dtype=np.int64)
        return found if self.task.kind == "multi_label" else one_of[found[:, 0]]

    def areas(self, chances: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
        """The AUC of each class over the scans of which it is known, of two that of the second alone; nan where all are
        of it, or none."""
        assert isinstance(self.task, ClassificationConfig)
        told = [1] if self.task.kind == "binary" else range(chances.shape[1])
        once = as_they_are(len(chances))
        known = truth != UNKNOWN
        return np.array([merit.auc(chances[:, k], truth[:, k] == 1, once * known[:, k])[0] for k in told])

    def voxel_chances(self, model: TaskModel, values: NDArray[np.float32]) -> Tensor:
        """Of a mask: values (C, *S) in [0, 1] -> (K, *S) on the CPU. Raises NonFiniteLossError, as `chances`."""
        from client import segmenting  # MONAI takes seconds to import, and a classification needs none

        found = segmenting.probabilities(
            model.eval(),
            values,
            self.size,
            overlap=self.overlap,
            windows=self.batch,
            device=self.device,
            autocast=autocast(self.device, self.precision),
        )
        require_numbers(found)  # class by class, for a scan may be large
        return found

    def mask(self, model: TaskModel, values: NDArray[np.float32], grid: Grid | None) -> NDArray[np.uint8]:
        """The class of each voxel, post-processed: (*grid.shape) on the source's grid, (*S) without a grid."""
        from client import segmenting

        chances = self.voxel_chances(model, values)
        found = segmenting.likeliest(chances) if grid is None else segmenting.likeliest_at_source(chances, grid)
        return segmenting.keep_largest(found, [1 + self.task.classes.index(name) for name in self.keep_largest])


def require_numbers(answers: Iterable[Tensor]) -> None:
    """Before they are ranked or made classes: what is no number would be so by its place alone, and in a table sorted
    by class look right. Weights and loss may all be finite. Raises NonFiniteLossError."""
    if not all(bool(each.isfinite().all()) for each in answers):
        raise NonFiniteLossError(
            "the model's answers are not all numbers: its training diverged; take a smaller training.lr, or precision "
            "fp32 for bf16"
        )


def check_extra(task: TaskConfig) -> None:
    """Before scans are read. Raises ConfigError: what masks need is not installed."""
    needed = ("monai", "scipy") if isinstance(task, SegmentationConfig) else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} must be installed for masks: {way_to('finetune')}")
