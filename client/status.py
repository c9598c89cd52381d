"""What `unimiss-site status` says, from the two files that the daemon keeps in the state folder."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.daemon import is_running
from client.health import (
    LASTING,
    PROBLEMS,
    Contact,
    Health,
    read_contact,
    read_health,
    read_noise_alone,
    read_refused,
)

STALE_S = 120.0
"""Longer than this without an answer, and without a word why, a coordinator is told to be silent."""


def as_json(state: Path) -> str:
    """All that is known, for a monitor."""
    contact, health, refused = read_contact(state), read_health(state), read_refused(state)
    alone = read_noise_alone(state)
    facts: dict[str, Any] = {
        "running": is_running(state),
        "daemon": health.model_dump() if health else None,
        "contact": contact.model_dump() if contact else None,
        "refused": refused.model_dump() if refused else None,
        "noise_alone": alone.model_dump() if alone else None,
    }
    return json.dumps(facts, indent=1)


def lines(state: Path, now: float) -> Iterator[str]:
    """For a person. now: seconds since 1970."""
    runs, contact, health = is_running(state), read_contact(state), read_health(state)
    if runs and health is None:
        yield "daemon       is starting"
        return
    if health is None or not runs:
        yield f"daemon       does not run{_last(health)}; `unimiss-site run` starts it"
        return
    yield f"daemon       runs since {at(health.since)}, process {health.pid}{_restarts(health)}"
    yield f"coordinator  {_coordinator(contact, health, now)}"
    if contact is not None and contact.asked is not None:
        what = f"for round {contact.round}" if contact.round is not None else "who this site is"
        yield f"last asked   {what}, {at(contact.asked)}"
    if (refused := read_refused(state)) is not None:
        first, *more = refused.words.splitlines()
        yield f"refused      at {at(refused.at)}, with the reason `{refused.reason}`: {first}"
        yield from (f"             {line}" for line in more)
    if (alone := read_noise_alone(state)) is not None:
        kinds = " and ".join(f"{rank}D" for rank in alone.ranks)
        yield (
            f"scans        study {alone.study} found no usable {kinds} scan at {at(alone.at)}: its rounds are charged "
            "all the same, and such steps are noise alone; is the archive mounted? `unimiss-site check`"
        )


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _coordinator(contact: Contact | None, health: Health, now: float) -> str:
    tried = "" if health.next_try is None else f"; the next try is in {max(0.0, health.next_try - now):.0f} s"
    if contact is None:
        return f"no word yet{tried}"
    if contact.problem is not None:
        since = f", since {at(contact.problem_since)}" if contact.problem_since else ""
        seldom = "; it is tried seldom" if contact.problem in LASTING and not tried else ""
        return f"{PROBLEMS.get(contact.problem, contact.problem)}{since}{tried}{seldom}"
    if contact.connected is None or health.state != "running":
        return f"no connection yet{tried}"
    answered = contact.answered or contact.connected
    if now - answered > STALE_S:
        return f"silent since {at(answered)}, and the gate has not said why; see log/gate.log in the state folder"
    return f"connected since {at(contact.connected)}, last answer {at(answered)}"


def _restarts(health: Health) -> str:
    if not health.restarts:
        return ""
    times = "once" if health.restarts == 1 else f"{health.restarts} times"
    return f"; its processes were started again {times}, last after {health.ended}"


def _last(health: Health | None) -> str:
    if health is None:
        return ", and never did"
    return ", and was stopped" if health.state == "stopped" else ", and was ended by force"
