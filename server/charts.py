"""Small charts as inline SVG. Colours and fonts come from the report's style sheet, so that a chart follows
light, dark and print; every site and label has a colour and a marker of its own, so that colour is never alone.

All panels are 320 units wide and stand in a grid whose columns are about as wide in pixels: text keeps its size.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from server.markup import Html, tag
from server.wording import byte_count, significant

WIDTH, HEIGHT = 320, 196
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 14, 24
STYLES = 8
"""Colours and markers of the style sheet; the ninth series starts over."""

_DENSE = 40
"""Above this many points of a line, markers would run together and are left away; values show on hovering."""
_MOST_POINTS = 300
"""Of a line: about one for each unit of its width. Of more, `_thinned` draws those that can be seen."""
_MOST_BARS = 120
_MOST_CELLS = 66
"""Of a strip: two units wide each."""
_MOST_DOTS = 1500
"""Of a panel. Where its lines have more points than that, none answers to hovering."""
_ROW = 52
"""Height of a row with an estimate before and after."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line: (round, value) pairs, None where there is no value. `style` picks colour and marker."""

    name: str
    points: Sequence[Point]
    style: int

    def values(self) -> list[float]:
        return [y for _, y in self.points if _is_drawn(y)]


@dataclass(frozen=True)
class Reference:
    """A level that every line of a panel is read against."""

    name: str
    value: float


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_panel(
    title: str, series: Sequence[Series], *, reference: Reference | None, bounds: tuple[float, float]
) -> Html:
    """Lines over rounds. `bounds` is the vertical range, given so that panels that belong together share it."""
    rounds = sorted({x for one in series for x, _ in one.points})
    x, y = _round_axis(rounds), Axis(*bounds, HEIGHT - BOTTOM, TOP)
    marks = [*_gridlines(y), *_round_ticks(x, rounds)]
    if reference:
        marks += _reference(y, reference)
    drawn = [_thinned(one.points) for one in series]
    with_hints = sum(map(len, drawn)) <= _MOST_DOTS
    marks += [_line(one, points, x, y, with_hints) for one, points in zip(series, drawn, strict=True)]
    described = "; ".join(_described(one) for one in series)
    return _panel(title, marks, f"{title} over rounds. {described}.", HEIGHT)


def bounds_of(series: Sequence[Series], *, include: Sequence[float] = ()) -> tuple[float, float]:
    """A vertical range with a little air that holds every finite value and `include`."""
    values = [value for one in series for value in one.values()] + list(include)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low == 0 else low - air), high + air


def traffic_panel(title: str, rounds: Sequence[int], sites: Mapping[str, Sequence[tuple[int, int]]]) -> Html:
    """Stacked bars per round: above the line what sites sent, below what was sent to them. Of many rounds each bar is
    the mean of several.

    sites: name -> (bytes down, bytes up) for each of `rounds`.
    """
    size = rounds_in_one(len(rounds), _MOST_BARS)
    spans = [slice(i, i + size) for i in range(0, len(rounds), size)]
    means = {name: [_mean_traffic(site[span]) for span in spans] for name, site in sites.items()}
    down = [sum(site[i][0] for site in means.values()) for i in range(len(spans))]
    up = [sum(site[i][1] for site in means.values()) for i in range(len(spans))]
    x = _round_axis(rounds)
    # Room above and below the bars for the words that say which way is which.
    y = Axis(-max([1, *down]), max([1, *up]), HEIGHT - BOTTOM - 16, TOP + 12)
    room = 0.72 * (WIDTH - LEFT - RIGHT - 16) / max(1, rounds[-1] - rounds[0] + 1)
    width = max(0.6, min(18.0, room * size))
    marks = [*_gridlines(y, _round_bytes), *_round_ticks(x, rounds)]
    for i, span in enumerate(spans):
        first, last = rounds[span][0], rounds[span][-1]
        left, bars = x((first + last) / 2) - width / 2, []
        for way in (0, 1):
            base = 0.0
            for style, site in enumerate(means.values()):
                top = base + site[i][way] * (1 if way else -1)
                bars.append(_bar(left, width, y(base), y(top), style))
                base = top
        named = f"round {first}" if first == last else f"rounds {first}\N{EN DASH}{last}, in each"
        hint = f"{named}: {byte_count(up[i])} from sites, {byte_count(down[i])} to sites"
        marks.append(tag("g", None, tag("title", None, hint), *bars))
    zero = y(0)
    marks.append(tag("line", {"class": "axis", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": zero, "y2": zero}))
    marks.append(_text("from the sites", WIDTH - RIGHT, TOP + 4, "note end"))
    marks.append(_text("to the sites", WIDTH - RIGHT, HEIGHT - BOTTOM - 4, "note end"))
    whole_down, whole_up = (sum(one[way] for site in sites.values() for one in site) for way in (0, 1))
    text = (
        f"{title}: {byte_count(whole_up)} from sites and {byte_count(whole_down)} to sites over {len(rounds)} rounds."
    )
    return _panel(title if size == 1 else f"{title}: each bar the mean of {size}", marks, text, HEIGHT)


def _mean_traffic(rounds: Sequence[tuple[int, int]]) -> tuple[float, float]:
    return sum(down for down, _ in rounds) / len(rounds), sum(up for _, up in rounds) / len(rounds)


def rounds_in_one(rounds: int, most: int) -> int:
    """How many rounds share a bar or a cell, so that there are `most` at most."""
    return max(1, math.ceil(rounds / most))


def scatter_panel(title: str, points: NDArray[np.float64], labels: NDArray[np.str_], styles: Mapping[str, int]) -> Html:
    """points (N, 2) in the plane, equal scales on both axes; colour and marker by label. At most 1,500 are drawn."""
    height = 240
    finite = np.isfinite(points).all(axis=1)
    points, labels = points[finite], labels[finite]
    every = max(1, math.ceil(len(points) / _MOST_DOTS))
    points, labels = points[::every], labels[::every]
    if len(points) == 0:
        return _panel(title, [_text("no points", WIDTH / 2, height / 2, "note middle")], f"{title}: no points.", height)
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    reach = np.abs(points - centre).max(axis=0)
    scale = min((WIDTH / 2 - 10) / max(reach[0], 1e-9), (height / 2 - 10) / max(reach[1], 1e-9))
    placed = (points - centre) * [scale, -scale] + [WIDTH / 2, height / 2]
    frame = tag("rect", {"class": "frame", "x": 0.5, "y": 0.5, "width": WIDTH - 1, "height": height - 1, "rx": 6})
    dots = [_marker(styles[str(label)], x, y, "dot") for (x, y), label in zip(placed, labels, strict=True)]
    counts = ", ".join(f"{int((labels == label).sum())} {label}" for label in styles)
    return _panel(
        title, [frame, *dots], f"{title}: projection of {len(points)} held-out scans to the plane ({counts}).", height
    )


@dataclass(frozen=True)
class Estimate:
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Compared:
    """A row of an interval panel: before and after, and a floor that either should clear."""

    name: str
    before: Estimate | None
    after: Estimate | None
    floor: float | None = None


def interval_panel(title: str, rows: Sequence[Compared], *, chance: float) -> Html:
    """Per row an estimate before (hollow) and after (filled), each with its interval, against the level of chance."""
    height = TOP + _ROW * len(rows) + BOTTOM
    x = Axis(*_reach_of(rows, chance), 8, WIDTH - 8)
    marks: list[Html] = []
    for value in ticks(x.low, x.high, 5):
        marks.append(_upright("gridline", x(value), TOP, height - BOTTOM))
        marks.append(_text(f"{value:.1f}", x(value), height - 8, "tick middle"))
    marks.append(_upright("reference", x(chance), TOP, height - BOTTOM))
    marks.append(_text("chance", x(chance) + 4, TOP - 4, "note"))
    for index, row in enumerate(rows):
        top = TOP + _ROW * index
        marks.append(_text(_shortened(row.name), 8, top + 14, "name"))
        for offset, kind, one in ((25, "before", row.before), (38, "after", row.after)):
            if one:
                marks.append(_estimate(x, top + offset, kind, one))
        if row.floor is not None:
            marks.append(_cross(x(row.floor), top + 31.5, f"bare pixels {row.floor:.3f}"))
    return _panel(title, marks, f"{title}: {'; '.join(_compared_in_words(row) for row in rows)}.", height)


def _reach_of(rows: Sequence[Compared], chance: float) -> tuple[float, float]:
    values = [chance, 0.8, *(row.floor for row in rows if row.floor is not None)]
    for one in (estimate for row in rows for estimate in (row.before, row.after) if estimate):
        values += [one.value, *(one.interval or ())]
    return min(values) - 0.03, max(values) + 0.03


def rounds_of_cell(rounds: int) -> int:
    """How many rounds a cell of `attendance` stands for."""
    return rounds_in_one(rounds, _MOST_CELLS)


def attendance(statuses: Sequence[str]) -> Html:
    """A strip with one cell for each round, or, of many, for several: at least a quarter of them were as it shows, or
    worse, so that no steady trouble hides. A status other than ok has a shape of its own."""
    width, height = 132, 14
    size = rounds_of_cell(len(statuses))
    kinds = [status if status in _CELL else "absent" for status in statuses]
    shown = [_of_worst_quarter(kinds[i : i + size]) for i in range(0, len(kinds), size)]
    step = min(12.0, width / max(1, len(shown)))
    cells: list[Html] = []
    for i, kind in enumerate(shown):
        y, tall = _CELL[kind]
        place: dict[str, float] = {"x": i * step + 0.5, "y": y, "width": max(step - 2, 0.7 * step), "height": tall}
        cells.append(tag("rect", {**place, "class": f"cell {kind}"}))
    return tag("svg", {"class": "strip", "viewBox": f"0 0 {width} {height}", "aria-hidden": "true"}, *cells)


def _of_worst_quarter(kinds: Sequence[str]) -> str:
    """The mildest of the worst quarter of them."""
    return sorted(kinds, key=WORST_FIRST.index)[math.ceil(len(kinds) / 4) - 1]


# Vertical place and height of a cell: ok stands tall, late half as tall, refused lies low, error hangs from the top,
# absent is a dash.
_CELL = {"error": (1, 5), "refused": (8, 5), "absent": (6.25, 1.5), "late": (4, 6), "ok": (1, 12)}
WORST_FIRST = tuple(_CELL)


def swatch(style: int) -> Html:
    """The line and marker of a series, for a legend."""
    line = tag("line", {"class": "line", "x1": 1, "x2": 23, "y1": 6, "y2": 6})
    picture = tag("g", {"class": f"s{style % STYLES}"}, line, _shape(style, 12, 6, 3))
    return tag("svg", {"class": "swatch", "viewBox": "0 0 24 12", "aria-hidden": "true"}, picture)


def dot_swatch(style: int) -> Html:
    return tag(
        "svg", {"class": "swatch dot", "viewBox": "0 0 12 12", "aria-hidden": "true"}, _marker(style, 6, 6, "dot", 4)
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten, about `count` of them."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(title: str, marks: Sequence[Html], description: str, height: float) -> Html:
    picture = tag("svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-label": description}, *marks)
    return tag("figure", {"class": "panel"}, tag("figcaption", None, title), picture)


def _round_axis(rounds: Sequence[float]) -> Axis:
    low, high = (min(rounds), max(rounds)) if rounds else (0, 1)
    return (
        Axis(low - 0.5, high + 0.5, LEFT + 4, WIDTH - RIGHT)
        if high == low
        else Axis(low, high, LEFT + 14, WIDTH - RIGHT - 10)
    )


def _round_ticks(x: Axis, rounds: Sequence[float]) -> list[Html]:
    if not rounds:
        return []
    first, last = int(rounds[0]), int(rounds[-1])
    step = max(1, math.ceil((last - first) / 6))
    step = next(nice for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, step) if nice >= step)
    shown = [first, *range(first - first % step + step, last + 1, step)]
    # The first round is always named; a round tick that would touch it is not.
    shown = [n for n in shown if n == first or x(n) - x(first) > 20]
    return [_text(f"{n}" if n != first else f"round {n}", x(n), HEIGHT - 6, "tick middle") for n in shown]


def _gridlines(y: Axis, name: Callable[[float], str] | None = None) -> list[Html]:
    marks = []
    values = ticks(y.low, y.high, 4)
    digits = _digits(values)
    for value in values:
        marks.append(
            tag("line", {"class": "gridline", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": y(value), "y2": y(value)})
        )
        marks.append(_text(name(value) if name else f"{value:.{digits}f}", LEFT - 6, y(value) + 3.5, "tick end"))
    return marks


def _round_bytes(value: float) -> str:
    """A tick of the traffic axis, which counts upwards both ways: 0, 2.5 MB, 10 MB."""
    number, unit = byte_count(abs(value)).split()
    return f"{float(number):g} {unit}" if value else "0"


def _digits(values: Sequence[float]) -> int:
    """Fewest decimals that tell neighbouring ticks apart."""
    steps = [b - a for a, b in itertools.pairwise(values)] or [1.0]
    return next((d for d in range(7) if abs(round(steps[0], d) - steps[0]) < 1e-9), 6)


def _reference(y: Axis, reference: Reference) -> list[Html]:
    at = y(reference.value)
    return [
        tag("line", {"class": "reference", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": at, "y2": at}),
        _text(f"{reference.name} = {significant(reference.value)}", WIDTH - RIGHT, at - 5, "note end"),
    ]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Of too many points to be seen apart, `_MOST_POINTS` at most: the first, the last, and of each stretch between the
    least and the greatest value, so that the line reaches as far up and down as before. A gap that is shorter than a
    stretch, two units of the line's width, closes."""
    if len(points) <= _MOST_POINTS:
        return points
    inner, stretches = points[1:-1], _MOST_POINTS // 2 - 1
    edges = [i * len(inner) // stretches for i in range(stretches + 1)]
    kept = [points[0]]
    for start, end in itertools.pairwise(edges):
        values = [(y, x) for x, y in inner[start:end] if _is_drawn(y)]
        kept += sorted({(x, y) for y, x in (min(values), max(values))}) if values else [(inner[start][0], None)]
    return [*kept, points[-1]]


def _is_drawn(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _line(series: Series, points: Sequence[Point], x: Axis, y: Axis, with_hints: bool) -> Html:
    """A line through `points`, broken where a value is missing. Few have a marker each; of more the value shows on
    hovering, where the panel is to have hints."""
    runs: list[list[tuple[float, float]]] = [[]]
    for px, py in points:
        if _is_drawn(py):
            runs[-1].append((px, py))
        else:
            runs.append([])
    paths = [
        tag("polyline", {"class": "line", "points": " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in run)})
        for run in runs
        if len(run) > 1
    ]
    visible = len(points) <= _DENSE
    markers = [
        tag(
            "g",
            None if visible else {"class": "hover"},
            tag("title", None, f"{series.name}, round {px:g}: {significant(py)}"),
            _shape(series.style, x(px), y(py), 2.6 if visible else 4),
        )
        for run in (runs if visible or with_hints else [])
        for px, py in run
    ]
    return tag("g", {"class": f"s{series.style % STYLES}"}, *paths, *markers)


def _bar(left: float, width: float, base: float, top: float, style: int) -> Html:
    # A hair of background between segments, unless that would swallow the segment.
    height = abs(top - base)
    gap = 0.8 if height > 2.4 else 0.0
    place = {"x": left, "y": min(base, top) + gap / 2, "width": width, "height": height - gap}
    return tag("rect", {"class": f"bar s{style % STYLES}", **place})


def _estimate(x: Axis, y: float, kind: str, one: Estimate) -> Html:
    marks = []
    hint = f"{kind} {one.value:.3f}"
    if one.interval:
        low, high = one.interval
        marks.append(tag("line", {"class": "whisker", "x1": x(low), "x2": x(high), "y1": y, "y2": y}))
        hint += f" [{low:.3f}, {high:.3f}]"
    marks.append(tag("circle", {"cx": x(one.value), "cy": y, "r": 4}))
    return tag("g", {"class": f"estimate {kind}"}, tag("title", None, hint), *marks)


def _upright(kind: str, x: float, top: float, bottom: float) -> Html:
    return tag("line", {"class": kind, "x1": x, "x2": x, "y1": top, "y2": bottom})


def _cross(x: float, y: float, hint: str) -> Html:
    strokes = f"M{x - 3:.1f},{y - 3:.1f}l6,6m0,-6l-6,6"
    return tag("path", {"class": "cross", "d": strokes}, tag("title", None, hint))


def _marker(style: int, x: float, y: float, kind: str, radius: float = 2.8) -> Html:
    return tag("g", {"class": f"{kind} s{style % STYLES}"}, _shape(style, x, y, radius))


def _shape(style: int, x: float, y: float, r: float) -> Html:
    """Eight markers that stay apart in black and white: disc, square, triangle, diamond, and their hollow forms."""
    hollow: dict[str, str | float] = {"class": "hollow"} if style % STYLES >= 4 else {}
    if style % 4 == 0:
        return tag("circle", {**hollow, "cx": x, "cy": y, "r": r})
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    }[style % 4]
    return tag("polygon", {**hollow, "points": " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)})


def _text(words: str, x: float, y: float, kind: str) -> Html:
    return tag("text", {"class": kind, "x": x, "y": y}, words)


def _shortened(words: str, letters: int = 46) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "…"


def _described(series: Series) -> str:
    values = series.values()
    if not values:
        return f"{series.name}: no values"
    return f"{series.name}: {significant(values[0])}" + (f" to {significant(values[-1])}" if len(values) > 1 else "")


def _compared_in_words(row: Compared) -> str:
    pairs = (("before", row.before), ("after", row.after))
    said = [f"{kind} {one.value:.3f}" for kind, one in pairs if one]
    return f"{row.name} {', '.join(said)}"
