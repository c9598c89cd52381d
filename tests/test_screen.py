"""What a researcher's command shows while it works; the clock is the test's own."""

import sys

import pytest

from client.screen import Screen
from unimiss_core.progress import Event, Note, Preparing, StepDone

EVENTS: list[tuple[float, Event]] = [
    (1.0, Note("begins with scratch")),
    (2.0, Preparing("x", 256, 0)),
    (30.0, Preparing("x", 1, 400)),
    (31.5, Preparing("x", 2, 400)),
    (40.0, Preparing("x", 9, 400)),
    (70.0, StepDone("x", 3, 20, 0.5)),
]


def shown(events: list[tuple[float, Event]]) -> None:
    now = 0.0
    screen = Screen(lambda: now)
    for at, event in events:
        now = at
        screen.show(event)


def test_a_log_hears_of_the_work_once_in_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    shown(EVENTS)
    assert capsys.readouterr().err.splitlines() == [
        "begins with scratch",
        "reading scans: 2 of 400",  # 30.5 s after the note
        "x: 3 of 20",
    ]


def test_a_terminal_has_one_line_that_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown(EVENTS[:4])
    clear = "\r\x1b[K"
    counts = ["looking through files: 256", "reading scans: 1 of 400", "reading scans: 2 of 400"]
    assert capsys.readouterr().err == f"{clear}begins with scratch\n" + "".join(f"{clear}{one}" for one in counts)
