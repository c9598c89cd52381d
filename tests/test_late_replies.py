"""Late replies of sites that are not there any more, or that are there under another node."""

import threading
import time
from pathlib import Path

import pytest
import torch

from server.coordinator_config import CoordinatorConfig
from server.rounds import Federation
from tests.federation import StubSite, good_answer, metric_rows, stub_app
from tests.test_faults import BAD_ROUND, Grid, _update, exact_study, federate, only_in_bad_round, site
from unimiss_core import checkpoint
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")


class Slow:
    """A site that answers the bad round when the next one has begun, and one that begins it: it sees to the order."""

    def __init__(self) -> None:
        self.begun, self.sent = threading.Event(), threading.Event()

    def slow(self, request: TrainRequest, of: StubSite) -> TrainReply:
        self.begun.wait(20)
        self.sent.set()
        return good_answer(request, of)

    def prompt(self, request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == BAD_ROUND + 1:
            self.begun.set()
            self.sent.wait(20)
            time.sleep(1.0)  # until the other's reply has been fetched
        return good_answer(request, of)


def test_the_late_reply_of_a_site_that_left_meanwhile_counts(tmp_path: Path) -> None:
    late = Slow()
    slow, prompt = site("slow", only_in_bad_round(late.slow)), site("a", late.prompt)

    def present(name: str) -> bool:
        return name == "a" or len(prompt.requests) < BAD_ROUND

    state = federate(tmp_path, [slow, prompt], exact_study(late_weight=0.5), present=present, deadline_s=4.0)
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0002").student
    ours, theirs = _update("a", 3), _update("slow", 2)
    for name, update in ours.items():
        expected = start[name].double() + (update.double() + 0.5 * theirs[name].double()) / 1.5
        torch.testing.assert_close(state.student[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert metric_rows(tmp_path)[-1]["sites"]["slow"]["status"] == "late"
    assert state.taught["slow"] == BAD_ROUND


def test_a_site_that_came_back_as_another_node_counts_once_in_a_round(tmp_path: Path) -> None:
    """Its old node's reply to round 2 arrives in round 3, for which its new node was asked."""
    late = Slow()
    old, prompt = site("twin", only_in_bad_round(late.slow)), site("a", late.prompt)

    def after_the_old_reply(request: TrainRequest, of: StubSite) -> TrainReply:
        late.sent.wait(20)
        time.sleep(0.5)
        return good_answer(request, of)

    new = site("twin", after_the_old_reply)
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path, wait_s=0.1, retry_s=0.0, deadline_s=4.0)
    nodes = {"old": {"name": "old"}, "new": {"name": "new"}, "a": {"name": "a"}}
    app = stub_app({"old": old, "new": new, "a": prompt})
    with Grid(app, nodes, run_config={}, workers=3) as grid:
        grid.present = lambda name: name == ("old" if len(prompt.requests) < BAD_ROUND else "new") or name == "a"
        state = Federation(grid, exact_study(late_weight=0.5), config).run()
    assert [request.round for request in new.requests] == [3]
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0002").student
    ours, theirs = _update("a", 3), _update("twin", 3)
    for name, update in ours.items():
        expected = start[name].double() + (update.double() + theirs[name].double()) / 2
        torch.testing.assert_close(state.student[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert metric_rows(tmp_path)[-1]["sites"]["twin"]["status"] == "ok"
