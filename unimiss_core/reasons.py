"""Why a site does not count in a round: the fixed codes that may cross the wire, stand in metrics and on screens.

A peer's own words never do: a reason that is not listed here becomes `malformed`.
"""

REASONS: dict[str, str] = {
    # the site says so
    "site_setup": "the site's own file, folders, disk or device do not allow it; its screen and log say what",
    "no_usable_scans": "the site's folders hold nothing that can be trained on",
    "study": "the site does not understand the study: another version of the program",
    "bundle": "the site runs no code but what it has installed, and the coordinator's is another: both need the same "
    "version of the program",
    "needs_whole": "the site lost what it remembered; it is sent the whole student and teacher next time",
    "budget": "the site allows no such study, or no more of it: it would cost patients too much, has too little noise, "
    "or protects no patient where the site asks for that; its screen says which, and only the site decides",
    "policy": "the site's policy does not allow what was asked: the study, its length or size, or that losses are "
    "told; the site's screen says what, and only its own file decides",
    "audit": "the site cannot write down what it is asked and what it sends (disk full, or its audit log is damaged), "
    "and so it sends nothing",
    "unknown_request": "the site was asked for something that no site answers",
    "promise": "by the site's accountant the study's noise does not keep its own privacy.max_epsilon: begin a run with "
    "more noise; `unimiss plan-privacy --study` says how much",
    "ledger": "the site's record of what its patients have cost is damaged, or was put back to an older one",
    "not_finite": "a loss, gradient or update is not a finite number",
    "device_lost": "a process that trained on one of the site's devices died; its screen and log say which",
    "undisclosed": "the site's own screen says why: it may hang on its scans, of which a private study tells nothing",
    "held": "a private round failed at the site, and none begins there before its operator has looked into it",
    "failed": "the site met an error of the program; its log says where",
    # the coordinator says so
    "not_connected": "the site took part before or is registered, and is not there",
    "no_introduction": "the site did not say in time who it is",
    "no_reply": "no reply: the site is gone, or the deadline passed",
    "busy": "the site is still at work on a round; its update counts when it comes",
    "discounted": "the site's update for an earlier round came late and counted with less weight, as the study says",
    "set_aside": "the site failed in several rounds in a row; it is asked again later",
    "not_registered": "the coordinator file does not name the site, or names it with another key",
    "name_taken": "another connected site goes by the same name",
    "protocol": "the site speaks another version of the protocol",
    "malformed": "the reply is not of the agreed form",
    "wrong_names": "the reply holds other parameter groups than were asked for",
    "wrong_dtype": "the reply's values are not of the agreed type",
    "wrong_size": "the reply holds more or fewer values than the model",
    "wrong_site": "the reply names another site than was asked",
    "wrong_study": "the reply was trained for another study",
    "wrong_run": "the reply was trained in another run of the study",
    "stale_round": "the reply is for another round",
    "counts": "the reply claims a number of scans that it may not",
    "steps": "the reply claims another number of steps than the study asks",
    "too_large": "the update is larger than the study allows",
}

LASTING = frozenset(
    {
        "site_setup",
        "no_usable_scans",
        "study",
        "bundle",
        "protocol",
        "not_registered",
        "budget",
        "promise",
        "ledger",
        "held",
        "policy",
        "audit",
        "unknown_request",
    }
)
"""What no time mends: a person has to."""
