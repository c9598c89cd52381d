"""A doctor's task: what a fine-tuned model is asked. It stands in a fine-tuning's file, in a study of `task: finetune`,
and in the model's own."""

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from unimiss_core.config import Config, chosen_by_name
from unimiss_core.model_config import Axis, ModelConfig
from unimiss_core.scan import SMALLEST, Rank

Fraction = Annotated[float, Field(ge=0, le=1)]

Trains = Literal["linear_probe", "frozen", "full"]
"""What of a model is trained: its new head alone; all but the encoder (head and decoder); everything."""

OtherGrids = Literal["refuse", "resample"]
"""What becomes of a channel that does not lie on the grid of its scan's first."""

MOST_CLASSES = 256

UNKNOWN = -1
"""In the place of a 0 or 1 that nobody knows: it counts in no loss, no weight and no figure."""

ClassName = Annotated[str, Field(min_length=1, max_length=64)]

MOST_CHANNELS = 16

ChannelName = Annotated[str, Field(min_length=1, max_length=64)]


def folded(channel: str) -> str:
    """A channel's name as all have it who mean the same, however they write it."""
    return channel.strip().casefold()


class _Task(Config):
    """What both kinds of task set."""

    name: str
    rank: Rank = 3
    """2 for images, 3 for volumes."""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=MOST_CLASSES)]
    channels: Annotated[
        tuple[ChannelName, ...] | None,
        Field(min_length=2, max_length=MOST_CHANNELS, exclude_if=lambda named: named is None),
    ] = None
    """What each image or volume of a scan is, in their order, where several of one patient lie on one grid: MR
    sequences, say, or CT and PET. None: a scan is one, which is not written out, so that older studies keep their
    digests."""
    other_grids: Annotated[OtherGrids, Field(exclude_if=lambda rule: rule == "refuse")] = "refuse"
    """Of volumes that do not lie on the grid of their scan's first channel: refuse leaves the scan out, resample lays
    them on it by where their files say that they lie in the patient. Whether they are registered nobody checks."""
    input_size: Annotated[tuple[Axis, ...], Field(min_length=2, max_length=3)] | None = None
    """(H, W) or (D, H, W) that the network sees; None takes the size that its position tables are made for."""

    def size_for(self, model: ModelConfig) -> tuple[int, ...]:
        """S that the network sees."""
        return self.input_size or model.size_of(self.rank)

    @property
    def channel_count(self) -> int | None:
        """C of scans that are several images or volumes; None: each is one."""
        return None if self.channels is None else len(self.channels)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        names = [folded(name) for name in self.channels or ()]
        if len(set(names)) < len(names) or "" in names:
            raise ValueError("channels: each name may stand once, however it is written, and is no blank")
        if self.other_grids == "resample" and (self.channels is None or self.rank == 2):
            raise ValueError("other_grids: resample is of volumes of several channels; leave it out")
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

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if self.outputs > MOST_CLASSES:
            raise ValueError(f"classes: masks have 8 bits, so {MOST_CLASSES - 1} at most; got {len(self.classes)}")
        return self


TaskConfig = Annotated[
    Annotated[ClassificationConfig, Tag("classification")] | Annotated[SegmentationConfig, Tag("segmentation")],
    chosen_by_name(default="classification"),
]


class AugmentationConfig(Config):
    """Random changes of training scans; the recipe of pretraining (`unimiss_core.views`), more gently."""

    area: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Share of an image's area that a classification's crop covers; of a volume also the root of it in depth."""
    flip: tuple[Fraction, Fraction, Fraction] = (0.0, 0.0, 0.5)
    """Chance of a mirror image along (D, H, W); an image has the last two. 0 where left and right are classes."""
    intensity: Fraction = 0.5
    """Chance of each: noise, another brightness and contrast, another gamma."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.area[0] <= self.area[1]:
            raise ValueError(f"area: the bounds {list(self.area)} must rise, from above 0")
        return self


class SupervisionConfig(Config):
    """What a federation fine-tunes for: the section `finetune` of a study (docs/finetuning.md, 'By a federation').

    Nothing here follows from what a site or a batch holds, so that each scan's loss is its own: what privacy rests on.
    """

    task: TaskConfig
    head: Literal["shared", "local"] = "shared"
    """shared: one head, joined like the encoder. local: each site keeps its own, which never leaves it."""
    trains: Trains = "full"
    """As in a fine-tuning's file. What it leaves alone stays as the run began, at every site."""
    class_weights: Annotated[tuple[Annotated[float, Field(gt=0, le=1e3)], ...] | None, Field(min_length=1)] = None
    """How much each of the model's answers counts in the cross-entropy (of multi_label: a class that is there), in the
    order of the classes, with the background first; None counts all alike."""
    foreground: Fraction = 0.5
    """Share of a segmentation's windows that are laid about a voxel of a class."""
    augmentation: AugmentationConfig = AugmentationConfig()
    validation: Annotated[float, Field(ge=0, lt=1, exclude_if=lambda share: share == 0)] = 0.0
    """Share of each site's labelled patients that no round trains on: in each the site measures the shared model by
    them, and tells the figure. 0 holds out nobody, and is not written out, so that older studies keep their digests."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation and self.head == "local":
            raise ValueError(
                "validation: measures the model that sites share, and with head: local there is none; leave it out"
            )
        if self.class_weights is not None and len(self.class_weights) != self.task.outputs:
            background = ", the background first" if isinstance(self.task, SegmentationConfig) else ""
            raise ValueError(
                f"class_weights: expected {self.task.outputs}{background}, one for each of the task's classes; got "
                f"{len(self.class_weights)}"
            )
        if self.head == "local" and self.trains == "linear_probe":
            raise ValueError(
                "head: local, trains: linear_probe: nothing would be joined; share the head, or train more"
            )
        return self
