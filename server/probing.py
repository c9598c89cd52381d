"""The coordinator's yardstick: how well labelled, public scans separate by the global teacher's features.

A probe set is an .npz that is already preprocessed, because the coordinator cannot read a scan:
    scans (N, 1, *S) as the model takes them, labels (N,), patients (N,) so that no patient stands on both sides.
Its name is the file's, its rank that of `scans`. Beside every figure stands the same probe on 16 x 16 pixels of the
scans (of a volume's middle slice): what can be told without any encoder.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.run_folder import RunFolder
from unimiss_core import durable, progress
from unimiss_core.backbone import Backbone
from unimiss_core.embedding import bare_pixels, embed, encoder_of
from unimiss_core.errors import ConfigError
from unimiss_core.label_counts import class_counts, counts_in_words
from unimiss_core.probe import Probe, gain, plane, probe
from unimiss_core.study import ModelConfig

BATCH = 32


@dataclass(frozen=True)
class ProbeSet:
    name: str
    scans: Tensor
    labels: NDArray[np.str_]
    patients: NDArray[np.str_]


def read_probe_set(path: Path) -> ProbeSet:
    """Raises ConfigError: not such a file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:  # numpy leaves a damaged one open
            scans = torch.from_numpy(held["scans"])
            found = ProbeSet(path.stem, scans, held["labels"].astype(str), held["patients"].astype(str))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
        raise ConfigError(f"probe set {path}: expected an .npz with scans, labels and patients") from None
    if scans.ndim not in (4, 5) or not len(scans) == len(found.labels) == len(found.patients):
        raise ConfigError(f"probe set {path}: expected scans (N, 1, *S), labels (N,) and patients (N,)")
    return found


def tell_of_sets(paths: Sequence[Path]) -> None:
    """Before anything is trained, what classes each set asks to tell apart. Raises ConfigError: one is no probe set."""
    for path in paths:
        found = read_probe_set(path)
        counts = class_counts(found.labels.tolist(), found.patients.tolist())
        told = f"{len(set(found.labels))} classes" if counts is None else f"classes {counts_in_words(counts)}"
        scans, patients = len(found.labels), len(set(found.patients))
        progress.report(progress.Note(f"probe {found.name}: {scans} scans of {patients} patients; {told}"))


class Yardstick:
    """Probes the teachers of a run, each beside the one of round 0, whose features are kept."""

    def __init__(self, folder: RunFolder, paths: Sequence[Path], model: ModelConfig) -> None:
        self._folder, self._paths, self._model = folder, paths, model
        self._first: dict[Path, NDArray[np.float32]] = {}

    def __call__(self, teacher: Mapping[str, Tensor], *, is_last: bool) -> dict[str, dict[str, Any]]:
        """Figures of this teacher by task, which are told; where it is the last, the report's files are written, too.

        Raises ConfigError: a file is no probe set.
        """
        encoder = encoder_of(self._model, teacher)
        before: dict[str, dict[str, Any]] = {}
        after: dict[str, dict[str, Any]] = {}
        planes: dict[str, NDArray[Any]] = {}
        for path in self._paths:
            progress.report(progress.Note(f"probing {path.stem}"))
            found = read_probe_set(path)
            old, new = self._of_first(path, found), _features(encoder, found.scans)
            probed = [probe(features, found.labels, found.patients) for features in (old, new)]
            floor = probe(bare_pixels(found.scans), found.labels, found.patients)
            before[found.name] = figures_of(found, probed[0], floor)
            after[found.name] = figures_of(found, probed[1], floor) | gained(*probed)
            progress.report(progress.Note(in_words(after[found.name])))
            planes |= {f"{found.name}/before": plane(old), f"{found.name}/after": plane(new)}
            planes[f"{found.name}/labels"] = found.labels
        if is_last:
            self._write(before, after, planes)
        return after

    def _of_first(self, path: Path, found: ProbeSet) -> NDArray[np.float32]:
        if path not in self._first:
            self._first[path] = _features(encoder_of(self._model, self._folder.load(0).teacher), found.scans)
        return self._first[path]

    def _write(
        self,
        before: Mapping[str, Mapping[str, Any]],
        after: Mapping[str, Mapping[str, Any]],
        planes: Mapping[str, NDArray[Any]],
    ) -> None:
        report = self._folder.report
        durable.write_text(report / "probe-before.json", json.dumps(before, indent=2, sort_keys=True))
        durable.write_text(report / "probe-after.json", json.dumps(after, indent=2, sort_keys=True))
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **planes)
        durable.write_bytes(report / "probe-projection.npz", packed.getvalue())


def _features(encoder: Backbone, scans: Tensor) -> NDArray[np.float32]:
    return torch.cat([embed(encoder, part) for part in scans.split(BATCH)]).numpy()


def figures_of(found: ProbeSet, probed: Probe, floor: Probe) -> dict[str, Any]:
    binary = len(probed.classes) == 2
    return {
        "task": found.name,
        "rank": found.scans.ndim - 2,
        "auc": probed.auc(),
        "interval": probed.interval(),
        "n": len(found.labels),
        "classes": class_counts(found.labels.tolist(), found.patients.tolist()),
        "positives": int((probed.labels == 1).sum()) if binary else None,
        "reason": probed.reason or None,
        "pixel_floor": floor.auc(),
    }


def gained(before: Probe, after: Probe) -> dict[str, Any]:
    found = gain(before, after)
    return {"gain": found[0], "gain_interval": found[1]} if found else {"gain": None, "gain_interval": None}


def in_words(figures: Mapping[str, Any]) -> str:
    """probe pneumonia: AUC 0.701 (0.640 to 0.759), +0.089 (+0.020 to +0.151) since round 0"""
    if figures["auc"] is None:
        return f"probe {figures['task']}: no figure: {figures['reason']}"
    low, high = figures["interval"]
    said = f"probe {figures['task']}: AUC {figures['auc']:.3f} ({low:.3f} to {high:.3f})"
    if figures["gain"] is None:
        return said
    low, high = figures["gain_interval"]
    return f"{said}, {figures['gain']:+.3f} ({low:+.3f} to {high:+.3f}) since round 0"
