"""The first thing a reader wants: did it go well, and who took part. Verdict and table of sites."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from server import charts
from server.artefacts import Artefacts, SiteRecord
from server.markup import Html, joined, tag
from server.report_pieces import because, card_table, caution, labelled, lines, note, number, section, whole
from server.wording import byte_count, counted, duration, listed
from unimiss_core.figures import STEPS_THAT_TEACH

_SCANS = {"2d": "image", "3d": "volume"}
_COLUMNS = ("Site", "Trains on", "Scans", "Rounds", "Steps", "To the site", "From the site", "Time")
_COLUMNS_AT_STOP = (*_COLUMNS[:3], "When the run ended")
_NUMBERS = _COLUMNS[4:]
_NOT_TOLD = "not told"


def verdict(run: Artefacts) -> Html:
    """One paragraph: how far it came, with whom, at what cost, and who dropped out."""
    planned = run.study.schedule.rounds if run.study else None
    if not run.rounds:
        asked = f" of the {planned} rounds that the study asks for" if planned else ""
        rest = f".{_end(run)}" if run.stop else ", so there is nothing to show yet."
        return joined(tag("b", None, "No round was finished"), asked, rest)
    done = f"{len(run.rounds)} of {planned} rounds" if planned else counted(len(run.rounds), "round")
    start = "Finished" if planned is None or len(run.rounds) >= planned else "Stopped after"
    down, up = run.traffic(run.sites)
    return joined(
        tag("b", None, f"{start} {done}"),
        f" with {counted(len(run.sites), 'site')} in ",
        whole(duration(sum(one.seconds for one in run.rounds))),
        ". ",
        whole(byte_count(down)),
        " went to the sites and ",
        whole(byte_count(up)),
        f" came back. {_faithfulness(run)}",
        _end(run),
        *_collapse(run),
    )


def site_table(run: Artefacts) -> Html:
    gaps = [caution(f"This report is not complete. {' '.join(run.gaps)}")] if run.gaps else []
    if not run.sites and run.stop and run.stop.sites:
        rows = [_row_at_stop(run, name, record) for name, record in sorted(run.stop.sites.items())]
        return section("Sites", card_table(_COLUMNS_AT_STOP, rows), *gaps)
    if not run.sites:
        return section("Sites", note("No round has been recorded, so nothing is known about the sites."), *gaps)
    rows = [_site_row(run, name) for name in run.sites]
    size = charts.rounds_of_cell(len(run.rounds))
    order = ", ".join(charts.WORST_FIRST)
    told = f"A cell of a strip is {size} rounds; at least a quarter of them were as it shows, or worse ({order})."
    strips = [note(told)] if size > 1 else []
    return section("Sites", card_table(_COLUMNS, rows, numbers=_NUMBERS, foot=_total_row(run)), *strips, *gaps)


def _faithfulness(run: Artefacts) -> str:
    missed = {name: missed for name in run.sites if (missed := run.missed(name))}
    if not missed:
        return "Every site counted in every round."
    gone = [name for name in missed if run.rounds[-1].round in missed[name]]
    said = [f"{name} did not count {_since(run, missed[name])}" for name in gone]
    said += [f"{name} did not count in {counted(len(missed[name]), 'round')}" for name in missed if name not in gone]
    return f"{listed(said)}; the table says why."


def _end(run: Artefacts) -> str:
    return f" The run ended in round {run.stop.round}: {run.stop.error.rstrip('.')}." if run.stop else ""


def _collapse(run: Artefacts) -> list[str]:
    if not (sites := list(run.collapsed())):
        return []
    assert run.study is not None
    if (steps := run.rounds[-1].round * run.study.schedule.local_steps) < STEPS_THAT_TEACH:
        said = f": after {steps} of some {STEPS_THAT_TEACH} steps all scans of {listed(sites)} still get one answer."
        return [" ", tag("b", None, "This run is too short to learn"), said]
    said = f": {listed(sites)} last told no scan from another, so nothing is learned there; see Collapse below."
    return [" ", tag("b", None, "The run has collapsed"), said]


def _since(run: Artefacts, missed: Sequence[int]) -> str:
    last = max((one.round for one in run.rounds if one.round not in missed), default=None)
    return f"after round {last}" if last is not None else "in any round"


def _site_row(run: Artefacts, name: str) -> list[str]:
    records = run.records(name)
    down, up = run.traffic([name])
    steps, seconds = sum(one.steps for one in records), sum(one.seconds for one in records)
    return [
        name,
        *_holdings(run, records),
        _attendance(run, name),
        number(steps, f"{steps:,}"),
        number(down, byte_count(down)),
        number(up, byte_count(up)),
        number(seconds, duration(seconds) if run.counts_are_told else _NOT_TOLD),
    ]


def _row_at_stop(run: Artefacts, name: str, record: SiteRecord) -> list[str]:
    why = [tag("div", {"class": "fine"}, because(record.reason))] if record.reason else []
    return [name, *_holdings(run, [record]), tag("div", None, record.status, *why)]


def _holdings(run: Artefacts, records: Sequence[SiteRecord]) -> list[Html]:
    """The cells of what a site trains on: ranks, and the most scans of each that a record names."""
    most = {rank: max(one.scans.get(rank, 0) for one in records) for rank in _SCANS}
    held = {rank: count for rank, count in most.items() if count}
    scans = [counted(count, _SCANS[rank]) for rank, count in held.items()] if run.counts_are_told else [_NOT_TOLD]
    ranks = " + ".join(rank.upper() for rank in held)
    return [whole(ranks or "unknown"), tag("div", None, *lines(scans or ["unknown"]))]


def _total_row(run: Artefacts) -> Html:
    down, up = run.traffic(run.sites)
    seconds = sum(one.seconds for one in run.rounds)
    cells = [number(down, byte_count(down)), number(up, byte_count(up)), number(seconds, duration(seconds))]
    name = tag("th", {"scope": "row", "colspan": len(_COLUMNS) - 3}, "Whole run")
    return tag("tr", None, name, *labelled(_COLUMNS[-3:], cells, numbers=_NUMBERS))


def _attendance(run: Artefacts, name: str) -> Html:
    """3 ok, 1 refused; a strip with a cell for each round; and why a round did not count."""
    records = run.records(name)
    counts = Counter(record.status for record in records)
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: item[0] != "ok"))
    reasons: dict[tuple[str, str], list[int]] = defaultdict(list)
    for one, record in zip(run.rounds, records, strict=True):
        if record.status != "ok":
            reasons[record.status, record.reason].append(one.round)
    why = [joined(f"{status}, {_spans(numbers)}: ", because(reason)) for (status, reason), numbers in reasons.items()]
    strip = charts.attendance([record.status for record in records])
    return tag("div", None, said, strip, tag("div", {"class": "fine"}, *lines(why)))


def _spans(numbers: Sequence[int]) -> str:
    """round 3; rounds 3, 5-7."""
    runs: list[list[int]] = []
    for one in numbers:
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    text = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}\N{EN DASH}{run[-1]}" for run in runs)
    return f"round\N{NO-BREAK SPACE}{text}" if len(numbers) == 1 else f"rounds\N{NO-BREAK SPACE}{text}"
