"""Views measured: from the cache in batches, against decoding the source for every sample and shading views singly.

    OMP_NUM_THREADS=1 python -m benchmarks.views --json views.json

Two views of a scan at the published sizes, on one core:
  cache      `draw_batch` on scans of the cache, with the published recipe's chances and strengths
  published  the released loader, operation by operation (`benchmarks.published_views`)
  lean       the same work without its waste: float32, nothing padded, a view shaded as a whole and by our recipe; but
             still the whole file decoded for each sample, and one view at a time

Rates are per second of processor time, so that other programs on the machine do not count. Needs the workplace's data
sets (`--data`, by default ../shared/data beside the project).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from benchmarks import published_views
from benchmarks.published_views import published_image, published_volume
from client.anatomy import draw_body
from client.cache import CachedScan, open_library
from client.phantoms import PhantomConfig, ct
from client.site_config import DataSource, SiteConfig
from unimiss_core.study import PlanConfig, ViewConfig
from unimiss_core.views import draw_batch, generator_for

DATA = Path(__file__).parents[2] / "shared" / "data"
PLAN = PlanConfig(volume_spacing_mm=(1.0, 1.0, 1.0))
"""The published loader does not resample these 1 mm volumes: neither does this plan."""
VOLUME_RECIPE = ViewConfig(
    volume_size=published_views.VOLUME,
    flip=(0.8, 0.8, 0.8),
    blur=0.6,
    blur_sigma=(0.1, 2.0),
    noise=1.0,
    noise_sigma=(0.0, 0.1),
    brightness=0.9,
    brightness_factor=(0.75, 1.25),
    contrast=1.0,
    contrast_factor=(0.75, 1.25),
    gamma=0.9,
)
"""The published chances and strengths, means over the two views; offsets have no counterpart here."""
IMAGE_RECIPE = ViewConfig(
    image_size=published_views.IMAGE,
    area=(0.14, 1.0),
    flip=(0.0, 0.0, 0.5),
    blur=0.75,
    blur_sigma=(0.1, 2.0),
    noise=0.0,
    brightness=0.8,
    brightness_factor=(0.6, 1.4),
    contrast=0.8,
    contrast_factor=(0.6, 1.4),
    gamma=0.0,
)
"""The same for images; hue and saturation have none in grey ones."""
WHOLE = PhantomConfig(kind="ct", patients=1, volume_shape=(120, 256, 256), volume_spacing_mm=(2.0, 1.3, 1.3))
Array = NDArray[np.float32]
Loader = Callable[[Path, np.random.Generator], Sequence[Any]]
Draw = Callable[[], int]


# -------------------------------------------------------------------------------------------------------------- lean


def lean_volume(path: Path, rng: np.random.Generator) -> list[Array]:
    """Two views (16, 96, 96): the volume decoded to float32, nothing padded, each view augmented alone."""
    volume = np.asarray(nibabel.load(path).dataobj, dtype=np.float32).transpose(2, 0, 1)  # type: ignore[attr-defined]
    region = _cut(volume, (26, 154, 154), rng)
    region = np.clip((region + 1024) / 2048, 0, 1)
    views = []
    for _ in range(2):
        crop = _cut(region, (16, *(round(rng.uniform(0.6, 1.6) * 96) for _ in range(2))), rng)
        crop = np.flip(crop, 2) if rng.random() < 0.5 else crop
        views.append(_shade(_resized(crop, VOLUME_RECIPE.volume_size[1:]), VOLUME_RECIPE, rng))
    return views


def lean_image(path: Path, rng: np.random.Generator) -> list[Array]:
    """Two views (224, 224) of one grey channel, each augmented alone."""
    with Image.open(path) as source:
        picture = source.convert("L")
    views = []
    for _ in range(2):
        view = np.asarray(_pillow_crop(picture, IMAGE_RECIPE, rng), dtype=np.float32) / np.float32(255)
        view = np.flip(view, 1) if rng.random() < 0.5 else view
        views.append(_shade(view, IMAGE_RECIPE, rng))
    return views


def _shade(x: Array, config: ViewConfig, rng: np.random.Generator) -> Array:
    """Blur, noise, brightness, contrast, gamma, standardised, as `unimiss_core.views` does for a whole batch."""
    if rng.random() < config.blur:
        x = ndimage.gaussian_filter(x, rng.uniform(*config.blur_sigma))
    if rng.random() < config.noise:
        x = x + rng.uniform(*config.noise_sigma) * rng.standard_normal(x.shape, dtype=np.float32)
    if rng.random() < config.brightness:
        x = x * np.float32(rng.uniform(*config.brightness_factor))
    if rng.random() < config.contrast:
        x = (x - x.mean()) * np.float32(rng.uniform(*config.contrast_factor)) + x.mean()
    x = np.clip(x, 0, 1)
    if rng.random() < config.gamma:
        x = x ** np.float32(rng.uniform(*config.gamma_exponent))
    return np.ascontiguousarray((x - np.float32(0.5)) / np.float32(0.25))


def _pillow_crop(picture: Image.Image, config: ViewConfig, rng: np.random.Generator) -> Image.Image:
    surface = rng.uniform(*config.area) * picture.width * picture.height
    aspect = np.exp(rng.uniform(*np.log(config.aspect)))
    width = min(picture.width, round(float(np.sqrt(surface / aspect))))
    height = min(picture.height, round(float(np.sqrt(surface * aspect))))
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    crop = picture.crop((left, top, left + width, top + height))
    return crop.resize(config.image_size[::-1], Image.Resampling.BILINEAR)


def _resized(planes: NDArray[Any], size: Sequence[int]) -> Array:
    """(D, H, W) linearly to (D, *size), without regard to aliasing."""
    x = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))[None]
    return np.asarray(F.interpolate(x, size=tuple(size), mode="bilinear")[0].numpy())


def _cut(x: NDArray[Any], shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """A random box of about this shape."""
    box = []
    for have, want in zip(x.shape, shape, strict=True):
        start = int(rng.integers(0, max(1, have - want + 1)))
        box.append(slice(start, start + want))
    return x[tuple(box)]


# ------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Set:
    """What is measured: files of one rank, and the same scans in the cache."""

    name: str
    files: tuple[Path, ...]
    scans: tuple[CachedScan, ...]
    published: Loader
    lean: Loader


def measure(data: Path, scratch: Path, seconds: float, stretches: int) -> list[dict[str, Any]]:
    examples = data / "unimiss_examples"
    volumes, images = (published_volume, lean_volume), (published_image, lean_image)
    sets = [
        _set("3D of 24-slice pieces, .nii.gz", examples / "3d", scratch, volumes),
        _set("3D of whole CT 120x256x256, .nii.gz", _write_whole(scratch / "whole"), scratch, volumes),
        _set("2D of 512x512, .png", examples / "2d", scratch, images),
    ]
    return [_compare(measured, seconds, stretches) for measured in sets]


def _set(name: str, folder: Path, scratch: Path, loaders: tuple[Loader, Loader]) -> Set:
    source = DataSource(folder=folder, modality="CT" if name.startswith("3D") else "XR")
    site = SiteConfig(name="benchmark", data=(source,), state=scratch / "sites" / folder.name, workers=1)
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
    return Set(name, files, open_library(site, PLAN).scans, *loaders)


def _write_whole(folder: Path) -> Path:
    """Four phantoms of a usual CT's extent, 2 x 1.3 x 1.3 mm, as int16; the spacing is written as 1 mm."""
    folder.mkdir()
    make: Any = nibabel.Nifti1Image
    for seed in range(4):
        rng = np.random.default_rng(seed)
        body = draw_body(rng, lesion=True)
        volume = ct(body, WHOLE, rng)
        nibabel.save(make(volume.transpose(2, 1, 0).astype(np.int16), np.eye(4)), folder / f"{seed}.nii.gz")
    return folder


def _compare(measured: Set, seconds: float, stretches: int) -> dict[str, Any]:
    """All three in turn, stretch by stretch; medians, and medians of the stretches' ratios."""
    rng, steps, scans = np.random.default_rng(0), count(), measured.scans
    batch, recipe = (24, IMAGE_RECIPE) if scans[0].rank == 2 else (8, VOLUME_RECIPE)

    def cache() -> int:
        step = next(steps)
        some = [scans[(step * batch + k) % len(scans)] for k in range(batch)]
        views = draw_batch(some, recipe, generator_for(0, "benchmark", step))
        return views.shape[0] * views.shape[1]

    def naive(loader: Loader) -> int:
        return len(loader(measured.files[next(steps) % len(measured.files)], rng))

    sides: dict[str, Draw] = {
        "cache": cache,
        "published": partial(naive, measured.published),
        "lean": partial(naive, measured.lean),
    }
    for side in sides.values():
        side()
    rates = [{name: _rate(side, seconds) for name, side in sides.items()} for _ in range(stretches)]
    return {
        "two views": measured.name,
        **{f"{name}, views/s": round(median(rate[name] for rate in rates)) for name in sides},
        **{
            f"cache : {name}": round(median(rate["cache"] / rate[name] for rate in rates), 1)
            for name in ("published", "lean")
        },
    }


def _rate(draw: Draw, seconds: float) -> float:
    """Views per second of this process's time."""
    began, drawn = time.process_time(), 0
    while time.process_time() - began < seconds:
        drawn += draw()
    return drawn / (time.process_time() - began)


# ------------------------------------------------------------------------------------------------------------ report


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast views are drawn.")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of a stretch")
    parser.add_argument("--stretches", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options.data, Path(scratch), options.seconds, options.stretches)
    table = Table(title="Views, one core")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"views": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
