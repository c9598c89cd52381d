"""The file of a fine-tuning: the task, what it begins with, labelled scans, how they are split, how it is trained.

Paths of scans and tables lie below `data_root`; that, and the others, below the file's own folder unless absolute.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from client.label_config import CsvData as CsvData
from client.label_config import MsdData as MsdData
from client.label_config import check_patient_pattern
from client.label_values import wrong_settings
from unimiss_core.config import Config, Name, chosen_by_name, load
from unimiss_core.device import check_names
from unimiss_core.errors import ConfigError
from unimiss_core.given_path import GivenPath
from unimiss_core.study import Fraction, ModelConfig, NonNegative, PlanConfig, Positive
from unimiss_core.task_config import (
    AugmentationConfig,
    ClassificationConfig,
    SegmentationConfig,
    TaskConfig,
    Trains,
)

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**31)]


class FromCheckpoint(Config):
    """A round of a run of ours: the teacher's backbone, and the plan that it was trained with."""

    name: Literal["checkpoint"] = "checkpoint"
    folder: GivenPath
    key: GivenPath | None = None
    """The public key (.pub) that must have signed it; None asks for no signature."""


class FromReleased(Config):
    """A file that the authors of UniMiSS released."""

    name: Literal["released"] = "released"
    file: GivenPath


class FromScratch(Config):
    """No pretraining: what it was worth is told by comparison with this."""

    name: Literal["scratch"] = "scratch"
    model: ModelConfig = ModelConfig()


InitConfig = Annotated[
    Annotated[FromCheckpoint, Tag("checkpoint")]
    | Annotated[FromReleased, Tag("released")]
    | Annotated[FromScratch, Tag("scratch")],
    chosen_by_name(default="checkpoint"),
]


class MedMnistData(Config):
    """A MedMNIST file: arrays {train,val,test}_{images,labels}; each image counts as a patient."""

    name: Literal["medmnist"] = "medmnist"
    file: GivenPath


DataConfig = Annotated[
    Annotated[CsvData, Tag("csv")] | Annotated[MsdData, Tag("msd")] | Annotated[MedMnistData, Tag("medmnist")],
    chosen_by_name(default="csv"),
]


class GivenSplit(Config):
    """As the table's column, or the MedMNIST file, says."""

    name: Literal["given"] = "given"
    validation: OpenFraction = 0.2
    """Share of the training patients that validate, rounded up to patients, where none are given for that."""
    seed: Seed | None = None
    """By which those are drawn; None takes the file's."""


class FoldSplit(Config):
    """By patient, at random: one of k parts tests, a share of the others validates."""

    name: Literal["folds"] = "folds"
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    fold: Annotated[int, Field(ge=0, le=99)] = 0
    """From 0."""
    validation: OpenFraction = 0.2
    seed: Seed | None = None
    """Of who is in which part. None takes the file's; one of its own keeps the patients where several seeds train."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold} is not there; {self.folds} folds count from 0 to {self.folds - 1}")
        return self


SplitConfig = Annotated[
    Annotated[GivenSplit, Tag("given")] | Annotated[FoldSplit, Tag("folds")], chosen_by_name(default="folds")
]


class TrainingConfig(Config):
    trains: Trains = "full"
    """linear_probe: the head alone. frozen: head and decoder. full: everything."""
    epochs: Positive = 50
    steps_per_epoch: Positive | None = None
    """None goes once through the training scans in an epoch."""
    batch: Positive = 8
    lr: Annotated[float, Field(gt=0)] = 1e-3
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer nearer the input learns at so many times the rate of the one above it. None is 0.75 for pretrained
    layers, which have less to learn, and 1 from scratch: at 0.75 the first would hardly move. In a few hundred steps it
    costs pretrained ones more than it keeps, too (docs/LOG.md): the variants for a CPU have 1."""
    weight_decay: NonNegative = 0.05
    warmup_epochs: NonNegative = 1.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longest gradient of all parameters together."""
    balance: Literal["loss", "sampling", "none"] = "loss"
    """Of a classification: rare classes weigh more in the loss, or are drawn more often. A mask's are met by
    `foreground` and the Dice loss."""
    foreground: Fraction = 0.5
    """Share of a segmentation's windows that are laid about a voxel of a class."""
    validate_every: Positive = 1
    """Epochs."""
    patience: Positive | None = 15
    """Validations without a better score before training stops; None goes through all epochs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    augmentation: AugmentationConfig = AugmentationConfig()


class InferenceConfig(Config):
    batch: Positive = 8
    """Scans, or windows of a scan, at a time."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of neighbouring windows, as a share of their sides."""
    keep_largest: tuple[str, ...] = ()
    """Classes of which only the largest connected part is kept."""
    surface_tolerance_mm: Annotated[float, Field(gt=0)] = 1.0
    """How far apart two surfaces may lie to count as one in surface Dice."""


class FinetuneConfig(Config):
    name: Name
    seed: Seed = 0
    task: TaskConfig
    init: InitConfig
    plan: PlanConfig | None = None
    """How scans are prepared; None takes the checkpoint's own, which is what its weights know."""
    data_root: GivenPath = Path()
    data: DataConfig
    split: SplitConfig = FoldSplit()
    allow_empty_masks: bool = False
    """Whether a mask may hold no class at all: a patient in whom there is nothing to find."""
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: GivenPath = Path("out")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := _contradictions(self):
            raise ValueError("; ".join(problems))
        return self


def _contradictions(config: FinetuneConfig) -> list[str]:
    """What cannot be true together, each with its key."""
    problems, task, data = [], config.task, config.data
    if isinstance(data, MsdData) and not isinstance(task, SegmentationConfig):
        problems.append("data: an msd folder holds masks; the task must be segmentation")
    if isinstance(data, MedMnistData) and not isinstance(task, ClassificationConfig):
        problems.append("data: a MedMNIST file holds classes; the task must be classification")
    if isinstance(data, MedMnistData) and task.channels is not None:
        problems.append("task.channels: a MedMNIST file's images are of one channel, or coloured; leave it out")
    if isinstance(data, MsdData) and isinstance(config.split, GivenSplit):
        problems.append("split: an msd folder's imagesTr says of none what it is for; use folds")
    if not isinstance(data, MedMnistData):
        try:
            check_patient_pattern(data.patient_pattern)
        except ValueError as error:
            problems.append(f"data.{error}")
    if not isinstance(data, MedMnistData) and (wrong := wrong_settings(data, task)) is not None:
        problems.append(wrong)
    if isinstance(task, ClassificationConfig) and task.kind == "multi_label" and config.training.balance == "sampling":
        problems.append("training.balance: a scan of several labels cannot be drawn for one of them; use loss or none")
    if unknown := [name for name in config.inference.keep_largest if name not in task.classes]:
        problems.append(f"inference.keep_largest: {', '.join(unknown)} is none of the task's classes")
    try:
        check_names([config.device])
    except ValueError as error:
        problems.append(f"device: {error}")
    return problems


def layer_decay_of(config: FinetuneConfig) -> float:
    """`training.layer_decay`, or what None stands for."""
    if config.training.layer_decay is not None:
        return config.training.layer_decay
    return 1.0 if isinstance(config.init, FromScratch) else 0.75


def load_finetune(path: Path, *, data_root: Path | None = None, out: Path | None = None) -> FinetuneConfig:
    """Read a fine-tuning's file; every path in what comes back is absolute.

    data_root, out: instead of the file's own. Raises ConfigError: every mistake in one message.
    """
    config, base = load(FinetuneConfig, path), path.absolute().parent
    root = data_root.absolute() if data_root else base / config.data_root
    return config.model_copy(
        update={
            "data_root": root,
            "out": out.absolute() if out else base / config.out,
            "init": _with_paths_below(base, config.init),
            "data": _with_paths_below(root, config.data),
        }
    )


def init_from(text: str, otherwise: InitConfig, *, named: str = "--init") -> InitConfig:
    """What a command line says to begin with: scratch, a checkpoint's folder or a released file. A key that the file
    asks for holds of another checkpoint, too. named: what the command calls it. Raises ConfigError."""
    path = Path(text).absolute()
    if text == "scratch":
        return otherwise if isinstance(otherwise, FromScratch) else FromScratch()
    if path.is_dir():
        return FromCheckpoint(folder=path, key=otherwise.key if isinstance(otherwise, FromCheckpoint) else None)
    if path.is_file():
        return FromReleased(file=path)
    what = "is neither a folder nor a file" if path.exists() else "does not exist"
    raise ConfigError(f"{named} {text}: {what}; give 'scratch', a checkpoint's folder or a released file")


def signed_by(key: Path, init: InitConfig) -> FromCheckpoint:
    """`init`, which must have been signed by the key. Raises ConfigError: nobody signs it."""
    if not isinstance(init, FromCheckpoint):
        raise ConfigError(f"--key: begins with '{init.name}', which nobody signs; give a checkpoint, or no key")
    return init.model_copy(update={"key": key.absolute()})


def _with_paths_below(base: Path, config: InitConfig | DataConfig) -> InitConfig | DataConfig:
    paths = {name: base / value for name, value in config if isinstance(value, Path)}
    return config.model_copy(update=paths)
