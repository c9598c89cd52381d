"""The live screen, fed with recorded events; the clock is the test's own."""

import io
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from server.display import Display, Tally
from server.wording import byte_count, duration
from tests.run_artefacts import round_records, study, write_run
from unimiss_core import checkpoint, progress
from unimiss_core.progress import Collapsed, Event, Note, Preparing, RoundDone, RoundStarted, SiteReplied, StepDone

SITES = ("alpha", "beta", "gamma")


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def round_events(number: int, rounds: int, *, refused: str = "", silent: str = "", steps: int = 3) -> list[Event]:
    events: list[Event] = [RoundStarted(number, rounds, SITES)]
    for site in SITES:
        events += [StepDone(site, step, steps, 6.0 - number / 10) for step in range(1, steps + 1)]
        if site == refused:
            events.append(SiteReplied(number, site, "refused", "too_large"))
        elif site != silent:
            events.append(SiteReplied(number, site, "ok", ""))
    return [*events, RoundDone(number, rounds, 12.0, {"alpha": 6.0 - number / 10})]


def shown(events: Iterable[Event], *, terminal: bool = False, clock: Clock | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=110, color_system=None, legacy_windows=False)
    with Display(console, clock=clock or Clock()):
        for event in events:
            progress.report(event)
    return file.getvalue()


def test_a_log_gets_one_line_for_each_round_and_each_site_that_did_not_count() -> None:
    events = [*round_events(1, 2), *round_events(2, 2, refused="beta", silent="gamma")]
    assert shown(events).splitlines() == [
        "round 1 of 2: 12 s, 3 of 3 sites, loss alpha 5.90",
        "round 2: beta did not count: refused too_large",
        "round 2: gamma did not count: absent no reply in time",
        "round 2 of 2: 12 s, 1 of 3 sites, loss alpha 5.80",
        "Finished 2 of 2 rounds in 0.0 s.",
        "beta did not count in 1 round: refused too_large (1).",
        "gamma did not count in 1 round: absent no reply in time (1).",
        "Mean loss, first round to last: alpha 5.90 to 5.80.",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_site_without_labels_is_told_once_and_summed_up_at_the_end(terminal: bool) -> None:
    rounds = [(number, round_events(number, 3, silent="beta")) for number in (1, 2, 3)]
    events = [[*told[:-1], SiteReplied(number, "beta", "refused", "no_labels"), told[-1]] for number, told in rounds]
    text = shown([event for told in events for event in told], terminal=terminal)
    assert [f"round {number}: beta did not count: refused no_labels" in text for number in (1, 2, 3)] == [True] + [
        False
    ] * 2
    assert text.count("2 of 3 sites") == 3
    assert "beta did not count in 3 rounds: refused no_labels (3)." in text


def test_a_log_gets_a_sign_of_life_every_three_minutes_of_a_long_round() -> None:
    clock, file = Clock(), io.StringIO()
    with Display(Console(file=file, width=110), clock=clock):
        for done in range(4):
            clock.now += 100
            progress.report(Preparing("beta", done, 9))
        progress.report(RoundStarted(1, 2, SITES))
        for step in range(1, 8):
            clock.now += 60
            progress.report(StepDone("alpha", step, 9, 5.5))
    assert file.getvalue().splitlines()[:-1] == [
        "beta: scans prepared: 1 of 9",
        "beta: scans prepared: 3 of 9",
        "round 1 of 2: alpha at step 3 of 9, loss 5.50",
        "round 1 of 2: alpha at step 6 of 9, loss 5.50",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_site_that_is_still_at_work_is_not_said_to_have_missed_a_round_that_it_then_counts_in(terminal: bool) -> None:
    events: list[Event] = [
        RoundStarted(3, 3, ("alpha", "beta")),
        SiteReplied(3, "beta", "absent", "busy", at_work_on=2),
        SiteReplied(3, "alpha", "ok", ""),
        SiteReplied(3, "beta", "late", "discounted"),
        RoundDone(3, 3, 12.0, {"alpha": 5.0}),
    ]
    text = shown(events, terminal=terminal)
    assert text.count("round 3: beta is still at work on round 2; that update counts late, if at all") == 1
    assert text.count("round 3: beta counted late") == 1
    assert "did not count" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_that_ended_collapsed_says_so_at_its_end_with_a_way_out(terminal: bool) -> None:
    first, second = round_events(1, 2), round_events(2, 2)
    first.insert(-1, Collapsed(1, "gamma", "image: all targets are alike", 500))
    second.insert(-1, Collapsed(2, "beta", "volume: all targets are alike", 1000))
    text = shown([*first, *second], terminal=terminal)
    assert "gamma: image: all targets are alike" in text
    assert text.splitlines()[-1] == (
        "Collapsed in round 2, so that nothing is learned: beta; docs/objectives.md says under Collapse what to try."
    )
    assert "Collapsed in round" not in shown([*first, *round_events(2, 2)], terminal=terminal)


def test_a_run_of_few_steps_is_called_too_short_and_not_collapsed() -> None:
    events = round_events(1, 1)
    events.insert(-1, Collapsed(1, "beta", "volume: all targets are alike", 100))
    assert shown(events).splitlines()[-1] == (
        "Too short to learn, 100 of some 800 steps: all scans of beta still get one answer."
    )


def test_a_log_says_once_that_a_sites_scans_are_ready() -> None:
    events = [Preparing("alpha", 0, 0), *(Preparing("alpha", done, 5) for done in range(6)), Preparing("alpha", 5, 5)]
    assert shown(events) == "alpha: 5 scans prepared\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_of_a_patient_level_study_no_count_of_scans_and_no_loss_is_shown(terminal: bool) -> None:
    events = [Preparing("alpha", 31, 0, is_secret=True), Preparing("alpha", 47, 47, is_secret=True)]
    text = shown([*events, RoundStarted(1, 2, SITES), StepDone("beta", 3, 9, None)], terminal=terminal)
    assert "alpha" in text
    assert terminal or "alpha: scans are prepared" in text  # of bars only the last that they showed is kept
    assert not {"31", "47", "loss"} & set(text.replace(":", " ").replace(",", " ").split())


def test_long_lines_of_a_log_are_not_broken() -> None:
    words = "word " * 60
    assert shown([Note(words)]).splitlines() == [words.rstrip() + " "]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sites_words_neither_steer_the_terminal_nor_count_as_markup(terminal: bool) -> None:
    text = shown([Note("[bold]a[/bold]\x1b[2J\x07\nfaked line [/nonsense]")], terminal=terminal)
    assert "[bold]a[/bold]" in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert not any(line.startswith("faked") for line in text.splitlines())


def test_a_terminal_gets_bars_with_step_and_loss_and_no_control_codes_are_left_open() -> None:
    text = shown([Preparing("alpha", 2, 4), *round_events(1, 1, refused="beta")], terminal=True)
    final = text[text.rindex("rounds ") :]
    assert "round 1 of 1" in final
    assert "replied" in final
    assert "did not count: refused too_large" in final
    assert "━" in final
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is hidden, then shown again


def test_the_cursor_comes_back_after_ctrl_c() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)

    def run() -> None:
        with Display(console, clock=Clock()):
            progress.report(RoundStarted(1, 4, SITES))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "\x1b[?25h" in file.getvalue()
    assert "Stopped after 0 of 4 rounds" in file.getvalue()
    progress.report(Note("nobody listens any more"))
    assert "nobody" not in file.getvalue()


def test_time_left_is_the_pace_of_this_start_times_what_is_left() -> None:
    """Resumed at round 7 of 10: half of round 8 is done after 30 s, so 1.5 rounds took 30 s and 2.5 are left."""
    clock = Clock()
    tally = Tally(clock)
    assert tally.seconds_left() is None
    for event in round_events(7, 10):
        tally.count(event)
    tally.count(RoundStarted(8, 10, ("alpha", "beta")))
    tally.count(StepDone("alpha", 3, 4, 6.0))
    tally.count(StepDone("beta", 1, 4, 6.0))
    clock.now += 30
    assert tally.fraction() == pytest.approx(7.5)
    assert tally.seconds_left() == pytest.approx(30 / 1.5 * 2.5)


def test_a_site_that_answered_counts_as_through_with_its_round() -> None:
    tally = Tally(Clock())
    tally.count(RoundStarted(1, 2, ("alpha", "beta")))
    tally.count(SiteReplied(1, "alpha", "refused", "steps"))
    assert tally.fraction() == pytest.approx(0.5)


def test_an_unfinished_run_is_not_called_finished() -> None:
    clock = Clock()
    events = [*round_events(3, 9), RoundStarted(4, 9, SITES)]
    assert shown(events, clock=clock).splitlines()[1] == "Stopped after 3 of 9 rounds, 0.0 s into this start."


def test_events_of_many_threads_are_all_counted() -> None:
    sites = tuple(f"site-{i}" for i in range(8))
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=True, width=100), clock=Clock()):
        progress.report(RoundStarted(1, 1, sites))
        start = threading.Barrier(len(sites))

        def train(site: str) -> None:
            start.wait()
            for step in range(1, 41):
                progress.report(StepDone(site, step, 40, 5.0))
            progress.report(SiteReplied(1, site, "refused", "steps"))

        threads = [threading.Thread(target=train, args=(site,)) for site in sites]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        progress.report(RoundDone(1, 1, 1.0, {}))
    assert all(file.getvalue().count(f"{site} did not count in 1 round: refused steps (1).") == 1 for site in sites)


def test_the_last_lines_say_where_the_artefacts_lie(tmp_path: Path) -> None:
    write_run(tmp_path, round_records(1), rounds=1)
    folder = tmp_path / "checkpoints" / "round-0001"
    config = study(1)
    checkpoint.save(
        folder,
        origin="federation",
        round=1,
        study_digest=config.digest(),
        model=config.model,
        plan=config.plan,
        student={"w": torch.ones(2, 3)},
        teacher={"w": torch.ones(2, 3)},
    )
    file = io.StringIO()
    with Display(Console(file=file), clock=Clock()) as display:
        pass
    display.summarise(tmp_path)
    assert file.getvalue().splitlines() == [
        "Every round of this run was finished before; nothing was left to do.",
        f"Metrics: {tmp_path / 'metrics.jsonl'}",
        f"Model:   {folder}",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.4, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (41_234_567, "41.2 MB"), (999_600, "1.00 MB"), (5e15, "5000 TB")],
)
def test_bytes_are_counted_in_thousands(count: float, words: str) -> None:
    assert byte_count(count) == words
