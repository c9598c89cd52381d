"""The coordinator file: which study, where results go, how long to wait for whom."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from unimiss_core.config import Config, Name, load
from unimiss_core.errors import ConfigError
from unimiss_core.given_path import GivenPath
from unimiss_core.scan import Rank


class RegisteredSite(Config):
    """A site that may take part."""

    name: Name
    """As its site file says it."""
    public_key: str | None = None
    """The line of its .pub file; None trusts the name alone, for trials among friends."""
    max_images: Annotated[int, Field(gt=0)] | None = None
    """A reply that claims to have trained on more is refused: under the weightings `sqrt` and `scans` a claim is
    weight."""
    max_volumes: Annotated[int, Field(gt=0)] | None = None

    def most_scans(self, rank: Rank) -> int | None:
        return self.max_images if rank == 2 else self.max_volumes


_FILES = {"a person": "coordinator file", "unimiss-server": "coordinator.yaml", "unimiss-simulate": "simulation file"}


class CoordinatorConfig(Config):
    study: GivenPath
    """The study file; relative paths count from the coordinator file's folder."""
    out: GivenPath
    """Folder for checkpoints, metrics and the report."""
    start: GivenPath | None = None
    """A checkpoint folder of the study's model, from another run or imported: a new run begins from its teacher instead
    of random weights. Where a study promises privacy, it must have been trained on nothing but public scans."""
    start_key: GivenPath | None = None
    """The public key (.pub) that must have signed `start`; None asks for no signature."""
    signing_key: GivenPath | None = None
    """The private key that signs each round's checkpoint, as `unimiss-server init` makes it; a run that is resumed must
    have been signed by it. None signs nothing, and asks for no signature."""
    sites: tuple[RegisteredSite, ...] = ()
    """Only these are asked; empty means every node that connects."""
    identity: Literal["proved", "believed", "simulated"] = "proved"
    """How a study of site-level privacy knows that no site takes part under two names, and counts twice. proved: each
    site is registered with its public_key. believed: by its word; the study's promise then holds of a name, not of a
    site. simulated: all sites are the operator's own, as a simulation writes it."""
    min_sites: Annotated[int, Field(gt=0)] = 1
    """Sites that must have joined before the first round begins."""
    min_replies: Annotated[int, Field(gt=0)] = 1
    """Updates that must count for a round to be completed."""
    wait_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a round waits for `min_sites` to connect."""
    introduction_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a site that is new may take to say what it holds: it reads its archive before it answers."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a try of a round waits for updates; where too few count by then, a quarter of it more."""
    round_tries: Annotated[int, Field(gt=0)] = 3
    """How often a round that too few updates came of is tried before the run ends; it can then be resumed. What counted
    in one try counts in the next."""
    retry_s: Annotated[float, Field(ge=0)] = 30.0
    """Pause before a round is tried again; twice as long before each further try."""
    set_aside_after: Annotated[int, Field(gt=0)] = 3
    """A site that failed in as many rounds in a row is left out of the next 1, then 2, 4, 8 and 16 rounds between two
    tries, unless the round has too few sites without it."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 10
    """Newest rounds whose checkpoints stay; the initial weights, round 0, always do."""
    probe: tuple[GivenPath, ...] = ()
    """Labelled, already preprocessed public sets (.npz, as `unimiss probe --set-out` writes them), measured before and
    after the run."""
    probe_every: Annotated[int, Field(gt=0)] | None = None
    """Also after so many rounds, each time; sites wait meanwhile. None: at the end alone."""
    ledgers: GivenPath | None = None
    """File in which is kept, over all runs, how far each site's ledger of private rounds is known to have come
    (`server.known_ledgers`). None: each run knows its own alone."""
    forget_ledgers: tuple[Name, ...] = ()
    """Sites whose ledger of private rounds was begun anew, as those answer for who protect their patients' data
    (docs/privacy.md, 'The ledger'): what was known of it is forgotten whenever this coordinator starts."""

    written_by: Literal["a person", "unimiss-server", "unimiss-simulate"] = "a person"
    """Who wrote this file. The two commands write it anew at each start, of one that their user wrote: that is the one
    which messages name. Leave it out in a file of your own."""

    @property
    def is_simulated(self) -> bool:
        return self.identity == "simulated"

    @property
    def file_in_words(self) -> str:
        """The file that a person wrote."""
        return _FILES[self.written_by]

    @property
    def names_its_sites(self) -> bool:
        """Whether that file lists the sites, so that one may be taken out."""
        return self.written_by == "unimiss-simulate" or (self.written_by == "a person" and bool(self.sites))

    @property
    def goes_on_by(self) -> str:
        """What its operator does to go on with a run that ended."""
        return "`unimiss-server run` again" if self.written_by == "unimiss-server" else "resume"

    def called(self, quorum: Literal["min_sites", "min_replies"]) -> str:
        """A setting of the quorum, as that file has it."""
        return f"quorum.{quorum}" if self.written_by == "unimiss-simulate" else quorum

    def is_probed(self, round: int, last: int) -> bool:
        """Whether a probe is due after this round."""
        return round == last or (self.probe_every is not None and round % self.probe_every == 0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.probe_every and not self.probe:
            raise ValueError("probe_every has no meaning without probe; leave it out, or name the labelled sets")
        if self.min_replies > self.min_sites:
            raise ValueError(f"min_replies={self.min_replies} must not be above min_sites={self.min_sites}")
        if self.start_key and not self.start:
            raise ValueError("start_key has no meaning without start; leave it out, or name the checkpoint")
        names = [site.name for site in self.sites]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"sites: the name {', '.join(sorted(twice))} stands twice")
        if self.sites and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites={self.min_sites} must not be above the number of sites, {len(self.sites)}")
        return self


def load_coordinator(path: Path) -> CoordinatorConfig:
    """Read a coordinator file, relative paths taken from its folder. Raises ConfigError."""
    config = load(CoordinatorConfig, path)
    base = path.resolve().parent
    anchored = config.model_copy(
        update={
            "study": base / config.study,
            "out": base / config.out,
            "start": config.start and base / config.start,
            "start_key": config.start_key and base / config.start_key,
            "signing_key": config.signing_key and base / config.signing_key,
            "ledgers": config.ledgers and base / config.ledgers,
            "probe": tuple(base / probe for probe in config.probe),
        }
    )
    for index, probe in enumerate(anchored.probe):
        if not probe.is_file():
            raise ConfigError(f"{path}: 'probe.{index}': {probe} is not a file")
    return anchored
