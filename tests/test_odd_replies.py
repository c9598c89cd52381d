"""What a site may answer that nobody thought of: it costs that site its round, and never the run."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import server.one_round
import server.roster
from tests.federation import StubSite, good_answer, metric_rows, random_tensors, reply_with, small_study
from tests.test_rounds import ct, federate, xray
from unimiss_core.errors import RoundError, WireError
from unimiss_core.wire import TrainReply, TrainRequest

pytestmark = pytest.mark.usefixtures("narrow")


def zeros(request: TrainRequest, site: StubSite) -> TrainReply:
    return reply_with({name: torch.zeros_like(t) for name, t in random_tensors(site.layout, 0).items()}, request, site)


def statuses(out: Path, site: str) -> list[tuple[str, str]]:
    return [(row["sites"][site]["status"], row["sites"][site]["reason"]) for row in metric_rows(out)]


def test_updates_of_zeros_say_nothing_of_how_large_updates_are(tmp_path: Path) -> None:
    """Of the round before, whoever sent them: neither does an update of the usual size seem too large after them, nor
    does the run end."""
    sites = [xray("good"), xray("idle", zeros), xray("still", zeros), xray("away", zeros)]
    state = federate(tmp_path, sites, small_study(3))
    assert state.round == 3
    assert statuses(tmp_path, "good") == [("ok", "")] * 3
    assert statuses(tmp_path, "idle") == [("ok", "")] * 3


def test_zeros_do_not_lower_what_is_usual(tmp_path: Path) -> None:
    """Six of them beside five updates of one size: one that is 100 times as large is still refused."""
    honest = [xray(f"good-{number}") for number in range(4)]
    idle = [xray(f"idle-{number}", zeros) for number in range(6)]

    def grows(request: TrainRequest, site: StubSite) -> TrainReply:
        reply = good_answer(request, site)
        return replace(reply, update={n: 100.0 ** (request.round - 1) * t for n, t in reply.update.items()})

    federate(tmp_path, [*honest, *idle, xray("grows", grows)], small_study(2))
    assert statuses(tmp_path, "grows") == [("ok", ""), ("refused", "too_large")]
    assert statuses(tmp_path, "good-0") == [("ok", "")] * 2


def test_a_run_whose_only_updates_were_zeros_goes_on_when_others_come(tmp_path: Path) -> None:
    """Resumed, too: what the checkpoint remembers of sizes ends no try."""

    def away(request: TrainRequest, site: StubSite) -> TrainReply:
        if request.round < 4:
            raise WireError("failed", "not now")
        return good_answer(request, site)

    def leaves(request: TrainRequest, site: StubSite) -> TrainReply:
        if request.round > 3:
            raise WireError("failed", "no more")
        return zeros(request, site)

    study = small_study(6)
    with pytest.raises(RoundError):
        federate(tmp_path, [xray("broken", leaves)], study)
    assert federate(tmp_path, [xray("broken", leaves), xray("good", away)], study, resume=True).round == 6


def test_whatever_a_reply_raises_costs_its_site_the_round_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    admit = server.one_round.admit

    def admit_but(reply: TrainReply, **rest: Any) -> float:
        if reply.site == "odd":
            raise ZeroDivisionError("patient P123")
        return admit(reply, **rest)

    monkeypatch.setattr(server.one_round, "admit", admit_but)
    with caplog.at_level(logging.WARNING):
        state = federate(tmp_path, [xray("odd"), ct()], small_study(2))
    assert state.round == 2
    assert statuses(tmp_path, "odd") == [("refused", "malformed")] * 2
    assert statuses(tmp_path, "ct") == [("ok", "")] * 2
    assert metric_rows(tmp_path)[0]["sites"]["odd"]["steps"] == 0
    assert "ZeroDivisionError at test_odd_replies.py:" in caplog.text
    assert "P123" not in caplog.text


def test_whatever_an_introduction_raises_costs_its_site_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard = server.roster.introduction_of

    def heard_but(reply: Any) -> Any:
        introduction = heard(reply)
        return introduction if introduction.site == "ct" else 1 / 0

    monkeypatch.setattr(server.roster, "introduction_of", heard_but)
    assert federate(tmp_path, [xray("odd"), ct()], small_study(1)).round == 1
    assert statuses(tmp_path, "odd") == [("refused", "malformed")]
    assert "ZeroDivisionError at test_odd_replies.py:" in caplog.text
