"""What a run begins from: random weights, or a checkpoint's."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from server.coordinator_config import CoordinatorConfig
from unimiss_core import checkpoint, progress
from unimiss_core.channels import SEES_THEIR_MEAN, for_channels_of, sees_their_mean
from unimiss_core.checkpoint import Checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.groups import group_of
from unimiss_core.keys import read_signing_public_key
from unimiss_core.network import tensors_of
from unimiss_core.students import build_student, travelling_layout
from unimiss_core.study import StudyConfig
from unimiss_core.tuned_round import known_channels, rank_of_task


def first_student(study: StudyConfig, config: CoordinatorConfig) -> Mapping[str, Tensor]:
    """What travels of the student before the first round: random, or the teacher of the checkpoint to start from; in
    fine-tuning its backbone, for scans of the task's channels, beside a random head.

    Raises CheckpointError, and ConfigError where it is of another model.
    """
    specs = [spec for specs in travelling_layout(study).values() for spec in specs]
    if (start := _start(study, config)) is None:
        made = tensors_of(build_student(study))
        return {spec.name: made[spec.name] for spec in specs}
    begun = _for_task(study, config.start, start)
    shapes = {name: tuple(tensor.shape) for name, tensor in begun.items()}
    taken = [spec for spec in specs if study.finetune is None or group_of(spec.name) != "head"]
    if wrong := [spec.name for spec in taken if shapes.get(spec.name) != spec.shape]:
        raise ConfigError(
            f"start: {config.start} lacks {len(wrong)} tensors that the study needs, {wrong[0]} among them; give a "
            "checkpoint of pretraining, of the study's model"
        )
    random = {} if study.finetune is None else tensors_of(build_student(study))
    return {spec.name: begun[spec.name] if spec in taken else random[spec.name] for spec in specs}


def _for_task(study: StudyConfig, folder: Path | None, start: Checkpoint) -> Mapping[str, Tensor]:
    """The start's tensors, in fine-tuning for scans of the task's channels."""
    if study.finetune is None or folder is None:
        return start.teacher
    task = study.finetune.task
    known = known_channels(folder, start.manifest, rank_of_task(start.manifest))
    if sees_their_mean(task, study.finetune.trains, known):
        progress.report(progress.Note(SEES_THEIR_MEAN))
    return for_channels_of(task, study.model, start.teacher, known)


def is_taught(config: CoordinatorConfig) -> bool:
    """Whether the run begins from a checkpoint of a task, which labels taught. Raises CheckpointError."""
    return config.start is not None and rank_of_task(checkpoint.read_manifest(config.start)) is not None


def _tell_of_taught_start(study: StudyConfig) -> None:
    assert study.finetune is not None
    told = "the start was fine-tuned: its head stays behind, and this study's begins at random"
    if study.finetune.validation:
        told = (
            f"WARNING: {told}. Figures on held-out patients show what is remembered of those whom the start was "
            "trained on: no site holds out such a one where this study has the start's seed and no larger a "
            "finetune.validation (docs/finetuning.md, 'Validation')"
        )
    progress.report(progress.Note(told))


def _start(study: StudyConfig, config: CoordinatorConfig) -> Checkpoint | None:
    """The checkpoint to start from, of the study's model; in fine-tuning of its backbone."""
    if config.start is None:
        return None
    found = checkpoint.load(config.start, key=read_signing_public_key(config.start_key) if config.start_key else None)
    held, asked = found.manifest.model, study.model
    if study.finetune is not None:  # prototypes and reconstruction stay behind
        held = held.model_copy(update={"prototypes": asked.prototypes, "reconstruction": asked.reconstruction})
    if held != asked:
        raise ConfigError(
            f"start: {config.start} holds another model ({found.manifest.model.canonical()}) than the study asks for "
            f"({asked.canonical()}); give a checkpoint of that model, or change the study"
        )
    if study.finetune is not None and found.manifest.plan != study.plan:
        progress.report(
            progress.Note("WARNING: the start was trained on scans prepared by another plan than this study's `plan`")
        )
    if study.finetune is not None and is_taught(config):
        _tell_of_taught_start(study)
    return found
