"""What the site's audit log says of a message that came and of an answer that leaves, read from these and nothing else.

Apart from the log (`client.audit`), which programs without torch write and read too.
"""

from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict

from unimiss_core.wire import arrays_in, content_digest, facts_in, num_bytes, run_of, study_of

ASKED = {"query": "introduction", "train": "round"}
"""Flower's type of a message -> what is asked; whatever else comes is `unknown`."""


def request_facts(message_type: str, content: RecordDict) -> dict[str, Any]:
    """What the log says of a message that came, besides what it is `named_by`."""
    return {
        "asked": ASKED.get(message_type, "unknown"),
        "bytes": num_bytes(content),
        "sha256": content_digest(content),
    }


def named_by(content: RecordDict) -> dict[str, Any]:
    """Run, study and round that a message names, as far as they can be read."""
    named: dict[str, Any] = {}
    try:
        study = study_of(content)
        named |= {"study": study.digest(), "study_name": study.name, "run": run_of(content)}
    except Exception:  # whatever a peer thought of: that it asked must stand in the log
        return named
    round = facts_in(content).get("round")
    return named | ({"round": round} if type(round) is int and abs(round) < 10**12 else {})


def answer_entry(content: RecordDict, asked: Mapping[str, Any], epsilon: float | None) -> tuple[str, dict[str, Any]]:
    """(kind, facts) of an answer, read from what is about to leave and nothing else. asked: `named_by` the request."""
    facts = facts_in(content)
    if facts.get("status") == "refused":
        return "refusal", {**asked, "reason": facts["reason"]}
    told = {"sha256": content_digest(content), "ledger": facts.get("ledger")}
    if "status" not in facts:
        counts = {name: facts[name] for name in ("scans_2d", "scans_3d", "left_out")}
        return "introduction", {**asked, **told, **counts}
    figures = facts["losses"].count(":") + facts["diagnostics"].count(":")
    sent = {"bytes": num_bytes(content), "groups": _bytes_by_group(content), "figures": figures}
    return "reply", {**asked, **told, **sent, "epsilon": epsilon}


def _bytes_by_group(content: RecordDict) -> dict[str, int]:
    """By group; what is not of the update, which nothing of ours sends, under its part's name as well."""
    return {
        (group if part == "update" else f"{part}.{group}"): len(array.data)
        for part, record in arrays_in(content).items()
        for group, array in record.items()
    }
