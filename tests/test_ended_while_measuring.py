"""A site that is ended while it measures held-out patients: the round's steps count, and it does not measure again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from client import trainer
from client.site import Site
from tests.labelled_hospitals import opened
from tests.test_federated_finetuning import request_of
from tests.test_held_out import AUC, PICTURES, known_hospital, validated
from tests.test_trainer import steps_taken, watched

STUDY = validated(2, local_steps=3)


def site_in(folder: Path) -> Site:
    return opened(known_hospital(folder / "north", 11, pictures=PICTURES), STUDY)


def test_a_site_that_is_killed_while_it_measures_goes_on_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, _ = steps_taken(site_in(tmp_path / "unbroken"), request_of(STUDY))
    assert AUC in unbroken.diagnostics

    def killed(*_: Any) -> None:
        raise SystemExit

    site = site_in(tmp_path / "killed")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "measured", killed)
        with pytest.raises(SystemExit):
            steps_taken(site, request_of(STUDY))
    reply, steps, said = watched(site, request_of(STUDY))
    assert steps == []
    assert all(torch.equal(reply.update[name], change) for name, change in unbroken.update.items())
    assert reply.diagnostics == {name: value for name, value in unbroken.diagnostics.items() if name != AUC}
    assert "north: does not measure the shared model in round 1: it was ended by that, or soon after" in said
    assert AUC in steps_taken(site, request_of(STUDY, 2))[0].diagnostics


def test_an_error_of_torch_costs_the_figure_and_not_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 of /archive/P1.dcm")

    monkeypatch.setattr(trainer, "measured", fails)
    reply, steps, said = watched(site_in(tmp_path), request_of(STUDY))
    assert steps == [1, 2, 3]
    assert AUC not in reply.diagnostics
    assert any(
        told.startswith("north: does not measure the shared model: RuntimeError at test_ended_") for told in said
    )
