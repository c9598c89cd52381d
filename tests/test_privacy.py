"""What a study's noise amounts to, and what a site does about a study that promises site-level privacy."""

import math
import re
from pathlib import Path

import pytest

from client import site as sites
from tests.federation import RUN, small_study
from tests.test_private_rounds import IMAGES, SCANS, Hospital, request
from unimiss_core import progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.privacy import Mechanism, joint_multiplier, mechanisms
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply

PATIENT = {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 1.0, "centre_noise": 5.0}
SITE = {"mode": "site", "max_epsilon": 8.0, "noise_multiplier": 4.0, "clip_norm": 1.0, "sites": 5}
FIT = {"batch": {"images": 128, "volumes": 128}, "aggregation": {"max_size_ratio": None}}
"""What else either asks of a study."""


@pytest.mark.parametrize(("noises", "expected"), [((1.0, 5.0, 20.0), 0.979), ((1.0, 10.0, 20.0), 0.994)])
def test_releases_over_one_draw_count_as_one(noises: tuple[float, ...], expected: float) -> None:
    """The two rows of the design's section 1.4, whose third release is a loss."""
    gradient, centre, loss = noises
    joined = joint_multiplier(joint_multiplier(gradient, centre, 1), loss, 1)
    assert joined == pytest.approx(expected, abs=5e-4)


def test_several_representations_are_one_vector_of_longer_reach() -> None:
    """R unit vectors end to end have length sqrt(R): a noise of s_f covers them as s_f / sqrt(R) covers one."""
    assert joint_multiplier(1.0, 5.0, 2) == pytest.approx(joint_multiplier(1.0, 5.0 / math.sqrt(2), 1))


def test_a_sites_mechanisms_are_those_of_the_ranks_it_trains() -> None:
    study = small_study(
        6,
        privacy={**PATIENT, "sampling_rate": {"images": 0.1, "volumes": 0.2}},
        schedule={"rounds": 6, "local_steps": 3, "alternate": [1, 2]},
        **FIT,
    )
    image, volume = joint_multiplier(1.0, 5.0, 1), joint_multiplier(1.0, 5.0, 2)
    assert mechanisms(study, {2}, [1, 2]) == [Mechanism(image, 0.1, 6)]
    assert mechanisms(study, {3}, range(1, 7)) == [Mechanism(volume, 0.2, 18)]
    assert mechanisms(study, {2, 3}, range(1, 7)) == [Mechanism(image, 0.1, 6), Mechanism(volume, 0.2, 12)]
    assert mechanisms(study, {2, 3}, []) == []
    with pytest.raises(ValueError, match="mode is none"):
        mechanisms(small_study(), {2}, [1])


def test_a_study_without_privacy_keeps_its_digest() -> None:
    plain = small_study(**FIT)
    assert "privacy" not in plain.canonical()
    private = small_study(privacy=PATIENT, **FIT)
    assert small_study(privacy={"mode": "none"}, **FIT).digest() == plain.digest() != private.digest()


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ({"mode": "patent"}, r"'privacy\.mode': expected one of none, patient, site, got \"patent\" \(did you mean"),
        ({"mode": "patient"}, r"missing key 'privacy\.max_epsilon'"),
        ({**PATIENT, "sites": 3}, r"unknown key 'privacy\.sites' \(a setting of mode: site\)"),
        ({"clip_norm": 1.0}, r"unknown key 'privacy\.clip_norm' \(a setting of mode: patient or site\)"),
        ({**PATIENT, "noise_multiplier": 0.0}, r"privacy\.noise_multiplier"),
    ],
)
def test_mistakes_are_told_by_their_key(privacy: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(StudyConfig, {"name": "x", "privacy": privacy}, where="test")


def site_level(rounds: int = 1) -> StudyConfig:
    return small_study(rounds, privacy=SITE, aggregation={"max_size_ratio": None}, batch={"images": 4})


def test_a_site_refuses_a_site_level_study_whose_noise_does_not_keep_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At z = 4, 100 rounds cost 13, and 8 is promised; before a scan is read."""
    monkeypatch.setattr(sites, "open_library", lambda *_: pytest.fail("read"))
    heard: list[progress.Event] = []
    with progress.listen(heard.append), Hospital(tmp_path).asked() as ask:
        answer = ask(Hello(site_level(100), RUN).pack(), "query")
    assert Refusal.found_in(answer) == Refusal("promise")
    (told,) = [event.text for event in heard if isinstance(event, progress.Note)]
    assert re.search(r"comes to epsilon 13\.2 .*above privacy\.max_epsilon=8", told)


def test_in_a_site_level_study_a_site_trains_and_tells_as_without_privacy(tmp_path: Path) -> None:
    """There the coordinator is trusted with counts and losses, and no patient is charged."""
    hospital = Hospital(tmp_path)
    with hospital.asked() as ask:
        told = Introduction.unpack(ask(Hello(site_level(), RUN).pack(), "query"))
        reply = TrainReply.unpack(ask(request(site_level()), "train"), IMAGES, "bf16")
    assert told.scans == reply.scans == {2: SCANS, 3: 0}
    assert reply.losses.keys() == {"image"}
    assert hospital.entries == []
