"""A model that left this program, in forms that others read, and what its `config.json` says of it.

    config.json         see `ExportedConfig`
    model.safetensors   a plain state_dict, float32: of a backbone, or of a task's model

`load` takes such a folder back, for whoever has this program beside torch.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from torch import nn

from unimiss_core.backbone import Backbone, backbone_of
from unimiss_core.config import Config
from unimiss_core.errors import CheckpointError, ScanError
from unimiss_core.inputs import InputConfig, inputs_of
from unimiss_core.json_text import object_in
from unimiss_core.scan import Modality, Rank
from unimiss_core.study import ModelConfig, PlanConfig
from unimiss_core.task_config import TaskConfig
from unimiss_core.tasks import TaskModel, load_task_model

FORMAT_VERSION = 2
_READ = (1, FORMAT_VERSION)
"""Versions of which this program reads what they wrote; 1 has neither `inputs` nor `modality`."""
CONFIG, TENSORS = "config.json", "model.safetensors"


class GraphConfig(Config):
    """One ONNX file, as it was checked when it was written."""

    input: tuple[int | str, ...]
    """Shape of `scan`: batch, channels, S; a name stands for an axis of any length."""
    outputs: Mapping[str, tuple[int | str, ...]]
    largest_difference: float = Field(ge=0)
    """Between onnxruntime's answers and torch's, in shares of the largest value where that is above 1."""


class ExportedConfig(Config):
    format_version: int = FORMAT_VERSION
    holds: Literal["encoder", "classification", "segmentation"]
    part: Literal["teacher", "student"] | None
    """Of a checkpoint; None of a fine-tuned model."""
    model: ModelConfig
    """Sizes of the backbone, as a study states them."""
    architecture: Mapping[str, int | tuple[int, ...]]
    """What `model.size` stands for: channels, depths, heads, reductions."""
    num_features: int
    """Width of what the encoder says of a scan."""
    ranks: tuple[Rank, ...]
    """2 takes images (B, 1 or 3, H, W), 3 volumes (B, 1, D, H, W); of a task with channels (B, C, *S), as `inputs` has
    them."""
    values: tuple[float, float] = (-2.0, 2.0)
    """Range of the input: a scan that `plan` brought to [0, 1] is x -> 4 x - 2."""
    plan: PlanConfig
    """How a scan is prepared before the model sees it."""
    inputs: tuple[InputConfig, ...] = ()
    """What follows on the plan, for each of `ranks`, or of an ONNX file alone; empty where an earlier version wrote
    this, which did the same (`size_of`)."""
    modality: Modality | None = None
    """What a fine-tuned model took scans for whose files do not say it."""
    task: TaskConfig | None = None
    study_digest: str | None = None
    """sha256 of the study that an encoder was trained by; None where it is of none, or of a fine-tuned model."""
    source_digest: str
    """sha256 of the manifest.json, or model.json, that this was made from."""
    licence: str | None = None
    graphs: Mapping[str, GraphConfig] = {}
    """ONNX files by name."""
    sha256: Mapping[str, str] = {}
    """File name -> sha256 of its bytes."""

    @property
    def channels(self) -> tuple[str, ...] | None:
        """Of scans that are several images or volumes; None of all else."""
        return None if self.task is None else self.task.channels

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        """S that a scan of this rank is brought to. Raises ScanError: the model takes none of them."""
        for one in self.inputs or inputs_of(self.model, self.task):
            if len(one.size) == rank:
                return one.size
        raise ScanError("other_rank")


def load(folder: Path) -> tuple[Backbone | TaskModel, ExportedConfig]:
    """What `unimiss export --to safetensors` wrote, ready to be asked.

    Raises CheckpointError: no such folder, of another version, or its tensors were changed or are not the model's.
    """
    config = read_config(folder)
    try:
        payload = (folder / TENSORS).read_bytes()
    except OSError:
        raise CheckpointError(f"{folder}: holds no {TENSORS}; export it with --to safetensors") from None
    if hashlib.sha256(payload).hexdigest() != config.sha256.get(TENSORS):
        raise CheckpointError(f"{folder / TENSORS}: was changed after it was written; take another copy")
    try:
        tensors = tensors_in(payload)
    except SafetensorError:
        raise CheckpointError(f"{folder / TENSORS}: is not a file of tensors; take another copy") from None
    if config.task is not None:
        return load_task_model(config.model, config.task, tensors=tensors), config
    with torch.device("meta"):
        encoder = backbone_of(config.model)
    _take_(encoder, tensors, folder)
    return encoder.eval(), config


def read_config(folder: Path) -> ExportedConfig:
    """Raises CheckpointError. The version comes first: what a later one says more of is no mistake."""
    path = folder / CONFIG
    try:
        written = path.read_bytes()
        version = object_in(written)["format_version"]
        if version in _READ:
            return ExportedConfig.model_validate_json(written)
    except OSError:
        raise CheckpointError(f"{folder}: holds no {CONFIG}; give a folder that `unimiss export` wrote") from None
    except (ValueError, KeyError):
        raise CheckpointError(f"{path}: is not of this program; take another copy") from None
    raise CheckpointError(
        f"{path}: has format version {version}, this program reads {FORMAT_VERSION}; "
        "use the version of the program that wrote it"
    )


def _take_(module: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError:
        raise CheckpointError(f"{folder}: its tensors are not those of the model in {CONFIG}; export again") from None
