"""The live screen of a simulation: bars where a person watches, plain lines where the output is a log.

    with Display() as display:
        simulate(...)
    display.summarise(out)

It listens to `unimiss_core.progress` and changes nothing about the run. Events may come from any thread.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from server.run_folder import RunFolder
from server.wording import counted, duration, printable, significant
from unimiss_core import checkpoint, progress
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.figures import COLLAPSE_WAY_OUT, STEPS_THAT_TEACH
from unimiss_core.progress import Collapsed, Event, Note, Preparing, RoundDone, RoundStarted, SiteReplied, StepDone
from unimiss_core.study import StudyConfig

LASTING = frozenset(("no_labels",))
"""Reasons that a site gives in each round alike, and that nobody need mend: told once, and summed up at the end."""


class Display:
    """Shows the events of the block it wraps, and at its end - good or bad - what they came to.

    console: by default standard output. clock: seconds that never run backwards; a test gives its own.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._tally = Tally(clock)
        self._screen: Screen = Bars(self._console) if self._console.is_terminal else Lines(self._console, clock)
        # One event at a time: sites may train in threads, and a bar's text must go with its tally.
        self._lock = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._screen.start()
        self._open.enter_context(progress.listen(self.show))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._screen.stop()
        for line in self._tally.summary():
            self._console.print(Text(line), soft_wrap=True)

    def summarise(self, out: Path) -> None:
        """After a run that ended well: where its artefacts lie."""
        if self._tally.rounds == 0:
            self._console.print(Text("Every round of this run was finished before; nothing was left to do."))
        places = [("Report", out / "report.html"), ("Metrics", out / "metrics.jsonl"), *_models(out)]
        for name, path in places:
            if path.exists():
                self._console.print(Text(f"{name + ':':8} {path}"), soft_wrap=True)

    def show(self, event: Event) -> None:
        with self._lock:
            silent = self._tally.count(event)
            for site in silent:
                self._screen.show(site, self._tally)
            self._screen.show(event, self._tally)


def _models(out: Path) -> Iterator[tuple[str, Path]]:
    """The newest checkpoint, which is an encoder alone where sites keep heads of their own; of a simulation, whose
    sites are on this machine, their models then."""
    latest, own_heads = checkpoint.latest(out / "checkpoints"), False
    with suppress(ConfigError):
        study = load(StudyConfig, out / "study.yaml")
        own_heads = study.finetune is not None and study.finetune.head == "local"
    if latest is not None:
        yield "Encoder" if own_heads else "Model", latest
    if own_heads:
        for path in sorted(out.glob(f"sites/*/state/models/{RunFolder(out).run}")):
            yield "Model", path


@dataclass
class Tally:
    """What the events so far add up to."""

    clock: Callable[[], float]
    round: int = 0
    rounds: int = 0
    rounds_done: int = 0
    sites: tuple[str, ...] = ()
    """Asked in this round."""
    replied: set[str] = field(default_factory=set)
    """Answered in this round, rightly or not."""
    counting: int = 0
    """Sites whose update counted in this round."""
    losses: list[Mapping[str, float]] = field(default_factory=list)
    """Mean loss by site, of each round."""
    collapsed: dict[str, Collapsed] = field(default_factory=dict)
    """The last sign of collapse that a site showed."""
    _steps: dict[str, float] = field(default_factory=dict)
    _missed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(site, why) -> finished rounds in which it did not count."""
    _causes: dict[str, str] = field(default_factory=dict)
    """Site -> why it does not count in the running round, by its last word; empty where it does."""
    _first_given: dict[tuple[str, str], int] = field(default_factory=dict)
    """(site, reason) -> the round in which it was first given."""
    _first_round: int = 0
    _began: float = 0.0

    def count(self, event: Event) -> list[SiteReplied]:
        """Take in `event`. When a round ends, gives a reply for each site that was asked and stayed silent."""
        match event:
            case RoundStarted():
                self._start(event)
            case StepDone():
                self._steps[event.site] = event.step / max(1, event.steps)
            case SiteReplied():
                self.replied.add(event.site)
                self._first_given.setdefault((event.site, event.reason), event.round)
                counts = event.status in ("ok", "late")
                self.counting += counts
                self._causes[event.site] = "" if counts else _status(event)
            case Collapsed():
                self.collapsed[event.site] = event
            case RoundDone():
                silent = [
                    SiteReplied(event.round, site, "absent", "no reply in time")
                    for site in self.sites
                    if site not in self.replied
                ]
                for reply in silent:
                    self.count(reply)
                self._missed, self._causes = self._missed_so_far(), {}
                self.rounds_done = event.round
                self.losses.append(event.losses)
                return silent
            case _:
                pass
        return []

    def is_news(self, event: SiteReplied) -> bool:
        """Whether it says what was not said in an earlier round."""
        return event.reason not in LASTING or self._first_given[event.site, event.reason] == event.round

    def fraction(self) -> float:
        """Rounds done, with the part of the running one: 2.5 in the middle of round 3."""
        if self.rounds_done >= self.round:
            return float(self.rounds_done)
        parts = [1.0 if site in self.replied else self._steps.get(site, 0.0) for site in self.sites]
        return self.round - 1 + (sum(parts) / len(parts) if parts else 0.0)

    def seconds_left(self) -> float | None:
        """At the pace so far of this process; None before there is a pace."""
        done = self.fraction() - (self._first_round - 1)
        if self.rounds == 0 or done <= 0:
            return None
        return (self.clock() - self._began) / done * (self.rounds - self.fraction())

    def summary(self) -> list[str]:
        """What a person wants to know at the end; nothing where no round began."""
        if self.rounds == 0:
            return []
        took = duration(self.clock() - self._began)
        if self.rounds_done >= self.rounds:
            began = f" (from round {self._first_round})" if self._first_round > 1 else ""
            lines = [f"Finished {self.rounds_done} of {counted(self.rounds, 'round')} in {took}{began}."]
        else:
            lines = [f"Stopped after {self.rounds_done} of {counted(self.rounds, 'round')}, {took} into this start."]
        missed = self._missed_so_far()
        for site in sorted({site for site, _ in missed}):
            causes = [f"{status} ({number})" for (name, status), number in missed.items() if name == site]
            total = sum(number for (name, _), number in missed.items() if name == site)
            lines.append(f"{printable(site)} did not count in {counted(total, 'round')}: {', '.join(causes)}.")
        if len(self.losses) > 1 and (shared := sorted(self.losses[0].keys() & self.losses[-1].keys())):
            first, last = self.losses[0], self.losses[-1]
            moved = [f"{printable(site)} {significant(first[site])} to {significant(last[site])}" for site in shared]
            start = "first round" if self._first_round == 1 else f"round {self._first_round}"
            lines.append(f"Mean loss, {start} to last: {', '.join(moved)}.")
        if fallen := [last for _, last in sorted(self.collapsed.items()) if last.round == self.rounds_done]:
            lines.append(_nothing_learned(fallen))
        return lines

    def _missed_so_far(self) -> Counter[tuple[str, str]]:
        """With the running round, of which a site may be told several times: in each try, and when it comes late."""
        return self._missed + Counter((site, cause) for site, cause in self._causes.items() if cause)

    def _start(self, event: RoundStarted) -> None:
        if self.rounds == 0:
            self._first_round, self._began = event.round, self.clock() - event.ago_s
            self.rounds_done = event.round - 1
        self.round, self.rounds, self.sites = event.round, event.rounds, event.sites
        self.replied, self.counting, self._steps = set(), 0, {}


class Screen(Protocol):
    def start(self) -> None: ...
    def show(self, event: Event, tally: Tally) -> None: ...
    def stop(self) -> None: ...


SILENT_S = 180.0
"""A log that got no line for so long gets one from whatever site is heard of next."""


class Lines:
    """For logs: one line when a site is ready, when a site does not count, and when a round is done; in between, a sign
    of life every few minutes."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._last_line = clock()
        self._prepared: dict[str, int] = {}
        """Scans of each site that were told to be ready; a site looks at its cache again whenever it opens it."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def show(self, event: Event, tally: Tally) -> None:
        match event:
            case Preparing(done=done, total=total) if done == total > 0 and self._prepared.get(event.site) != total:
                self._prepared[event.site] = total
                self._line(f"{event.site}: {'scans are' if event.is_secret else counted(total, 'scan')} prepared")
            case SiteReplied(status=status) if status != "ok" and tally.is_news(event):
                self._line(_refusal(event))
            case RoundDone():
                self._line(_round_line(event, tally))
            case Collapsed():
                self._line(f"{event.site}: {event.sign}")
            case Note():
                self._line(event.text)
            case StepDone() if self._clock() - self._last_line >= SILENT_S:
                self._line(f"round {tally.round} of {tally.rounds}: {event.site} at {_step(event)}")
            case Preparing() if self._clock() - self._last_line >= SILENT_S:
                self._line(f"{event.site}: {_preparation(event)}")
            case _:
                pass

    def _line(self, words: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(printable(words)), soft_wrap=True)


class Bars:
    """For a terminal: a bar for the rounds with the time left, and one for each site with step and loss."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(_Words("name"), BarColumn(bar_width=32), _Words("status"), console=console)
        self._rounds = self._progress.add_task(
            "", total=None, name=Text("rounds", style="bold"), status=Text("waiting for the sites")
        )
        self._sites: dict[str, TaskID] = {}

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, event: Event, tally: Tally) -> None:
        match event:
            case Preparing():
                self._site(event.site, event.done, event.total or None, _preparation(event))
            case RoundStarted():
                for site in event.sites:
                    self._site(site, 0, None, "waiting")
            case StepDone():
                self._site(event.site, event.step, event.steps, _step(event))
            case SiteReplied(status="ok"):
                self._site(event.site, 1, 1, "replied")
            case SiteReplied(at_work_on=int(earlier)):
                self._site(event.site, 0, None, f"still at work on round {earlier}")
                self._above(_refusal(event), "")
            case SiteReplied(status="late"):
                self._site(event.site, 1, 1, "counted late")
                self._above(_refusal(event), "")
            case SiteReplied():
                self._site(event.site, 0, 1, f"did not count: {_status(event)}", style="red")
                if tally.is_news(event):
                    self._above(_refusal(event), "red")
            case RoundDone():
                self._above(_round_line(event, tally), "dim")
            case Collapsed():
                self._above(f"{event.site}: {event.sign}", "red")
            case Note():
                self._above(event.text, "")
        if tally.rounds:
            self._show_rounds(tally)

    def _show_rounds(self, tally: Tally) -> None:
        left = tally.seconds_left()
        time_left = f", about {duration(left)} left" if left else ""
        words = f"round {tally.round} of {tally.rounds}{time_left}"
        self._progress.update(self._rounds, completed=tally.fraction(), total=tally.rounds, status=Text(words))

    def _site(self, site: str, done: int, total: int | None, words: str, *, style: str = "") -> None:
        if site not in self._sites:
            self._sites[site] = self._progress.add_task("", name=Text(printable(site)), status=Text())
        status = Text(printable(words), style=style)
        self._progress.update(self._sites[site], completed=done, total=total, status=status)

    def _above(self, words: str, style: str) -> None:
        self._progress.console.print(Text(printable(words), style=style))


class _Words(ProgressColumn):
    """The text that a task holds under one name; never read as markup, for a site's words may hold brackets."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._field = field

    def render(self, task: Task) -> Text:
        words = task.fields[self._field]
        return words if isinstance(words, Text) else Text(str(words))


def _nothing_learned(last: Sequence[Collapsed]) -> str:
    """last: of each site whose last round told no scan from another."""
    sites, steps = ", ".join(printable(one.site) for one in last), max(one.steps for one in last)
    if steps < STEPS_THAT_TEACH:
        return (
            f"Too short to learn, {steps} of some {STEPS_THAT_TEACH} steps: all scans of {sites} still get one answer."
        )
    return f"Collapsed in round {last[0].round}, so that nothing is learned: {sites}; {COLLAPSE_WAY_OUT}."


def _preparation(event: Preparing) -> str:
    if event.is_secret:
        return "looking through files" if event.total == 0 else "preparing scans"
    if event.total == 0:
        return f"looking through files, {event.done}"
    return f"scans prepared: {event.done} of {event.total}"


def _step(event: StepDone) -> str:
    loss = "" if event.loss is None else f", loss {significant(event.loss)}"
    return f"step {event.step} of {event.steps}{loss}"


def _status(event: SiteReplied) -> str:
    return f"{printable(event.status)} {printable(event.reason)}".rstrip()


def _refusal(event: SiteReplied) -> str:
    if event.at_work_on is not None:
        said = f"is still at work on round {event.at_work_on}; that update counts late, if at all"
    else:
        said = "counted late" if event.status == "late" else f"did not count: {_status(event)}"
    return f"round {event.round}: {event.site} {said}"


def _round_line(event: RoundDone, tally: Tally) -> str:
    """round 3 of 10: 18 s, 2 of 3 sites, loss alpha 5.81, beta 5.92"""
    sites = f"{tally.counting} of {counted(len(tally.sites), 'site')}"
    losses = [f"{site} {significant(value)}" for site, value in sorted(event.losses.items())]
    said = f"round {event.round} of {event.rounds}: {duration(event.seconds)}, {sites}"
    return said + (f", loss {', '.join(losses)}" if losses else "")
