"""What a run would have left, made up: for tests of whatever reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimiss_core.config import dump_yaml, parse
from unimiss_core.study import StudyConfig

SITES = {"alpha-xray": ("2d",), "beta-ct": ("3d",), "gamma-mixed": ("2d", "3d")}
TERMS = {"2d": ("image",), "3d": ("volume", "slices", "slices_to_volume", "volume_to_slices")}
GROUPS = {"shared": 0.9, "2d": 0.5, "3d": 0.7, "head": 1.3}


def site_record(name: str, number: int, rng: np.random.Generator) -> dict[str, Any]:
    ranks = SITES[name]
    fall = 0.9 * (1 - np.exp(-number / 6))
    return {
        "status": "ok",
        "reason": "",
        "scans": {"2d": 412 if "2d" in ranks else 0, "3d": 37 if "3d" in ranks else 0},
        "steps": 40,
        "losses": {t: 6.25 - fall * rng.uniform(0.8, 1.2) + rng.normal(0, 0.03) for r in ranks for t in TERMS[r]},
        "bytes_down": int(1_700_000 * (1 + len(ranks)) + number),
        "bytes_up": int(880_000 * (1 + len(ranks)) + 3 * number),
        "seconds": float(rng.uniform(4, 9) * len(ranks)),
        "diagnostics": {f"target_entropy_{r}": 6.2 - 2 * fall * rng.uniform(0.9, 1.1) for r in ranks}
        | {"grad_norm": rng.uniform(0.8, 1.2)},
    }


def round_records(rounds: int, *, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "round": number,
            "seconds": float(rng.uniform(14, 18)),
            "sites": {name: site_record(name, number, rng) for name in SITES},
            "global": {"update_norm": {g: size * (0.4 + 1 / number) for g, size in GROUPS.items()}},
        }
        for number in range(1, rounds + 1)
    ]


def without(record: Mapping[str, Any], status: str, reason: str) -> dict[str, Any]:
    """A site's record in a round that it did not count in."""
    silent = {"steps": 0, "losses": {}, "bytes_up": 0, "seconds": 0.0, "diagnostics": {}}
    return {**record, **silent, "status": status, "reason": reason}


def study(rounds: int, *, local_steps: int = 40, **settings: object) -> StudyConfig:
    raw = {**settings, "schedule": {"rounds": rounds, "local_steps": local_steps}, "optimiser": {"warmup_steps": 20}}
    return parse(StudyConfig, {"name": "three-hospitals", **raw}, where="")


def write_run(out: Path, records: list[dict[str, Any]], *, rounds: int, **settings: object) -> None:
    """study.yaml and metrics.jsonl in `out`; settings: of the study."""
    config = study(rounds, **settings)
    (out / "report").mkdir(parents=True, exist_ok=True)
    (out / "study.yaml").write_text(f"# sha256 of this study: {config.digest()}\n{dump_yaml(config)}", encoding="utf-8")
    (out / "metrics.jsonl").write_text("".join(json.dumps(one, sort_keys=True) + "\n" for one in records))


def write_probe(report: Path) -> None:
    """Two tasks with figures, one without."""
    shared = {"task": "pneumonia", "rank": 2, "n": 300, "positives": 97, "pixel_floor": 0.634, "reason": None}
    no_figure = {"task": "rare_finding", "rank": 2, "n": 40, "positives": 2, "auc": None, "interval": None}
    lesion = {"task": "lesion_in_volume", "rank": 3, "n": 61, "positives": 30}
    before = {
        "pneumonia": {**shared, "auc": 0.612, "interval": [0.541, 0.68]},
        "lesion_in_volume": {**lesion, "auc": 0.55, "interval": [0.41, 0.69]},
        "rare_finding": {**no_figure, "reason": "too few positives"},
    }
    after = {
        "pneumonia": {
            **before["pneumonia"],
            "auc": 0.701,
            "interval": [0.64, 0.759],
            "gain": 0.089,
            "gain_interval": [0.02, 0.151],
        },
        "lesion_in_volume": {
            **before["lesion_in_volume"],
            "auc": 0.53,
            "interval": [0.39, 0.67],
            "gain": -0.02,
            "gain_interval": [-0.13, 0.09],
        },
        "rare_finding": before["rare_finding"],
    }
    (report / "probe-before.json").write_text(json.dumps(before))
    (report / "probe-after.json").write_text(json.dumps(after))
    rng = np.random.default_rng(1)
    labels = (rng.random(300) < 0.4).astype(int)
    organ = rng.choice(["head", "thorax", "abdomen", "pelvis", "leg"], 160)
    sites = np.unique(organ, return_inverse=True)[1]
    np.savez(
        report / "probe-projection.npz",
        **{
            "pneumonia/before": rng.normal(size=(300, 2)) * [3, 1],
            "pneumonia/after": rng.normal(size=(300, 2)) * [2, 1] + labels[:, None] * [2.5, 0.8],
            "pneumonia/labels": np.where(labels, "pneumonia", "no finding"),
            "organ/before": rng.normal(size=(160, 2)),
            "organ/after": rng.normal(size=(160, 2)) * 0.3 + np.stack([np.cos(sites * 1.3), np.sin(sites * 1.3)], 1),
            "organ/labels": organ,
        },
    )


def write_views(report: Path) -> None:
    """A sheet of 3 rows of 6 smooth grey pictures for each site."""
    rng = np.random.default_rng(2)
    for name in SITES:
        noise = rng.normal(size=(3 * 64, 6 * 64))
        spectrum = np.fft.fft2(noise) * np.exp(-((np.fft.fftfreq(192)[:, None] ** 2 + np.fft.fftfreq(384) ** 2) * 900))
        smooth = np.fft.ifft2(spectrum).real
        grey = 255 * (smooth - smooth.min()) / np.ptp(smooth)
        Image.fromarray(grey.astype(np.uint8)).save(report / f"views-{name}.png")
