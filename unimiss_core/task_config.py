"""A doctor's task: what a fine-tuned model is asked. It stands in a fine-tuning's file, and in the model's own."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from unimiss_core.config import Config, chosen_by_name
from unimiss_core.scan import SMALLEST, Rank
from unimiss_core.study import Axis, ModelConfig

ClassName = Annotated[str, Field(min_length=1, max_length=64)]


class _Task(Config):
    """What both kinds of task set."""

    name: str
    rank: Rank = 3
    """2 for images, 3 for volumes."""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=256)]
    input_size: Annotated[tuple[Axis, ...], Field(min_length=2, max_length=3)] | None = None
    """(H, W) or (D, H, W) that the network sees; None takes the size that its position tables are made for."""

    def size_for(self, model: ModelConfig) -> tuple[int, ...]:
        """S that the network sees."""
        return self.input_size or (model.image_size if self.rank == 2 else model.volume_size)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: each name may stand once")
        if self.input_size is not None:
            least = SMALLEST[self.rank]
            if len(self.input_size) != self.rank or any(n < m for n, m in zip(self.input_size, least, strict=True)):
                raise ValueError(
                    f"input_size: {list(self.input_size)} is no size of rank {self.rank}; "
                    f"give {self.rank} axes of at least {list(least)}"
                )
        return self


class ClassificationConfig(_Task):
    """Which class a whole scan is of; the scan is seen whole, shrunk to the input size."""

    name: Literal["classification"] = "classification"
    kind: Literal["binary", "multi_class", "multi_label"] = "binary"
    """binary: the second class against the first. multi_class: one of several. multi_label: each may be there."""

    @property
    def outputs(self) -> int:
        """K of the model's logits: one for each class, of two classes, too."""
        return len(self.classes)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"classes: binary needs two, the one looked for last; got {len(self.classes)}")
        if self.kind == "multi_class" and len(self.classes) < 3:
            raise ValueError(f"classes: multi_class needs at least three; got {len(self.classes)}; see kind: binary")
        return self


class SegmentationConfig(_Task):
    """Which class each voxel is of; the scan is seen in overlapping windows of the input size."""

    name: Literal["segmentation"] = "segmentation"

    @property
    def outputs(self) -> int:
        """K of the model's logits: background, then value i of a mask is classes[i - 1]."""
        return 1 + len(self.classes)


TaskConfig = Annotated[
    Annotated[ClassificationConfig, Tag("classification")] | Annotated[SegmentationConfig, Tag("segmentation")],
    chosen_by_name(default="classification"),
]
