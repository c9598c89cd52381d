"""The site file: data folders, device, limits. It never leaves the site."""

import errno
from collections.abc import Callable, Mapping
from os.path import realpath
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from client.label_config import LabelData, LabelsConfig, check_patient_pattern
from client.path_patterns import PathPattern
from unimiss_core.config import NAME, Config, Name, load
from unimiss_core.device import check_names
from unimiss_core.errors import ConfigError
from unimiss_core.given_path import GivenPath
from unimiss_core.groups import GROUPS, Group
from unimiss_core.privacy_config import Delta, Multiplier
from unimiss_core.scan import Modality, Rank
from unimiss_core.sealing import Seal, read_seal
from unimiss_core.yaml_files import read_yaml


class TableConfig(Config):
    """A CSV, or the same with tabs (TSV), that says which files of a folder count, and whose they are."""

    path: GivenPath
    file: str = "file"
    """Column with the file's path below the folder."""
    patient: str | None = None
    """Column with the patient; where it stands, it overrules every other rule."""
    modality: str | None = None
    """Column with CT, MR, PT, XR or OT, for formats that do not say."""
    where: Mapping[str, tuple[str, ...]] = {}
    """Only rows whose column holds one of these texts are used, for each column named."""


_LEFT_OUT_WHERE_EMPTY = Field(exclude_if=lambda patterns: not patterns)
"""Of what a source is told by: what was read of folders before there were patterns stays read."""


class DataSource(Config):
    """One folder of scans, read with all its sub-folders; files are recognised by content, not by name."""

    folder: GivenPath
    table: TableConfig | None = None
    """Without a table every file of the folder is looked at."""
    include: Annotated[tuple[PathPattern, ...], _LEFT_OUT_WHERE_EMPTY] = ()
    """Only files whose path below the folder is of one of these patterns, as in 'sub-*/**/anat/*_T1w.nii.gz': `*` is
    any part of a name, `**` any folders (`client.path_patterns`). Empty: all."""
    exclude: Annotated[tuple[PathPattern, ...], _LEFT_OUT_WHERE_EMPTY] = ()
    """Not these, whatever `include` says, as in 'derivatives/**'."""
    patient_pattern: str | None = None
    """For PNG, NIfTI and the like: a regular expression with a group `patient`, searched in the path below folder.
    Without it, and without a table that names patients, each such file counts as a patient of its own; patient-level
    studies refuse such a guess, unless `file_is_patient` says that it is none."""
    file_is_patient: bool = False
    """Each such file is of another patient, and no patient has two: this site vouches for it. Where it is wrong, a
    patient costs more than the ledger says."""
    modality: Modality | None = None
    """For formats that do not say it; without it NIfTI counts as OT and pictures count as XR."""
    patient_range: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Only patients whose hash falls in [from, to) of the unit interval: splits a folder by patient, reproducibly."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patient_range[0] >= self.patient_range[1]:
            raise ValueError(f"patient_range: {self.patient_range} is empty")
        check_patient_pattern(self.patient_pattern)
        if self.file_is_patient and (self.patient_pattern or (self.table and self.table.patient)):
            raise ValueError("file_is_patient: patient_pattern or the table says otherwise; leave out one of the two")
        return self


def _listed(names: object) -> object:
    return (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list) else names


def _possible(names: tuple[str, ...]) -> tuple[str, ...]:
    check_names(names)
    return names


Devices = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_listed), AfterValidator(_possible)]
"""Names of devices; one name alone need not be a list."""


MicroBatch = Literal["auto"] | Annotated[int, Field(gt=0, le=10**6)] | None


class MicroBatchConfig(Config):
    """Most scans in one forward pass, by rank. The study's batch is met exactly whatever stands here: a larger one is
    met in parts whose gradients add up."""

    images: MicroBatch = "auto"
    """auto finds the largest that fits a GPU's memory, and is the whole batch on a CPU; null is the whole batch."""
    volumes: MicroBatch = "auto"

    def of(self, rank: Rank) -> MicroBatch:
        return self.images if rank == 2 else self.volumes


RANKS_BY_NAME: Mapping[str, Rank] = {"images": 2, "volumes": 3}


class PatientLimits(Config):
    """What this site's patients may cost in private rounds, whatever a study says; `client.ledger` holds to it.

    Only studies in the mode `patient` are charged. So a site that sets `max_epsilon`, or was ever charged, takes part
    in no others, unless it allows them: `client.terms`.
    """

    holds: Annotated[tuple[Literal["images", "volumes"], ...], Field(min_length=1)] | None = None
    """What this site trains on in private studies, whatever scans it has: it is told, and scans never are. Where it has
    none of what stands here, or a study's plan leaves none, it sends noise. Without it, it takes part in none."""
    allow_unprotected: bool = False
    """Take part in studies of other modes, too. What they tell of patients is in no epsilon of this site."""
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    """What a patient may cost at most, in all rounds of all studies that this site ever takes part in; None leaves it
    to each study's own limit."""
    delta: Delta = 1e-5
    """Below one over ten times the site's patients; of this site's own epsilon."""
    least_noise_multiplier: Multiplier | None = None
    """Noise of gradient and centre together (`unimiss_core.privacy`), relative to one patient's share, below which a
    round is refused."""

    @property
    def ranks(self) -> frozenset[Rank]:
        """Of what it `holds`; empty where that is not said."""
        return frozenset(RANKS_BY_NAME[kind] for kind in self.holds or ())


def _known_groups(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    if lacking := {"shared", "2d", "head"} - set(groups):
        raise ValueError(
            f"without {', '.join(sorted(lacking))} no site can train: updates hold shared, 2d and head, and one of "
            "volumes 3d; to send nothing, take part in nothing (studies: [])"
        )
    return groups


class SitePolicy(Config):
    """What may be asked of this site, whatever a study says: `client.policy` holds to it, before a scan is read.

    What patients may cost is under `privacy`. Bounds on size and time are against a study that would take the machine's
    memory, disk or weeks; as they stand they are far above the published settings.
    """

    studies: tuple[Annotated[str, Field(pattern=f"^{NAME}$")], ...] | None = None
    """Which may come, by name or by sha256 (`Digest`, as the coordinator and this site's screen print it). A name lets
    its coordinator change every setting within the bounds below; a sha256 none. None: any; []: none."""
    most_rounds: Annotated[int, Field(gt=0)] = 10_000
    """Of one run."""
    most_steps: Annotated[int, Field(gt=0)] = 20_000
    """Of one round."""
    most_parameters: Annotated[int, Field(gt=0)] = 200_000_000
    """Of the network; training takes some 20 bytes of memory for each, and four times 8 of disk for each run."""
    most_voxels: Annotated[int, Field(gt=0)] = 1_000_000_000
    """Of all views of one step, 4 bytes of memory each; in a patient-level study, of one patient's."""
    finest_spacing_mm: Annotated[float, Field(gt=0)] = 0.1
    """To which scans are resampled: halving it takes eight times the disk for volumes."""
    runs_limit_gb: Annotated[float, Field(gt=0)] = 200.0
    """What is remembered of all runs (`state/runs`); beyond it no new run begins before old ones are deleted."""
    groups_may_leave: Annotated[tuple[Group, ...], AfterValidator(_known_groups)] = GROUPS
    """Tensors that may leave, by parameter group; without 3d this site takes part where it trains on images alone."""
    losses_may_leave: bool = True
    """Means of losses and of figures about training. Where false, studies must say `wire.losses: false`, or be
    patient-level, where none are sent."""
    bundles: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()
    """sha256 of bundles of code that may run here, besides the one that this installation makes."""


class SiteTraining(Config):
    """What a site file and a simulation say alike: a site's name, how it trains on its own devices, and what its
    patients may cost; nothing here but `privacy.holds` changes what is learned (docs/training.md)."""

    name: Name
    """What coordinator and report call this site: lower-case letters, digits, '-' and '_'."""
    devices: Devices = ("auto",)
    """What trains: auto (every GPU, or the CPU where there is none), or a list of cuda:N, or cpu. Several share each
    batch, each with a process of its own; `cpu` may stand several times, `auto` stands alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster, and needs less memory, on GPUs and on CPUs that have such products; others emulate them."""
    micro_batch: MicroBatchConfig = MicroBatchConfig()
    patients_at_once: Annotated[int, Field(gt=0, le=10**6)] = 1
    """In private rounds, patients whose gradients are worked out together: for GPUs that one patient alone leaves idle.
    Each takes the memory of a gradient and of its activations. Not in bf16, nor with views_in_turn or
    activation_checkpointing."""
    views_in_turn: bool = False
    """Hold a volume's slices of one view, or one view of the volume itself, at a time: a seventh less memory for a
    sixth more time in bf16 (docs/performance.md)."""
    activation_checkpointing: bool = False
    """Recompute a part of the forward pass instead of keeping it, with views in turn: for cards on which even one scan
    does not fit."""
    compile: bool = False
    """Compile what works on the fine grids at a round's start, which takes minutes: for GPUs, and rounds much longer
    than that. Where it fails, the round goes on without. Not in private rounds."""
    cuda_graphs: bool = True
    """On a GPU, record a step of each rank and launch it as one, which is up to four times as fast; the memory of a
    step's activations stays taken between steps. Where it fails, the round goes on without. Not in private rounds."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads for training, for each process; None leaves torch's choice, or shares the cores among processes."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    """How often a round's work is saved on the way, so that a site that was killed goes on from there; 0 saves it after
    every step."""
    workers: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Processes that read scans; None takes one for each core."""
    privacy: PatientLimits = PatientLimits()
    policy: SitePolicy = SitePolicy()


class SiteConfig(SiteTraining):
    data: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    labels: LabelsConfig | None = None
    """Labelled scans, for studies of `task: finetune`; without them this site takes part in none. Such a study reads
    these alone, and one of pretraining reads `data` alone."""
    state: GivenPath
    """Folder for optimiser state, teacher, secret and cache: on local disk, readable by the daemon alone."""
    ledger: GivenPath | None = None
    """Folder of the ledger of what patients have cost, which must be there; None means the state folder. Sites that
    hold the same patients, as a hospital in two federations has, name one: what any of them releases then counts
    against the limits of all (docs/site.md, 'In two federations at once')."""
    state_key: GivenPath | None = None
    """A key made by `unimiss-site make-key`, on another disk than the state folder: what is remembered of rounds and
    the preprocessed scans are then sealed with it (docs/sealing.md). None leaves them in clear."""
    cache: GivenPath | None = None
    """Folder for preprocessed scans; None means `cache` in the state folder."""
    cache_limit_gb: Annotated[float, Field(gt=0)] = 200.0

    def seal(self) -> Seal | None:
        """What this site's files are sealed with. Raises ConfigError: the key cannot be read, or lies among them."""
        if self.state_key is None:
            return None
        if any(folder in self.state_key.parents for folder in (self.state, self.cache_folder)):
            raise ConfigError(
                f"state_key: {self.state_key} lies among what it seals, and who takes the one takes the other; put the "
                "key on another disk"
            )
        return read_seal(self.state_key)

    @property
    def ledger_folder(self) -> Path:
        return self.ledger or self.state

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.state / "cache"


def load_site(path: Path, *, reads_scans: bool = True) -> SiteConfig:
    """Read a site file; relative paths in it count from the file's own folder.

    reads_scans: its data folders and tables must be there; what no scan is read for goes on without them. Raises
    ConfigError.
    """
    site = anchored(load(SiteConfig, path), path.resolve().parent)
    if reads_scans:
        _require_data(site)
    return site


def state_folder(path: Path) -> Path:
    """Where the site of this file keeps its state, whatever else is wrong with the file. Raises ConfigError."""
    raw = read_yaml(path)
    state = raw.get("state") if isinstance(raw, Mapping) else None
    is_read = isinstance(state, str) and state and "\0" not in state
    return path.resolve().parent / (str(state) if is_read else load(SiteConfig, path).state)


def anchored(site: SiteConfig, base: Path) -> SiteConfig:
    """`site` with every relative path taken from `base`."""
    sources = []
    for source in site.data:
        table = source.table and source.table.model_copy(update={"path": base / source.table.path})
        sources.append(source.model_copy(update={"folder": base / source.folder, "table": table}))
    placed: dict[str, Path | None] = {"state": base / site.state}
    placed |= {key: path and base / path for key, path in (("cache", site.cache), ("ledger", site.ledger))}
    labels = site.labels and site.labels.model_copy(update={"data": below_base(site.labels.data, base)})
    return site.model_copy(
        update={
            "data": tuple(sources),
            "labels": labels,
            "state_key": site.state_key and base / site.state_key,
            **placed,
        }
    )


def below_base(data: LabelData, base: Path) -> LabelData:
    """`data` with every relative path taken from `base`."""
    return data.model_copy(update={name: base / value for name, value in data if isinstance(value, Path)})


def _require_data(site: SiteConfig) -> None:
    """Raises ConfigError: a data folder or a table is not there."""
    problems = []
    for index, source in enumerate(site.data):
        if not _is_there(source.folder.is_dir):
            problems.append(f"'data.{index}.folder': {source.folder} is not a folder")
        if source.table and not _is_there(source.table.path.is_file):
            problems.append(f"'data.{index}.table.path': {source.table.path} is not a file")
    for name, path in site.labels.data if site.labels else ():
        if isinstance(path, Path) and not _is_there(path.exists):
            problems.append(f"'labels.data.{name}': {path} is not there")
    if problems:
        raise ConfigError(
            f"site '{site.name}': its file names what is not there\n" + "\n".join(f"  - {line}" for line in problems)
        )
    for key, folder in (("state", site.state), ("cache", site.cache_folder), ("ledger", site.ledger_folder)):
        if any(_is_read_through(source, folder) for source in site.data):
            raise ConfigError(
                f"site '{site.name}': '{key}': {folder} lies in a folder of scans, and what is written there would be "
                "taken for new scans with each round; point it elsewhere"
            )


def _is_there(look: Callable[[], bool]) -> bool:
    """What `look` says of a path; False of a name too long for the system."""
    try:
        return look()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _is_read_through(source: DataSource, folder: Path) -> bool:
    """Whether every file below `folder` is looked at as a scan."""
    return source.table is None and Path(realpath(folder)).is_relative_to(realpath(source.folder))
