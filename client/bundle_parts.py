"""What the configuration of a MONAI bundle of ours names (`client.monai_bundle`): callables around our own pieces.

A scan goes through as a dict: `image`, its path, or those of its channels, and then the tensor that the network takes;
`name`, of a case of several files; `source` and `grid`, where it lay, or its first channel; `pred`, what was found.
Legend of shapes: C channels, S spatial axes, K outputs.
"""

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.catalogue import read_one_apart
from client.channel_reading import modalities_of, read_channels_apart, require_like_names
from client.channels import cases_of, of_numbers
from client.inference import require_numbers
from client.input_names import without_ending
from client.labelled import as_stored, as_values, grid_of
from client.masks import write_at_source
from client.task_training import autocast
from unimiss_core import task_checkpoint
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.plan import prepare_channels
from unimiss_core.scan import Scan
from unimiss_core.task_checkpoint import TaskManifest
from unimiss_core.task_config import ClassificationConfig
from unimiss_core.tasks import TaskModel
from unimiss_core.views import standardise, whole

_log = logging.getLogger(__name__)

Item = dict[str, Any]


def network(folder: str) -> TaskModel:
    """The model in the bundle: scans (B, C, *S) -> logits. Raises CheckpointError: its tensors were changed, ..."""
    return task_checkpoint.load(Path(folder))[0]


def manifest(folder: str) -> TaskManifest:
    """What the model says of itself. Raises CheckpointError."""
    return task_checkpoint.load(Path(folder))[1]


def scans_in(folder: str) -> list[Item]:
    """Each file of a folder, and each folder in it, which should hold a DICOM series; those that begin with a dot are
    left out. Raises ConfigError: there is none."""
    return [{"image": str(Path(folder) / name)} for name in _names_in(folder)]


def cases_in(folder: str, manifest: TaskManifest) -> list[Item]:
    """As `scans_in`, of a task with channels: each case, called CASE_0000, CASE_0001, ..., or one file of its volumes.

    `image` is a path for each of the task's channels, in their order, but for those that the case lacks.
    """
    found = cases_of(_names_in(folder))
    files = {case: of_numbers(manifest.channel_numbers, held).values() for case, held in found.items()}
    return [{"image": [str(Path(folder) / name) for name in names], "name": case} for case, names in files.items()]


def _names_in(folder: str) -> list[str]:
    path = Path(folder)
    found = sorted(one.name for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else []
    if not found:
        raise ConfigError("dataset_dir: is no folder that holds scans; each file in it is one, or each folder a series")
    return found


class Prepared:
    """Reads a scan and prepares it by the model's plan, for a mask on the plan's grid, for a class seen whole."""

    def __init__(self, manifest: TaskManifest) -> None:
        self._manifest = manifest

    def __call__(self, item: Mapping[str, Any]) -> Item:
        """Raises ScanError: the scan cannot be read, is of the other rank, or lacks a channel."""
        plan, task = self._manifest.plan, self._manifest.task
        scans, source = self._read(item["image"])
        if any(scan.rank != task.rank for scan in scans):
            raise ScanError("other_rank")
        require_like_names(task, scans)
        values, spacing = prepare_channels(scans, plan, task.other_grids)
        values = as_values(as_stored(values))
        if isinstance(task, ClassificationConfig):
            image = whole(values, task.size_for(self._manifest.model))
        else:
            image = standardise(torch.from_numpy(values))
        return {**item, "image": image, "source": source, "grid": grid_of(scans[0], spacing)}

    def _read(self, image: str | Sequence[str]) -> tuple[tuple[Scan, ...], Path]:
        """What the scan is made of, and where the first of it lies."""
        manifest, interpolate = self._manifest, self._manifest.plan.interpolates
        if isinstance(image, str):
            return (read_one_apart(Path(image), manifest.modality, interpolate=interpolate),), Path(image)
        numbers, paths = manifest.channel_numbers, [Path(one) for one in image]
        if len(paths) < len(numbers):
            raise ScanError("lacks_channel")
        modalities = modalities_of(manifest.task, manifest.modality)
        return read_channels_apart(paths, numbers, modalities, interpolate=interpolate), paths[0]


class Chances(nn.Module):
    """The network's answer as probabilities (B, K) or (B, K, *S), in float32; scans are brought to where it is."""

    def __init__(self, network: nn.Module, manifest: TaskManifest) -> None:
        super().__init__()
        self.network = network
        task = manifest.task
        self._several = isinstance(task, ClassificationConfig) and task.kind == "multi_label"
        self._precision = manifest.precision

    def forward(self, x: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        with autocast(device, self._precision):
            logits: Tensor = self.network(x.to(device)).float()
        return logits.sigmoid() if self._several else logits.softmax(1)


class MaskAtSource:
    """Writes the likeliest class of each voxel in the geometry of the scan's own file, post-processed as judged."""

    def __init__(self, manifest: TaskManifest, folder: str) -> None:
        self._folder, self._written = Path(folder), set[str]()
        self._kept = [1 + manifest.task.classes.index(name) for name in manifest.keep_largest]

    def __call__(self, item: Item) -> Item:
        """`pred` (K, *S) of the prepared scan -> `pred` (*S) of its source, and `mask`, where it was written."""
        from client import segmenting  # MONAI takes seconds to import, and a classification needs none

        classes = segmenting.keep_largest(segmenting.likeliest_at_source(item["pred"].cpu(), item["grid"]), self._kept)
        self._folder.mkdir(parents=True, exist_ok=True)
        called = _name_of(item)
        name = f"{without_ending(Path(called))}_seg"
        if name in self._written:  # a folder A beside A.nii, say
            name = f"{called}_seg"
        self._written.add(name)
        path = write_at_source(self._folder, name, classes, item["grid"].affine, item["source"])
        return {**item, "pred": classes, "mask": path}


def _name_of(item: Item) -> str:
    """As its file, or as the case that its files are of."""
    return str(item.get("name", item["source"].name))


class Table:
    """Writes each scan's probabilities as a line of predictions.csv, which the first call begins anew."""

    def __init__(self, manifest: TaskManifest, folder: str) -> None:
        assert isinstance(manifest.task, ClassificationConfig)
        self._classes, self._folder, self._begun = manifest.task.classes, Path(folder), False

    def __call__(self, item: Item) -> Item:
        """`pred` (K,) -> the same as numbers by class."""
        chances = dict(zip(self._classes, item["pred"].tolist(), strict=True))
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "predictions.csv").open("a" if self._begun else "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if not self._begun:
                writer.writerow(["scan", *(f"p/{name}" for name in self._classes)])
            writer.writerow([_name_of(item), *(f"{chance:.6f}" for chance in chances.values())])
        self._begun = True
        return {**item, "pred": chances}


@torch.inference_mode()
def run(
    dataset: Sequence[Item],
    predictor: nn.Module,
    inferer: Callable[[Tensor, nn.Module], Tensor],
    postprocessing: Callable[[Item], Item],
) -> int:
    """Answer every scan, one at a time; how many there were. What cannot be read is left out, and logged with its
    reason. Raises NonFiniteLossError: an answer is not all numbers, of which a class or a mask would look right."""
    predictor.eval()
    count = 0
    for number in range(len(dataset)):
        try:
            item = dataset[number]
        except Exception as error:  # MONAI's own around ours, whatever version of it
            if (reason := _reason(error)) is None:
                raise
            _log.warning("left out: scan %d of %d: %s", number + 1, len(dataset), reason)
            continue
        answer = inferer(item["image"][None], predictor)[0]
        require_numbers([answer])
        postprocessing({**item, "pred": answer})
        count += 1
    return count


def _reason(error: BaseException | None) -> str | None:
    """Of a scan that could not be used, anywhere among the causes; None where that was not it."""
    while error is not None and not isinstance(error, ScanError):
        error = error.__cause__
    return None if error is None else error.reason
