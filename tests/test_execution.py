"""However a step is computed - recomputed, compiled, in parts -, its loss, gradients and names are the same."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.test_learner import apart, assert_same, copied, everything, images, in_float64, plus_study, study, volumes
from unimiss_core import execution
from unimiss_core.errors import MemoryTooSmallError
from unimiss_core.execution import Execution, compiling, set_up_blocks_
from unimiss_core.layers import Block
from unimiss_core.learner import Learner
from unimiss_core.model import ARCHITECTURES, MiT
from unimiss_core.network import Network, build_network, tensors_of
from unimiss_core.objective import Loss
from unimiss_core.scan import Rank
from unimiss_core.study import ModelConfig

NANO = ModelConfig(prototypes=16)
SIZES = [(33, 40), (13, 33, 40)]
IN_TURN, LESS = Execution(views_in_turn=True), Execution(activation_checkpointing=True)


@pytest.fixture(autouse=True)
def _compiled_programs_are_forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()


def gradients(of: Callable[[], Tensor], backbone: MiT) -> dict[str, Tensor]:
    backbone.zero_grad(set_to_none=True)
    torch.autograd.backward(of())
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("class_only", [True, False])
def test_recomputed_activations_give_the_same_bits(size: tuple[int, ...], precision: str, class_only: bool) -> None:
    plain, recomputed = (build_network(NANO, seed=1).backbone for _ in range(2))
    set_up_blocks_(recomputed, recomputed=True)
    x = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))

    def loss(backbone: MiT) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if class_only:
                return backbone(x).float().square().sum()
            features = backbone.features(x)
            maps = (*features.encoder_maps, features.decoder_map, features.class_token)
            return torch.stack([y.float().square().sum() for y in maps]).sum()

    assert torch.equal(loss(recomputed), loss(plain))
    ours, theirs = gradients(lambda: loss(recomputed), recomputed), gradients(lambda: loss(plain), plain)
    assert len(theirs) > 50
    assert_same(ours, theirs)
    assert [name for name, _ in recomputed.named_parameters()] == [name for name, _ in plain.named_parameters()]


def kept_bytes(backbone: MiT, x: Tensor) -> int:
    """What autograd keeps of a forward pass, beside the parameters and what a recomputed block was given."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backbone(x)
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    return sum(tensor.untyped_storage().nbytes() for at, tensor in storages.items() if at not in own)


@pytest.mark.parametrize("size", [(64, 96), (16, 64, 96)], ids=["2d", "3d"])
def test_recomputing_keeps_less_than_half(size: tuple[int, ...]) -> None:
    plain, recomputed = (build_network(NANO, seed=1).backbone for _ in range(2))
    set_up_blocks_(recomputed, recomputed=True)
    x = torch.rand(2, 1, *size)
    assert kept_bytes(recomputed, x) < 0.5 * kept_bytes(plain, x)


def test_nothing_is_recomputed_without_gradients() -> None:
    backbone = build_network(NANO, seed=1).backbone
    runs: list[str] = []
    for name, module in backbone.named_modules():
        if isinstance(module, Block):
            module.norm1.register_forward_hook(lambda *_, name=name: runs.append(name))
    set_up_blocks_(backbone, recomputed=True)
    x = torch.rand(1, 1, 33, 40)
    with torch.no_grad():
        backbone(x)
    assert len(runs) == len(set(runs)) == 7
    torch.autograd.backward(backbone(x).sum())
    assert len(runs) == 7 + 7 + 4  # the blocks of the two first and two last stages once more


@pytest.mark.parametrize("objective", ["unimiss", "unimiss_plus"])
@pytest.mark.parametrize("batch", [images(), volumes()], ids=["images", "volumes"])
@pytest.mark.parametrize("less", [IN_TURN, LESS], ids=["in turn", "recomputed"])
def test_a_step_that_takes_views_in_turn_or_recomputes_is_the_same_step(
    batch: Tensor, objective: str, less: Execution
) -> None:
    """In float64, so that nothing but rounding may differ; the moments after a step are the clipped gradients."""
    of = study() if objective == "unimiss" else plus_study()
    whole = in_float64(apart(Learner(of, ranks={2, 3})))
    recomputed = in_float64(apart(Learner(of, ranks={2, 3}, execution=less)))
    expected, report = whole.step(batch.double(), step=0), recomputed.step(batch.double(), step=0)
    assert report.terms == pytest.approx(expected.terms, rel=1e-9)
    assert report.total == pytest.approx(expected.total, rel=1e-9)
    torch.testing.assert_close(recomputed.state(weights=True).tensors, whole.state(weights=True).tensors)


@pytest.mark.parametrize("objective", ["unimiss", "unimiss_plus"])
@pytest.mark.parametrize("less", [IN_TURN, LESS], ids=["in turn", "recomputed"])
def test_losses_of_volumes_look_at_one_view_each_and_add_up(objective: str, less: Execution) -> None:
    """Of three views: slices of each; then the volumes themselves and their radiographs."""
    of = study() if objective == "unimiss" else plus_study()
    learner = apart(Learner(of, ranks={2, 3}, execution=less))
    views = torch.cat([volumes(), volumes(seed=1)[:, :1]], dim=1)
    whole = learner.objective(learner.student, learner.teacher, views, learner.centre)
    pieces = list(learner._losses_of(views))
    assert len(pieces) == 3 * (2 if objective == "unimiss" else 3)
    assert [piece.observed.keys() for piece in pieces] == [whole.observed.keys(), *[set()] * (len(pieces) - 1)]
    assert all(name.startswith("slices") for piece in pieces[:3] for name in piece.terms)
    for name, term in whole.terms.items():
        parts = [piece.terms[name] for piece in pieces if name in piece.terms]
        assert len(parts) == 3
        torch.testing.assert_close(torch.stack(parts).sum(), term)
    torch.testing.assert_close(torch.stack([piece.total for piece in pieces]).sum(), whole.total)


def test_bf16_with_views_in_turn_and_recomputed_costs_nearly_the_same_loss() -> None:
    exact = apart(Learner(study(), ranks={3})).step(volumes(), step=0)
    less = replace(LESS, precision="bf16")
    assert apart(Learner(study(), ranks={3}, execution=less)).step(volumes(), step=0).terms == pytest.approx(
        exact.terms, rel=0.02
    )


# ------------------------------------------------------------------------------------------------------- compilation


class Backend:
    """A compiler that changes nothing, counts its programs, and fails when it is told to."""

    def __init__(self, *, fails: str = "") -> None:
        self.programs, self.fails = 0, fails

    def __call__(self, program: nn.Module, _: list[Tensor]) -> Callable[..., object]:
        self.programs += 1
        if self.fails == "compiling":
            raise RuntimeError("no C++ compiler\n\nand a long story")

        def run(*inputs: Tensor) -> object:
            if self.fails == "running":
                raise RuntimeError("no C++ compiler\n\nand a long story")
            return program(*inputs)

        return run


def compiled(monkeypatch: pytest.MonkeyPatch, backend: object, **settings: object) -> Learner:
    monkeypatch.setattr(execution, "COMPILER", backend)
    return apart(Learner(study(), ranks={2, 3}, execution=Execution(compile=True, **settings)))


@pytest.mark.parametrize("scans", [images(), volumes()], ids=["images", "volumes"])
def test_compiled_steps_of_the_other_backbone_are_the_same(monkeypatch: pytest.MonkeyPatch, scans: Tensor) -> None:
    """With its reconstructions."""
    of = plus_study()
    of = of.model_copy(update={"model": of.model.model_copy(update={"size": "plus_nano"})})
    monkeypatch.setattr(execution, "COMPILER", backend := Backend())
    plain, ours = (apart(Learner(of, ranks={2, 3}, execution=Execution(compile=on))) for on in (False, True))
    assert ours.step(scans, step=0).terms == pytest.approx(plain.step(scans, step=0).terms, rel=1e-4)
    assert backend.programs > 0


@pytest.mark.usefixtures("shallow")
def test_compiled_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = apart(Learner(study(), ranks={2, 3}, execution=Execution(micro_batch={2: 2})))
    ours = compiled(monkeypatch, backend := Backend(), micro_batch={2: 2})
    programs = []
    for step, batch in enumerate(
        (images(scans=4), volumes(), images(scans=5), images(seed=1, scans=4), volumes(seed=1))
    ):
        expected, report = plain.step(batch, step=step), ours.step(batch, step=step)
        assert report.terms == pytest.approx(expected.terms, rel=1e-4)
        assert report.diagnostics == pytest.approx(expected.diagnostics, rel=1e-3)
        programs.append(backend.programs)
    # For the student and the teacher each: stem, two embeddings and two blocks, of images; those again, of volumes'
    # slices, which are more, and of volumes; and of the one image that is left over.
    assert programs == [10, 30, 40, 40, 40]
    assert tensors_of(ours.student).keys() == tensors_of(plain.student).keys()


def test_all_blocks_of_a_stage_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    for depth in (1, 3):
        sizes = replace(ARCHITECTURES["nano"], encoder_depths=(depth, 0, 0, 1), decoder_depths=(0, 0, 1))
        monkeypatch.setitem(ARCHITECTURES, "nano", sizes)
        compiled(monkeypatch, backend := Backend()).step(images(), step=0)
        programs.append(backend.programs)
        torch.compiler.reset()
    assert programs[0] == programs[1]


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])
def test_compiled_and_recomputed_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...]) -> None:
    """Also of a volume whose position tables must be resized along some axes and not along others."""
    monkeypatch.setattr(execution, "COMPILER", "aot_eager")
    plain, ours = (build_network(NANO, seed=1).backbone.double() for _ in range(2))
    set_up_blocks_(ours, compiled=True, recomputed=True)
    x = torch.rand(2, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gradients(lambda: plain(x).square().sum(), plain)
    with compiling():
        torch.testing.assert_close(gradients(lambda: ours(x).square().sum(), ours), expected)


@pytest.mark.usefixtures("shallow")
def test_what_fits_is_tried_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is of another number of scans, hence of other programs."""
    ours = compiled(monkeypatch, backend := Backend())
    assert ours.fits(2, 3)
    assert backend.programs == 0
    ours.step(images(), step=0)
    assert backend.programs > 0


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("fails", ["compiling", "running"])
def test_where_compilation_fails_the_same_step_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    plain, ours = apart(Learner(study(), ranks={2, 3})), compiled(monkeypatch, Backend(fails=fails))
    for step in range(2):
        assert ours.step(images(), step=step) == plain.step(images(), step=step)
    assert_same(everything(ours), everything(plain))
    (said,) = [record.message for record in caplog.records if record.name == "unimiss_core.learner"]
    assert "compilation failed, going on without it" in said
    assert "no C++ compiler" in said
    assert "long story" not in said


def test_a_mistake_of_the_caller_stays_a_mistake_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "COMPILER", "eager")
    with pytest.raises(ValueError, match="the model takes 2D"):
        Learner(study(), ranks={2}, execution=Execution(compile=True)).step(volumes(), step=0)


# ------------------------------------------------------------------------------------------------------------ memory


class Tight:
    """An objective on a device that holds no more than `scans`, and that other work fills up at call number `full`.

    error: how the device says so.
    """

    def __init__(self, learner: Learner, *, scans: int, full: int | None = None) -> None:
        self._objective, self._scans, self._full, self.sizes = learner.objective, scans, full, list[int]()
        self.error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def representations(self, rank: Rank) -> tuple[str, ...]:
        return self._objective.representations(rank)

    def __call__(self, student: Network, teacher: Network, views: Tensor, centre: Mapping[str, Tensor]) -> Loss:
        self.sizes.append(len(views))
        if len(views) > self._scans or len(self.sizes) == self._full:
            raise self.error
        return self._objective(student, teacher, views, centre)


def tight(*, scans: int, full: int | None = None) -> tuple[Learner, Tight]:
    learner = apart(Learner(study(), ranks={2, 3}))
    learner.objective = objective = Tight(learner, scans=scans, full=full)
    return learner, objective


@pytest.mark.parametrize("batch", [images(scans=5), volumes(scans=5)], ids=["images", "volumes"])
def test_where_memory_runs_out_the_same_step_is_met_in_smaller_parts(
    caplog: pytest.LogCaptureFixture, batch: Tensor
) -> None:
    learner, objective = tight(scans=1)
    parts = {2: 1, 3: 1}
    plain = apart(Learner(study(), ranks={2, 3}, execution=Execution(micro_batch=parts)))
    for step in range(2):
        assert learner.step(batch, step=step) == plain.step(batch, step=step)
    assert_same(everything(learner), everything(plain))
    assert objective.sizes == [5, 2, *[1] * 5, *[1] * 5]  # the second step begins with what the first found
    assert [record.message.rpartition(" in ")[2] for record in caplog.records] == [
        "parts of 2, not 5 scans",
        "parts of 1, not 2 scans",
    ]


def test_gradients_of_parts_before_memory_ran_out_do_not_count_twice() -> None:
    learner, objective = tight(scans=4, full=2)
    learner.micro_batch[2] = 4
    plain = apart(Learner(study(), ranks={2, 3}, execution=Execution(micro_batch={2: 2})))
    assert learner.step(images(scans=5), step=0) == plain.step(images(scans=5), step=0)
    assert_same(everything(learner), everything(plain))
    assert objective.sizes == [4, 1, 2, 2, 1]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_memory_that_a_library_does_not_find_is_memory_that_ran_out(words: str) -> None:
    learner, objective = tight(scans=2)
    objective.error = RuntimeError(words)
    learner.step(images(scans=5), step=0)
    assert objective.sizes == [5, 2, 2, 1]


def test_a_scan_that_does_not_fit_is_told_in_words_and_changes_nothing() -> None:
    learner, _ = tight(scans=0)
    before = everything(learner)
    with pytest.raises(MemoryTooSmallError, match=r"one 3D scan, views of shape \(1, 2, 1, 13, 33, 40\).* of cpu\. In"):
        learner.step(volumes(), step=0)
    assert_same(everything(learner), before)
    assert all(parameter.grad is None for parameter in learner.student.parameters())


def test_trying_what_fits_changes_nothing() -> None:
    learner, objective = tight(scans=3)
    learner.step(images(), step=0)
    before, centre, random = everything(learner), copied(learner.centre), torch.get_rng_state()
    figures = learner.round_diagnostics()
    objective.sizes.clear()
    assert [learner.fits(2, size) for size in (16, 4, 3)] == [False, False, True]
    assert objective.sizes == [16, 4, 3, 3]  # of the study's 16; two parts tell enough
    assert_same(everything(learner), before)
    assert_same(learner.centre, centre)
    assert torch.equal(torch.get_rng_state(), random)
    assert learner.round_diagnostics() == figures
    assert learner.micro_batch == {}
    assert all(parameter.grad is None for parameter in learner.student.parameters())
