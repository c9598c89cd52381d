"""Every figure that training reports has a name that the wire knows."""

import pytest
import torch

from tests.federation import small_study
from unimiss_core.figures import is_diagnostic, is_loss
from unimiss_core.learner import Learner

VIEWS = {2: (2, 2, 1, 37, 40), 3: (2, 2, 1, 13, 33, 40)}


@pytest.mark.parametrize("objective", ["unimiss", "unimiss_plus"])
def test_what_a_learner_reports_may_travel(objective: str) -> None:
    model = {"prototypes": 16, "reconstruction": objective == "unimiss_plus"}
    learner = Learner(
        small_study(50, objective={"name": objective}, model=model, local={"proximal": 0.1}), ranks={2, 3}
    )
    learner.stay_near({name: p.detach().clone() for name, p in learner.student.named_parameters()})
    for shape in VIEWS.values():
        report = learner.step(torch.rand(shape, generator=torch.Generator().manual_seed(0)), step=0)
        assert all(map(is_loss, report.terms))
        assert all(map(is_diagnostic, report.diagnostics))
    assert all(map(is_diagnostic, learner.round_diagnostics()))


@pytest.mark.parametrize("name", ["", "image_to_", "patient", "skipped_batches_image", "target_entropy", "image_image"])
def test_other_names_are_no_figures(name: str) -> None:
    assert not is_loss(name)
    assert not is_diagnostic(name)
