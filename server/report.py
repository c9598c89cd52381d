"""OUT/report.html: what a run was, what it did and how far it may be believed, in one file that opens anywhere.

It is made from the artefacts in OUT alone, so that it can be made again at any time, also of a run that was stopped.
Nothing in it comes from a network, and no script runs in it.
"""

import base64
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from server import charts
from server.artefacts import Artefacts, ProbeRecord, RoundRecord, SiteRecord, read_artefacts
from server.charts import Series
from server.markup import Html, joined, tag
from server.report_style import STYLE
from server.wording import byte_count, counted, duration, listed
from unimiss_core import durable
from unimiss_core.config import dump_yaml

STEPS_THAT_TEACH = 800
"""Optimiser steps of a site below which the published recipe has not left the uniform answer in our pilots."""

_ABSENT = SiteRecord(status="absent")
_GROUPS = {"shared": "shared", "2d": "2D only", "3d": "3D only", "head": "head"}
_SCANS = {"2d": "image", "3d": "volume"}
_COLUMNS = ("Site", "Trains on", "Scans", "Rounds", "Steps", "To the site", "From the site", "Time")
_NUMBERS = {"Steps", "To the site", "From the site", "Time"}


def write_report(out: Path) -> Path:
    """Write `out`/report.html from the artefacts in `out` and return its path.

    Whatever is missing or damaged is said in the report. Raises OSError where `out` cannot be written.
    """
    path = out / "report.html"
    durable.write_bytes(path, _page(read_artefacts(out)).encode("utf-8", "xmlcharrefreplace"))
    return path


def _page(run: Artefacts) -> str:
    title = run.study.name if run.study else "Run of an unknown study"
    head = tag(
        "head",
        None,
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", None, f"{title} · Federated UniMiSS"),
        tag("style", None, Html(STYLE)),
    )
    sections = (_sites(run), _losses(run), _rounds(run), _diagnostics(run), _views(run), _projection(run), _probe(run))
    verdict = tag("p", {"class": "verdict"}, _verdict(run))
    header = tag(
        "header",
        None,
        tag("p", {"class": "kind"}, "Federated UniMiSS, report of a run"),
        tag("h1", None, title),
        verdict,
    )
    body = tag("body", None, tag("main", None, header, *sections, _study(run)))
    return f"<!doctype html>\n{tag('html', {'lang': 'en'}, head, body)}\n"


# ---- What happened, in words


def _verdict(run: Artefacts) -> Html:
    rounds = run.rounds
    planned = run.study.schedule.rounds if run.study else None
    if not rounds:
        asked = f" of the {planned} rounds that the study asks for" if planned else ""
        return joined(tag("b", None, "No round was finished"), f"{asked}, so there is nothing to show yet.")
    done = f"{len(rounds)} of {planned} rounds" if planned else counted(len(rounds), "round")
    start = "Finished" if planned is None or len(rounds) >= planned else "Stopped after"
    sites = _names(rounds)
    down, up = (sum(way) for way in zip(*(_traffic(rounds, name) for name in sites), strict=True)) if sites else (0, 0)
    return joined(
        tag("b", None, f"{start} {done}"),
        f" with {counted(len(sites), 'site')} in ",
        _whole(duration(sum(one.seconds for one in rounds))),
        ". ",
        _whole(byte_count(down)),
        " went to the sites and ",
        _whole(byte_count(up)),
        f" came back. {_faithfulness(rounds, sites)}",
    )


def _faithfulness(rounds: Sequence[RoundRecord], sites: Sequence[str]) -> str:
    missed = {name: missed for name in sites if (missed := _missed(rounds, name))}
    if not missed:
        return "Every site counted in every round."
    gone = [name for name in missed if rounds[-1].round in missed[name]]
    back = [name for name in missed if name not in gone]
    said = [f"{name} dropped out {_since(rounds, missed[name])}" for name in gone]
    said += [f"{name} did not count in {counted(len(missed[name]), 'round')}" for name in back]
    return f"{listed(said)}; the table says why."


def _since(rounds: Sequence[RoundRecord], missed: Sequence[int]) -> str:
    last = max((one.round for one in rounds if one.round not in missed), default=None)
    return f"after round {last}" if last is not None else "before its first round counted"


def _missed(rounds: Sequence[RoundRecord], name: str) -> list[int]:
    return [one.round for one in rounds if _record(one, name).status != "ok"]


# ---- Sites


def _sites(run: Artefacts) -> Html:
    names = _names(run.rounds)
    if not names:
        return _section("Sites", _note("No round has been recorded, so nothing is known about the sites."), *_gaps(run))
    header = [
        tag("th", {"scope": "col", "class": "number" if name in _NUMBERS else "words"}, name) for name in _COLUMNS
    ]
    rows = [_site_row(run.rounds, name) for name in names]
    table = tag(
        "table",
        {"class": "cards"},
        tag("thead", None, tag("tr", None, *header)),
        tag("tbody", None, *rows),
        tag("tfoot", None, _total_row(run.rounds, names)),
    )
    return _section("Sites", table, *_gaps(run))


def _site_row(rounds: Sequence[RoundRecord], name: str) -> Html:
    records = [_record(one, name) for one in rounds]
    scans = {rank: max((one.scans.get(rank, 0) for one in records), default=0) for rank in _SCANS}
    held = {rank: count for rank, count in scans.items() if count}
    down, up = _traffic(rounds, name)
    steps, seconds = sum(one.steps for one in records), sum(one.seconds for one in records)
    held_scans = [counted(count, _SCANS[rank]) for rank, count in held.items()]
    cells = (
        _whole(" + ".join(rank.upper() for rank in held) or "unknown"),
        tag("div", None, *_lines(held_scans or ["unknown"])),
        _attendance(rounds, name),
        _number(steps, f"{steps:,}"),
        _number(down, byte_count(down)),
        _number(up, byte_count(up)),
        _number(seconds, duration(seconds)),
    )
    labelled = [tag("td", _cell(label), cell) for label, cell in zip(_COLUMNS[1:], cells, strict=True)]
    return tag("tr", None, tag("th", {"scope": "row"}, name), *labelled)


def _cell(label: str) -> dict[str, str]:
    """Attributes of a cell: a narrow screen shows the label beside it in place of the header."""
    return {"data-label": label, "class": "number" if label in _NUMBERS else "words"}


def _total_row(rounds: Sequence[RoundRecord], names: Sequence[str]) -> Html:
    down, up = (sum(way) for way in zip(*(_traffic(rounds, name) for name in names), strict=True))
    seconds = sum(one.seconds for one in rounds)
    cells = (_number(down, byte_count(down)), _number(up, byte_count(up)), _number(seconds, duration(seconds)))
    labelled = [tag("td", _cell(label), cell) for label, cell in zip(_COLUMNS[-3:], cells, strict=True)]
    return tag("tr", None, tag("th", {"scope": "row", "colspan": 5}, "Whole run"), *labelled)


def _attendance(rounds: Sequence[RoundRecord], name: str) -> Html:
    """3 ok, 1 refused; a strip with a cell for each round; and why a round did not count."""
    records = {one.round: _record(one, name) for one in rounds}
    counts = Counter(record.status for record in records.values())
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: item[0] != "ok"))
    reasons: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, record in records.items():
        if record.status != "ok":
            reasons[record.status, record.reason or "no reason given"].append(number)
    lines = [f"{status}: {reason}, {_spans(numbers)}" for (status, reason), numbers in reasons.items()]
    strip = charts.attendance([one.status for one in records.values()])
    return tag("div", None, said, strip, tag("div", {"class": "fine"}, *_lines(lines)))


def _spans(numbers: Sequence[int]) -> str:
    """round 3; rounds 3, 5-7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}\N{EN DASH}{run[-1]}" for run in runs)
    return f"round\N{NO-BREAK SPACE}{text}" if len(numbers) == 1 else f"rounds\N{NO-BREAK SPACE}{text}"


# ---- Curves


def _losses(run: Artefacts) -> Html:
    curves = _curves(
        run.rounds, {name: [_record(one, name).losses for one in run.rounds] for name in _names(run.rounds)}
    )
    if not curves:
        return _section(
            "Loss", _note("No loss was recorded: either no round was finished, or the sites keep it to themselves.")
        )
    level = _uniform_level(run)
    bounds = charts.bounds_of(
        [one for group in curves.values() for one in group], include=[level.value] if level else []
    )
    panels = [charts.line_panel(_words(term), group, reference=level, bounds=bounds) for term, group in curves.items()]
    said = "Each term of the objective at each site, as the mean over the steps of a round."
    if run.study and level:
        said += (
            f" The dashed line is log K for K = {run.study.model.prototypes:,} prototypes: what a model scores"
            " that tells nothing apart. Learning shows as falling below it."
        )
    return _section("Loss", _note(said), _site_legend(run), _grid(panels))


def _uniform_level(run: Artefacts) -> charts.Reference | None:
    """The cross-entropy, and the entropy, of a model that gives each of K prototypes the same probability."""
    return charts.Reference("log K", math.log(run.study.model.prototypes)) if run.study else None


def _rounds(run: Artefacts) -> Html:
    names, rounds = _names(run.rounds), run.rounds
    if not rounds:
        return joined()
    numbers = [one.round for one in rounds]
    traffic = {name: [(record.bytes_down, record.bytes_up) for record in _records(rounds, name)] for name in names}
    pace = [
        Series(
            name,
            [(one.round, record.seconds if (record := _record(one, name)).status == "ok" else None) for one in rounds],
            i,
        )
        for i, name in enumerate(names)
    ]
    panels = [
        charts.traffic_panel("Bytes in a round", numbers, traffic),
        charts.line_panel("Seconds in a round", pace, reference=None, bounds=charts.bounds_of(pace, include=[0.0])),
    ]
    moved = _curves(rounds, {"": [one.whole.update_norm for one in rounds]})
    legends = [_site_legend(run)]
    if moved:
        order = sorted(moved, key=lambda group: [*_GROUPS, group].index(group))
        # Hollow markers, and colours that no small federation's sites have.
        norms = [Series(_GROUPS.get(group, group), moved[group][0].points, 4 + i) for i, group in enumerate(order)]
        panels.append(
            charts.line_panel(
                "Norm of the global update",
                norms,
                reference=None,
                bounds=charts.bounds_of(norms, include=[0.0]),
            )
        )
        legends.append(_legend([(charts.swatch(one.style), one.name) for one in norms], of="Parameters"))
    said = (
        "What each round cost, and how far it moved the global student: the L2 norm of the change, by parameter group."
    )
    return _section("Rounds", _note(said), *legends, _grid(panels))


def _diagnostics(run: Artefacts) -> Html:
    curves = _curves(
        run.rounds, {name: [_record(one, name).diagnostics for one in run.rounds] for name in _names(run.rounds)}
    )
    if not curves:
        return joined()
    level = _uniform_level(run)
    panels = [
        charts.line_panel(
            _words(name),
            group,
            reference=(known := level if "entropy" in name else None),
            bounds=charts.bounds_of(group, include=[known.value] if known else []),
        )
        for name, group in curves.items()
    ]
    said = (
        "Self-distillation can fall into giving every image the same answer. Signs of it: an entropy of the teacher's"
        " targets that stays at log K (it tells nothing apart), an entropy of their mean over the batch near zero"
        " (one prototype takes all), or features that stop varying."
    )
    return _section("Collapse", _note(said), _site_legend(run), _grid(panels))


def _curves(
    rounds: Sequence[RoundRecord], figures: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, list[Series]]:
    """Name of a figure -> a line for each site that ever had it, in the sites' order and colours."""
    found = dict.fromkeys(key for per_round in figures.values() for values in per_round for key in values)
    return {
        key: [
            Series(site, [(one.round, values.get(key)) for one, values in zip(rounds, per_round, strict=True)], style)
            for style, (site, per_round) in enumerate(figures.items())
            if any(key in values for values in per_round)
        ]
        for key in found
    }


# ---- What the model sees and knows


def _views(run: Artefacts) -> Html:
    if not run.views:
        return _section("Views", _note("No example views were kept."))
    figures = [
        tag(
            "figure",
            None,
            tag("figcaption", None, site),
            tag("img", {"src": _inline(picture), "alt": f"Contact sheet of augmented views that {site} trains on"}),
        )
        for site, picture in run.views.items()
    ]
    return _section(
        "Views",
        _note("Random views of scans as the student and the teacher see them, a few of each site."),
        _grid(figures, "grid wide"),
    )


def _projection(run: Artefacts) -> Html:
    if not run.projections:
        return joined()
    parts = []
    for task, projection in run.projections.items():
        styles = {str(label): i for i, label in enumerate(sorted(set(projection.labels.tolist())))}
        panels = [
            charts.scatter_panel("Before", projection.before, projection.labels, styles),
            charts.scatter_panel("After", projection.after, projection.labels, styles),
        ]
        counts = Counter(projection.labels.tolist())
        legend = _legend([(charts.dot_swatch(i), f"{label} ({counts[label]:,})") for label, i in styles.items()])
        parts += [tag("h3", None, _words(task)), legend, _grid(panels)]
    said = (
        "Embeddings of scans that no site trained on, drawn in the plane before the first round and after the last."
        " What lies close together looks alike to the model; the axes have no meaning of their own."
    )
    return _section("Held-out scans", _note(said), *parts)


def _probe(run: Artefacts) -> Html:
    tasks = list(dict.fromkeys([*run.before, *run.after]))
    if not tasks:
        return _section(
            "Probe", _note("No probe was made: no site of this run has labelled scans set aside."), *_caution(run)
        )
    records = {task: (run.before.get(task), run.after.get(task)) for task in tasks}
    drawn = {task: (_estimate(a), _estimate(b)) for task, (a, b) in records.items() if _estimate(a) or _estimate(b)}
    parts = (
        [charts.interval_panel("Area under the ROC curve", {_words(k): v for k, v in drawn.items()}, chance=0.5)]
        if drawn
        else []
    )
    legend = tag("p", {"class": "fine"}, "Hollow: before the first round. Filled: after the last. Bars: interval.")
    missing = [
        kind
        for kind, found in (("before the first round", run.before), ("after the last round", run.after))
        if not found
    ]
    said = "A linear classifier on the frozen features, judged on patients that it was not fitted to."
    if missing:
        said += f" The probe {listed(missing)} was not made."
    return _section(
        "Probe", _note(said), *_caution(run), *([_grid(parts), legend] if parts else []), _probe_table(records)
    )


def _probe_table(records: Mapping[str, tuple[ProbeRecord | None, ProbeRecord | None]]) -> Html:
    head = ("Task", "Input", "Scans", "Positive", "Before", "After", "Change")
    header = [tag("th", {"scope": "col"}, name) for name in head]
    rows = []
    for task, (before, after) in records.items():
        known = after or before or ProbeRecord()
        cells = (
            f"{known.rank}D" if known.rank else "",
            f"{known.n:,}",
            f"{known.positives:,}" if known.positives is not None else "",
            _figure(before),
            _figure(after),
            _with_interval(after.gain, after.gain_interval, "+.3f") if after and after.gain is not None else "",
        )
        labelled = [tag("td", {"data-label": label}, cell) for label, cell in zip(head[1:], cells, strict=True)]
        rows.append(tag("tr", None, tag("th", {"scope": "row"}, _words(task)), *labelled))
    return tag("table", {"class": "cards"}, tag("thead", None, tag("tr", None, *header)), tag("tbody", None, *rows))


def _caution(run: Artefacts) -> Iterator[Html]:
    """The sentence that keeps a reader from reading learning into a run that was too short for it."""
    steps = [total for name in _names(run.rounds) if (total := sum(one.steps for one in _records(run.rounds, name)))]
    if steps and (mean := sum(steps) / len(steps)) < STEPS_THAT_TEACH:
        yield tag(
            "p",
            {"class": "caution"},
            f"This run is too short to show learning: each site made {mean:,.0f} steps on average, and some"
            f" {STEPS_THAT_TEACH} steps a site are needed before differences mean anything."
            " Read no gain or loss into these figures.",
        )


def _figure(record: ProbeRecord | None) -> Html | str:
    if record is None:
        return "not made"
    return (
        _with_interval(record.auc, record.interval, ".3f") if record.auc is not None else (record.reason or "no figure")
    )


def _with_interval(value: float, interval: tuple[float, float] | None, form: str) -> Html:
    said = _signed(f"{value:{form}}")
    if interval is None:
        return _whole(said)
    return _whole(said, tag("span", {"class": "soft"}, _signed(f" [{interval[0]:{form}}, {interval[1]:{form}}]")))


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _estimate(record: ProbeRecord | None) -> charts.Estimate | None:
    return charts.Estimate(record.auc, record.interval) if record and record.auc is not None else None


# ---- The study


def _study(run: Artefacts) -> Html:
    if run.study is None:
        return _section("Study", _note("The study of this run is not known: study.yaml is missing or damaged."))
    text = tag(
        "details", None, tag("summary", None, "Every setting, as resolved"), tag("pre", None, dump_yaml(run.study))
    )
    digest = tag("p", None, "sha256 ", tag("code", None, run.study.digest()))
    return _section(
        "Study", _note("What all sites agreed on. Two runs with this digest ran the same study."), digest, text
    )


# ---- Pieces


def _section(title: str, *parts: str) -> Html:
    return tag("section", None, tag("h2", None, title), *parts)


def _note(words: str) -> Html:
    return tag("p", None, words)


def _grid(panels: Sequence[str], kind: str = "grid") -> Html:
    return tag("div", {"class": kind}, *panels)


def _legend(entries: Sequence[tuple[Html, str]], *, of: str = "") -> Html:
    title = [tag("li", {"class": "soft"}, of)] if of else []
    return tag("ul", {"class": "legend"}, *title, *(tag("li", None, picture, name) for picture, name in entries))


def _whole(*words: str) -> Html:
    """A quantity, kept on one line with its unit."""
    return tag("span", {"class": "whole"}, *words)


def _lines(words: Sequence[str]) -> list[Html]:
    return [tag("div", None, one) for one in words]


def _site_legend(run: Artefacts) -> Html:
    return _legend([(charts.swatch(i), name) for i, name in enumerate(_names(run.rounds))], of="Sites")


def _gaps(run: Artefacts) -> Iterator[Html]:
    if run.gaps:
        yield tag("p", {"class": "caution"}, f"This report is not complete. {' '.join(run.gaps)}")


def _number(value: float, words: str) -> Html:
    """What a person reads, with the exact number beside it for a program."""
    return tag("data", {"value": repr(value)}, words)


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _names(rounds: Sequence[RoundRecord]) -> list[str]:
    return sorted({name for one in rounds for name in one.sites})


def _record(one: RoundRecord, name: str) -> SiteRecord:
    return one.sites.get(name, _ABSENT)


def _records(rounds: Sequence[RoundRecord], name: str) -> list[SiteRecord]:
    return [_record(one, name) for one in rounds]


def _traffic(rounds: Sequence[RoundRecord], name: str) -> tuple[int, int]:
    """Bytes to the site and from it, over all rounds."""
    records = _records(rounds, name)
    return sum(one.bytes_down for one in records), sum(one.bytes_up for one in records)
