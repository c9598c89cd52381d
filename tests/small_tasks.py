"""Tasks whose models have three answers: of a class, or of a voxel."""

from unimiss_core.scan import Rank
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig, TaskConfig


def three_answers(rank: Rank, *, dense: bool) -> TaskConfig:
    if dense:
        return SegmentationConfig(rank=rank, classes=("a", "b"))
    return ClassificationConfig(kind="multi_class", rank=rank, classes=("a", "b", "c"))
