"""What the model sees and what it knows: example views, held-out embeddings, and the linear probe."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence

from server import charts
from server.artefacts import Artefacts, ProbeRecord
from server.charts import Compared, Estimate, Reference, Series
from server.markup import Html, joined, tag
from server.report_pieces import card_table, caution, grid, in_words, legend, note, section, whole
from server.wording import listed
from unimiss_core.figures import STEPS_THAT_TEACH
from unimiss_core.label_counts import counts_in_words

"""Optimiser steps of a site below which the published recipe has not left the uniform answer in our pilots."""

_COLUMNS = ("Task", "Input", "Scans", "Positive", "Bare pixels", "Before", "After", "Change")

Pair = tuple[ProbeRecord | None, ProbeRecord | None]
"""A task's probe before the first round and after the last."""


def views(run: Artefacts) -> Html:
    if not run.views:
        return section("Views", note("No example views were kept."))
    sheets = [_sheet(site, picture) for site, picture in run.views.items()]
    said = "Random views as student and teacher see them: a column for each scan, its views below each other."
    return section("Views", note(said), grid(sheets, "grid wide"))


def projection(run: Artefacts) -> Html:
    if not run.projections:
        return joined()
    parts = []
    for task, one in run.projections.items():
        counts = Counter(one.labels.tolist())
        styles = {label: i for i, label in enumerate(sorted(counts))}
        panels = [
            charts.scatter_panel("Before", one.before, one.labels, styles),
            charts.scatter_panel("After", one.after, one.labels, styles),
        ]
        entries = [(charts.dot_swatch(i), f"{label} ({counts[label]:,})") for label, i in styles.items()]
        parts += [tag("h3", None, in_words(task)), legend(entries), grid(panels)]
    said = (
        "Embeddings of scans that no site trained on, before the first round and after the last, each drawn along"
        " its own two directions of largest variance. What lies close together looks alike to the model."
    )
    return section("Held-out scans", note(said), *parts)


def probe(run: Artefacts) -> Html:
    records = {task: (run.before.get(task), run.after.get(task)) for task in [*run.before, *run.after]}
    if not records:
        said = "No probe was made, so nothing here tells whether the features became more useful."
        return section("Probe", note(said), *_too_short(run))
    said = (
        "A linear classifier on the frozen features, judged on patients that it was not fitted to, beside the same"
        " classifier on the scans' own pixels, shrunk to a few. Intervals are 95%, over patients."
    )
    if run.study and run.study.finetune:
        said = (
            "The model's own answers on scans that no site trained on, beside a linear classifier on the scans' pixels,"
            " shrunk to a few, which was fitted to other patients of the same set. Intervals are 95%, over patients."
        )
    kinds = {"before the first round": run.before, "after the last round": run.after}
    if missing := [kind for kind, found in kinds.items() if not found]:
        said += f" The probe {listed(missing)} was not made."
    rows = [_row(task, pair) for task, pair in records.items()]
    picture = [*_intervals(records), *_over_rounds(run)]
    return section("Probe", note(said), *_too_short(run), *picture, card_table(_COLUMNS, rows), *_classes(records))


def _classes(records: dict[str, Pair]) -> list[Html]:
    known = {task: one.classes for task, (before, after) in records.items() if (one := after or before) and one.classes}
    told = "; ".join(f"{in_words(task)}: {counts_in_words(counts)}" for task, counts in known.items())
    return [tag("p", {"class": "fine"}, f"Scans of each class. {told}.")] if known else []


def _sheet(site: str, picture: bytes) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = tag("img", {"src": source, "alt": f"Contact sheet of augmented views that {site} trains on"})
    return tag("figure", None, tag("figcaption", None, site), image)


def _too_short(run: Artefacts) -> list[Html]:
    """The sentence that keeps a reader from reading learning into a run that was too short for it."""
    steps = [total for name in run.sites if (total := sum(one.steps for one in run.records(name)))]
    if run.study and run.study.finetune:  # from labels far fewer are enough
        return []
    if not steps or (mean := sum(steps) / len(steps)) >= STEPS_THAT_TEACH:
        return []
    return [
        caution(
            f"This run is too short to show learning: each site made {mean:,.0f} steps on average, and some"
            f" {STEPS_THAT_TEACH} steps a site are needed before differences mean anything."
            " Read no gain or loss into these figures."
        )
    ]


def _intervals(records: dict[str, Pair]) -> Sequence[Html]:
    drawn = [
        _compared(task, pair) for task, pair in records.items() if any(one and one.auc is not None for one in pair)
    ]
    if not drawn:
        return []
    said = "Hollow: before the first round. Filled: after the last. Bars: 95% intervals. Crosses: bare pixels."
    return [
        grid([charts.interval_panel("Area under the ROC curve", drawn, chance=0.5)]),
        tag("p", {"class": "fine"}, said),
    ]


def _over_rounds(run: Artefacts) -> list[Html]:
    """The AUC after each round that was probed, where more than the last one was; at 0 that of the first teacher."""
    points: dict[str, list[charts.Point]] = {}
    for one in run.rounds:
        for task, told in one.whole.probe.items():
            auc = told.get("auc") if isinstance(told, Mapping) else None
            if isinstance(auc, float):
                points.setdefault(task, []).append((one.round, auc))
    begun = {task: [(0.0, one.auc)] for task, one in run.before.items() if one.auc is not None}
    series = [
        Series(in_words(task), [*begun.get(task, []), *found], style)
        for style, (task, found) in enumerate(points.items())
        if len(found) > 1
    ]
    if not series:
        return []
    chance = Reference("coin toss", 0.5)
    bounds = charts.bounds_of(series, include=[chance.value])
    panel = charts.line_panel("AUC of the probe", series, reference=chance, bounds=bounds)
    return [legend([(charts.swatch(one.style), one.name) for one in series]), grid([panel])]


def _compared(task: str, pair: Pair) -> Compared:
    floor = next((one.pixel_floor for one in pair if one and one.pixel_floor is not None), None)
    return Compared(in_words(task), _estimate(pair[0]), _estimate(pair[1]), floor)


def _row(task: str, pair: Pair) -> list[str]:
    before, after = pair
    known = after or before or ProbeRecord()
    return [
        in_words(task),
        f"{known.rank}D" if known.rank else "",
        f"{known.n:,}",
        f"{known.positives:,}" if known.positives is not None else "",
        f"{known.pixel_floor:.3f}" if known.pixel_floor is not None else "",
        _figure(before),
        _figure(after),
        _with_interval(after.gain, after.gain_interval, "+.3f") if after and after.gain is not None else "",
    ]


def _figure(record: ProbeRecord | None) -> str:
    if record is None:
        return "not made"
    if record.auc is None:
        return record.reason or "no figure"
    return _with_interval(record.auc, record.interval, ".3f")


def _with_interval(value: float, interval: tuple[float, float] | None, form: str) -> Html:
    said = _signed(f"{value:{form}}")
    if interval is None:
        return whole(said)
    return whole(said, tag("span", {"class": "soft"}, _signed(f" [{interval[0]:{form}}, {interval[1]:{form}}]")))


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _estimate(record: ProbeRecord | None) -> Estimate | None:
    return Estimate(record.auc, record.interval) if record and record.auc is not None else None
