"""The model of a site that keeps its own head: the only place where it is whole.

    STATE/models/<run>/model.json, model.safetensors     as it stood after the site's part of the newest round

In clear, also where the state folder is sealed: it is there to be used (`unimiss_core.task_checkpoint`). How many are
kept is ruled as for the memory of runs (`client.site_state.forget_old_runs`). A site that has lost its memory of a run
takes its head from there; one whose state folder is sealed does not, for it believes nothing that lies in clear.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from client.site import Site
from client.site_state import make_run_folder, models_folder
from client.telling import tell
from unimiss_core import task_checkpoint
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.network import load_tensors_, tensors_of
from unimiss_core.students import Student, staying_names


def keep_own_model(site: Site, trained: Student, received: Mapping[str, Tensor], round: int) -> None:
    """Write what the site trained to in `round`, where the study leaves heads at their sites; `received` is what it
    began the round from. Raises ConfigError: the folder cannot be written to."""
    study = site.study
    if not _keeps_a_head(site):
        return
    manifest = task_checkpoint.of_rounds(
        study,
        round=round,
        began_with="checkpoint",
        pretrained_digest=task_checkpoint.digest_of(received),
        trained_on=sorted({kind for scan in site.library.scans for kind in scan.modalities}),
        channels=site.library.channels,
    )
    folder = _folder(site)
    try:
        make_run_folder(folder)
        task_checkpoint.save(folder, dict(trained.named_parameters()), manifest)
    except OSError as error:
        raise ConfigError(f"the site's own model cannot be written ({error.strerror}); make room for it") from None


def take_own_head_(student: Student, site: Site) -> None:
    """Put into `student` the head that the site last kept of this run, or leave it as the study begins it; says which,
    for nothing else would tell that a head which was trained is gone. Nothing where heads are no site's own."""
    if not _keeps_a_head(site):
        return
    name = site.config.name
    if site.config.seal() is not None and task_checkpoint.is_there(_folder(site)):
        tell(name, "its own head begins anew: a model of this run lies in clear, and a sealed site believes none")
        return
    try:
        model, manifest = task_checkpoint.load(_folder(site))
        kept = tensors_of(model)
        head = {name: kept[name] for name in staying_names(site.study, kept)}
        load_tensors_(student, tensors_of(student) | head)
    except CheckpointError:
        tell(name, "its own head begins anew: nothing that fits is kept of this run's earlier rounds here")
    else:
        tell(name, f"its own head goes on as it stood after round {manifest.epoch}, from the model that is kept here")


def _keeps_a_head(site: Site) -> bool:
    return site.study.finetune is not None and site.study.finetune.head == "local"


def _folder(site: Site) -> Path:
    return models_folder(site.config.state) / site.run
