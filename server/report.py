"""OUT/report.html: what a run was, what it did and how far it may be believed, in one file that opens anywhere.

It is made from the artefacts in OUT alone, so that it can be made again at any time, also of a run that was stopped.
Nothing in it comes from a network, and no script runs in it.
"""

from pathlib import Path

from server.artefacts import Artefacts, read_artefacts
from server.markup import Html, tag
from server.report_curves import collapse, losses, rounds, validation
from server.report_pieces import note, section
from server.report_privacy import privacy
from server.report_probe import probe, projection, views
from server.report_sites import site_table, verdict
from server.report_style import STYLE
from unimiss_core import durable
from unimiss_core.config import dump_yaml


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
    header = tag(
        "header",
        None,
        tag("p", {"class": "kind"}, "Federated UniMiSS, report of a run"),
        tag("h1", None, title),
        tag("p", {"class": "verdict"}, verdict(run)),
    )
    parts = (site_table, privacy, losses, validation, rounds, collapse, views, projection, probe, _study)
    body = tag("body", None, tag("main", None, header, *(part(run) for part in parts)))
    return f"<!doctype html>\n{tag('html', {'lang': 'en'}, head, body)}\n"


def _study(run: Artefacts) -> Html:
    if run.study is None:
        return section("Study", note("The study of this run is not known: study.yaml is missing or damaged."))
    said = "What all sites agreed on. Two runs with this digest ran the same study."
    digest = tag("p", None, "sha256 ", tag("code", None, run.study.digest()))
    settings = tag("pre", None, dump_yaml(run.study))
    return section("Study", note(said), digest, tag("details", None, tag("summary", None, "Every setting"), settings))
