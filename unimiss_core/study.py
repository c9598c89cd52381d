"""The study: everything that all sites must agree on, in one file that travels with each request.

Its sha256 (`StudyConfig.digest`) is what a site's policy allows, what a checkpoint names, and what an
update must carry to count. Nothing here depends on how much data a site holds.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_serializer, model_validator

from unimiss_core.config import NAME_ALONE, Config, Mistakes, Name, chosen_by_name
from unimiss_core.model_config import Axis as Axis
from unimiss_core.model_config import ImageSize, VolumeSize
from unimiss_core.model_config import ModelConfig as ModelConfig
from unimiss_core.optimiser_config import AdamWConfig, LocalOptimiserConfig
from unimiss_core.privacy_config import NoPrivacyConfig, PrivacyConfig, contradictions
from unimiss_core.scan import RANKS, Rank
from unimiss_core.task_config import Fraction as Fraction
from unimiss_core.task_config import SupervisionConfig

Positive = Annotated[int, Field(gt=0)]
Length = Annotated[int, Field(gt=0, le=10**6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Weight = Annotated[float, Field(gt=0, le=1e6)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
TermWeight = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Of a term of the loss, beside one that counts 1. A sum in float32 has 24 bits: much further apart than this, one of
the two rounds to nothing; and much larger products overflow, in bf16 as well."""

COARSEST_MM, MOST_SIGMA, MOST_FACTOR = 100.0, 1e3, 100.0
"""Far beyond what any study means: time and memory grow with a grid's spacing and with a blur."""


class PlanConfig(Config):
    """How a scan becomes what the model sees; it travels in the checkpoint, and fine-tuning applies the same one."""

    volume_spacing_mm: tuple[float, float, float] = (3.0, 1.0, 1.0)
    """(D, H, W). Volumes are resampled to it; published: 1x1x3 mm for CT."""
    image_spacing_mm: tuple[float, float] | None = None
    """(H, W). Images are resampled to it where the source states a spacing; None keeps their own grid."""
    image_longest_side: Positive | None = 512
    """Larger images are shrunk to this many pixels on their longer side; None keeps them."""
    ct_window_hu: tuple[float, float] = (-1024.0, 1024.0)
    """CT is clipped to it and mapped to [0, 1]."""
    percentiles: tuple[float, float] = (0.5, 99.5)
    """Every other modality is clipped to these percentiles of the scan and mapped to [0, 1]."""
    missing_slices: Literal["refuse", "interpolate"] = "refuse"
    """What a gap in a series costs: the series, or up to 10% interpolated slices."""

    @property
    def interpolates(self) -> bool:
        """Whether missing slices may be made up."""
        return self.missing_slices == "interpolate"

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, (low, high) in {"ct_window_hu": self.ct_window_hu, "percentiles": self.percentiles}.items():
            if low >= high:
                raise ValueError(f"{name}: the lower bound {low} must be below the upper bound {high}")
        if not (0 <= self.percentiles[0] and self.percentiles[1] <= 100):
            raise ValueError(f"percentiles: {self.percentiles} must lie in [0, 100]")
        spacing = self.volume_spacing_mm + (self.image_spacing_mm or ())
        if not (min(spacing) > 0 and max(spacing) <= COARSEST_MM):
            raise ValueError(f"volume_spacing_mm, image_spacing_mm: must be above zero, {COARSEST_MM:g} mm at most")
        return self


class ViewConfig(Config):
    """Random views of a scan, one code for both ranks; see `unimiss_core.views`."""

    views: Annotated[int, Field(ge=2, le=32)] = 2
    """Views of one scan in a step (V); a step's loss is over all V * (V - 1) pairs."""
    image_size: ImageSize = (64, 64)
    volume_size: VolumeSize = (16, 64, 64)
    area: tuple[Fraction, Fraction] = (0.25, 1.0)
    """Share of the image's (H, W) area that a crop covers, drawn uniformly; a volume's crop also covers the root of it
    in depth. Published for images: (0.14, 1.0)."""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """How much taller than the view's own shape a crop is (log-uniform); 1 means not stretched."""
    volume_region: Annotated[float, Field(gt=0, le=1e3)] | None = 1.6
    """All views of a volume lie in one box, placed at random, of this many times volume_size (published: 1.4 to 1.8;
    crops then have 0.8 to 1.6 times the view's sides); None means the whole volume, as always for images."""
    flip: tuple[Fraction, Fraction, Fraction] = (0.0, 0.0, 0.5)
    """Chance of a mirror image along (D, H, W); an image has the last two. Published for volumes: 0.8 for each."""
    blur: Fraction = 0.5
    blur_sigma: tuple[float, float] = (0.1, 1.5)
    """Standard deviation of the Gaussian blur, in pixels of the view."""
    noise: Fraction = 0.1
    noise_sigma: tuple[float, float] = (0.0, 0.05)
    """Standard deviation of additive Gaussian noise, intensities being in [0, 1]."""
    brightness: Fraction = 0.5
    brightness_factor: tuple[float, float] = (0.7, 1.3)
    contrast: Fraction = 0.5
    contrast_factor: tuple[float, float] = (0.65, 1.5)
    gamma: Fraction = 0.5
    gamma_exponent: tuple[float, float] = (0.7, 1.5)

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        return self.image_size if rank == 2 else self.volume_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        sigmas = ("blur_sigma", "noise_sigma")
        factors = ("area", "aspect", "brightness_factor", "contrast_factor", "gamma_exponent")
        for name in (*sigmas, *factors):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lower bound {low} must not be above the upper bound {high}")
            if high > (most := MOST_SIGMA if name in sigmas else MOST_FACTOR):
                raise ValueError(f"{name}: the upper bound {high:g} must be at most {most:g}")
            if low < 0 or (low == 0 and name in factors):
                raise ValueError(
                    f"{name}: the lower bound {low} must be {'above' if name in factors else 'at least'} 0"
                )
        return self


class DistillationConfig(Config):
    """What every objective sets: a student learns what its teacher makes of other views of the same scan."""

    name: str
    student_temperature: Temperature = 0.1
    teacher_temperature: Temperature = 0.04
    """Lower means sharper targets; too high and both networks drift to the uniform answer."""
    volume_teacher_temperature: Annotated[Temperature | None, Field(exclude_if=lambda own: own is None)] = None
    """Of a volume's targets; None means teacher_temperature, as published, and is not written out, so that older
    studies keep their digests. A batch holds few volumes, which are told apart sooner than images: their targets may
    need less sharpening."""
    centre_momentum: Fraction = 0.9
    teacher_momentum: tuple[Fraction, Fraction] = (0.996, 1.0)
    """EMA of the teacher, per step, from first to last step of the study (cosine)."""

    def teacher_temperature_of(self, rank: Rank) -> float:
        own = self.volume_teacher_temperature if rank == 3 else None
        return self.teacher_temperature if own is None else own

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("teacher_temperature", "volume_teacher_temperature"):
            if (getattr(self, name) or 0.0) > self.student_temperature:
                raise ValueError(
                    f"{name}={getattr(self, name)} must not be above student_temperature={self.student_temperature}"
                )
        return self


class UniMiSSConfig(DistillationConfig):
    """UniMiSS (ECCV 2022); see `unimiss_core.objective` and docs/objectives.md."""

    name: Literal["unimiss"] = "unimiss"
    slices_per_volume: Positive | None = None
    """Evenly spaced slices of a volume that take the 2D path; None takes all, as published."""


class UniMiSSPlusConfig(DistillationConfig):
    """UniMiSS+ (TPAMI 2024), with its weights; see `unimiss_core.unimiss_plus` and docs/objectives.md.

    Weights are above 0, because volumes then train every parameter, on which aggregation relies.
    """

    name: Literal["unimiss_plus"] = "unimiss_plus"
    radiograph_weight: TermWeight = 0.5
    """Of the cross-entropy from a volume's radiograph to the volume, which itself counts 1."""
    slices_weight: TermWeight = 0.1
    """Of the cross-entropy from a volume's slices to the volume."""
    reconstruction_weight: TermWeight = 5.0
    """Of the mean squared error with which images, volumes and radiographs are drawn again."""
    slice_stride: Positive = 2
    """2 means that every second slice of a volume, from its first, takes the 2D path."""
    radiograph_angle_deg: Annotated[float, Field(ge=-180, le=180)] = 0.0
    """From where radiographs are taken: 0 from front to back, 90 from right to left."""


ObjectiveConfig = Annotated[
    Annotated[UniMiSSConfig, Tag("unimiss")] | Annotated[UniMiSSPlusConfig, Tag("unimiss_plus")],
    chosen_by_name(default="unimiss"),
]
"""What is learned; without a `name` it is UniMiSS."""


class ScheduleConfig(Config):
    """How long: every schedule counts steps of the whole study, rounds x local_steps."""

    rounds: Length = 10
    local_steps: Length = 50
    """Optimiser steps of each site in each round."""
    alternate: tuple[Positive, Positive] = (1, 1)
    """A site with both ranks does this many 2D steps, then this many 3D steps, and so on."""


class BatchConfig(Config):
    """Scans in one optimiser step, by rank; a site meets it exactly on any card, in micro-batches."""

    images: Annotated[int, Field(gt=0, le=10**9)] = 16
    volumes: Annotated[int, Field(gt=0, le=10**9)] = 2
    sampling: Literal["scans", "patients"] = "scans"
    """patients: each has the same chance, however many scans it has, and gives one of them to a batch."""

    def of(self, rank: Rank) -> int:
        return self.images if rank == 2 else self.volumes


class LocalConfig(Config):
    """What ties a site's training to the federation's student, or to its own of before; see docs/federation.md."""

    proximal: NonNegative = 0.0
    """mu of FedProx: mu/2 ||w - w_received||^2 is added to what each step lowers; 0 turns it off."""
    divergence_scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """tau of FedEMA (published: 0.7): a site that comes back starts from a mixture of the received student and its own
    of the round before; tau is its own's share the first time. None starts from the received one alone."""


class MeanConfig(Config):
    """The weighted mean: no site is mistrusted, and nothing is kept."""

    name: Literal["mean"] = "mean"


class MedianConfig(Config):
    """The median of each coordinate over the sites that trained it."""

    name: Literal["median"] = "median"


class TrimmedMeanConfig(Config):
    """The mean of each coordinate without its largest and smallest values."""

    name: Literal["trimmed_mean"] = "trimmed_mean"
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Of the sites, left out at either end, rounded up: fewer hostile sites than this share cannot lead the result out
    of the range of the honest ones."""


class NormBoundedMeanConfig(Config):
    """The weighted mean of updates that were shortened to a bound where they are longer, per parameter group."""

    name: Literal["norm_bounded_mean"] = "norm_bounded_mean"
    times_median: Weight = 1.0
    """The bound, in medians of this round's norms of the group. Not used where `max_norm` is given."""
    max_norm: Weight | None = None
    """A bound fixed for the whole study: updates need not be kept on disk until all have come, but it must be known
    beforehand, for every group and every learning rate of the schedule."""


RuleConfig = Annotated[
    Annotated[MeanConfig, Tag("mean")]
    | Annotated[MedianConfig, Tag("median")]
    | Annotated[TrimmedMeanConfig, Tag("trimmed_mean")]
    | Annotated[NormBoundedMeanConfig, Tag("norm_bounded_mean")],
    chosen_by_name(default="mean"),
    NAME_ALONE,
]


class NoServerOptimiserConfig(Config):
    """What the rule gives is added to the student as it is."""

    name: Literal["none"] = "none"

    @model_serializer
    def _as_written(self) -> str:
        return self.name  # a mapping would change the digest of every study that was written before there was a choice


class FedAvgMConfig(Config):
    """Momentum over rounds; see `server.optimisers`."""

    name: Literal["fedavgm"] = "fedavgm"
    lr: Weight = 1.0
    """Steady updates are taken lr / (1 - momentum) fold."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAdamConfig(Config):
    """Adam over rounds; see `server.optimisers`."""

    name: Literal["fedadam"] = "fedadam"
    lr: Weight = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Weight = 1e-3
    """How adaptive: coordinates whose updates are well below it are taken lr / tau fold, those above about lr far."""


ServerOptimiserConfig = Annotated[
    Annotated[NoServerOptimiserConfig, Tag("none")]
    | Annotated[FedAvgMConfig, Tag("fedavgm")]
    | Annotated[FedAdamConfig, Tag("fedadam")],
    chosen_by_name(default="none"),
    NAME_ALONE,
]

LARGEST_SUMMAND = 1e12
"""Of a weight times a norm. What the sum of updates drops of a value is at most 2^-94 of the power of two above its
largest possible summand (`server.exact_sum`), here 2^-54: 2^-30 of values of 6e-8, which float32 rounds to 2^-24."""


class AggregationConfig(Config):
    """How the coordinator joins updates; see `server.aggregation`."""

    rule: Annotated[RuleConfig, Field(exclude_if=lambda rule: rule.name == "mean")] = MeanConfig()
    """How the sites' updates become one, per parameter group. The mean is not written out, so that older studies keep
    their digests."""
    weighting: Literal["uniform", "sqrt", "scans"] = "uniform"
    """A site counts 1, the root of its scans, or its scans, per parameter group and its rank."""
    server_optimiser: ServerOptimiserConfig = NoServerOptimiserConfig()
    """What is made of it before it is added to the student."""
    max_scans: Positive = 1_000_000
    """A site that claims more is refused: under `sqrt` and `scans` a claim is a weight."""
    max_update_norm: Annotated[float, Field(gt=0)] = 1e3
    """An update with a larger L2 norm is refused. Times the largest weight, LARGEST_SUMMAND at most."""
    max_size_ratio: Annotated[float, Field(gt=1)] | None = 10.0
    """An update whose values have a root mean square of more than this many times the median of the updates that
    counted in the last three rounds is refused; None asks nothing."""
    late_weight: Fraction = 0.0
    """An update that comes after its round was closed counts in a later one, with this share of its weight for each
    round of delay (Xie, Koyejo, Gupta 2019, "Asynchronous federated optimization"); 0 drops it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weighting != "uniform" and isinstance(self.rule, MedianConfig | TrimmedMeanConfig):
            raise ValueError(
                f"weighting={self.weighting} has no meaning under the rule {self.rule.name}, where each site counts 1: "
                "a claim of many scans must not buy influence; write weighting: uniform"
            )
        self._check_largest_summand()
        return self

    def _check_largest_summand(self) -> None:
        """Raises ValueError: a weight times a norm may be larger than the sum of updates bears."""
        weight, times = {
            "uniform": (1, ""),
            "sqrt": (self.max_scans, " times the root of max_scans"),
            "scans": (self.max_scans, " times max_scans"),
        }[self.weighting]
        most = min(LARGEST_SUMMAND / self.max_update_norm, 1e150)  # whose square is still a float
        if weight > (most * most if self.weighting == "sqrt" else most):
            raise ValueError(
                f"max_update_norm={self.max_update_norm:g}{times} must be at most {LARGEST_SUMMAND:g}: the sum of the "
                "updates keeps room for the largest that may come, and with more room it would lose small ones, in the "
                "end all. The check cannot be switched off; write a norm that no honest update comes near, as the "
                f"default, 1000{', or a lower max_scans' if times else ''}"
            )


class WireConfig(Config):
    """In what values travel; see `unimiss_core.formats` and docs/federation.md."""

    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """What weights and updates travel as. With int8, what rounding loses is kept and sent with the next update; a site
    that was away is sent whole weights in fp32."""
    losses: Annotated[bool, Field(exclude_if=lambda told: told)] = True
    """Whether sites send means of their losses, and of figures about training, with each update; of a patient-level
    study they never do. Not written out where they do, so that older studies keep their digests."""


class StudyConfig(Config):
    name: Name
    """Lower-case letters, digits, '-' and '_'."""
    seed: Annotated[int, Field(ge=0)] = 0
    task: Annotated[Literal["pretrain", "finetune"], Field(exclude_if=lambda task: task == "pretrain")] = "pretrain"
    """pretrain: `objective` and `views` say what is learned. finetune: the section `finetune` does, from the labels of
    each site. Neither is written out in a study of pretraining, so that older ones keep their digests."""
    finetune: Annotated[SupervisionConfig | None, Field(exclude_if=lambda section: section is None)] = None
    model: ModelConfig = ModelConfig()
    plan: PlanConfig = PlanConfig()
    views: ViewConfig = ViewConfig()
    objective: ObjectiveConfig = UniMiSSConfig()
    optimiser: LocalOptimiserConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    local: Annotated[LocalConfig, Field(exclude_if=lambda local: local == LocalConfig())] = LocalConfig()
    """Not written out where all of it is off, so that older studies keep their digests."""
    aggregation: AggregationConfig = AggregationConfig()
    wire: WireConfig = WireConfig()
    privacy: Annotated[PrivacyConfig, Field(exclude_if=lambda privacy: privacy.mode == "none")] = NoPrivacyConfig()
    """Not written out where nothing is promised, so that older studies keep their digests."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if found := [*_of_task(self), *_of_objective(self), *_of_optimiser(self), *contradictions(self)]:
            raise Mistakes(found)
        return self

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """Of the scans that it is learned from; a site may have some of them."""
        return RANKS if self.finetune is None else (self.finetune.task.rank,)

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        """S of what a step's network sees of a scan of this rank."""
        return self.views.size_of(rank) if self.finetune is None else self.finetune.task.size_for(self.model)


def _of_task(study: StudyConfig) -> Iterator[str]:
    """What the task asks of other sections, and does not find; and what of them would not be looked at."""
    if (study.task == "finetune") != (study.finetune is not None):
        yield "`task: finetune` and the section `finetune` need each other; give both, or neither"
    if study.finetune is None:
        return
    if study.finetune.validation and (study.privacy.mode == "patient" or not study.wire.losses):
        told_by = "privacy.mode: patient" if study.privacy.mode == "patient" else "wire.losses: false"
        yield f"finetune.validation: its figures would not leave a site under {told_by}; leave it out"
    joins_decoder_alone = study.finetune.trains == "frozen" and study.finetune.task.name == "classification"
    if study.finetune.head == "local" and joins_decoder_alone and not study.model.classifies_by_decoder:
        yield (
            f"finetune.head: local, finetune.trains: frozen: of {study.model.network} a classification reads the "
            "encoder alone, so nothing would be joined; share the head, or train more"
        )
    for name, default in {"objective": UniMiSSConfig(), "views": ViewConfig()}.items():
        if getattr(study, name) != default:
            yield f"{name}: is of pretraining, and not looked at in a study of task: finetune; leave the section out"
    if study.optimiser.freeze_prototypes_steps:
        yield "optimiser.freeze_prototypes_steps: a model for a task has no prototypes; leave it out"


def _of_objective(study: StudyConfig) -> Iterator[str]:
    """What the objective asks of other sections, and does not find."""
    if study.model.reconstruction != (needed := isinstance(study.objective, UniMiSSPlusConfig)):
        yield (
            f"the objective {study.objective.name} {'needs' if needed else 'never trains'} the model's "
            f"reconstruction; write model.reconstruction: {'true' if needed else 'false'}"
        )
    if study.model.is_plus and study.finetune is None and not needed:
        yield (
            f"the objective {study.objective.name} never trains the decoder of model.size: {study.model.size}, which "
            "only draws; write objective: {name: unimiss_plus}, or another size"
        )
    depth, slices = study.views.volume_size[0], getattr(study.objective, "slices_per_volume", None)
    if slices is not None and slices > depth:
        yield f"objective.slices_per_volume={slices} must not be above views.volume_size[0]={depth}, a view's slices"


def _of_optimiser(study: StudyConfig) -> Iterator[str]:
    """Likewise the optimiser."""
    optimiser, rounds, local = study.optimiser, study.schedule.rounds, study.schedule.local_steps
    steps = f"rounds x local_steps = {rounds} x {local} = {rounds * local}"
    if optimiser.warmup_steps >= rounds * local:
        yield (
            f"optimiser.warmup_steps={optimiser.warmup_steps} must be below {steps}, or the rate never reaches lr; "
            "lower it or train longer"
        )
    if optimiser.freeze_prototypes_steps > rounds * local:
        yield f"optimiser.freeze_prototypes_steps={optimiser.freeze_prototypes_steps} must not be above {steps}"
    if optimiser.name == "noise_aware_adamw" and study.privacy.mode != "patient":
        yield (
            "optimiser.name=noise_aware_adamw subtracts the noise of private steps, and privacy.mode is "
            f"{study.privacy.mode}, not patient; write name: adamw"
        )
