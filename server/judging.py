"""How well the model of a fine-tuning federation answers on labelled, public scans that no site trained on.

A set is as `server.probing` has it; its labels are names of the study's classes. Before and after stand side by side,
and the same figures on bare pixels, where a probe of pixels can be made.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.probing import BATCH, ProbeSet, figures_of, gained, in_words, read_probe_set
from server.run_folder import RunFolder
from unimiss_core import durable, progress
from unimiss_core.embedding import bare_pixels
from unimiss_core.errors import ConfigError
from unimiss_core.probe import Probe, probe
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import ClassificationConfig, SupervisionConfig
from unimiss_core.tasks import TaskModel, load_task_model


def can_judge(asked: SupervisionConfig) -> bool:
    """Whether there is one model whose answers are single classes of whole scans, each of one image or volume, as those
    of a probe set are."""
    task = asked.task
    of_classes = isinstance(task, ClassificationConfig) and task.kind != "multi_label"
    return asked.head == "shared" and of_classes and task.channels is None


def judge(
    folder: RunFolder, paths: Sequence[Path], study: StudyConfig, tensors: Mapping[str, Tensor], *, is_last: bool
) -> dict[str, dict[str, Any]]:
    """Figures of this model by task, which are told; where it is the last, those of round 0 and its own are written for
    the report, too.

    Raises ConfigError: a set holds labels that are no class of the study, or scans of another rank.
    """
    assert study.finetune is not None
    models = [_model(study, found) for found in (folder.load(0).teacher, tensors)]
    before: dict[str, dict[str, Any]] = {}
    after: dict[str, dict[str, Any]] = {}
    for path in paths:
        progress.report(progress.Note(f"judging the model on {path.stem}"))
        found = _read(path, study.finetune)
        old, new = (_answers(model, found, study.finetune) for model in models)
        floor = probe(bare_pixels(found.scans), found.labels, found.patients)
        before[found.name] = figures_of(found, old, floor)
        after[found.name] = figures_of(found, new, floor) | gained(old, new)
        progress.report(progress.Note(in_words(after[found.name])))
    if is_last:
        durable.write_text(folder.report / "probe-before.json", json.dumps(before, indent=2, sort_keys=True))
        durable.write_text(folder.report / "probe-after.json", json.dumps(after, indent=2, sort_keys=True))
    return after


def check_sets(paths: Sequence[Path], asked: SupervisionConfig) -> None:
    """Before anything is trained. Raises ConfigError, as `judge`."""
    for path in paths:
        _read(path, asked)


def _read(path: Path, asked: SupervisionConfig) -> ProbeSet:
    found, task = read_probe_set(path), asked.task
    if found.scans.ndim - 2 != task.rank:
        raise ConfigError(
            f"probe set {found.name}: its scans are of rank {found.scans.ndim - 2}, the task's {task.rank}"
        )
    if strange := sorted(set(found.labels) - set(task.classes)):
        raise ConfigError(f"probe set {found.name}: {len(strange)} labels are no class of the study, as '{strange[0]}'")
    return found


def _model(study: StudyConfig, tensors: Mapping[str, Tensor]) -> TaskModel:
    assert study.finetune is not None
    return load_task_model(study.model, study.finetune.task, tensors=tensors)


@torch.inference_mode()
def _answers(model: TaskModel, found: ProbeSet, asked: SupervisionConfig) -> Probe:
    """Each scan's probabilities, which can all be compared: one model gave them."""
    task = asked.task
    numbers = np.array([task.classes.index(label) for label in found.labels])
    if lacking := sorted(set(task.classes) - set(found.labels)):
        return Probe(numbers, found.patients, task.classes, reason=f"no scan is of class {lacking[0]}")
    logits = torch.cat([model(part.float()) for part in found.scans.split(BATCH)])
    if not logits.isfinite().all():  # they would be ranked by the order of the set
        return Probe(numbers, found.patients, task.classes, reason="the model's answers are not finite: it diverged")
    shares = logits.softmax(-1)
    scores: NDArray[np.float64] = shares.double().numpy()
    return Probe(numbers, found.patients, task.classes, scores, np.zeros(len(numbers), dtype=np.int64))
