"""What happened round by round: losses, traffic, the size of the update, and signs of collapse."""

import math
from collections.abc import Mapping, Sequence

from server import charts
from server.artefacts import Artefacts
from server.charts import Reference, Series
from server.markup import Html, joined
from server.report_pieces import caution, grid, in_words, legend, note, section, site_legend
from server.validation import best_of, by_round, figure_of
from unimiss_core.figures import COLLAPSE_WAY_OUT, VALIDATION_DICE
from unimiss_core.loss_terms import DICE, is_reconstruction

_GROUPS = {"shared": "shared", "2d": "2D only", "3d": "3D only", "head": "head"}

_OF_COLLAPSE = {
    "target_entropy": "Entropy of the targets",
    "mean_target_entropy": "Entropy of their mean",
    "feature_std": "Spread of the features",
    "effective_rank": "Directions of the features",
}
"""Figures of `unimiss_core.collapse.RoundWatch`, without the representation that each is of."""
_OF_ROUNDS = {
    "skipped_batches": "Batches skipped for NaN or infinity",
    "grad_norm": "Norm of the gradient, before clipping",
    "global_distance": "Distance from the received student",
    "own_share": "Share of the site's own student at its start",
}
"""Other figures that a site tells; one that is 0 throughout has no panel."""


def losses(run: Artefacts) -> Html:
    curves = _curves(run, {name: [one.losses for one in run.records(name)] for name in run.sites})
    if not curves:
        said = "No loss was recorded: either no round was finished, or the sites keep it to themselves."
        if not run.counts_are_told:
            said = (
                "The sites of a private study tell no losses; whether the model learns, a probe on public scans shows."
            )
        return section("Loss", note(said))
    level = _uniform_level(run)
    compared = {term: group for term, group in curves.items() if not is_reconstruction(term) and term != DICE}
    drawn = {term: group for term, group in curves.items() if term not in compared}
    everything = [one for group in compared.values() for one in group]
    bounds = charts.bounds_of(everything, include=[level.value] if level else [])
    panels = [
        charts.line_panel(in_words(term), group, reference=level, bounds=bounds) for term, group in compared.items()
    ]
    panels += [_from_zero(in_words(term), group) for term, group in drawn.items()]
    said = "Each term of the objective at each site, before its weight, as the mean over the steps of a round."
    if run.study:
        said += (
            f" The dashed line is log K for K = {run.study.model.prototypes:,} prototypes: what a model scores"
            " that tells nothing apart. Learning shows as falling below it."
            if level
            else " Each is a mean over what the sites trained on, and says nothing of scans they did not."
        )
    if DICE in drawn:
        said += " Dice is 1 minus the Dice coefficient, over the classes that a window's mask holds."
    elif drawn:
        said += " A reconstruction is the mean squared error of intensities between 0 and 1."
    return section("Loss", note(said), site_legend(run), grid(panels))


def validation(run: Artefacts) -> Html:
    """Of a fine-tuning whose sites hold patients out; else nothing."""
    if (figure := figure_of(run.study)) is None:  # what a site tells unasked says nothing of patients held out
        return joined()
    records = {name: run.records(name) for name in run.sites}
    told = (
        (one.round, {name: each[i].diagnostics for name, each in records.items() if each[i].status == "ok"})
        for i, one in enumerate(run.rounds)
    )
    measured = by_round(told, figure)
    if not measured:
        return joined()
    best = best_of(measured)
    lines = [
        Series(name, [(round, sites[name]) for round, sites in sorted(measured.items()) if name in sites], style)
        for style, name in enumerate(run.sites)
    ]
    drawn = [one for one in lines if one.points]
    masks = figure == VALIDATION_DICE
    title = "Dice coefficient" if masks else "Area under the ROC curve"
    bounds = charts.bounds_of(drawn, include=[0.0 if masks else 0.5])
    panel = charts.line_panel(title, drawn, reference=None, bounds=bounds)
    said = (
        "What each site measures of the shared model on patients of its own that no round trains on, by the round whose"
        " model it is; the last round's is sent to nobody. Round 0, whose head nothing has taught, is not in the "
        f"choice. {best.in_words().capitalize() if best else 'No later one was measured yet'}."
    )
    if run.taught_by_labels:
        said += (
            " The run began from an encoder that had been fine-tuned: of patients whom that was trained on these "
            "figures show what is remembered."
        )
    return section("Validation", note(said), site_legend(run), grid([panel]))


def rounds(run: Artefacts) -> Html:
    if not run.rounds:
        return joined()
    traffic = {name: [(one.bytes_down, one.bytes_up) for one in run.records(name)] for name in run.sites}
    panels = [charts.traffic_panel("Bytes in a round", [one.round for one in run.rounds], traffic)]
    if run.counts_are_told:
        pace = [
            _series(run, name, [one.seconds if one.status == "ok" else None for one in run.records(name)], style)
            for style, name in enumerate(run.sites)
        ]
        panels.append(_from_zero("Seconds in a round", pace))
    panels += [_from_zero(title, group) for key, title in _OF_ROUNDS.items() if (group := _told(run, key))]
    legends = [site_legend(run)]
    if norms := _update_norms(run):
        panels.append(_from_zero("Norm of the global update", norms))
        legends.append(legend([(charts.swatch(one.style), one.name) for one in norms], of="Parameters"))
    said = (
        "What each round cost, and how far it moved the global student: the L2 norm of the change, by parameter group."
    )
    return section("Rounds", note(said), *legends, grid(panels))


def collapse(run: Artefacts) -> Html:
    curves = _curves(run, {name: [one.diagnostics for one in run.records(name)] for name in run.sites})
    panels = [_diagnostic(run, title, group) for name, group in curves.items() if (title := _title_of(name))]
    if not panels:
        return joined()
    signs = [f"{site}: {sign}." for site, found in run.collapsed().items() for sign in found]
    seen = [caution(" ".join([*signs, f"{COLLAPSE_WAY_OUT}."]))] if signs else []
    said = (
        "Self-distillation can fall into giving every image the same answer. Signs of it: an entropy of the teacher's"
        " targets that stays at log K (it tells nothing apart), an entropy of their mean over the batch near zero"
        " (one prototype takes all), or features that stop varying."
    )
    return section("Collapse", *seen, note(said), site_legend(run), grid(panels))


def _title_of(figure: str) -> str:
    """`target_entropy_image` -> `Entropy of the targets: image`; empty for figures that say nothing of collapse."""
    found = [(key, title) for key, title in _OF_COLLAPSE.items() if figure.startswith(f"{key}_")]
    return "".join(f"{title}: {in_words(figure.removeprefix(f'{key}_'))}" for key, title in found)


def _told(run: Artefacts, key: str) -> list[Series]:
    """A line for each site of which this figure was other than 0 in some round."""
    values = {name: [one.diagnostics.get(key) for one in run.records(name)] for name in run.sites}
    return [_series(run, name, each, style) for style, (name, each) in enumerate(values.items()) if any(each)]


def _diagnostic(run: Artefacts, title: str, group: Sequence[Series]) -> Html:
    level = _uniform_level(run) if title.startswith("Entropy") else None
    bounds = charts.bounds_of(group, include=[level.value] if level else [])
    return charts.line_panel(title, group, reference=level, bounds=bounds)


def _from_zero(title: str, series: Sequence[Series]) -> Html:
    return charts.line_panel(title, series, reference=None, bounds=charts.bounds_of(series, include=[0.0]))


def _uniform_level(run: Artefacts) -> Reference | None:
    """The cross-entropy, and the entropy, of a model that gives each of K prototypes the same probability."""
    if run.study is None or run.study.finetune is not None:
        return None
    return Reference("log K", math.log(run.study.model.prototypes))


def _update_norms(run: Artefacts) -> list[Series]:
    """A line for each parameter group that some site trained, in hollow markers and colours that no small federation's
    sites have."""
    norms = [one.whole.update_norm for one in run.rounds]
    found = dict.fromkeys(group for one in norms for group, norm in one.items() if norm)
    order = [group for group in _GROUPS if group in found] + [group for group in found if group not in _GROUPS]
    return [
        _series(run, _GROUPS.get(group, group), [one.get(group) for one in norms], charts.STYLES // 2 + i)
        for i, group in enumerate(order)
    ]


def _curves(run: Artefacts, figures: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[Series]]:
    """Name of a figure -> a line for each site that ever had it, in the sites' order and colours.

    figures: site -> for each round, figures by name.
    """
    found = dict.fromkeys(key for per_round in figures.values() for values in per_round for key in values)
    return {
        key: [
            _series(run, site, [values.get(key) for values in per_round], style)
            for style, (site, per_round) in enumerate(figures.items())
            if any(key in values for values in per_round)
        ]
        for key in found
    }


def _series(run: Artefacts, name: str, values: Sequence[float | None], style: int) -> Series:
    return Series(name, [(one.round, value) for one, value in zip(run.rounds, values, strict=True)], style)
