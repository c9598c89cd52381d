"""The adaptation check: that a checkpoint will load into the tasks that it is made for, seen before it is trained.

What nnssl's adaptation plan is for (Wald et al. 2025): to learn after weeks of pretraining that no task takes the
weights would be too late.
"""

import torch

from unimiss_core.checkpoint import Checkpoint
from unimiss_core.errors import CheckpointError
from unimiss_core.scan import RANKS, SMALLEST
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig, TaskConfig
from unimiss_core.tasks import build_task_model


def check_adaptation(found: Checkpoint) -> None:
    """Build a classification and a segmentation of each rank from the checkpoint's teacher, as fine-tuning does, and
    let each answer one empty scan of the least size. Raises CheckpointError: one cannot be built, or its answer is no
    finite number for each class or voxel."""
    for rank in RANKS:
        for task in (
            ClassificationConfig(rank=rank, classes=("a", "b")),
            SegmentationConfig(rank=rank, classes=("a",)),
        ):
            try:
                _check(found, task)
            except (CheckpointError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"the weights that this run would train fit no {rank}D {task.name}: {str(error).splitlines()[0]}. "
                    "Nothing was trained. Give a `start:` of this model, or install one version of the program whole"
                ) from None


def _check(found: Checkpoint, task: TaskConfig) -> None:
    model = build_task_model(found.manifest.model, task, seed=0, pretrained=found.teacher).eval()
    scan, dense = torch.zeros(1, 1, *SMALLEST[task.rank]), task.name == "segmentation"
    with torch.inference_mode():
        answer = model(scan)
    if answer.shape != (1, task.outputs, *(SMALLEST[task.rank] if dense else ())):
        raise CheckpointError(f"its answer has the shape {tuple(answer.shape)}")
    if not bool(answer.isfinite().all()):
        raise CheckpointError("its answer holds a value that is not a finite number")
