"""`unimiss finetune`: from a pretrained encoder and labelled scans to a model, its figures and its masks.

OUT/model.json, model.safetensors    the model of the best epoch (`unimiss_core.task_checkpoint`)
OUT/made-of.json                     what that was made of, for its owner alone (`client.made_of`)
OUT/metrics.json                     figures with intervals, last of all: where it stands, the work is done
OUT/curves.csv                       loss and validation score by epoch
OUT/state.safetensors, prepared/     only while it runs: what going on needs, and the prepared scans; finetune.lock
and what `client.task_results` writes
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from client import task_training
from client.beginning import TAUGHT, Beginning, begin
from client.cache import READING_VERSION
from client.finetune_config import CsvData, FinetuneConfig, MedMnistData, init_from, load_finetune, signed_by
from client.folds import runs_of, summarise
from client.inference import check_extra
from client.label_tables import LabelTable, Part, label_table
from client.labelled import Labelled, prepare_cases
from client.made_of import check_made_of, digests_of, keep_made_of
from client.splits import Split, split_cases
from client.task_results import Classifying, Segmenting
from client.task_training import Epoch, Training
from client.tuning_folder import METRICS, alone_in, check_folder, is_finished
from client.tuning_settings import Settings, settings_of
from client.unnamed_scans import tell_of_unnamed, tell_of_unnamed_channels
from unimiss_core import durable, progress, task_checkpoint
from unimiss_core.channels import SEES_THEIR_MEAN, sees_their_mean
from unimiss_core.device import device_of
from unimiss_core.errors import ConfigError
from unimiss_core.scan import Modality
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig
from unimiss_core.tasks import TaskModel, build_task_model

_PREPARED = "prepared"
_CT_AMONG_CHANNELS = "where one is CT, let its name in task.channels begin so; where all are, set data.modality: CT"
_RESULTS = ("predictions.csv", "cases.csv", "predictions")


def finetune(
    path: Path,
    *,
    resume: bool = False,
    data_root: Path | None = None,
    out: Path | None = None,
    init: str | None = None,
    device: str | None = None,
    show_paths: bool = False,
    key: Path | None = None,
    fold: int | Literal["all"] | None = None,
) -> None:
    """Do what the fine-tuning's file says; the others stand in the place of its own settings.

    resume: go on where a fine-tuning that was interrupted left off; one that is finished is left as it is, and must be
    of the same settings, weights and labelled scans. show_paths: tables and messages name files. key: of who must have
    signed the checkpoint. fold: one of the split's, or all of them, each in a folder of its own below `out`.
    Raises ConfigError, CheckpointError, NoUsableScanError, NonFiniteLossError.
    """
    config = load_finetune(path, data_root=data_root, out=out)
    begins_with = init_from(init, config.init) if init else config.init
    changed = {"init": signed_by(key, begins_with) if key else begins_with, "device": device or config.device}
    config = config.model_copy(update={**changed, "out": out or config.out.resolve()})
    runs = runs_of(config, fold)
    finished = [one for one in runs if resume and is_finished(one.out)]
    waiting = [one for one in runs if one not in finished]
    for one in finished:  # first what needs nothing read
        check_made_of(one.out, settings_of(one))
    chosen = device_of(config.device if waiting else "cpu")
    if waiting:
        check_extra(config.task)
    for one in waiting:
        check_folder(one.out, resume=resume)
    beginning = begin(config.init, config.plan)
    _check_rank(config, beginning)
    table = label_table(config)
    digests = digests_of(config, beginning, table)
    for one in finished:
        check_made_of(one.out, {**settings_of(one), **digests})
        print(f"{one.out}: is finished, and nothing is left to do")
    if not waiting and fold != "all":
        return
    _say_which_is_which(config, table)
    splits = [split_cases(table.cases, one) for one in waiting]  # before hours of work on the first
    for one, split in zip(waiting, splits, strict=True):
        if fold == "all":
            progress.report(progress.Note(f"{one.out.name}, of {len(runs)} folds"))
        _tune(one, split, table, beginning, chosen, digests, resume=resume, show_paths=show_paths)
    if fold == "all":
        summarise(config, runs, table)


def _tune(
    config: FinetuneConfig,
    split: Split,
    table: LabelTable,
    beginning: Beginning,
    chosen: torch.device,
    digests: Settings,
    *,
    resume: bool,
    show_paths: bool,
) -> None:
    """One fine-tuning, in its folder. digests: `client.made_of`. Raises as `finetune`."""
    with alone_in(config.out, resume=resume), _removed_afterwards(config.out / _PREPARED) as folder:
        goes_on = (config.out / task_training.STATE).exists()
        if resume and not goes_on:
            progress.report(progress.Note("there is nothing to go on with yet: begins anew"))
        _say_how_it_begins(config, beginning, chosen)
        parts = prepare_cases(split, table, beginning.plan, config, folder, show_paths=show_paths)
        _tell(parts)
        if table.modality is None and not isinstance(config.data, MedMnistData):
            kinds = [one.modalities for found in parts.values() for one in found]
            if config.task.channels is None:
                tell_of_unnamed((kind for (kind,) in kinds), "data.modality: CT")
            else:
                tell_of_unnamed_channels(config.task.channels, kinds, _CT_AMONG_CHANNELS)
        digest = _digest(config, beginning, parts, table.modality)
        size = config.task.size_for(beginning.model)
        judge = (
            Classifying(config, chosen, size)
            if isinstance(config.task, ClassificationConfig)
            else Segmenting(config, chosen, size, table)
        )
        training = _training(config, beginning, parts, judge, chosen, size)
        if goes_on:
            training.restore(config.out, digest)
            progress.report(progress.Note(f"goes on after epoch {training.progress.epoch}"))
        training.run(lambda now: now.save(config.out, digest))
        _write_curves(config.out / "curves.csv", training.progress.curve)
        taught = sorted({kind for one in parts["train"] for kind in one.modalities})
        _write_model(config, beginning, training, table, taught)
        task_training.set_tensors_(training.model, training.best)
        _write_results(config, beginning, judge, training, parts, digests, show_paths=show_paths)
        (config.out / task_training.STATE).unlink(missing_ok=True)
    print(f"{config.out}: model of epoch {training.progress.best_epoch}, figures and predictions")


@contextmanager
def _removed_afterwards(folder: Path) -> Iterator[Path]:
    """The folder holds images of patients, and is gone when the work ends, however it ends but by a kill."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def task_model(config: FinetuneConfig, beginning: Beginning) -> TaskModel:
    """The task's model as it begins."""
    return build_task_model(
        beginning.model,
        config.task,
        seed=config.seed,
        pretrained=beginning.tensors_for(config.task),
        takes_head=beginning.has_head_for(config.task),
    )


def _training(
    config: FinetuneConfig,
    beginning: Beginning,
    parts: Mapping[Part, Sequence[Labelled]],
    judge: Classifying | Segmenting,
    device: torch.device,
    size: Sequence[int],
) -> Training:
    if isinstance(judge, Classifying):
        loss = task_training.classification_loss(parts["train"], config, device)
    else:
        from client.segmenting import DiceCE

        loss = DiceCE()
    return Training(
        task_model(config, beginning),
        parts["train"],
        config,
        loss=loss,
        score=judge.score(parts["validation"]),
        device=device,
        size=size,
    )


def _check_rank(config: FinetuneConfig, beginning: Beginning) -> None:
    """Raises ConfigError: it begins with a model for a task that is of the other rank."""
    if beginning.rank not in (None, config.task.rank):
        raise ConfigError(
            f"init: was fine-tuned for scans of rank {beginning.rank}, and holds nothing of rank {config.task.rank}, "
            "which task.rank asks for; give a checkpoint of pretraining, or one of that rank"
        )


def _digest(
    config: FinetuneConfig,
    beginning: Beginning,
    parts: Mapping[Part, Sequence[Labelled]],
    modality: Modality | None,
) -> str:
    """Of all that decides the result: settings without places, the pretrained tensors, which scans and masks are in
    which part, to the last bit, and what they were taken for."""
    settings = config.model_dump(mode="json", exclude={"out", "device", "data_root", "data", "init"})
    found = [(part, one) for part, scans in parts.items() for one in scans]
    cases = [[part, one.case.number, one.case.target, one.key, one.mask_key] for part, one in found]
    told = [settings, beginning.plan.canonical(), beginning.model.canonical(), beginning.digest, cases, modality]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _say_how_it_begins(config: FinetuneConfig, beginning: Beginning, device: torch.device) -> None:
    """Before anything that takes long. The plan too, for one of the file's own replaces what the weights know."""
    brought = "the checkpoint's" if beginning.name == "checkpoint" else "the default"
    plan = "the file's own" if config.plan else brought
    progress.report(
        progress.Note(
            f"begins with {beginning.name}{_head_in_words(config, beginning)}, "
            f"trains {config.training.trains} on {device}; reading the labelled scans, prepared by {plan} plan"
        )
    )
    if beginning.is_taught:
        progress.report(progress.Note(TAUGHT))
    if beginning.tensors is not None and sees_their_mean(config.task, config.training.trains, beginning.channels):
        progress.report(progress.Note(SEES_THEIR_MEAN))


def _say_which_is_which(config: FinetuneConfig, table: LabelTable) -> None:
    """Columns or numbers that were written in another order than the channels' names cannot be seen but by a person."""
    if config.task.channels is None:
        return
    places = [f"number {number}" for number in table.channels]
    if isinstance(config.data, CsvData):
        places = [f"column '{column}'" for column in config.data.scan_columns]
    told = zip(config.task.channels, places, strict=True)
    progress.report(progress.Note(f"channels: {', '.join(f'{name} is {place}' for name, place in told)}"))


def _head_in_words(config: FinetuneConfig, beginning: Beginning) -> str:
    """Of a model that was fine-tuned before; pretraining has none to give."""
    if beginning.rank is None:
        return ""
    if beginning.has_head_for(config.task):
        return " (fine-tuned for the same classes: its head, too)"
    why = "stayed at its sites, or nothing says its task"
    if beginning.task is not None:
        why = "is for another task, other classes or other channels"
    return f" (fine-tuned; a new head, for its own {why})"


def _tell(parts: Mapping[Part, Sequence[Labelled]]) -> None:
    counts = (
        f"{part} {len(found)} of {len({one.case.patient for one in found})} patients" for part, found in parts.items()
    )
    progress.report(progress.Note(f"scans: {', '.join(counts)}"))


def _write_curves(path: Path, curve: Sequence[Epoch]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["epoch", "loss", "score"])
    writer.writeheader()
    writer.writerows(asdict(one) for one in curve)
    durable.write_text(path, text.getvalue())


def _write_model(
    config: FinetuneConfig,
    beginning: Beginning,
    training: Training,
    table: LabelTable,
    kinds: Sequence[Modality],
) -> None:
    """kinds: of the scans that it was trained on."""
    manifest = TaskManifest(
        task=config.task,
        model=beginning.model,
        plan=beginning.plan,
        began_with=beginning.name,
        pretrained_digest=beginning.digest,
        taught_by_labels=beginning.is_taught,
        reading=READING_VERSION,
        trained=config.training.trains,
        seed=config.seed,
        epoch=training.progress.best_epoch,
        keep_largest=config.inference.keep_largest,
        overlap=config.inference.overlap,
        precision=config.training.precision,
        modality=table.modality,
        trained_on=tuple(kinds),
        channel=table.channel,
        channels=table.channels,
    )
    task_checkpoint.save(config.out, training.best, manifest)


def _write_results(
    config: FinetuneConfig,
    beginning: Beginning,
    judge: Classifying | Segmenting,
    training: Training,
    parts: Mapping[Part, Sequence[Labelled]],
    digests: Settings,
    *,
    show_paths: bool,
) -> None:
    for name in _RESULTS:  # of an attempt that was interrupted here
        shutil.rmtree(config.out / name) if (config.out / name).is_dir() else (config.out / name).unlink(
            missing_ok=True
        )
    progress.report(progress.Note(f"judging the model of epoch {training.progress.best_epoch}"))
    judged: list[Part] = ["validation", *(["test"] if parts["test"] else [])]  # type: ignore[list-item]
    figures = {
        part: {
            "scans": len(parts[part]),
            "patients": len({one.case.patient for one in parts[part]}),
            **judge.evaluate(training.model, parts[part], part, config.out, show_paths),
        }
        for part in judged
    }
    told = {
        "name": config.name,
        "task": config.task.name,
        "began_with": config.init.name,
        "taught_by_labels": beginning.is_taught,
        "trained": config.training.trains,
        "seed": config.seed,
        "epochs": training.progress.epoch,
        "best_epoch": training.progress.best_epoch,
        "parts": figures,
    }
    keep_made_of(config.out, {**settings_of(config), **digests})
    durable.write_text(config.out / METRICS, json.dumps(told, indent=2) + "\n")
    for part in judged:
        for line in _lines(figures[part]):
            print(f"{part}: {line}")


def _lines(figures: Mapping[str, object]) -> list[str]:
    """Figures in words; those of one class alone stand in the file."""
    lines = []
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and "/" not in name:
            value, low, high = (figure[key] for key in ("value", "low", "high"))
            lines.append(f"{name} {value:.3f} ({low:.3f} to {high:.3f})" if value is not None else f"{name} undefined")
    return lines
