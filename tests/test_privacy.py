"""What a study's noise amounts to, and that no round of a private study goes out before there is a ledger."""

import math
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client.app import app
from server.coordinator_config import CoordinatorConfig
from server.local_grid import LocalGrid
from server.rounds import Federation
from tests.federation import RUN, small_study, stub_app
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.privacy import Mechanism, joint_multiplier, mechanisms
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Refusal

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


def test_a_federation_of_a_site_level_study_is_refused_at_both_ends(tmp_path: Path) -> None:
    study = small_study(privacy=SITE, **FIT)
    config = CoordinatorConfig(study=Path("unused"), out=tmp_path / "out")
    with (
        LocalGrid(stub_app({}), {}, run_config={}) as grid,
        pytest.raises(ConfigError, match="is not offered by this version"),
    ):
        Federation(grid, study, config)
    assert not (tmp_path / "out").exists()
    file = tmp_path / "site.yaml"
    file.write_text(f"name: a\nstate: {tmp_path / 'state'}\ndata: [{{folder: {tmp_path / 'none'}}}]\n")
    context = Context(1, 5, {"site": str(file)}, RecordDict(), {})
    for kind in ("query", "train"):
        reply = app(Message(Hello(study, RUN).pack(), 5, kind, ttl=100.0), context)
        assert Refusal.found_in(reply.content) == Refusal("site_setup")
    assert not (tmp_path / "state").exists()
