"""How a task's model is asked about prepared scans: the same way in fine-tuning, where it is measured, as afterwards.

Legend of shapes: N scans, K outputs of the model, C channels, S spatial axes - (H, W) or (D, H, W).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.labelled import Grid
from client.task_training import autocast
from unimiss_core.errors import ConfigError
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig, TaskConfig
from unimiss_core.tasks import TaskModel
from unimiss_core.views import whole

Precision = Literal["fp32", "bf16"]


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
        """(N, K) of a classification, each scan (C, *S) in [0, 1] seen whole, all at a time."""
        assert isinstance(self.task, ClassificationConfig)
        x = torch.stack([whole(values, self.size) for values in scans])
        with autocast(self.device, self.precision):
            logits = model.eval()(x.to(self.device)).float()
        found = logits.sigmoid() if self.task.kind == "multi_label" else logits.softmax(1)
        return np.asarray(found.cpu().double().numpy())

    def voxel_chances(self, model: TaskModel, values: NDArray[np.float32]) -> Tensor:
        """Of a mask: values (C, *S) in [0, 1] -> (K, *S) on the CPU."""
        from client import segmenting  # MONAI takes seconds to import, and a classification needs none

        return segmenting.probabilities(
            model.eval(),
            values,
            self.size,
            overlap=self.overlap,
            windows=self.batch,
            device=self.device,
            autocast=autocast(self.device, self.precision),
        )

    def mask(self, model: TaskModel, values: NDArray[np.float32], grid: Grid | None) -> NDArray[np.uint8]:
        """The class of each voxel, post-processed: (*grid.shape) on the source's grid, (*S) without a grid."""
        from client import segmenting

        chances = self.voxel_chances(model, values)
        found = segmenting.likeliest(chances) if grid is None else segmenting.likeliest_at_source(chances, grid)
        return segmenting.keep_largest(found, [1 + self.task.classes.index(name) for name in self.keep_largest])


def check_extra(task: TaskConfig) -> None:
    """Before scans are read. Raises ConfigError: what masks need is not installed."""
    needed = ("monai", "scipy") if isinstance(task, SegmentationConfig) else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"{' and '.join(missing)} must be installed for masks: pip install 'federated-unimiss[finetune]'"
        )
