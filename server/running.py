"""What a `run` at work tells of itself in a file, and `unimiss-server status`, which reads files alone."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from server.children import Children
from server.contacts import AHEAD_S, BEHIND_S, Contact, Contacts
from server.coordinator_config import load_coordinator
from server.expiry import ending_soon
from server.home import Home
from server.registry import Registry
from server.run_folder import RunFolder
from server.said import at_work as round_at_work
from server.wording import counted, duration, printable
from unimiss_core import durable
from unimiss_core.errors import ConfigError


@dataclass(frozen=True)
class ChildStanding:
    name: str
    number: int | None
    """Of its process; None while it is down."""
    restarts: int
    last_code: int | None
    """That it last ended with."""


@dataclass(frozen=True)
class Running:
    """since: seconds of the epoch. submitted: whether SuperLink has the run now; else it is tried again soon."""

    study: str
    rounds: int
    since: FiniteFloat
    submitted: bool
    fruitless: int
    children: tuple[ChildStanding, ...]

    def write(self, path: Path) -> None:
        durable.write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Running | None":
        """None where there is none, or it is damaged."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValidationError):
            return None


def children_of(children: Children) -> tuple[ChildStanding, ...]:
    return tuple(
        ChildStanding(
            child.recipe.name,
            child.process.pid if child.process is not None and child.is_running else None,
            child.restarts,
            child.last_code,
        )
        for child in children.members
    )


def status(home: Home, *, at_work: bool, now: datetime) -> Iterator[str]:
    """How the folder's runs, processes and sites stand, in lines. at_work: whether a `run` holds the folder."""
    running = Running.read(home.running) if at_work else None
    yield from _process_lines(running, at_work, now)
    yield from ending_soon(home, now=now)
    for folder in sorted(home.runs.iterdir()) if home.runs.is_dir() else []:
        yield from _run_lines(RunFolder(folder), running, at_work)
        if running is not None and running.study == folder.name:
            yield from _round_lines(home, running.study, now)
    contacts, refused = Contacts.read(home.front_status)
    for name in sorted(contacts.sites.keys() | _approved(home)):
        yield _site_line(name, contacts.sites.get(name), now)
    if refused:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
        yield f"refused at the public side since it began: {counts}"


def _process_lines(running: Running | None, at_work: bool, now: datetime) -> Iterator[str]:
    if running is None:
        yield "a run is starting" if at_work else "no run is at work; unimiss-server run STUDY.yaml begins or resumes"
        return
    yield f"running {running.study} for {duration(now.timestamp() - running.since)}"
    if not running.submitted:
        yield f"  between two tries, {running.fruitless} in a row finished no round"
    for child in running.children:
        state = "works" if child.number else "is down, and is started again"
        again = f", started again {counted(child.restarts, 'time')}" if child.restarts else ""
        yield f"  {child.name} {state}{again}"


def _run_lines(folder: RunFolder, running: Running | None, at_work: bool) -> Iterator[str]:
    try:
        rows, rounds = folder.metric_rows(), folder.rounds()
    except OSError as cause:  # a folder in the place of its metrics, say
        yield f"{folder.path.name}: its metrics cannot be read ({cause.strerror})"
        return
    is_this = running is not None and running.study == folder.path.name
    done = rows[-1]["round"] if rows else 0
    counts = counted(done, "round") if rounds is None else f"{done} of {counted(rounds, 'round')}"
    last = f"{folder.path.name}: {counts} finished"
    if rows:
        counting = [name for name, site in rows[-1]["sites"].items() if site["status"] in ("ok", "late")]
        last += f", the last with {', '.join(map(printable, sorted(counting))) or 'no site'}"
    if not is_this and (error := folder.why_it_stopped()):
        last += f"; stopped: {_indented(error)}"
    elif error := folder.why_its_last_try_ended():
        last += f"; its last try ended: {_indented(error)}"
    yield from last.split("\n")
    is_starting = at_work and running is None  # which study's, nobody knows yet
    if rounds is None or is_this or is_starting:
        return
    if done < rounds:
        yield "  not at work; unimiss-server run STUDY.yaml goes on with it"
    elif not folder.is_finished:
        yield "  its model, audit log or report may lack; unimiss-server run STUDY.yaml brings it to its end"


def _round_lines(home: Home, study: str, now: datetime) -> Iterator[str]:
    """Of the round at work: who has answered, who is waited for, and for how long at most."""
    if (work := round_at_work(home.run(study))) is None:
        return
    counting = sorted(site for site, reply in work.replied.items() if reply.status in ("ok", "late"))
    yield (
        f"  round {work.round}, asked for {duration(now.timestamp() - work.since)} ago: "
        f"{', '.join(map(printable, counting)) or 'no site'} counted"
    )
    for site, reply in sorted(work.replied.items()):
        if site not in counting:
            yield f"    {printable(site)} did not count: {printable(f'{reply.status} {reply.reason}'.rstrip())}"
    if work.silent:
        approved = _approved(home)
        named = [printable(site) + ("" if site in approved else " (revoked)") for site in work.silent]
        yield f"    waits for {', '.join(named)}{_until(home, study, work.since)}"


def _until(home: Home, study: str, since: float) -> str:
    try:
        config = load_coordinator(home.run_file(study))
    except ConfigError:
        return ""
    latest = datetime.fromtimestamp(since + config.deadline_s, UTC)
    return (
        f", until {latest:%Y-%m-%d %H:%M} UTC (deadline_s), and a quarter longer where fewer than "
        f"{config.min_replies} count by then (min_replies)"
    )


def _indented(message: str) -> str:
    """Line by line, as it was written, below the line in which it begins."""
    return "\n    ".join(map(printable, message.strip().split("\n")))


def _approved(home: Home) -> set[str]:
    """Names; `unimiss-server sites` says what is wrong where a file is damaged."""
    try:
        return {site.name for site in Registry(home).approved()}
    except ConfigError:
        return set()


def _site_line(name: str, contact: Contact | None, now: datetime) -> str:
    if contact is None:
        return f"{name}: not heard since the public side began"
    ago = duration(max(0.0, (now - contact.seen).total_seconds()))
    line = f"{printable(name)}: heard {ago} ago"
    if contact.clock_ahead_s is not None and contact.clock_is_wrong:
        way = "ahead" if contact.clock_ahead_s > 0 else "behind"
        line += (
            f"; its clock is {duration(abs(contact.clock_ahead_s))} {way}, so that nothing of it is taken: at most "
            f"{BEHIND_S:g} s behind or {AHEAD_S:g} s ahead is allowed"
        )
    return line
