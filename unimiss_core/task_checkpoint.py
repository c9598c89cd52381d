"""A fine-tuned model as two files that describe themselves:

    model.json          what it answers, of what it was made, how scans are prepared for it: see `TaskManifest`
    model.safetensors   its tensors, float32, named as in `unimiss_core.tasks`

Whoever has both needs nothing else to use the model. No time, no host and no patient stands in them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from safetensors.torch import save as as_bytes
from torch import Tensor

from unimiss_core import checkpoint, durable
from unimiss_core.config import Config
from unimiss_core.errors import CheckpointError
from unimiss_core.scan import Modality
from unimiss_core.study import ModelConfig, PlanConfig, StudyConfig
from unimiss_core.task_config import TaskConfig
from unimiss_core.tasks import TaskModel, load_task_model

FORMAT_VERSION = 1
MANIFEST = "model.json"
_TENSORS = "model.safetensors"


class TaskManifest(Config):
    format_version: int = FORMAT_VERSION
    task: TaskConfig
    model: ModelConfig
    """The backbone's sizes; the head follows from the task."""
    plan: PlanConfig
    """How a scan is prepared before the model sees it."""
    began_with: Literal["checkpoint", "released", "scratch", "unknown"]
    """unknown: of a federation's round by itself, which does not say what its run was begun from."""
    pretrained_digest: str | None
    """sha256 of the pretrained tensors' names and values; None from scratch, or where nothing is known."""
    taught_by_labels: bool | None = None
    """Whether what it began with had been fine-tuned, perhaps on scans that judge this one; None: nobody told."""
    trained: Literal["linear_probe", "frozen", "full"]
    seed: int
    epoch: int = Field(ge=0)
    """Epochs that were trained for these tensors; of a federation its rounds."""
    trained_in: Literal["epochs", "rounds"] = "epochs"
    """What `epoch` counts: rounds where a federation tuned it."""
    keep_largest: tuple[str, ...] = ()
    """Classes of a mask of which only the largest connected part counts."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of neighbouring windows of a mask, as a share of their sides; with `precision` as the model was judged."""
    precision: Literal["fp32", "bf16"] = "fp32"
    modality: Modality | None = None
    """What scans were taken for whose files do not say it; None goes by the kind of file."""
    trained_on: tuple[Modality, ...] = ()
    """Kinds of its training scans, as they were read; empty where nobody told, as of a federation's sites."""
    channel: Annotated[int | None, Field(exclude_if=lambda channel: channel is None)] = None
    """Of cases whose files are called CASE_0000, CASE_0001, ..., as nnU-Net's, which it was trained on; None: they were
    not, or nobody told, which is not written out, so that versions before this one read the others' models."""
    channels: Annotated[
        tuple[Annotated[int, Field(ge=0, le=9999)], ...], Field(exclude_if=lambda numbers: not numbers)
    ] = ()
    """Of a task with channels: which of CASE_0000, CASE_0001, ..., or of a file's volumes, each of them is. Empty of
    what sites share, who each have numbers of their own: 0, 1, ... in the task's order; and of all other tasks."""
    reading: int | None = None
    """Which version of the rules its training scans were read by; None: by earlier ones, or nobody told."""
    tensors: Mapping[str, tuple[int, ...]] = {}
    sha256: str = ""
    """Of model.safetensors."""

    @property
    def channel_numbers(self) -> tuple[int, ...]:
        """`channels`, or what stands for it; empty of a task without channels."""
        return self.channels or tuple(range(self.task.channel_count or 0))

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if self.channels and len(set(self.channels)) != self.task.channel_count:
            raise ValueError("channels: expected a different number for each of the task's channels")
        return self


def save(folder: Path, tensors: Mapping[str, Tensor], manifest: TaskManifest) -> TaskManifest:
    """Write both files, the description last; returns it with the tensors' shapes and digest."""
    files, told = packed(tensors, manifest)
    for name, content in files.items():
        durable.write_bytes(folder / name, content)
    return told


def packed(tensors: Mapping[str, Tensor], manifest: TaskManifest) -> tuple[dict[str, bytes], TaskManifest]:
    """Both files by name, the description last; and that description, with the tensors' shapes and digest."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    payload = as_bytes(plain)
    told = manifest.model_copy(
        update={
            "tensors": {name: tuple(tensor.shape) for name, tensor in plain.items()},
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
    )
    return {_TENSORS: payload, MANIFEST: (told.model_dump_json(indent=2) + "\n").encode()}, told


def of_rounds(
    study: StudyConfig,
    *,
    round: int,
    began_with: Literal["checkpoint", "scratch", "unknown"],
    pretrained_digest: str | None,
    taught_by_labels: bool | None = None,
    trained_on: Sequence[Modality] = (),
    channels: tuple[int, ...] = (),
) -> TaskManifest:
    """What a model says of itself that a federation fine-tuned by `study`, after `round`; tensors are not yet told."""
    assert study.finetune is not None
    return TaskManifest(
        task=study.finetune.task,
        model=study.model,
        plan=study.plan,
        began_with=began_with,
        pretrained_digest=pretrained_digest,
        taught_by_labels=taught_by_labels,
        trained=study.finetune.trains,
        seed=study.seed,
        epoch=round,
        trained_in="rounds",
        trained_on=tuple(trained_on),
        channels=channels,
    )


def is_there(folder: Path) -> bool:
    """Whether the folder says that it holds a fine-tuned model."""
    return (folder / MANIFEST).is_file()


def load(folder: Path) -> tuple[TaskModel, TaskManifest]:
    """The model and what it says of itself.

    Raises CheckpointError: no model there, of another version, or a tensor changed or missing.
    """
    try:
        manifest = _manifest_in(folder / MANIFEST)
        payload = (folder / _TENSORS).read_bytes()
    except PermissionError as error:
        raise checkpoint.unreadable(folder, Path(error.filename).name, error) from None
    except OSError:
        raise CheckpointError(
            f"{folder}: holds no model; give the folder that `unimiss finetune` wrote, with {MANIFEST} and {_TENSORS}"
        ) from None
    if hashlib.sha256(payload).hexdigest() != manifest.sha256:
        raise CheckpointError(f"{folder / _TENSORS}: was changed after it was written; take another copy")
    try:
        tensors = tensors_in(payload)
    except SafetensorError:
        raise CheckpointError(f"{folder / _TENSORS}: is not a file of tensors; take another copy") from None
    return load_task_model(manifest.model, manifest.task, tensors=tensors), manifest


def _manifest_in(path: Path) -> TaskManifest:
    """Raises OSError, CheckpointError."""
    written = path.read_bytes()
    checkpoint.require_version(written, path, FORMAT_VERSION)
    try:
        return TaskManifest.model_validate_json(written)
    except ValidationError:
        raise CheckpointError(f"{path}: is no description of a fine-tuned model of this program") from None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and values, whatever file they stand in."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(as_bytes(plain)).hexdigest()
