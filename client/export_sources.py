"""What `unimiss export` is given: a checkpoint of pretraining, or a fine-tuned model, and all that is known of it."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client import accounting
from client.channel_reading import modalities_of
from unimiss_core import checkpoint, task_checkpoint, trained_by
from unimiss_core.backbone import Backbone, architecture_of
from unimiss_core.checkpoint import Manifest
from unimiss_core.embedding import encoder_of
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.exported import ExportedConfig
from unimiss_core.gaussian_privacy import gaussian_epsilon
from unimiss_core.inputs import inputs_of
from unimiss_core.json_text import read_object
from unimiss_core.keys import SigningPublicKey
from unimiss_core.network import check_tensors, empty_network
from unimiss_core.privacy import mechanisms
from unimiss_core.scan import RANKS
from unimiss_core.study import StudyConfig
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.tasks import TaskModel
from unimiss_core.trained_by import TrainedBy
from unimiss_core.tuned_round import load_tuned, rank_of_task, require_tensors_of_model, study_of


@dataclass(frozen=True)
class Pretrained:
    """An encoder of pretraining."""

    model: Backbone
    config: ExportedConfig
    manifest: Manifest
    study: StudyConfig | None
    """None where its file lies neither in the folder nor in that of the run."""
    trained_by: TrainedBy | None
    spent: float | None
    """Epsilon of what the study promises it to, a patient or a site, after the checkpoint's round."""


@dataclass(frozen=True)
class Tuned:
    """A model for a task."""

    model: TaskModel
    config: ExportedConfig
    manifest: TaskManifest
    described_by: str
    """File whose sha256 names the model: model.json, or a round's manifest.json."""
    judged_on: Literal["test", "validation"] | None
    """Which scans `figures` are of: validation scans where none tested it; None where nothing says."""
    figures: Mapping[str, Any]
    """What `metrics.json` beside it says of them."""


Source = Pretrained | Tuned


def read_source(folder: Path, *, student: bool, key: SigningPublicKey | None, licence: str | None) -> Source:
    """Read and check what lies in `folder`.

    student: take the student of a checkpoint in its teacher's place. key: of who must have signed a checkpoint.
    Raises CheckpointError: nothing there that can be exported, damaged, of another version, or not signed by that key.
    Raises ConfigError: `student` or `key` with a fine-tuned model, which has neither.
    """
    checkpoint.require_there(folder)
    if (folder / checkpoint.MANIFEST).is_file():
        if rank_of_task(checkpoint.read_manifest(folder, key=key)) is None:
            return _pretrained(folder, student=student, key=key, licence=licence)
        if student:
            raise ConfigError(f"{folder}: is of a federation that fine-tuned, without a teacher; leave --student out")
        return _tuned(folder, checkpoint.MANIFEST, key=key, licence=licence)
    if task_checkpoint.is_there(folder):
        if student or key is not None:
            raise ConfigError(f"{folder}: is a fine-tuned model: it has no student and no signature; leave both out")
        return _tuned(folder, task_checkpoint.MANIFEST, key=None, licence=licence)
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; turn released weights into a checkpoint first: unimiss import")
    raise CheckpointError(
        f"{folder}: holds neither a checkpoint ({checkpoint.MANIFEST}) "
        f"nor a fine-tuned model ({task_checkpoint.MANIFEST})"
    )


def _pretrained(folder: Path, *, student: bool, key: SigningPublicKey | None, licence: str | None) -> Pretrained:
    found = checkpoint.load(folder, key=key)
    manifest = found.manifest
    require_tensors_of_model(folder, manifest)
    tensors = found.student if student else found.teacher
    check_tensors(empty_network(manifest.model), tensors)
    encoder = encoder_of(manifest.model, tensors)
    study, counted = _record_of(folder, manifest)
    config = ExportedConfig(
        holds="encoder",
        part="student" if student else "teacher",
        model=manifest.model,
        architecture=architecture_of(manifest.model).numbers(),
        num_features=encoder.num_features,
        ranks=RANKS,
        plan=manifest.plan,
        inputs=inputs_of(manifest.model, None),
        study_digest=manifest.study_digest,
        source_digest=_sha256(folder / checkpoint.MANIFEST),
        licence=licence,
    )
    return Pretrained(encoder, config, manifest, study, counted, _spent(study, manifest.round, counted))


def _tuned(folder: Path, described_by: str, *, key: SigningPublicKey | None, licence: str | None) -> Tuned:
    model, manifest = load_tuned(folder, key=key)
    task = manifest.task
    kinds = None if task.channels is None else modalities_of(task, manifest.modality)
    config = ExportedConfig(
        holds=task.name,
        part=None,
        model=manifest.model,
        architecture=architecture_of(manifest.model).numbers(),
        num_features=model.backbone.num_features,
        ranks=(task.rank,),
        plan=manifest.plan,
        inputs=inputs_of(manifest.model, task, kinds),
        modality=manifest.modality,
        task=task,
        source_digest=_sha256(folder / described_by),
        licence=licence,
    )
    figures = _figures(folder / "metrics.json")
    return Tuned(model.requires_grad_(False), config, manifest, described_by, *figures)


def _record_of(folder: Path, manifest: Manifest) -> tuple[StudyConfig | None, TrainedBy | None]:
    """The study, and by whom it was trained: beside a checkpoint that was handed on, or in its run's folder."""
    if (found := study_of(folder, manifest)) is None:
        return None, None
    study, place = found
    return study, trained_by.read(folder) if place == folder else trained_by.of_run(place, manifest.round)


def _spent(study: StudyConfig | None, rounds: int, counted: TrainedBy | None) -> float | None:
    """Of a patient the dearest that a site's can have cost, by the study's own numbers; of a site what its run says,
    which may have lost lines, and never less than one release for each round comes to."""
    if study is None or study.privacy.mode == "none":
        return None
    if study.privacy.mode == "site":
        if counted is None or counted.site_epsilon is None:
            return None
        promise = study.privacy
        return max(counted.site_epsilon, gaussian_epsilon(promise.noise_multiplier, rounds, promise.delta))
    taken = range(1, rounds + 1)
    with suppress(ConfigError):  # too much to be told
        delta = study.privacy.delta
        return max(accounting.epsilon(mechanisms(study, ranks, taken), delta) for ranks in accounting.ALL_RANKS)
    return None


def _figures(path: Path) -> tuple[Literal["test", "validation"] | None, Mapping[str, Any]]:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # of a file that anyone may write
        parts = read_object(path)["parts"]
        part: Literal["test", "validation"] = "test" if parts.get("test") else "validation"
        if isinstance(parts[part], Mapping):
            return part, parts[part]
    return None, {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
