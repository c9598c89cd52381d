"""The model of a site that keeps its own head: the only place where it is whole.

    STATE/models/<run>/model.json, model.safetensors     as it stood after the site's part of the newest round

In clear, also where the state folder is sealed: it is there to be used (`unimiss_core.task_checkpoint`). How many are
kept is ruled as for the memory of runs (`client.site_state.forget_old_runs`).
"""

from collections.abc import Mapping

from torch import Tensor

from client.site import Site
from client.site_state import make_run_folder, models_folder
from unimiss_core import task_checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.students import Student


def keep_own_model(site: Site, trained: Student, received: Mapping[str, Tensor], round: int) -> None:
    """Write what the site trained to in `round`, where the study leaves heads at their sites; `received` is what it
    began the round from. Raises ConfigError: the folder cannot be written to."""
    study = site.study
    if study.finetune is None or study.finetune.head == "shared":
        return
    manifest = task_checkpoint.of_rounds(
        study,
        round=round,
        began_with="checkpoint",
        pretrained_digest=task_checkpoint.digest_of(received),
        trained_on=sorted({scan.modality for scan in site.library.scans}),
    )
    folder = models_folder(site.config.state) / site.run
    try:
        make_run_folder(folder)
        task_checkpoint.save(folder, dict(trained.named_parameters()), manifest)
    except OSError as error:
        raise ConfigError(f"the site's own model cannot be written ({error.strerror}); make room for it") from None
