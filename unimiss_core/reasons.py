"""Why a site does not count in a round: the fixed codes that may cross the wire, stand in metrics and on screens.

A peer's own words never do: a reason that is not listed here becomes `malformed`.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Reason(NamedTuple):
    means: str
    mend: str = ""
    """Of a reason that lasts, so that the site is not asked again at once: what a person has to do, and what the
    coordinator's operator cannot. Empty where another try may go well by itself."""


_AT_THE_SITE = "its own operator alone can mend it: the site's screen and log say what"
_BOTH_VERSIONS = "install the same version of the program there and here"

REASONS: Mapping[str, Reason] = {
    # the site says so
    "site_setup": Reason(
        "the site's own file, folders, disk or device do not allow it; its screen and log say what", _AT_THE_SITE
    ),
    "no_usable_scans": Reason(
        "the site's folders hold nothing that can be trained on",
        "its own operator alone can mend it: `unimiss-site check` there says what is left out, and why",
    ),
    "no_labels": Reason(
        "the site has no labels for the study's task, or for other classes or channels: its screen says which",
        "nothing is wrong with it: it takes part where its own operator adds `labels` for these classes to its site "
        "file, and the run goes on without it (lower min_sites, where that waits for it)",
    ),
    "study": Reason("the site does not understand the study: another version of the program", _BOTH_VERSIONS),
    "bundle": Reason(
        "the site runs no code but what it has installed, and the coordinator's is another", _BOTH_VERSIONS
    ),
    "needs_whole": Reason(
        "the site lost what it remembered; it is sent the whole student and teacher next time",
    ),
    "budget": Reason(
        "the site allows no such study, or no more of it: it would cost patients too much, has too little noise, "
        "or protects no patient where the site asks for that; its screen says which, and only the site decides",
        "you can do nothing about it, and the site's screen says which it is. Where its patients have cost what they "
        "may, that stays spent, and only whoever answers for their protection should raise the site's limit. Where the "
        "study has too little noise, or protects no patient, another study may do better",
    ),
    "policy": Reason(
        "the site's policy does not allow what was asked: the study, its length or size, or that losses are told; the "
        "site's screen says what, and only its own file decides",
        "you can do nothing about it but ask for less: the site's screen says what its policy does not allow, and its "
        "own operator alone decides whether to allow it",
    ),
    "audit": Reason(
        "the site cannot write down what it is asked and what it sends (disk full, or its audit log is damaged), and "
        "so it sends nothing",
        _AT_THE_SITE,
    ),
    "unknown_request": Reason("the site was asked for something that no site answers", _BOTH_VERSIONS),
    "promise": Reason(
        "by the site's accountant the study's noise does not keep its own privacy.max_epsilon: begin a run with "
        "more noise; `unimiss plan-privacy --study` says how much",
        "this study cannot be gone on with, at this site or any other: begin a run with more noise, in another folder; "
        "`unimiss plan-privacy --study` says how much",
    ),
    "ledger": Reason(
        "the site's record of what its patients have cost is damaged, or was put back to an older one",
        "its own operator alone can mend it (docs/privacy.md, 'The ledger'). Only if that ends in a ledger that is "
        "begun anew, name the site under forget_ledgers here",
    ),
    "not_finite": Reason("a loss, gradient or update is not a finite number"),
    "device_lost": Reason(
        "one of the site's devices, or the process that trained on it, was lost or hung; its screen and log say which",
    ),
    "undisclosed": Reason(
        "the site's own screen says why: it may hang on its scans, of which a private study tells nothing",
        "its own operator alone can mend it, and sees why on the site's screen. If it was in a round, the site is held "
        "from then on: `unimiss-site clear SITE.yaml` there, once it is mended",
    ),
    "held": Reason(
        "a private round failed at the site, and none begins there before its operator has looked into it",
        "its own operator looks into it, then types `unimiss-site clear SITE.yaml` there",
    ),
    "failed": Reason("the site met an error of the program; its log says where"),
    # the coordinator says so
    "not_connected": Reason("the site took part before or is registered, and is not there"),
    "no_introduction": Reason("the site did not say in time who it is"),
    "no_reply": Reason("no reply: the site is gone, or the deadline passed"),
    "busy": Reason(
        "the site is still at work on a round, whose update counts late, if at all; or, by its own word, on a private "
        "round of another run"
    ),
    "discounted": Reason(
        "the site's update for an earlier round came late and counted with less weight, as the study says",
    ),
    "set_aside": Reason("the site failed in several rounds in a row; it is asked again later"),
    "not_registered": Reason(
        "the coordinator file does not name the site, or names it with another key",
        "`unimiss-server approve` it, or give it an entry under `sites` of the coordinator file that you start a run "
        "by, with the name in its site file and its own key",
    ),
    "name_taken": Reason("another connected site goes by the same name"),
    "protocol": Reason("the site speaks another version of the protocol", _BOTH_VERSIONS),
    "malformed": Reason("the reply is not of the agreed form"),
    "wrong_names": Reason("the reply holds other parameter groups than were asked for"),
    "wrong_dtype": Reason("the reply's values are not of the agreed type"),
    "wrong_size": Reason("the reply holds more or fewer values than the model"),
    "wrong_site": Reason("the reply names another site than was asked"),
    "wrong_study": Reason("the reply was trained for another study"),
    "wrong_run": Reason("the reply was trained in another run of the study"),
    "stale_round": Reason("the reply is for another round"),
    "counts": Reason("the reply claims a number of scans that it may not"),
    "steps": Reason("the reply claims another number of steps than the study asks"),
    "too_large": Reason("the update is larger than the study allows"),
}


def lasts(reason: str) -> bool:
    """Whether no time mends it: a person has to."""
    return reason in REASONS and bool(REASONS[reason].mend)
