"""Rounds that are tried again, and rounds whose sites have to queue: the model is that of a run without the fault."""

import threading
import time
from pathlib import Path

import pytest
import torch

from server.run_folder import RunFolder
from tests.federation import Answer, StubSite, good_answer, metric_rows, small_study
from tests.test_faults import (
    BAD_ROUND,
    _update,
    all_good,
    assert_is_model_of,
    exact_study,
    federate,
    hanging_until_the_next_round,
    only_in_bad_round,
    raises,
    site,
)
from unimiss_core import checkpoint
from unimiss_core.errors import WireError
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")


def fails_once_in(round: int) -> Answer:
    def answer(request: TrainRequest, of: StubSite) -> TrainReply:
        again = sum(earlier.round == round for earlier in of.requests) > 1
        return good_answer(request, of) if again or request.round != round else raises(request, of)

    return answer


# -- fewer workers than sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_sites_that_queue_for_a_worker_all_count(tmp_path: Path, workers: int) -> None:
    names = ("a", "b", "ct", "ct-2", "c")
    state = federate(tmp_path, [site(name) for name in names], workers=workers)
    assert_is_model_of(state, tmp_path, all_good(*names))


def test_a_site_that_hangs_keeps_one_worker_from_the_others_and_not_both(tmp_path: Path) -> None:
    hangs, honest = hanging_until_the_next_round()
    sites = [site("slow", only_in_bad_round(hangs)), site("a", honest), site("b"), site("ct")]
    state = federate(tmp_path, sites, workers=2, deadline_s=3.0)
    assert_is_model_of(state, tmp_path, all_good("slow", "a", "b", "ct", but="slow"))
    assert metric_rows(tmp_path)[BAD_ROUND - 1]["sites"]["slow"]["reason"] == "no_reply"


def test_a_site_that_hangs_on_the_only_worker_costs_a_try_and_no_site_its_round(tmp_path: Path) -> None:
    """Whoever queues behind it when the deadline passes is asked again."""

    def hangs_once(request: TrainRequest, of: StubSite) -> TrainReply:
        if sum(earlier.round == BAD_ROUND for earlier in of.requests) == 1 and request.round == BAD_ROUND:
            time.sleep(3.5)
        return good_answer(request, of)

    sites = [site("slow", hangs_once), site("a"), site("ct")]
    state = federate(tmp_path, sites, workers=1, deadline_s=2.0, min_sites=3, min_replies=3)
    assert_is_model_of(state, tmp_path, all_good("slow", "a", "ct"))


# -- a round that is tried again ---------------------------------------------------------------------------------------


def test_the_median_of_a_round_that_is_tried_again_is_that_of_every_site_once(tmp_path: Path) -> None:
    sites = [site("a"), site("b"), site("c", fails_once_in(BAD_ROUND))]
    state = federate(tmp_path, sites, exact_study(rule="median"), min_sites=3, min_replies=3)
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0000").student
    for name in _update("a", 1):
        expected = start[name].double()
        for round in (1, 2, 3):
            expected = expected + torch.stack([_update(of, round)[name].double() for of in "abc"]).median(dim=0).values
        torch.testing.assert_close(state.student[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert [len(of.requests) for of in sites] == [3, 3, 4]
    assert not RunFolder(tmp_path).scratch.exists()


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_in_int8_a_round_that_is_tried_again_gives_the_bits_of_one_that_is_not(tmp_path: Path, rule: str) -> None:
    study = small_study(3, wire={"dtype": "int8"}, aggregation={"rule": rule})
    faulty, whole = ([site("a"), site("ct"), site("b", answer)] for answer in (fails_once_in(BAD_ROUND), good_answer))
    quorum = {"min_sites": 3, "min_replies": 3}
    ours = federate(tmp_path / "faulty", faulty, study, **quorum)
    theirs = federate(tmp_path / "whole", whole, study, **quorum)
    for part in ("student", "teacher"):
        held, expected = getattr(ours, part), getattr(theirs, part)
        assert all(torch.equal(held[name], expected[name]) for name in expected)
    first, again = [request for request in faulty[2].requests if request.round == BAD_ROUND]
    assert first.student_step is not None
    assert again.student_step is not None
    assert all(torch.equal(again.student_step[name], step) for name, step in first.student_step.items())


def test_a_late_reply_that_counts_in_one_try_counts_in_the_next_and_once(tmp_path: Path) -> None:
    begun = threading.Event()

    def slow(request: TrainRequest, of: StubSite) -> TrainReply:
        begun.wait(20)
        return good_answer(request, of)

    def begins(request: TrainRequest, of: StubSite) -> TrainReply:
        if request.round == BAD_ROUND + 1:
            begun.set()
        return good_answer(request, of)

    fails = fails_once_in(BAD_ROUND + 1)
    sites = [site("slow", only_in_bad_round(slow)), site("a", begins), site("b", fails), site("c", fails)]
    state = federate(
        tmp_path, sites, exact_study(late_weight=0.5), deadline_s=4.0, min_sites=3, min_replies=3, round_tries=2
    )
    start = checkpoint.load(tmp_path / "checkpoints" / "round-0002").student
    for name in _update("a", 3):
        total = 0.5 * _update("slow", 2)[name].double() + sum(_update(of, 3)[name].double() for of in "abc")
        torch.testing.assert_close(
            state.student[name].double(), start[name].double() + total / 3.5, rtol=1e-5, atol=1e-6
        )
    last = metric_rows(tmp_path)[-1]["sites"]
    assert {name: line["status"] for name, line in last.items()} == {"slow": "late", "a": "ok", "b": "ok", "c": "ok"}
    assert [request.round for request in sites[0].requests] == [1, 2]


# -- a site at work for another coordinator ----------------------------------------------------------------------------


def test_a_site_that_is_busy_with_another_run_costs_itself_that_round_alone(tmp_path: Path) -> None:
    """It answers so itself; the coordinator knows of no round of this run that it is at work on."""

    def at_work_elsewhere(_: TrainRequest, __: StubSite) -> TrainReply:
        raise WireError("busy", "another process of this site is at work on a private round")

    state = federate(tmp_path, [site("a"), site("b", only_in_bad_round(at_work_elsewhere)), site("ct")])
    assert_is_model_of(state, tmp_path, all_good("a", "b", "ct", but="b"))
    told = metric_rows(tmp_path)[BAD_ROUND - 1]["sites"]["b"]
    assert (told["status"], told["reason"]) == ("refused", "busy")
