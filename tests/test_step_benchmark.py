"""The baseline that `benchmarks/step.py` measures computes the same as the step that it is compared with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # the script finds its neighbours there


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The script's own `main`, in this process: another would spend its time on importing torch."""
    import step

    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    step.main()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--device", "gpu", "'gpu' is no device's name"),
        ("--device", "cuda:99", "cuda:99 is not on this machine"),
        ("--batch", "0", "expected a whole number above 0, got 0"),
        ("--repeats", "0", "expected a whole number above 0, got 0"),
        ("--variant=naive", "--profile", "--largest and --profile are of ours; give --variant fast"),
        ("--device=cpu", "--largest", "--largest: on a CPU a batch that is too large ends the process"),
        ("--variant=naive", "--model=plus", "--model plus: the naive step is of MiT alone; leave --variant out"),
    ],
)
def test_options_that_cannot_be_met_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, option, value)
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_case_that_fails_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prototype is no study's."""
    options = "--model nano --rank 2 --variant fast --precision fp32 --prototypes 1 --repeats 1 --device cpu"
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, *options.split())
    assert "fast fp32, 2D, ended before it was measured; see above" in capsys.readouterr().err.splitlines()[-1]


def results_of(file: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The figures that the benchmark writes, and what it says. In a process of its own, as it is typed: memory of this
    one would count in the figures."""
    nano = "--model nano --batch 2 --precision fp32 --prototypes 32 --repeats 1 --threads 1 --device cpu"
    command = [sys.executable, BENCHMARKS / "step.py", *nano.split(), *options, "--json", file]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    return json.loads(file.read_text())["results"], said


def test_the_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    results, said = results_of(tmp_path / "step.json", "--rank", "2")
    assert "naive fp32" in said
    assert "fast fp32 in 1s recomputed" in said
    assert [result["case"]["variant"] for result in results] == ["naive", "fast", "fast"]
    assert [result["first_loss"] for result in results[1:]] == pytest.approx([results[0]["first_loss"]] * 2, rel=1e-4)


def test_the_benchmark_measures_the_other_objective(tmp_path: Path) -> None:
    (naive, whole, in_turn, in_parts), _ = results_of(
        tmp_path / "step.json", "--rank", "3", "--objective", "unimiss_plus"
    )
    assert (naive["case"]["objective"], whole["case"]["objective"]) == ("unimiss", "unimiss_plus")
    assert whole["first_loss"] != pytest.approx(naive["first_loss"], rel=1e-2)
    assert [in_turn["case"]["switches"][name] for name in ("views_in_turn", "recompute")] == [True, False]
    others = [in_turn["first_loss"], in_parts["first_loss"]]
    assert others == pytest.approx([whole["first_loss"]] * 2, rel=1e-4)
