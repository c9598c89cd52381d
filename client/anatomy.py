"""A made-up chest: drawn at random, rendered in HU on any grid. Nothing in it was taken from a person.

Coordinates are millimetres (z, y, x) from the middle of the chest, towards superior, posterior and the patient's left,
as the axes of a volume. Legend of shapes: D, H, W along z, y, x.

A body is fat around soft tissue around a rib cage; lungs fill the cage above two diaphragm domes and beside the
mediastinum; heart, great vessels, airways, spine, liver, stomach gas and branching lung vessels are ellipsoids and
tubes painted over each other; a lesion is a nodule or a patchy opacity within a lung.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Point = tuple[float, float, float]
Finding = Literal["none", "nodule", "opacity"]

AIR_HU, FAT_HU, MUSCLE_HU, LUNG_HU, BONE_HU = -1000.0, -100.0, 45.0, -860.0, 620.0

_CAGE_TOP_MM, _CAGE_CAP_MM = 45.0, 85.0
"""Where the rib cage begins to close upwards, and over which height it does."""


@dataclass(frozen=True)
class Grid:
    """Where a volume is rendered: its voxel centres lie around `centre_mm`."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    centre_mm: Point = (0.0, 0.0, 0.0)

    def axes(self) -> tuple[Array, Array, Array]:
        """Coordinates z (D, 1, 1), y (1, H, 1), x (1, 1, W)."""
        lines = [
            ((np.arange(n) - (n - 1) / 2) * step + centre).astype(np.float32)
            for n, step, centre in zip(self.shape, self.spacing_mm, self.centre_mm, strict=True)
        ]
        return lines[0][:, None, None], lines[1][None, :, None], lines[2][None, None, :]


@dataclass(frozen=True)
class Ellipsoid:
    centre_mm: Point
    radii_mm: Point
    hu: float
    edge_mm: float = 4.0
    """Over which width it fades into what is around it."""

    def reach(self) -> tuple[Point, Point]:
        low = tuple(c - r - self.edge_mm for c, r in zip(self.centre_mm, self.radii_mm, strict=True))
        high = tuple(c + r + self.edge_mm for c, r in zip(self.centre_mm, self.radii_mm, strict=True))
        return low, high  # type: ignore[return-value]

    def depth(self, z: Array, y: Array, x: Array) -> Array:
        """About how far inside each point lies, in mm; negative outside."""
        squares = [((p - c) / r) ** 2 for p, c, r in zip((z, y, x), self.centre_mm, self.radii_mm, strict=True)]
        return np.asarray((1 - np.sqrt(squares[0] + squares[1] + squares[2])) * min(self.radii_mm))


@dataclass(frozen=True)
class Tube:
    start_mm: Point
    end_mm: Point
    radius_mm: float
    hu: float
    taper: float = 1.0
    """Radius at the end over radius at the start."""
    edge_mm: float = 3.0

    def reach(self) -> tuple[Point, Point]:
        margin = self.radius_mm + self.edge_mm
        low = tuple(min(a, b) - margin for a, b in zip(self.start_mm, self.end_mm, strict=True))
        high = tuple(max(a, b) + margin for a, b in zip(self.start_mm, self.end_mm, strict=True))
        return low, high  # type: ignore[return-value]

    def depth(self, z: Array, y: Array, x: Array) -> Array:
        """How far inside each point lies, in mm; negative outside."""
        along = np.subtract(self.end_mm, self.start_mm).astype(np.float32)
        offsets = [p - np.float32(s) for p, s in zip((z, y, x), self.start_mm, strict=True)]
        share = sum(o * a for o, a in zip(offsets, along, strict=True)) / np.float32(along @ along)
        share = np.clip(share, 0, 1)
        squares = [(o - share * a) ** 2 for o, a in zip(offsets, along, strict=True)]
        radius = self.radius_mm * (1 + (self.taper - 1) * share)
        return np.asarray(radius - np.sqrt(squares[0] + squares[1] + squares[2]))


@dataclass(frozen=True)
class Wave:
    """A smooth unevenness of tissue: a product of cosines along the axes."""

    lengths_mm: Point
    phases: Point
    hu: float

    def at(self, z: Array, y: Array, x: Array) -> Array:
        c, b, a = (
            np.cos(2 * np.pi * p / length + phase)
            for p, length, phase in zip((z, y, x), self.lengths_mm, self.phases, strict=True)
        )
        return np.asarray(self.hu * c * b * a, dtype=np.float32)


@dataclass(frozen=True)
class Body:
    """One made-up patient."""

    half_width_mm: float
    half_depth_mm: float
    fat_mm: float
    cage_half_width_mm: float
    cage_half_depth_mm: float
    rib_pitch_mm: float
    rib_slope: float
    rib_phase: float
    domes: tuple[Ellipsoid, Ellipsoid]
    """The diaphragm: lungs end at them."""
    mediastinum_mm: float
    organs: tuple[Ellipsoid | Tube, ...]
    """Painted over the lungs, in this order."""
    lesions: tuple[Ellipsoid, ...]
    unevenness: tuple[Wave, ...]
    finding: Finding


# ----------------------------------------------------------------------------------------------------------- drawing


def draw_body(rng: np.random.Generator, *, lesion: bool) -> Body:
    """A patient at random; `lesion` says whether one to three nodules or an opacity are among the lungs' contents."""
    size, build = rng.normal(1.0, 0.05), rng.normal(1.0, 0.06)
    cage = (126 * size, 84 * size * rng.normal(1.0, 0.04))  # half width, half depth
    fat = rng.uniform(6, 22)
    base = rng.uniform(-85, -60)
    body = Body(
        half_width_mm=(cage[0] + 14) * build + fat,
        half_depth_mm=(cage[1] + 14) * build + fat,
        fat_mm=fat,
        cage_half_width_mm=cage[0],
        cage_half_depth_mm=cage[1],
        rib_pitch_mm=rng.uniform(23, 28),
        rib_slope=rng.uniform(0.25, 0.5),
        rib_phase=rng.uniform(0, 28),
        domes=_draw_domes(rng, cage, base),
        mediastinum_mm=rng.uniform(17, 25),
        organs=(),
        lesions=(),
        unevenness=tuple(_draw_wave(rng) for _ in range(4)),
        finding="none",
    )
    organs = (*_draw_abdomen(rng, cage, base), *_draw_centre(rng, cage), *_draw_vessels(rng, body))
    finding: Finding = ("nodule" if rng.random() < 0.6 else "opacity") if lesion else "none"
    return Body(**{**vars(body), "organs": organs, "lesions": _draw_lesions(rng, body, finding), "finding": finding})


def _draw_domes(rng: np.random.Generator, cage: tuple[float, float], base: float) -> tuple[Ellipsoid, Ellipsoid]:
    heights = (rng.uniform(45, 62), rng.uniform(32, 50))  # the liver lifts the right one
    right, left = (
        Ellipsoid((base - 12, rng.uniform(-5, 10), side * 0.48 * cage[0]), (height, 1.05 * cage[1], 0.62 * cage[0]), 50)
        for side, height in zip((-1, 1), heights, strict=True)
    )
    return right, left


def _draw_abdomen(rng: np.random.Generator, cage: tuple[float, float], base: float) -> list[Ellipsoid]:
    liver = Ellipsoid((base - 22, -5, -0.45 * cage[0]), (52, 0.8 * cage[1], 0.55 * cage[0]), rng.uniform(52, 68))
    spleen = Ellipsoid((base - 18, 30, 0.62 * cage[0]), (28, 30, 24), 55)
    gas = rng.uniform(10, 24)
    bubble = Ellipsoid((base - 8, -25, 0.42 * cage[0]), (gas, gas, 1.4 * gas), -900)
    return [liver, spleen, bubble]


def _draw_centre(rng: np.random.Generator, cage: tuple[float, float]) -> list[Ellipsoid | Tube]:
    """Heart, great vessels, airways, spine and breast bone."""
    heart = rng.uniform(0.85, 1.25)
    carina = rng.uniform(28, 40)
    back = 0.72 * cage[1]
    spine = [Tube((-150, back, 0), (150, back - 8, 0), 17, 130), Tube((-150, back + 22, 0), (150, back + 14, 0), 7, 30)]
    vertebrae = [
        Ellipsoid((z, back, 0), (9, 14, 17), rng.uniform(260, 340)) for z in np.arange(-138, 140, rng.uniform(24, 28))
    ]
    return [
        Ellipsoid((-28, -18, rng.uniform(14, 26)), (48 * heart, 42 * heart, 52 * heart), rng.uniform(38, 50)),
        Ellipsoid((10, -20, -14), (42 * heart, 26, 28), 42),
        Tube((-150, 38, 14), (50, 34, 18), rng.uniform(11, 15), 48),
        Tube((50, 34, 20), (55, -14, 2), rng.uniform(11, 15), 48),
        *spine,
        *vertebrae,
        Ellipsoid((-10, -0.93 * cage[1], 0), (70, 7, 17), 240),
        Tube((carina, 12, 0), (150, 2, 0), 8.5, AIR_HU),
        Tube((carina, 12, 0), (carina - 28, 14, -32), 6.5, AIR_HU, taper=0.7),
        Tube((carina, 12, 0), (carina - 30, 14, 36), 6.0, AIR_HU, taper=0.7),
        Tube((118, -48, -18), (132, 0, -125), 6, 300),
        Tube((118, -48, 18), (132, 0, 125), 6, 300),
    ]


def _draw_vessels(rng: np.random.Generator, body: Body) -> list[Tube]:
    """From each hilum into its lung: trunks that fork once."""
    vessels = []
    for side in (-1, 1):
        hilum = (rng.uniform(0, 12), rng.uniform(4, 14), side * 30.0)
        for _ in range(9):
            tip = _point_in_lung(rng, body, margin_mm=8, side=side)
            fork = _on_the_way(hilum, tip, rng.uniform(0.45, 0.7))
            radius = rng.uniform(3.2, 5.0)
            vessels.append(Tube(hilum, fork, radius, 40, taper=0.65))
            for _ in range(2):
                aside: Point = tuple(t + rng.normal(0, 14) for t in tip)  # type: ignore[assignment]
                if _lung_depth(body, *aside) > 3:
                    vessels.append(Tube(fork, aside, 0.6 * radius, 30, taper=0.5))
    return vessels


def _draw_lesions(rng: np.random.Generator, body: Body, finding: Finding) -> tuple[Ellipsoid, ...]:
    if finding == "none":
        return ()
    if finding == "opacity":
        radii = rng.uniform(24, 44, 3)
        centre = _point_in_lung(rng, body, margin_mm=14)
        return (Ellipsoid(centre, _point(radii), rng.uniform(-280, -20), edge_mm=16.0),)
    lesions = []
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(11, 20)
        centre = _point_in_lung(rng, body, margin_mm=0.8 * radius)
        lesions.append(Ellipsoid(centre, _point(radius * rng.uniform(0.85, 1.15, 3)), rng.uniform(20, 80)))
    return tuple(lesions)


def _draw_wave(rng: np.random.Generator) -> Wave:
    return Wave(_point(rng.uniform(40, 130, 3)), _point(rng.uniform(0, 6.28, 3)), rng.uniform(5, 14))


def _point_in_lung(rng: np.random.Generator, body: Body, *, margin_mm: float, side: int = 0) -> Point:
    """A point at least `margin_mm` within a lung; side: -1 right, 1 left, 0 either."""
    extent = (130.0, body.cage_half_depth_mm, body.cage_half_width_mm)
    for _ in range(10_000):
        z, y, x = (float(rng.uniform(-e, e)) for e in extent)
        if (x * side >= 0) and _lung_depth(body, z, y, x) >= margin_mm:
            return z, y, x
    raise AssertionError("a body without lungs")


def _on_the_way(start: Point, end: Point, share: float) -> Point:
    return _point([s + share * (e - s) for s, e in zip(start, end, strict=True)])


def _point(values: Sequence[float] | NDArray[np.float64]) -> Point:
    z, y, x = (float(v) for v in values)
    return z, y, x


# --------------------------------------------------------------------------------------------------------- rendering


def render(body: Body, grid: Grid) -> Array:
    """The body in HU (D, H, W), without noise."""
    z, y, x = grid.axes()
    volume = _wall(body, z, y, x)
    cage = _cage_radius(body, z, y, x)
    _blend(volume, BONE_HU, _inside(_rib_depth(body, cage, z, y), 4.0))
    lungs = _inside(_lung_depth_in(body, cage, z, y, x), 5.0)
    _blend(volume, LUNG_HU + 0.35 * y, lungs)  # the lower lung of someone who lies on their back holds more blood
    for wave in body.unevenness:
        volume += wave.at(z, y, x) * (1 + lungs) * (volume > -950)
    for part in (*body.organs, *body.lesions):
        _paint(volume, part, (z, y, x))
    return volume


def _wall(body: Body, z: Array, y: Array, x: Array) -> Array:
    """Air, skin fat and muscle. The outline is a superellipse, wider at the shoulders."""
    shoulders = 1 + 0.12 / (1 + np.exp(-(z - 95) / 12))
    radius = (np.abs(x / (body.half_width_mm * shoulders)) ** 2.6 + np.abs(y / body.half_depth_mm) ** 2.6) ** (1 / 2.6)
    depth = (1 - radius) * body.half_depth_mm
    volume = np.full(depth.shape, AIR_HU, dtype=np.float32)
    _blend(volume, FAT_HU, _inside(depth, 4.0))
    _blend(volume, MUSCLE_HU, _inside(depth - body.fat_mm, 4.0))
    return volume


def _cage_radius(body: Body, z: Array, y: Array, x: Array) -> Array:
    """1 on the rib cage, below within it: an elliptic cylinder that closes like a dome towards the neck."""
    top = np.maximum(0, z - _CAGE_TOP_MM) / _CAGE_CAP_MM
    return np.asarray(np.sqrt((x / body.cage_half_width_mm) ** 2 + (y / body.cage_half_depth_mm) ** 2 + top**2))


def _rib_depth(body: Body, cage: Array, z: Array, y: Array) -> Array:
    """How far inside a rib: sloping bands (higher behind) in the shell of the cage."""
    height = (z - body.rib_slope * y + body.rib_phase) % body.rib_pitch_mm - body.rib_pitch_mm / 2
    band = 5.0 - np.abs(height)
    shell = 4.5 - np.abs(cage - 1) * body.cage_half_depth_mm
    return np.asarray(np.minimum(band, shell))


def _lung_depth_in(body: Body, cage: Array, z: Array, y: Array, x: Array) -> Array:
    within = (0.94 - cage) * body.cage_half_depth_mm
    beside = np.abs(x) - body.mediastinum_mm * (1 + 0.25 * np.sin(z / 40))
    right, left = (-dome.depth(z, y, x) for dome in body.domes)
    above = np.minimum(np.minimum(right, left), z - body.domes[0].centre_mm[0])
    return np.asarray(np.minimum(np.minimum(within, beside), above))


def _lung_depth(body: Body, z: float, y: float, x: float) -> float:
    point = np.float32(z), np.float32(y), np.float32(x)
    return float(_lung_depth_in(body, _cage_radius(body, *point), *point))  # type: ignore[arg-type]


def _paint(volume: Array, part: Ellipsoid | Tube, axes: tuple[Array, Array, Array]) -> None:
    """Blend one part into the box of the volume that it reaches."""
    low, high = part.reach()
    box = tuple(
        slice(*np.searchsorted(axis.ravel(), (bottom, top))) for axis, bottom, top in zip(axes, low, high, strict=True)
    )
    z, y, x = axes[0][box[0]], axes[1][:, box[1]], axes[2][:, :, box[2]]
    if z.size and y.size and x.size:
        _blend(volume[box], part.hu, _inside(part.depth(z, y, x), part.edge_mm))


def _inside(depth_mm: Array, edge_mm: float) -> Array:
    """Share of each voxel that is inside, across an edge of this width."""
    return np.asarray(np.clip(0.5 + depth_mm / edge_mm, 0, 1))


def _blend(volume: Array, hu: float | Array, share: Array) -> None:
    volume += share * (hu - volume)
