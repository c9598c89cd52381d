"""A fine-tuned model as two files that describe themselves:

    model.json          what it answers, of what it was made, how scans are prepared for it: see `TaskManifest`
    model.safetensors   its tensors, float32, named as in `unimiss_core.tasks`

Whoever has both needs nothing else to use the model. No time, no host and no patient stands in them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from safetensors.torch import save as as_bytes
from torch import Tensor

from unimiss_core import checkpoint, durable
from unimiss_core.config import Config
from unimiss_core.errors import CheckpointError
from unimiss_core.scan import Modality
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_config import TaskConfig
from unimiss_core.tasks import TaskModel, load_task_model

FORMAT_VERSION = 1
_TENSORS, _MANIFEST = "model.safetensors", "model.json"


class TaskManifest(Config):
    format_version: int = FORMAT_VERSION
    task: TaskConfig
    model: ModelConfig
    """The backbone's sizes; the head follows from the task."""
    plan: PlanConfig
    """How a scan is prepared before the model sees it."""
    began_with: Literal["checkpoint", "released", "scratch"]
    pretrained_digest: str | None
    """sha256 of the pretrained tensors' names and values; None from scratch."""
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
    tensors: Mapping[str, tuple[int, ...]] = {}
    sha256: str = ""
    """Of model.safetensors."""


def save(folder: Path, tensors: Mapping[str, Tensor], manifest: TaskManifest) -> TaskManifest:
    """Write both files, the description last; returns it with the tensors' shapes and digest."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    payload = as_bytes(plain)
    told = manifest.model_copy(
        update={
            "tensors": {name: tuple(tensor.shape) for name, tensor in plain.items()},
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
    )
    durable.write_bytes(folder / _TENSORS, payload)
    durable.write_text(folder / _MANIFEST, told.model_dump_json(indent=2) + "\n")
    return told


def load(folder: Path) -> tuple[TaskModel, TaskManifest]:
    """The model and what it says of itself.

    Raises CheckpointError: no model there, of another version, or a tensor changed or missing.
    """
    try:
        manifest = _manifest_in(folder / _MANIFEST)
        payload = (folder / _TENSORS).read_bytes()
    except OSError:
        what = "is a checkpoint of pretraining, which answers no task" if _is_pretrained(folder) else "holds no model"
        raise CheckpointError(
            f"{folder}: {what}; give the folder that `unimiss finetune` wrote, with {_MANIFEST} and {_TENSORS}"
        ) from None
    if hashlib.sha256(payload).hexdigest() != manifest.sha256:
        raise CheckpointError(f"{folder / _TENSORS}: was changed after it was written; take another copy")
    try:
        tensors = tensors_in(payload)
    except SafetensorError:
        raise CheckpointError(f"{folder / _TENSORS}: is not a file of tensors; take another copy") from None
    task = manifest.task
    dense = task.name == "segmentation"
    return load_task_model(manifest.model, task.rank, outputs=task.outputs, dense=dense, tensors=tensors), manifest


def _manifest_in(path: Path) -> TaskManifest:
    """Raises OSError, CheckpointError."""
    written = path.read_bytes()
    checkpoint.require_version(written, path, FORMAT_VERSION)
    try:
        return TaskManifest.model_validate_json(written)
    except ValidationError:
        raise CheckpointError(f"{path}: is no description of a fine-tuned model of this program") from None


def _is_pretrained(folder: Path) -> bool:
    return (folder / checkpoint.MANIFEST).exists()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and values, whatever file they stand in."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(as_bytes(plain)).hexdigest()
