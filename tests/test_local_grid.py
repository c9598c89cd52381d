"""The in-process grid keeps what networks keep: one message at a time, time-to-live, and memory that does not grow."""

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from server.exchange import Exchange
from server.local_grid import MOST_WAITING, LocalGrid
from tests.federation import stub_app
from unimiss_core.wire import Introduction


def arrays() -> RecordDict:
    return RecordDict({"update": ArrayRecord({"a": Array(np.zeros(3))})})


def test_a_straggler_gives_up_its_place_when_its_time_is_over() -> None:
    """One worker: the other site's message is served while the straggler, past its deadline, still runs."""
    release = threading.Event()
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        if context.node_config["slow"]:
            release.wait(20)
        return Message(RecordDict({}), reply_to=message)

    with LocalGrid(app, {"a": {"slow": True}, "b": {"slow": False}}, run_config={}) as grid:
        (late,) = grid.push_messages([grid.create_message(RecordDict({}), "query", 1001, "1", ttl=0.3)])
        time.sleep(0.1)
        (prompt,) = grid.push_messages([grid.create_message(RecordDict({}), "query", 1002, "1", ttl=20)])
        give_up = time.monotonic() + 15
        while not (found := list(grid.pull_messages([prompt]))) and time.monotonic() < give_up:
            time.sleep(0.01)
        release.set()
        time.sleep(0.2)
        assert found
        assert not list(grid.pull_messages([late]))


def test_one_node_serves_one_message_at_a_time() -> None:
    busy, most = [0], [0]
    app = ClientApp()

    @app.query()
    def count(message: Message, _: Context) -> Message:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        busy[0] -= 1
        return Message(RecordDict({}), reply_to=message)

    with LocalGrid(app, {"a": {}}, run_config={}, workers=4) as grid:
        ids = grid.push_messages([grid.create_message(RecordDict({}), "query", 1001, "1") for _ in range(4)])
        give_up = time.monotonic() + 20
        answered = 0
        while answered < len(ids) and time.monotonic() < give_up:
            answered += len(list(grid.pull_messages(ids)))
            time.sleep(0.01)
    assert answered == 4
    assert most[0] == 1


def test_stub_and_grid_keep_messages_apart() -> None:
    """A message that a site changes must not change for others: the grid copies, as a network would."""
    app = stub_app({})
    with LocalGrid(app, {"a": {}}, run_config={}) as grid:
        content = RecordDict({})
        message = grid.create_message(content, "query", 1001, "1")
        (identity,) = grid.push_messages([message])
        assert identity.startswith("message-")
        assert message.metadata.message_id == ""


def test_replies_do_not_pile_up_before_a_coordinator_that_is_slower_than_its_sites() -> None:
    """Each is as large as the model: few lie ready, and the sites that made the others hold their places."""
    made = threading.Semaphore(0)
    app = ClientApp()

    @app.train()
    def reply(message: Message, _: Context) -> Message:
        made.release()
        return Message(arrays(), reply_to=message)

    with LocalGrid(app, {f"site-{n}": {} for n in range(6)}, run_config={}) as grid:
        ids = grid.push_messages([grid.create_message(RecordDict({}), "train", 1001 + n, "1") for n in range(6)])
        assert all(made.acquire(timeout=20) for _ in range(MOST_WAITING + 1))
        assert not made.acquire(timeout=0.3)
        give_up, answered = time.monotonic() + 20, 0
        while answered < len(ids) and time.monotonic() < give_up:
            answered += len(grid.pull_messages(ids))
    assert answered == 6


def test_an_exchange_takes_in_one_reply_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are ready could be as many as there are sites; and one that cannot be read takes none with it."""
    sizes: list[int] = []
    pull = LocalGrid.pull_messages

    def counted(self: LocalGrid, message_ids: Iterable[str]) -> Sequence[Message]:
        sizes.append(len(ids := list(message_ids)))
        return pull(self, ids)

    monkeypatch.setattr(LocalGrid, "pull_messages", counted)
    app = ClientApp()

    @app.train()
    def reply(message: Message, _: Context) -> Message:
        return Message(arrays(), reply_to=message)

    nodes = range(1001, 1007)
    with LocalGrid(app, {f"site-{node}": {} for node in nodes}, run_config={}) as grid:
        exchange = Exchange(grid, deadline_s=20, late_count=False)
        exchange.begin(1)
        assert all(exchange.ask(node, Introduction(str(node), {}), RecordDict({})) for node in nodes)
        assert sorted(asked.node_id for asked, _ in exchange.replies(lambda: True)) == list(nodes)
    assert max(sizes) == 1
