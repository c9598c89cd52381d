"""The pieces that every part of the report is built of."""

from collections.abc import Sequence

from server import charts
from server.artefacts import Artefacts
from server.markup import Html, joined, tag
from unimiss_core.reasons import REASONS


def section(title: str, *parts: str) -> Html:
    return tag("section", None, tag("h2", None, title), *parts)


def note(words: str) -> Html:
    return tag("p", None, words)


def caution(words: str) -> Html:
    """A sentence that must not be overlooked."""
    return tag("p", {"class": "caution"}, words)


def grid(panels: Sequence[str], kind: str = "grid") -> Html:
    return tag("div", {"class": kind}, *panels)


def legend(entries: Sequence[tuple[Html, str]], *, of: str = "") -> Html:
    title = [tag("li", {"class": "soft"}, of)] if of else []
    return tag("ul", {"class": "legend"}, *title, *(tag("li", None, picture, name) for picture, name in entries))


def site_legend(run: Artefacts) -> Html:
    """Colour and marker of each site, the same in every part."""
    return legend([(charts.swatch(i), name) for i, name in enumerate(run.sites)], of="Sites")


def card_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = (), foot: str = ""
) -> Html:
    """A table that turns into a card for each row on a narrow screen, where a cell shows its column's name.

    rows: as many cells as columns; the first names the row. numbers: columns that are set flush right.
    """
    header = [tag("th", {"scope": "col", "class": _kind(name, numbers)}, name) for name in columns]
    body = [
        tag("tr", None, tag("th", {"scope": "row"}, row[0]), *labelled(columns[1:], row[1:], numbers=numbers))
        for row in rows
    ]
    bottom = [tag("tfoot", None, foot)] if foot else []
    return tag(
        "table", {"class": "cards"}, tag("thead", None, tag("tr", None, *header)), tag("tbody", None, *body), *bottom
    )


def labelled(columns: Sequence[str], cells: Sequence[str], *, numbers: Sequence[str]) -> list[Html]:
    return [
        tag("td", {"data-label": name, "class": _kind(name, numbers)}, cell)
        for name, cell in zip(columns, cells, strict=True)
    ]


def whole(*words: str) -> Html:
    """A quantity, kept on one line with its unit."""
    return tag("span", {"class": "whole"}, *words)


def lines(words: Sequence[str]) -> list[Html]:
    return [tag("div", None, one) for one in words]


def number(value: float, words: str) -> Html:
    """What a person reads, with the exact number beside it for a program."""
    return tag("data", {"value": repr(value)}, words)


def because(reason: str) -> Html:
    """A reason in words, with its code; a code of which no words are known stands alone."""
    if not reason:
        return joined("no reason given")
    code = tag("code", None, reason)
    return joined(REASONS[reason].means, " ", code) if reason in REASONS else code


def in_words(name: str) -> str:
    return name.replace("_", " ")


def _kind(column: str, numbers: Sequence[str]) -> str:
    return "number" if column in numbers else "words"
