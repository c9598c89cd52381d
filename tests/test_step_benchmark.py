"""The baseline that `benchmarks/step.py` measures computes the same as the step that it is compared with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.naive_unimiss import naive_loss
from unimiss_core.network import build_network
from unimiss_core.objective import UniMiSS
from unimiss_core.study import ModelConfig, UniMiSSConfig


@pytest.mark.parametrize("shape", [(2, 3, 1, 37, 50), (2, 2, 1, 13, 33, 40)])
def test_the_baseline_is_the_same_loss_and_gradient_in_float32(shape: tuple[int, ...]) -> None:
    model = ModelConfig(prototypes=24)
    student, teacher = build_network(model, seed=0), build_network(model, seed=1)
    views = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    objective = UniMiSS(UniMiSSConfig())
    start = {name: torch.zeros(128) for name in objective.representations(2 if len(shape) == 5 else 3)}
    fast = objective(student, teacher, views, start)
    terms, centre = naive_loss(student, teacher, views, {})
    assert {name: term.item() for name, term in fast.terms.items()} == pytest.approx(
        {name: term.item() for name, term in terms.items()}, rel=1e-4
    )
    parameters = [p for name, p in student.named_parameters() if len(shape) == 6 or "3d" not in name.split(".")]
    ours = torch.autograd.grad(fast.total, parameters)
    theirs = torch.autograd.grad(torch.stack(list(terms.values())).sum(), parameters)
    whole = torch.stack([gradient.norm() for gradient in theirs]).norm()
    for mine, naive in zip(ours, theirs, strict=True):
        assert (mine - naive).norm() <= 1e-3 * max(naive.norm(), 1e-3 * whole)
    for name, observed in fast.observed.items():
        torch.testing.assert_close(teacher.prototypes(0.1 * observed.bottleneck), centre[name], atol=1e-5, rtol=1e-4)


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step.py"


def said_of(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--device", "gpu", "'gpu' is no device's name"),
        ("--device", "cuda:99", "cuda:99 is not on this machine"),
        ("--batch", "0", "expected a whole number above 0, got 0"),
        ("--repeats", "0", "expected a whole number above 0, got 0"),
        ("--variant=naive", "--model=plus", "--model plus: the naive step is of MiT alone; leave --variant out"),
    ],
)
def test_options_that_cannot_be_met_are_told_at_once(option: str, value: str, told: str) -> None:
    done = said_of(option, value)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]


def test_a_case_that_fails_ends_the_benchmark() -> None:
    """One prototype is no study's."""
    options = "--model nano --rank 2 --variant fast --precision fp32 --prototypes 1 --repeats 1 --device cpu"
    done = said_of(*options.split())
    assert done.returncode == 1
    assert "fast fp32, 2D, ended before it was measured; see above" in done.stderr.splitlines()[-1]


def test_the_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    options = "--model nano --rank 2 --batch 2 --precision fp32 --prototypes 32 --repeats 1 --threads 1 --device cpu"
    command = [sys.executable, SCRIPT, *options.split(), "--json", tmp_path / "step.json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    assert "naive fp32" in said
    assert "fast fp32 in 1s recomputed" in said
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [result["case"]["variant"] for result in results] == ["naive", "fast", "fast"]
    assert [result["first_loss"] for result in results[1:]] == pytest.approx([results[0]["first_loss"]] * 2, rel=1e-4)


def test_the_benchmark_measures_the_other_objective(tmp_path: Path) -> None:
    options = "--model nano --rank 3 --batch 2 --precision fp32 --prototypes 32 --repeats 1 --threads 1 --device cpu"
    command = [sys.executable, SCRIPT, *options.split(), "--objective", "unimiss_plus"]
    subprocess.run([*command, "--json", tmp_path / "step.json"], capture_output=True, check=True, timeout=200)
    naive, whole, in_parts = json.loads((tmp_path / "step.json").read_text())["results"]
    assert (naive["case"]["objective"], whole["case"]["objective"]) == ("unimiss", "unimiss_plus")
    assert whole["first_loss"] != pytest.approx(naive["first_loss"], rel=1e-2)
    assert in_parts["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-4)
