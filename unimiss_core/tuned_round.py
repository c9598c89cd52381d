"""A round of a federation that fine-tuned: how it is told from one of pretraining, and the model for a task that it is.

A checkpoint does not say what its head answers; the study does, which lies beside a checkpoint that was handed on, or
in the folder of its run.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from unimiss_core import checkpoint, task_checkpoint
from unimiss_core.backbone import scan_kernel
from unimiss_core.checkpoint import Manifest
from unimiss_core.config import load
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.keys import SigningPublicKey
from unimiss_core.layers import CHANNELS
from unimiss_core.network import empty_network
from unimiss_core.scan import RANKS, Rank
from unimiss_core.study import StudyConfig
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.tasks import TaskModel, load_task_model

_BACKBONE, _HEAD = "backbone.", "head."


def rank_of_task(manifest: Manifest) -> Rank | None:
    """The one rank that the backbone of a task's checkpoint is of, whatever channels its scans have; None of a
    checkpoint of pretraining, of both."""
    for rank in RANKS:
        network, kernel = empty_network(manifest.model, ranks={rank}), _scan_kernel_of(manifest, rank)
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        if _backbone_of(manifest.tensors, kernel) == _backbone_of(shapes, kernel):
            return rank
    return None


def known_channels(folder: Path, manifest: Manifest, rank: Rank | None) -> tuple[str, ...] | None:
    """Of the scans that a checkpoint's task has, as its study names them; where they are several and nobody knows
    their names, their numbers. None: they are one. rank: as of `rank_of_task`."""
    if rank is None:
        return None
    if (found := study_of(folder, manifest)) is not None and found[0].finetune is not None:
        return found[0].finetune.task.channels
    count = manifest.tensors[_scan_kernel_of(manifest, rank)][1]
    return None if count == CHANNELS[rank] else tuple(map(str, range(count)))


def _scan_kernel_of(manifest: Manifest, rank: Rank) -> str:
    return f"{_BACKBONE}{scan_kernel(manifest.model, rank)}"


def _backbone_of(shapes: Mapping[str, tuple[int, ...]], kernel: str) -> dict[str, tuple[int, ...]]:
    """kernel: (O, C, *k), of which C is left off."""
    return {
        name: (*shape[:1], *shape[2:]) if name == kernel else tuple(shape)
        for name, shape in shapes.items()
        if name.startswith(_BACKBONE)
    }


def require_tensors_of_model(folder: Path, manifest: Manifest) -> None:
    """Of pretraining, before any memory is taken: the manifest itself has no checksum. Raises CheckpointError."""
    shapes = {name: tuple(p.shape) for name, p in empty_network(manifest.model).named_parameters()}
    if shapes != manifest.tensors:
        raise CheckpointError(f"{folder}: its tensors are not those of the model in its manifest; take another copy")


def study_of(folder: Path, manifest: Manifest) -> tuple[StudyConfig, Path] | None:
    """The study of a checkpoint in `folder`, and the folder that it lies in: beside a checkpoint that was handed on, or
    its run's; None where neither has it."""
    if manifest.study_digest is None:
        return None
    for place in (folder, folder.absolute().parent.parent):
        with suppress(ConfigError):
            study = load(StudyConfig, place / "study.yaml")
            if study.digest() == manifest.study_digest:
                return study, place
    return None


def load_tuned(folder: Path, *, key: SigningPublicKey | None = None) -> tuple[TaskModel, TaskManifest]:
    """A fine-tuned model: of the folder that fine-tuning wrote, or of a round of a federation that fine-tuned.

    key: of who must have signed the round. A folder with a manifest is a checkpoint, whatever else somebody put beside
    it: what no signature covers is not read in its place. Raises CheckpointError: as `task_checkpoint.load` and
    `checkpoint.load`; or a round that answers nothing, or nobody knows what. ConfigError: a key, where nobody signs.
    """
    checkpoint.require_there(folder)
    if (folder / checkpoint.MANIFEST).is_file():
        if rank_of_task(checkpoint.read_manifest(folder, key=key)) is None:
            raise CheckpointError(
                f"{folder}: is a checkpoint of pretraining, which answers no task; give the folder that `unimiss "
                "finetune` wrote, or a round of a federation that fine-tuned"
            )
        return _tuned_round(folder, key)
    require_unsigned(folder, key)
    return task_checkpoint.load(folder)


def require_unsigned(folder: Path, key: object) -> None:
    """Raises ConfigError: a key for a folder of fine-tuning, which has no signature."""
    if key is not None and task_checkpoint.is_there(folder):
        raise ConfigError(f"{folder}: is a fine-tuned model, which nobody signs; give no key")


def _tuned_round(folder: Path, key: SigningPublicKey | None) -> tuple[TaskModel, TaskManifest]:
    found = checkpoint.load(folder, key=key)
    manifest = found.manifest
    if not has_head(manifest):
        raise CheckpointError(
            f"{folder}: answers no task, for its federation leaves heads at their sites; a site's own model is in "
            "models/RUN of its state folder, and `unimiss finetune --init` takes this encoder"
        )
    if (of := study_of(folder, manifest)) is None or (tuned := of[0].finetune) is None:
        raise CheckpointError(
            f"{folder}: what it answers stands in its study.yaml, which lies neither beside it nor in its run's "
            "folder; put it beside the manifest"
        )
    task, study = tuned.task, of[0]
    model = load_task_model(study.model, task, tensors=found.student)
    told = task_checkpoint.of_rounds(study, round=manifest.round, began_with="unknown", pretrained_digest=None)
    return model, task_checkpoint.packed(found.student, told)[1]


def has_head(manifest: Manifest) -> bool:
    """Whether a round answers its task; where heads stay at their sites it holds none."""
    return any(name.startswith(_HEAD) for name in manifest.tensors)
