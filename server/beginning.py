"""What a run begins from: random weights, or a checkpoint's."""

from collections.abc import Mapping

from torch import Tensor

from server.coordinator_config import CoordinatorConfig
from unimiss_core import checkpoint, progress
from unimiss_core.checkpoint import Checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.network import tensors_of
from unimiss_core.students import build_student, travelling_layout
from unimiss_core.study import StudyConfig


def first_student(study: StudyConfig, config: CoordinatorConfig) -> Mapping[str, Tensor]:
    """What travels of the student before the first round: random, or the teacher of the checkpoint to start from; in
    fine-tuning its backbone, beside a random head.

    Raises CheckpointError, and ConfigError where it is of another model.
    """
    names = [spec.name for specs in travelling_layout(study).values() for spec in specs]
    found = {} if (start := _start(study, config)) is None else start.teacher
    begun = tensors_of(build_student(study))
    taken = {name: tensor for name, tensor in found.items() if study.finetune is None or name.startswith("backbone.")}
    wrong = [
        name
        for name in names
        if start is not None
        and (study.finetune is None or name.startswith("backbone."))
        and (name not in taken or taken[name].shape != begun[name].shape)
    ]
    if wrong:
        raise ConfigError(
            f"start: {config.start} lacks {len(wrong)} tensors that the study needs, {wrong[0]} among them; give a "
            "checkpoint of pretraining, of the study's model"
        )
    return {name: taken.get(name, begun[name]) for name in names}


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
    return found
