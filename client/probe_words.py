"""What a probe says on the screen."""

from collections.abc import Iterable, Mapping
from typing import Any

from client import merit
from unimiss_core.label_counts import MOST_NAMED, counts_in_words

GAIN, MINUS = "gain", " minus "
"""What a difference is called: of the one checkpoint to the random encoder, or between two."""
JUDGES = {"linear": "linear probe", "neighbours": "nearest neighbours"}
_IN_WORDS = {"auc": "AUC", "ap": "AP", "accuracy": "accuracy"}
_HEADS = {GAIN: "this minus random"}


def in_words(told: Mapping[str, Any]) -> str:
    """Of one question what the file holds, as a table."""
    kind = "images" if told["rank"] == 2 else "volumes"
    classes = counts_in_words(told["classes"])
    if len(told["classes"]) > MOST_NAMED:
        classes = f"{len(told['classes'])} classes"
    if not told["classes"]:
        classes = "labels are not named, for most are of one patient each"
    lines = [f"{told['question']}: {told['scans']} {kind} of {told['patients']} patients ({classes})"]
    if told["reason"]:
        return f"{lines[0]}\n  no figure: {told['reason']}\n"
    if told["judged"] < told["scans"]:
        lines.append(f"  {told['judged']} of them judged, by the split given; the others teach")
    as_rows = _by_encoder if "encoders" in told else _by_figure
    for judge, figures in told["figures"].items():
        lines += as_rows(JUDGES[judge], figures)
    return "\n".join(lines) + "\n"


def _by_figure(judge: str, figures: Mapping[str, Mapping[str, merit.Figure]]) -> list[str]:
    """A column for each encoder."""
    lines = [f"  {judge:20}" + _columns(_HEADS.get(name, name) for name in figures)]
    for name, said in _IN_WORDS.items():
        cells = (_cell(of[name], signed=encoder == GAIN) for encoder, of in figures.items())
        lines.append(f"    {said:18}" + _columns(cells))
    return lines


def _by_encoder(judge: str, figures: Mapping[str, Mapping[str, merit.Figure]]) -> list[str]:
    """A line for each encoder, of which there may be many."""
    lines = [f"  {judge:20}" + _columns(_IN_WORDS.values())]
    for encoder, of in figures.items():
        cells = (_cell(of[name], signed=MINUS in encoder) for name in _IN_WORDS)
        lines.append(f"    {encoder:18}" + _columns(cells))
    return lines


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:26}" for cell in cells).rstrip()


def _cell(figure: merit.Figure, *, signed: bool) -> str:
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "undefined"
    sign = "+" if signed else ""
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
