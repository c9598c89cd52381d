"""`unimiss predict`: what a fine-tuned model says about scans that nobody labelled.

OUT/predictions.csv   a line for each scan: of a classification its probabilities, of a segmentation its mask's volumes
OUT/masks/            of a segmentation: a mask for each scan, on the grid and in the axes of the scan's own file
OUT/masks/*.dcm       of DICOM series the same as DICOM SEG, where that is asked for
OUT/left_out.csv      only with --show-paths, or of a table: what was not used, by file or line
OUT/predicted.json    what was asked of which model, last of all: where it stands, the work is done

Scans are read, prepared and asked about one after the other, in the order of `client.reading`, so that memory holds a
few of them at most. Lines are written as they come: what was done before a crash stays.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from client.cache import READING_VERSION
from client.candidates import Channel
from client.case_tables import SCAN, CaseTable, cases_of_table, is_table
from client.catalogue import read_whole
from client.channel_reading import contradicted, modalities_of
from client.channels import expected_names, of_channels, of_one_channel, with_its_case
from client.dicom_seg import check_highdicom, write_dicom_seg
from client.inference import Inference, check_extra
from client.input_names import names_by_number
from client.labelled import Grid, as_stored, as_values, grid_of
from client.masks import write_at_source
from client.msd_folders import numbers_beside
from client.outputs import make_new_folder
from client.reading import Origin, Reading
from client.unnamed_scans import tell_of_unnamed, tell_of_unnamed_channels
from unimiss_core import durable, progress
from unimiss_core.card_wording import KINDS
from unimiss_core.device import device_of, is_out_of_memory
from unimiss_core.errors import CheckpointError, ConfigError, NonFiniteLossError, ScanError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.plan import prepare_channels
from unimiss_core.scan import Modality, Scan
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig, SegmentationConfig
from unimiss_core.tasks import TaskModel
from unimiss_core.tuned_round import load_tuned

_TABLE, _LEFT_OUT, _DONE = "predictions.csv", "left_out.csv", "predicted.json"
_ALL_CT = "where all are CT, say so with --modality CT"
LIKELY = 0.5
"""Probability from which a label of several counts as there."""

Names = Literal["number", "input"]
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A scan as the model sees it."""

    origin: Origin
    values: NDArray[np.float32]
    """(C, *S) in [0, 1]"""
    grid: Grid
    """Of its first channel."""


def predict(
    model: Path,
    scans: Path,
    out: Path,
    *,
    modality: Modality | None = None,
    batch: int = 8,
    device: str = "auto",
    show_paths: bool = False,
    dicom_seg: bool = False,
    names: Names = "number",
    key: Path | None = None,
    root: Path | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Ask the fine-tuned model in the folder `model` about every scan of `scans`, a folder or a file. A round of a
    federation that fine-tuned is such a model, too. A model of several channels is asked about cases of as many files,
    or volumes of one; a single file of a case stands for all of it. `scans` may also be a table that names them, whose
    lines are called as they are numbered: `client.case_tables`, also of root and columns.

    modality: of scans whose files do not say it; None takes what the model was trained with. batch: scans, or windows
    of one, at a time. show_paths: the tables name files. dicom_seg: masks of DICOM series also as DICOM SEG. names:
    what masks are called, and the table's scans beside their number: nothing more, or as their files. key: the public
    key's file of who must have signed the round.
    Raises CheckpointError, ConfigError, NoUsableScanError.
    """
    chosen = device_of(device)
    network, manifest = load_tuned(model, key=read_signing_public_key(key) if key else None)
    if not all(parameter.isfinite().all() for parameter in network.parameters()):  # a mask would be all background
        raise CheckpointError(f"{model}: its weights are not all numbers: its training diverged; fine-tune it again")
    check_extra(manifest.task)
    table = CaseTable.of(scans, root, columns, manifest.task.channels or ()) if is_table(scans) else None
    if table is None and (root is not None or columns):
        raise ConfigError("--root, --scan: are of a table, and SCANS is no file whose name ends in .csv or .tsv")
    if table is not None and names == "input":
        raise ConfigError("--names input: masks of a table's scans are called by its lines; leave the option out")
    if dicom_seg:
        _check_dicom_seg(manifest, are_named=table is not None)
    make_new_folder("--out", out)
    channels = _channels(manifest, None if table else scans, modality)
    reading = _reading(table or scans, manifest, channels, modality)
    inference = _inference(manifest, chosen, batch)
    called = _names(reading, manifest) if names == "input" else {}
    unlike = _unlike_training(
        reading, manifest, says_modality=modality is not None or any(one.modality for one in channels)
    )
    answers = _Answers(network.to(chosen), manifest, inference, reading, out, show_paths, dicom_seg, called)
    if len(reading):
        _tell_of_other_reading(manifest)
        progress.report(progress.Note(f"asking about {len(reading)} scan(s) on {chosen}"))
    try:
        done = _write_table(out / _TABLE, answers.lines(_asked(reading, manifest)))
    except NonFiniteLossError:
        raise CheckpointError(
            f"{model}: its answers are not all numbers: its training diverged; fine-tune it again"
        ) from None
    finally:  # of what is interrupted, too: a line of a table must not be in neither
        if show_paths or table is not None:
            _write_table(out / _LEFT_OUT, _left_out(reading, all_files=bool(channels)))
    reading.explain()
    if channels and table is None and {"lacks_channel", "unknown_channel"} & reading.reasons.keys():
        progress.report(progress.Note(expected_names(channels)))
    reading.require(done)
    told = {
        "model": manifest.sha256,
        "task": manifest.task.name,
        "classes": manifest.task.classes,
        "scans": done,
        "unlike_training": unlike,
        "left_out": reading.reasons,
    }
    durable.write_text(out / _DONE, json.dumps(told, indent=2) + "\n")
    left = len(reading.left_out)
    print(f"{out}: {done} scan(s) predicted" + (f", {left} scan(s) or file(s) left out" if left else ""))


def _left_out(reading: Reading, *, all_files: bool) -> Iterator[Line]:
    """all_files: of what belongs together, not the first alone. Of a table its lines, where it says which files are
    theirs."""
    for files, reason, line in sorted(reading.left_out, key=lambda one: one.line):
        if line:
            yield {"line": line, "reason": reason}
        else:
            yield from ({"file": file, "reason": reason} for file in (files if all_files else files[:1]))


def _check_dicom_seg(manifest: TaskManifest, *, are_named: bool) -> None:
    """are_named: whether a table names the scans."""
    if not isinstance(manifest.task, SegmentationConfig) or manifest.task.rank != 3:
        raise ConfigError("--dicom-seg: the model draws no masks of volumes; leave the option out")
    if manifest.task.channels is not None and not are_named:
        raise ConfigError(
            "--dicom-seg: is of DICOM series, and of a folder the model reads the channels of a scan from other files; "
            "leave the option out, or name the series in a table"
        )
    check_highdicom()


def _channels(manifest: TaskManifest, scans: Path | None, modality: Modality | None) -> tuple[Channel, ...]:
    """Empty of a task without channels. scans: None where a table names them; else a dataset.json decides that lies
    with them and names the channels: which number each is differs between hospitals. Tells where what is said of all
    is not what the name of one says."""
    if (apart := contradicted(manifest.task, modality)) is not None:
        how = f"it is prepared as {modality} all the same, where its file does not say what it is"
        progress.report(progress.Note(f"WARNING: --modality: {apart}; {how}"))
    names, taken_for = manifest.task.channels or (), modalities_of(manifest.task, modality or manifest.modality)
    told, numbers = numbers_beside(scans, names) if names and scans else None, manifest.channel_numbers
    if told not in (None, numbers):
        progress.report(
            progress.Note("dataset.json of the scans numbers the channels otherwise than the model, and decides")
        )
    return tuple(map(Channel, names, told or numbers, taken_for))


def _reading(
    scans: Path | CaseTable, manifest: TaskManifest, channels: Sequence[Channel], modality: Modality | None
) -> Reading:
    """Raises ConfigError: `scans` is neither a folder nor a file, or no table of paths."""
    modality = modality or manifest.modality
    if isinstance(scans, CaseTable):
        read = channels or (Channel(SCAN, 0, modality),)
        return Reading(cases_of_table(scans, read, interpolate=manifest.plan.interpolates))
    reading = Reading.of_path(scans, manifest.plan, modality)
    if channels:
        found = reading.found if scans.is_dir() else with_its_case(reading.found, channels, modality)
        return Reading(of_channels(found, channels))
    return reading if manifest.channel is None else Reading(of_one_channel(reading.found, manifest.channel))


def _tell_of_other_reading(manifest: TaskManifest) -> None:
    """Where a model of images was fine-tuned at one place when the same files were read otherwise."""
    if manifest.task.rank == 2 and manifest.trained_in == "epochs" and manifest.reading != READING_VERSION:
        progress.report(
            progress.Note(
                "the model was fine-tuned by another version of this program, to which single slices in NIfTI and "
                "DICOM, pictures of CT, or pictures that are to be turned or have 16 bits and colours, may have looked "
                "otherwise; where it is asked about such, fine-tune it again"
            )
        )


def _inference(manifest: TaskManifest, device: torch.device, batch: int) -> Inference:
    """As the model was judged when it was fine-tuned."""
    return Inference(
        task=manifest.task,
        size=manifest.task.size_for(manifest.model),
        device=device,
        precision=manifest.precision,
        batch=batch,
        overlap=manifest.overlap,
        keep_largest=manifest.keep_largest,
    )


def _unlike_training(reading: Reading, manifest: TaskManifest, *, says_modality: bool) -> dict[Modality, int]:
    """Kind -> how many scans of the model's rank are of it, or a channel of theirs, for each kind that it was not
    trained on; all are told. Of a model of which nothing says that, scans are told that do not say their own."""
    known = manifest.trained_on
    asked = [one for one in reading.found.candidates if one.kind == f"{manifest.task.rank}d"]
    kinds = Counter(kind for one in asked for kind in set(one.modalities))
    unlike = {kind: count for kind, count in sorted(kinds.items()) if known and not _is_like(kind, known)}
    for kind, count in unlike.items():
        taught = ", ".join(KINDS[one] for one in known)
        told = (
            f"WARNING: {count} scan(s) are of another kind ({KINDS[kind]}) than the model was fine-tuned on ({taught})"
        )
        way_out = (
            "where they are CT, say so with --modality CT" if kind == "OT" else "its answers were never judged on such"
        )
        progress.report(progress.Note(f"{told}; {way_out}"))
    if not known and not says_modality:
        if manifest.task.channels is None:
            tell_of_unnamed(kinds.elements())
        else:
            tell_of_unnamed_channels(manifest.task.channels, [one.modalities for one in asked], _ALL_CT)
    return unlike


def _names(reading: Reading, manifest: TaskManifest) -> Mapping[int, str]:
    """Of scans of the model's rank: masks without the ending of their file, in the table of classes with it; a case of
    several files without ending and channel. Raises ConfigError: two would be called alike."""
    kind, is_classes = f"{manifest.task.rank}d", isinstance(manifest.task, ClassificationConfig)
    numbered = enumerate(reading.found.candidates, start=1)
    return names_by_number(((number, one) for number, one in numbered if one.kind == kind), keeps_ending=is_classes)


def _is_like(kind: Modality, known: Sequence[Modality]) -> bool:
    """Whether scans of this kind may be such as the model knows. OT says nothing, and may be any but CT, whose values
    alone are prepared by a window in HU."""
    return kind in known or (kind != "CT" and "OT" in known) or (kind == "OT" and "CT" not in known)


def _asked(reading: Reading, manifest: TaskManifest) -> Iterator[Asked]:
    """The scans that the model can be asked about; the others are counted."""
    for origin, scans in reading.each(read_whole):
        try:
            values, grid = _prepared(scans, manifest)
        except (ScanError, MemoryError) as error:
            del scans
            reading.leave_out(origin, error.reason if isinstance(error, ScanError) else "out_of_memory")
        else:
            del scans
            yield Asked(origin, values, grid)
            del values
        progress.report(progress.StepDone("scans", origin.number, len(reading), None))


def _prepared(scans: Sequence[Scan], manifest: TaskManifest) -> tuple[NDArray[np.float32], Grid]:
    """Of what one scan is made of, to the last bit as fine-tuning prepares it. Raises ScanError."""
    if any(scan.rank != manifest.task.rank for scan in scans):
        raise ScanError("other_rank")
    values, spacing = prepare_channels(scans, manifest.plan, manifest.task.other_grids)
    return as_values(as_stored(values)), grid_of(scans[0], spacing)


@dataclass(frozen=True)
class _Answers:
    """What the model says, line by line of the table."""

    model: TaskModel
    manifest: TaskManifest
    inference: Inference
    reading: Reading
    out: Path
    show_paths: bool
    dicom_seg: bool
    names: Mapping[int, str]
    """Number of a scan -> what it is called; empty where that is its number alone."""

    def lines(self, scans: Iterable[Asked]) -> Iterator[Line]:
        """Of each scan, in their order; masks are written on the way."""
        if isinstance(self.inference.task, ClassificationConfig):
            for batch in _batches(scans, self.inference.batch):
                yield from self._classified(batch)
            return
        for one in scans:
            try:
                yield self._segmented(one)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self.reading.leave_out(one.origin, "out_of_memory")

    def _classified(self, scans: Sequence[Asked]) -> Iterator[Line]:
        task = self.inference.task
        assert isinstance(task, ClassificationConfig)
        for one, told in self._chances(scans):
            there = told >= LIKELY if task.kind == "multi_label" else np.arange(len(told)) == told.argmax()
            yield {
                **self._named(one),
                **{f"p/{name}": f"{chance:.6f}" for name, chance in zip(task.classes, told, strict=True)},
                "predicted": ";".join(name for name, is_it in zip(task.classes, there, strict=True) if is_it),
            }

    def _chances(self, scans: Sequence[Asked]) -> list[tuple[Asked, NDArray[np.float64]]]:
        """Of each scan (K,). Where memory ends, each is asked about alone, and those that it ends for are left out."""
        try:
            return list(zip(scans, self.inference.chances(self.model, [one.values for one in scans]), strict=True))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if len(scans) > 1:
            return [answer for one in scans for answer in self._chances([one])]
        self.reading.leave_out(scans[0].origin, "out_of_memory")
        return []

    def _segmented(self, one: Asked) -> Line:
        classes = self.inference.mask(self.model, one.values, one.grid)
        number, (source, *_), line = one.origin.number, one.origin.paths, one.origin.line
        name = self.names.get(number, f"line-{line:05d}" if line else f"scan-{number:05d}")
        path = write_at_source(self.out / "masks", name, classes, one.grid.affine, source)
        if self.dicom_seg:
            self._write_dicom_seg(path.with_name(f"{name}.dcm"), classes, one)
        names = self.inference.task.classes
        counts = np.bincount(classes.ravel(), minlength=1 + len(names))[1:]
        ml = float(np.prod(one.grid.spacing_mm)) / 1000
        volumes = {f"ml/{name}": f"{n * ml:.3f}" for name, n in zip(names, counts, strict=True)}
        return {
            **self._named(one),
            "mask": path.relative_to(self.out).as_posix(),
            **{f"voxels/{name}": int(n) for name, n in zip(names, counts, strict=True)},
            **(volumes if classes.ndim == 3 else {}),
        }

    def _write_dicom_seg(self, path: Path, classes: NDArray[np.uint8], one: Asked) -> None:
        affine, number, line = one.grid.affine, one.origin.number, one.origin.line
        series = self.reading.found.candidates[number - 1].first
        if affine is None or series.stack is None:
            return
        if not write_dicom_seg(path, classes, affine, series.paths, self.manifest):
            why = "for its files lack what that must repeat"
            if any(frame.number for frame in series.stack.frames):  # the second frame of a file, say
                why = "which highdicom does not make of such an enhanced (multi-frame) object"
            called = f"line {line}" if line else f"scan {number}"
            progress.report(progress.Note(f"{called}: no DICOM SEG, {why}; the NIfTI is there"))

    def _named(self, one: Asked) -> Line:
        origin = one.origin
        name = {"name": self.names[origin.number]} if self.names else {}
        file = {"file": origin.files[0]} if self.show_paths else {}
        line = {"line": origin.line} if origin.line else {}
        return {"scan": origin.number, **line, "key": origin.key, **name, **file}


def _batches(scans: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    held: list[Asked] = []
    for one in scans:
        held.append(one)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _write_table(path: Path, lines: Iterable[Line]) -> int:
    """Each line as it comes; how many there were. No file where there was none."""
    count = 0
    for count, line in enumerate(lines, start=1):
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(line))
            if count == 1:
                writer.writeheader()
            writer.writerow(line)
    return count
