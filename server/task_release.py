"""What a fine-tuning federation ends in: a model that `unimiss predict` and everyone else can use, OUT/model."""

from server.run_folder import RunFolder
from unimiss_core import durable, progress, task_checkpoint
from unimiss_core.groups import group_of
from unimiss_core.study import StudyConfig

MODEL = "model"
"""Folder of the run's own: model.json and model.safetensors (`unimiss_core.task_checkpoint`)."""


def release_model(folder: RunFolder, study: StudyConfig, *, round: int, from_start: bool) -> None:
    """Write the model after `round` where the study has one: heads that stay at their sites make none.

    from_start: whether the run began from a checkpoint.
    """
    if study.finetune is None or study.finetune.head == "local":
        return
    first, last = folder.load(0).student, folder.load(round).student
    backbone = {name: tensor for name, tensor in first.items() if group_of(name) != "head"}
    manifest = task_checkpoint.of_rounds(
        study,
        round=round,
        began_with="checkpoint" if from_start else "scratch",
        pretrained_digest=task_checkpoint.digest_of(backbone) if from_start else None,
        taught_by_labels=folder.was_taught() if from_start else False,
    )
    durable.make_folder(folder.path / MODEL)
    task_checkpoint.save(folder.path / MODEL, last, manifest)
    progress.report(progress.Note(f"the fine-tuned model: {folder.path / MODEL}"))
