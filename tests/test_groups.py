import pytest
import torch

from tests.federation import small_study
from unimiss_core.groups import GROUPS, group_of, groups_of_ranks, ranks_needed
from unimiss_core.network import Network, build_network
from unimiss_core.objective import new_centre
from unimiss_core.objectives import build_objective
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

STUDIES = [
    small_study(),
    small_study(model={"prototypes": 16, "reconstruction": True}, objective={"name": "unimiss_plus"}),
]
of_each_objective = pytest.mark.parametrize("study", STUDIES, ids=[study.objective.name for study in STUDIES])


def names_reached(study: StudyConfig, network: Network, rank: Rank) -> set[str]:
    """The parameters that autograd gives a gradient when the objective sees scans of this rank."""
    teacher = build_network(study.model, seed=1)
    objective = build_objective(study)
    centre = new_centre(objective.representations(rank), 128, torch.device("cpu"))
    size = (33, 40) if rank == 2 else (13, 33, 40)
    torch.autograd.backward(objective(network, teacher, torch.rand(1, 2, 1, *size), centre).total)
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None}


@of_each_objective
@pytest.mark.parametrize("rank", [2, 3])
def test_the_groups_of_a_rank_are_what_autograd_reaches(study: StudyConfig, rank: Rank) -> None:
    network = build_network(study.model, seed=0)
    expected = {name for name, _ in network.named_parameters() if group_of(name) in groups_of_ranks({rank})}
    assert names_reached(study, network, rank) == expected


def test_every_group_has_parameters() -> None:
    network = build_network(small_study().model, seed=0)
    assert {group_of(name) for name, _ in network.named_parameters()} == set(GROUPS)


@of_each_objective
def test_only_the_rank_switches_tell_2d_from_3d(study: StudyConfig) -> None:
    shapes = {name: p.ndim for name, p in build_network(study.model, seed=0).named_parameters()}
    assert all(ndim != 5 or group_of(name) == "3d" for name, ndim in shapes.items())
    assert all(ndim != 4 or group_of(name) == "2d" for name, ndim in shapes.items())


def test_a_site_with_volumes_trains_all_and_one_with_images_all_but_3d() -> None:
    assert groups_of_ranks({2}) == {"shared", "2d", "head"}
    assert groups_of_ranks({3}) == groups_of_ranks({2, 3}) == set(GROUPS)
    assert groups_of_ranks(()) == frozenset()


def test_volumes_need_the_2d_path() -> None:
    assert ranks_needed({2}) == (2,)
    assert ranks_needed({3}) == ranks_needed({2, 3}) == (2, 3)
