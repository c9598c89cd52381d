"""The model of a site that keeps its own head: the only place where it is whole.

    STATE/models/<run>/model.json, model.safetensors     as it stood after the site's part of the newest round

In clear, also where the state folder is sealed: it is there to be used (`unimiss_core.task_checkpoint`).
"""

from collections.abc import Mapping

from torch import Tensor

from client.site import Site
from client.site_state import models_folder
from unimiss_core import durable, task_checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.students import Student
from unimiss_core.task_checkpoint import TaskManifest


def keep_own_model(site: Site, trained: Student, received: Mapping[str, Tensor], round: int) -> None:
    """Write what the site trained to in `round`, where the study leaves heads at their sites; `received` is what it
    began the round from. Raises ConfigError: the folder cannot be written to."""
    study = site.study
    if study.finetune is None or study.finetune.head == "shared":
        return
    manifest = TaskManifest(
        task=study.finetune.task,
        model=study.model,
        plan=study.plan,
        began_with="checkpoint",
        pretrained_digest=task_checkpoint.digest_of(received),
        trained=study.finetune.trains,
        seed=study.seed,
        epoch=round,
        trained_in="rounds",
    )
    folder = models_folder(site.config.state) / site.run
    try:
        durable.make_folder(folder)
        task_checkpoint.save(folder, dict(trained.named_parameters()), manifest)
    except OSError as error:
        raise ConfigError(f"the site's own model cannot be written ({error.strerror}); make room for it") from None
