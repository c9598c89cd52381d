"""What a private study promises, in a reader's words, and why its report tells less."""

from server.artefacts import Artefacts
from server.markup import Html, joined
from server.report_pieces import note, section


def privacy(run: Artefacts) -> Html:
    if run.study is None or run.study.privacy.mode == "none":
        return joined()
    promise = run.study.privacy
    cost = f"epsilon of at most {promise.max_epsilon:g} at delta {promise.delta:g} over all rounds of this study"
    if promise.mode == "patient":
        said = (
            "Whoever sees everything that a site sent can hardly tell whether any one patient's scans were used: "
            f"{cost}. Each site holds to that by a ledger of its own, and refuses rounds beyond it (unimiss-site"
            " ledger). It therefore tells neither how many scans it has nor its losses nor how long it worked."
        )
    else:
        said = (
            "Whoever sees the models of this run can hardly tell whether any one site's archive was used: "
            f"{cost}. This report and the metrics are the coordinator's own and are not covered by that."
        )
    return section("Privacy", note(said))
