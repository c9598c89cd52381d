"""The coordinator's yardstick: how well labelled, public scans separate by the global teacher's features.

A probe set is an .npz that is already preprocessed, because the coordinator cannot read a scan:
    scans (N, 1, *S) as the model takes them, labels (N,), patients (N,) so that no patient stands on both sides.
Its name is the file's, its rank that of `scans`. Beside every figure stands the same probe on 16 x 16 pixels of the
scans (of a volume's middle slice): what can be told without any encoder.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.run_folder import RunFolder
from unimiss_core import durable, progress
from unimiss_core.embedding import embed, encoder_of
from unimiss_core.errors import ConfigError
from unimiss_core.model import MiT
from unimiss_core.probe import Probe, gain, plane, probe
from unimiss_core.study import ModelConfig

BATCH = 32
FLOOR_SIDE = 16


@dataclass(frozen=True)
class ProbeSet:
    name: str
    scans: Tensor
    labels: NDArray[np.str_]
    patients: NDArray[np.str_]


def read_probe_set(path: Path) -> ProbeSet:
    """Raises ConfigError: not such a file."""
    try:
        with np.load(path, allow_pickle=False) as held:
            scans = torch.from_numpy(held["scans"])
            found = ProbeSet(path.stem, scans, held["labels"].astype(str), held["patients"].astype(str))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"probe set {path}: expected an .npz with scans, labels and patients") from None
    if scans.ndim not in (4, 5) or not len(scans) == len(found.labels) == len(found.patients):
        raise ConfigError(f"probe set {path}: expected scans (N, 1, *S), labels (N,) and patients (N,)")
    return found


def measure(
    folder: RunFolder, paths: Sequence[Path], model: ModelConfig, teacher: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Probe the teacher of round 0 and this one, write the figures for the report, return those of this one."""
    first = folder.load(0).teacher
    encoders = [encoder_of(model, tensors) for tensors in (first, teacher)]
    before: dict[str, dict[str, Any]] = {}
    after: dict[str, dict[str, Any]] = {}
    planes: dict[str, NDArray[Any]] = {}
    for path in paths:
        progress.report(progress.Note(f"probing {path.stem}"))
        found = read_probe_set(path)
        old, new = (_features(encoder, found.scans) for encoder in encoders)
        probed = [probe(features, found.labels, found.patients) for features in (old, new)]
        floor = probe(pixels(found.scans), found.labels, found.patients)
        before[found.name] = figures_of(found, probed[0], floor)
        after[found.name] = figures_of(found, probed[1], floor) | gained(*probed)
        planes |= {f"{found.name}/before": plane(old), f"{found.name}/after": plane(new)}
        planes[f"{found.name}/labels"] = found.labels
    durable.write_text(folder.report / "probe-before.json", json.dumps(before, indent=2, sort_keys=True))
    durable.write_text(folder.report / "probe-after.json", json.dumps(after, indent=2, sort_keys=True))
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **planes)
    durable.write_bytes(folder.report / "probe-projection.npz", packed.getvalue())
    return after


def _features(encoder: MiT, scans: Tensor) -> NDArray[np.float32]:
    return torch.cat([embed(encoder, part) for part in scans.split(BATCH)]).numpy()


def pixels(scans: Tensor) -> NDArray[np.float32]:
    """(N, 256): each scan, or the middle slice of each volume, as 16 x 16 averages."""
    x = scans.float() if scans.ndim == 4 else scans[:, :, scans.shape[2] // 2].float()
    return F.adaptive_avg_pool2d(x, FLOOR_SIDE).flatten(1).numpy()


def figures_of(found: ProbeSet, probed: Probe, floor: Probe) -> dict[str, Any]:
    binary = len(probed.classes) == 2
    return {
        "task": found.name,
        "rank": found.scans.ndim - 2,
        "auc": probed.auc(),
        "interval": probed.interval(),
        "n": len(found.labels),
        "positives": int((probed.labels == 1).sum()) if binary else None,
        "reason": probed.reason or None,
        "pixel_floor": floor.auc(),
    }


def gained(before: Probe, after: Probe) -> dict[str, Any]:
    found = gain(before, after)
    return {"gain": found[0], "gain_interval": found[1]} if found else {"gain": None, "gain_interval": None}
