"""The coordinator's processes, played by small scripts: order, patience, logs, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server import children, superlink
from server.children import ChildError, Children, Member, Recipe
from server.home import Home
from server.server_config import ServerConfig
from unimiss_core import tether
from unimiss_core.child import KEPT_LOGS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def recipe(name: str, code: str, is_ready: Callable[[], bool] = lambda: True) -> Recipe:
    return Recipe(name, [sys.executable, "-c", code], is_ready)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Callable[..., Children]]:
    made: list[Children] = []

    def make(*recipes: Recipe, **settings: object) -> Children:
        (tmp_path / "empty").mkdir()
        one = Children(recipes, tmp_path, tmp_path / "empty", ENVIRONMENT, 1_000_000, **settings)  # type: ignore[arg-type]
        made.append(one)
        return one

    yield make
    for one in made:
        one.end()


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


NOTES = "import signal, sys, time; from pathlib import Path; book = Path('../book').open('a', buffering=1)\n"
STAYS = NOTES + (
    "signal.signal(signal.SIGTERM, lambda *_: (book.write(NAME + ' ends\\n'), sys.exit()))\n"
    "book.write(NAME + ' begins\\n'); Path('../' + NAME).touch(); time.sleep(60)"
)


def test_they_begin_in_order_and_end_in_reverse(tmp_path: Path, family: Callable[..., Children]) -> None:
    names = ("a", "b", "c")
    one = family(*(recipe(n, f"NAME = '{n}'\n{STAYS}", (tmp_path / n).exists) for n in names))
    one.start()
    one.end()
    book = (tmp_path / "book").read_text().split("\n")[:-1]
    assert book == [*(f"{n} begins" for n in names), *(f"{n} ends" for n in reversed(names))]


def test_one_that_does_not_begin_is_told_with_its_log(tmp_path: Path, family: Callable[..., Children]) -> None:
    with pytest.raises(ChildError, match=r"b does not begin; .*b\.log says why"):
        family(recipe("a", "input()"), recipe("b", "raise SystemExit('no port')", lambda: False)).start()
    until(lambda: (tmp_path / "b.log").exists() and "no port" in (tmp_path / "b.log").read_text())


def test_whatever_ends_is_started_again_with_patience(family: Callable[..., Children]) -> None:
    """Exit code 0 is an end as well; pauses double up to the longest, and begin anew once a child has stayed."""
    now = 0.0
    one = family(recipe("a", "pass"), clock=lambda: now)
    (child,) = one.members
    one.start()
    pauses = []
    for _ in range(9):
        assert child.process is not None
        child.process.wait()
        one.look_after()
        assert child.process is None
        pauses.append(child.not_before - now)
        now = child.not_before - 0.01
        one.look_after()
        assert child.process is None
        now += 0.02
        one.look_after()
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])
    assert (child.restarts, child.last_code) == (9, 0)


def test_a_child_that_stayed_is_started_again_soon(family: Callable[..., Children]) -> None:
    now = 0.0
    one = family(recipe("a", "input()"), clock=lambda: now)
    (child,) = one.members
    one.start()
    child.pause_s = 32.0
    now = children.STAYED_S + 1
    one.look_after()
    assert child.pause_s == children.FIRST_PAUSE_S


def test_a_child_that_is_ended_alone_is_started_again(family: Callable[..., Children]) -> None:
    now = 0.0
    one = family(recipe("a", "input()"), recipe("b", "input()"), clock=lambda: now)
    one.start()
    now = 7.0
    first, second = (member.process.pid for member in one.members if member.process is not None)
    one.end_one("a")
    assert (one.runs_s("a"), one.runs_s("b")) == (0.0, 7.0)
    one.look_after()
    now += children.FIRST_PAUSE_S
    one.look_after()
    again = [member.process.pid for member in one.members if member.process is not None]
    assert again[0] != first
    assert again[1] == second


def test_a_child_that_will_not_end_is_killed_with_what_it_started(
    tmp_path: Path, family: Callable[..., Children], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "END_S", 0.3)
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('../pid.part', 'w').write(str(one.pid)); import os; os.rename('../pid.part', '../pid'); time.sleep(60)"
    )
    one = family(recipe("deaf", deaf, (tmp_path / "pid").exists))
    one.start()
    one.end()
    until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_a_full_log_makes_room(tmp_path: Path, family: Callable[..., Children]) -> None:
    one = family(recipe("a", "print(*range(100), sep='\\n')"))
    one.log_bytes = 1_000
    one.start()
    until(lambda: (log := one.log_of(one.members[0])).exists() and log.read_text().endswith(" 99\n"))
    assert one.log_of(one.members[0]).stat().st_size <= 1_000
    assert (tmp_path / "a.log.1").exists()


def test_the_coordinators_page_tells_what_room_logs_take() -> None:
    config = ServerConfig(address="127.0.0.1:9443")
    files, logs = 1 + KEPT_LOGS, len(superlink.family(Home(Path("/home")), config).recipes)
    told = f"of each {files} files of {config.log_mb:g} MB (`log_mb`), {files * logs * config.log_mb:g} MB in all"
    page = " ".join((ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8").split())
    assert told in page


def test_none_outlives_its_starter_however_that_ends() -> None:
    """The starter is killed; the tethered process, deaf to SIGTERM, and what it started, end all the same."""
    tethered_code = (
        "import os, signal, subprocess, sys, time; from unimiss_core import tether\n"
        "tether.PATIENCE_S = 0.3; tether.watch(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), one.pid, flush=True); time.sleep(60)"
    )
    starter_code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {tethered_code!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", starter_code], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    numbers = [int(number) for number in starter.stdout.readline().split()]
    assert all(map(is_alive, numbers))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    until(lambda: not any(map(is_alive, numbers)))


def test_a_tethered_command_is_the_installations_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unimiss_core.tether", "unimiss-site", "nonsense"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdin=pipe, stderr=pipe, text=True) as done:
        assert done.stderr is not None
        assert "unimiss-site: error: argument COMMAND: invalid choice: 'nonsense'" in done.stderr.read()
    assert done.returncode == 2


def test_a_childs_standing_is_told_while_it_runs(family: Callable[..., Children]) -> None:
    one = family(recipe("a", "input()"))
    assert not Member(one.recipes[0]).is_running
    one.start()
    assert one.members[0].is_running
    assert tether.PATIENCE_S < children.END_S  # of a starter that is killed; one that is not has more


def is_alive(number: int) -> bool:
    """A process that has ended and is not yet waited for is not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
