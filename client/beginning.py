"""What a task begins with, or what is asked about scans: a checkpoint of ours, a released file, or nothing at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from client.finetune_config import FromCheckpoint, FromReleased, InitConfig
from unimiss_core import checkpoint, task_checkpoint
from unimiss_core.backbone import Backbone
from unimiss_core.channels import are_same, for_channels_of, require_one
from unimiss_core.embedding import encoder_of, seen_whole
from unimiss_core.errors import ScanError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.network import build_network, tensors_of
from unimiss_core.released import read_released
from unimiss_core.scan import RANKS, Modality, Rank, Scan
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_config import TaskConfig
from unimiss_core.tuned_round import (
    has_head,
    known_channels,
    rank_of_task,
    require_tensors_of_model,
    require_unsigned,
    study_of,
)

TAUGHT = (
    "this encoder was taught by labels: what follows holds for patients who neither trained it nor chose its epoch, of "
    "the others it shows what is remembered"
)


@dataclass(frozen=True)
class Beginning:
    """The weights that a fine-tuning begins with, or that are probed."""

    name: Literal["checkpoint", "released", "scratch"]
    model: ModelConfig
    plan: PlanConfig
    tensors: Mapping[str, Tensor] | None
    """The pretrained teacher's, or those of a model for a task; None from scratch."""
    rank: Rank | None = None
    """The one that a task's model is of; None of pretraining."""
    task: TaskConfig | None = None
    """What its head answers; None of pretraining, where heads stayed at their sites, and where nothing says."""
    size: tuple[int, ...] | None = None
    """S of scans of `rank`, as its task has it; None where nothing says, and of pretraining."""
    modality: Modality | None = None
    """What a fine-tuned model took scans for whose files do not say it; None of all else."""
    channels: tuple[str, ...] | None = None
    """Of the scans of a task that has channels, their numbers where nothing says their names; None of all else, and of
    pretraining."""

    @property
    def is_taught(self) -> bool:
        """Whether labels trained it, of patients about whom it must not be asked as if it had never seen them."""
        return self.rank is not None

    @property
    def digest(self) -> str | None:
        return None if self.tensors is None else task_checkpoint.digest_of(self.tensors)

    def has_head_for(self, task: TaskConfig) -> bool:
        """Whether its head answers just this, for scans of whatever size."""
        if self.task is None or not are_same(task.channels, self.task.channels):
            return False
        return _answered(self.task) == _answered(task)

    def tensors_for(self, task: TaskConfig) -> Mapping[str, Tensor] | None:
        """`tensors`, as a model of the task's channels begins with them."""
        return None if self.tensors is None else for_channels_of(task, self.model, self.tensors, self.channels)

    def encoder(self) -> Backbone:
        """On the CPU; from scratch the random one. A task's knows scans of `rank` alone. Raises ConfigError: one that
        knows scans of several channels alone."""
        require_one(self.channels)
        return self.random_encoder() if self.tensors is None else encoder_of(self.model, self.tensors, self.rank)

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        """S that the encoder sees a scan of this rank at. Raises ScanError: it takes none of them."""
        if self.rank not in {None, rank}:
            raise ScanError("other_rank")
        return self.size or self.model.size_of(rank)

    def prepares_as(self, other: "Beginning") -> bool:
        """Whether both see a scan of any rank alike."""
        return (self.plan, self.rank, self._sizes) == (other.plan, other.rank, other._sizes)

    @property
    def _sizes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.size_of(rank) for rank in RANKS if self.rank in {None, rank})

    def seen_whole(self, scan: Scan) -> Tensor:
        """(C, *S) as the encoder takes it: prepared by the plan, and resized as a whole. Raises ScanError."""
        return seen_whole(scan, self.plan, self.size_of(scan.rank))

    def random_encoder(self, seed: int = 0) -> Backbone:
        """What an encoder of these sizes is before it has seen a scan."""
        return build_network(self.model, seed=seed).backbone.eval().requires_grad_(False)


def begin(init: InitConfig, plan: PlanConfig | None = None) -> Beginning:
    """Read what `init` names. plan: instead of the checkpoint's own. Raises CheckpointError, ConfigError."""
    if isinstance(init, FromCheckpoint):
        return _from_checkpoint(init, plan)
    if isinstance(init, FromReleased):
        released = read_released(init.file)
        return Beginning("released", released.model, plan or PlanConfig(), released.teacher)
    return Beginning("scratch", init.model, plan or PlanConfig(), None)


def _from_checkpoint(init: FromCheckpoint, plan: PlanConfig | None) -> Beginning:
    """Of a round of pretraining, of a round of a federation that fine-tuned, or of a fine-tuned model's folder."""
    checkpoint.require_there(init.folder)
    if task_checkpoint.is_there(init.folder) and not (init.folder / checkpoint.MANIFEST).is_file():
        require_unsigned(init.folder, init.key)
        tuned, told = task_checkpoint.load(init.folder)
        task, model, tensors = told.task, told.model, tensors_of(tuned)
        about = task.rank, task, task.size_for(model), told.modality
        return Beginning("checkpoint", model, plan or told.plan, tensors, *about, channels=task.channels)
    found = checkpoint.load(init.folder, key=read_signing_public_key(init.key) if init.key else None)
    manifest, rank = found.manifest, rank_of_task(found.manifest)
    if rank is None:
        require_tensors_of_model(init.folder, manifest)
        return Beginning("checkpoint", manifest.model, plan or manifest.plan, found.teacher)
    study = study_of(init.folder, manifest)
    asked = study[0].finetune.task if study and study[0].finetune else None
    return Beginning(
        "checkpoint",
        manifest.model,
        plan or manifest.plan,
        found.student,
        rank=rank,
        task=asked if has_head(manifest) else None,
        size=asked.size_for(manifest.model) if asked else None,
        channels=known_channels(init.folder, manifest, rank),
    )


def _answered(task: TaskConfig) -> TaskConfig:
    """The task as all have it that a head answers alike, of scans of whatever size, grid and order of channels."""
    return task.model_copy(update={"input_size": None, "other_grids": "refuse", "channels": None})
