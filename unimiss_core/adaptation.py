"""The adaptation check: that a checkpoint will load into the tasks that it is made for, seen before it is trained.

What nnssl's adaptation plan is for (Wald et al. 2025): to learn after weeks of pretraining that no task takes the
weights would be too late.
"""

import torch

from unimiss_core.checkpoint import Checkpoint
from unimiss_core.errors import CheckpointError
from unimiss_core.scan import RANKS, SMALLEST, Rank
from unimiss_core.tasks import build_task_model

_OUTPUTS = 2


def check_adaptation(found: Checkpoint) -> None:
    """Build a classification and a segmentation of each rank from the checkpoint's teacher, as fine-tuning does, and
    let each answer one empty scan of the least size. Raises CheckpointError: one cannot be built, or its answer is no
    finite number for each class or voxel."""
    for rank in RANKS:
        for task, dense in (("classification", False), ("segmentation", True)):
            try:
                _check(found, rank, dense=dense)
            except (CheckpointError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"the weights that this run would train fit no {rank}D {task}: {str(error).splitlines()[0]}. "
                    "Nothing was trained. Give a `start:` of this model, or install one version of the program whole"
                ) from None


def _check(found: Checkpoint, rank: Rank, *, dense: bool) -> None:
    model = build_task_model(
        found.manifest.model, rank, outputs=_OUTPUTS, dense=dense, seed=0, pretrained=found.teacher
    ).eval()
    scan = torch.zeros(1, 1, *SMALLEST[rank])
    with torch.inference_mode():
        answer = model(scan)
    if answer.shape != (1, _OUTPUTS, *(SMALLEST[rank] if dense else ())):
        raise CheckpointError(f"its answer has the shape {tuple(answer.shape)}")
    if not bool(answer.isfinite().all()):
        raise CheckpointError("its answer holds a value that is not a finite number")
