"""When the site's processes are started again and what is told of it: by a clock that is set, and without processes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from client.health import Contact, Health, Refused
from client.supervision import PATIENCE_S, Supervision, pause_s
from unimiss_core.errors import UnimissError

HOUR_S = 3600.0


@dataclass
class Process:
    """Ends `after_s` of the world's time, saying `ended`."""

    world: "World"
    name: str
    ends_at: float
    ended: str

    def how_it_ended(self) -> str | None:
        return self.ended if self.world.time >= self.ends_at else None

    def end(self, patience_s: float) -> None:
        assert patience_s == PATIENCE_S
        self.world.log.append(f"end {self.name}")


@dataclass
class World:
    """Time passes only while somebody waits. lives: how each life goes, in turn; the last one is repeated."""

    lives: list[Callable[["World"], list[Process]]]
    stop_at: float = float("inf")
    time: float = 1_000_000.0
    starts: list[float] = field(default_factory=list)
    contact: Contact | None = None
    log: list[str] = field(default_factory=list)
    told: list[Health] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.time

    def start(self) -> list[Process]:
        self.starts.append(self.time - self.began)
        return self.lives[min(len(self.starts), len(self.lives)) - 1](self)

    def wait(self, seconds: float) -> bool:
        self.time = min(self.time + seconds, max(self.time, self.began + self.stop_at))
        return self.time >= self.began + self.stop_at

    def note(self, kind: str, facts: Mapping[str, str | int | float]) -> None:
        assert kind == "daemon"
        self.notes.append(str(facts["event"]))

    def run(self, refused: Callable[[], Refused | None] = lambda: None) -> None:
        at = self.start, lambda: self.contact, self.told.append, self.note, self.wait, lambda: self.time
        Supervision(4711, *at, refused).run()


def life(
    after_s: float = float("inf"),
    ended: str = "exit code 1",
    *,
    problem: str | None = None,
    connects: bool = False,
    who: int = 0,
) -> Callable[[World], list[Process]]:
    """A life of two processes; process `who` ends after `after_s`."""

    def begin(world: World) -> list[Process]:
        if connects or problem:
            connected = world.time if connects else None
            world.contact = Contact(connected=connected, problem=problem, problem_since=world.time if problem else None)
        ends = [float("inf"), float("inf")]
        ends[who] = world.time + after_s
        return [Process(world, name, at, ended) for name, at in zip(("gate", "superexec"), ends, strict=True)]

    return begin


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def test_a_crash_loop_slows_down_to_five_minutes() -> None:
    world = World([life(1.0)], stop_at=HOUR_S)
    world.run()
    pauses = [gap - 1.0 for gap in gaps(world.starts)]
    assert pauses[:7] == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0]
    assert set(pauses[7:]) == {300.0}


def test_a_lost_connection_of_sixty_seconds_is_outwaited_soon() -> None:
    """The coordinator holds the one before for live for 60 s; the try after that is not minutes later."""
    world = World([life(600.0, "signal SIGKILL", connects=True), life(1.0, problem="not_yet")], stop_at=800.0)
    world.run()
    after = [at - 600.0 for at in world.starts[1:]]
    assert any(60.0 < at < 120.0 for at in after)


def test_an_end_with_code_0_is_an_end_like_any_other() -> None:
    world = World([life(30.0, "exit code 0", connects=True)], stop_at=100.0)
    world.run()
    assert gaps(world.starts) == [35.0, 35.0]
    assert world.told[-1].ended == "the gate, exit code 0 (log/gate.log in the state folder)"


def test_whoever_reached_the_coordinator_begins_again_with_short_pauses() -> None:
    world = World([life(1.0), life(1.0), life(1.0), life(50.0, connects=True), life(1.0)], stop_at=200.0)
    world.run()
    assert gaps(world.starts)[:5] == [6.0, 11.0, 21.0, 55.0, 11.0]


def test_what_only_a_person_can_mend_is_tried_seldom() -> None:
    world = World([life(1.0, problem="not_approved")], stop_at=HOUR_S)
    world.run()
    assert set(gaps(world.starts)) == {301.0}
    assert pause_s(1, "unreachable") == 5.0


def test_what_a_former_life_heard_is_not_taken_for_this_ones() -> None:
    world = World([life(1.0, problem="not_approved"), life(1.0)], stop_at=HOUR_S)
    world.run()
    assert gaps(world.starts)[1] == 11.0  # nothing was heard in it


def test_both_end_when_one_does_and_the_gate_is_the_first_to_be_asked() -> None:
    world = World([life(10.0, who=1), life()], stop_at=60.0)
    world.run()
    assert world.log == ["end gate", "end superexec"] * 2  # the second time because the daemon was asked to stop
    assert world.told[-1].state == "stopped"


def test_a_stop_during_a_pause_starts_nothing_more() -> None:
    world = World([life(1.0)], stop_at=3.0)
    world.run()
    assert world.starts == [0.0]
    assert [health.state for health in world.told] == ["starting", "running", "waiting", "stopped"]


def test_its_number_is_told_before_anything_is_noted_or_started() -> None:
    """Until then whoever would stop it finds none, or that of a daemon that was killed."""
    world, told_by_then = World([life(1.0)], stop_at=3.0), []
    at = world.start, lambda: None, world.told.append, lambda *_: told_by_then.append(list(world.told)), world.wait
    Supervision(4711, *at, lambda: world.time).run()
    assert [(health.pid, health.state) for health in told_by_then[0]] == [(4711, "starting")]


def test_a_process_that_cannot_be_started_is_tried_again() -> None:
    def no_memory(_: World) -> list[Process]:
        raise OSError(12, "Cannot allocate memory")

    world = World([no_memory, life()], stop_at=60.0)
    world.run()
    assert world.starts == [0.0, 5.0]
    assert world.told[-1].ended == "cannot be started (Cannot allocate memory)"


def test_the_coordinator_is_lost_when_trouble_lasts_and_found_when_it_is_over() -> None:
    def change(world: World) -> Iterator[tuple[float, Contact]]:
        at = world.time
        yield 1.0, Contact(connected=at)
        yield 20.0, Contact(connected=at, problem="unreachable", problem_since=at + 20)  # for half a minute: no loss
        yield 50.0, Contact(connected=at)
        yield 100.0, Contact(connected=at, problem="unreachable", problem_since=at + 100)  # for ten minutes
        yield 700.0, Contact(connected=at)

    world = World([life()], stop_at=900.0)
    changes = list(change(world))
    sleep = world.wait

    def wait(seconds: float) -> bool:
        while changes and world.time - world.began >= changes[0][0]:
            world.contact = changes.pop(0)[1]
        return sleep(seconds)

    world.wait = wait  # type: ignore[method-assign]
    world.run()
    assert world.notes == ["started", "connected", "lost", "connected", "stopped"]
    assert world.starts == [0.0]  # a cut of ten minutes ends no process


def test_a_life_that_ends_loses_the_coordinator_and_the_next_finds_it() -> None:
    world = World([life(100.0, connects=True)], stop_at=150.0)
    world.run()
    assert world.notes == ["started", "connected", "lost", "connected", "stopped"]


def test_whoever_was_revoked_reads_so_on_the_daemons_screen(caplog: pytest.LogCaptureFixture) -> None:
    World([life(1.0, "exit code 0", problem="not_approved", who=1)], stop_at=60.0).run()
    (said,) = (message for message in caplog.messages if message.startswith("ended"))
    assert said == (
        "ended: flower-superexec, exit code 0 (log/training.log in the state folder); the coordinator does not know "
        "this site's key, or has revoked it; only its operator can mend that; the next try is in 300 s"
    )


def test_what_was_refused_is_said_once_on_the_daemons_screen(caplog: pytest.LogCaptureFixture) -> None:
    world = World([life(connects=True)], stop_at=60.0)
    refused = Refused(at=world.time, reason="policy", words="study 'x' is refused:\nit is not in policy.studies")
    world.run(lambda: refused.model_copy(update={"at": world.time}))
    assert [message for message in caplog.messages if "refused" in message] == [
        "refused, with the reason `policy`: study 'x' is refused:\nit is not in policy.studies"
    ]


def test_a_disk_that_takes_no_more_notes_ends_nothing() -> None:
    world = World([life(100.0, connects=True)], stop_at=500.0)
    taken: list[str] = []

    def full(_kind: str, facts: Mapping[str, str | int | float]) -> None:
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(str(facts["event"]))

    world.note = full  # type: ignore[method-assign]
    world.run()
    assert len(world.starts) > 1


def test_a_damaged_log_is_looked_at_before_anything_runs() -> None:
    world = World([life()], stop_at=500.0)

    def damaged(_kind: str, _facts: Mapping[str, str | int | float]) -> None:
        raise UnimissError("the log is damaged")

    world.note = damaged  # type: ignore[method-assign]
    with pytest.raises(UnimissError):
        world.run()
    assert not world.starts


@pytest.mark.parametrize("failures", [1, 2, 50, 5000])
def test_no_pause_is_longer_than_five_minutes(failures: int) -> None:
    assert 5.0 <= pause_s(failures, None) <= 300.0
