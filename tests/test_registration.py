"""Who may be asked, and how much a site may claim."""

import dataclasses
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from client.accounting import epsilon
from server.coordinator_config import CoordinatorConfig, RegisteredSite, load_coordinator
from server.local_grid import LocalGrid
from server.registration import Registration
from server.rounds import Federation
from server.simulate import prepare, read_simulation
from server.site_level import check_site_level, who_is_believed
from tests.federation import StubSite, good_answer, metric_rows, small_study, stub_app
from tests.test_site_level import site_study
from unimiss_core import progress
from unimiss_core.config import dump_yaml
from unimiss_core.errors import ConfigError, WireError
from unimiss_core.privacy import Mechanism
from unimiss_core.scan import Rank
from unimiss_core.wire import Introduction, TrainReply, TrainRequest


def key_pair() -> tuple[str, bytes]:
    """(the line of a .pub file, the key as Flower gives it with a node)."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return f"{line} somebody@somewhere", public_key_to_bytes(public)


ALPHA_LINE, ALPHA_KEY = key_pair()
_, STRANGER_KEY = key_pair()
ALPHA = RegisteredSite(name="alpha", public_key=ALPHA_LINE)
BETA = RegisteredSite(name="beta")


def says(name: str) -> Introduction:
    return Introduction(name, {2: 5, 3: 0})


def test_without_a_list_everybody_may_come() -> None:
    registration = Registration([])
    assert registration.may_ask(NodeInfo(name="anybody"))
    registration.check(says("whoever"), NodeInfo(name="anybody"))


@pytest.mark.parametrize(
    ("node", "asked"),
    [
        (NodeInfo(public_key=ALPHA_KEY), True),
        (NodeInfo(name="alpha", public_key=STRANGER_KEY), False),  # its name is registered with another key
        (NodeInfo(name="alpha"), False),
        (NodeInfo(name="beta"), True),
        (NodeInfo(name="beta", public_key=STRANGER_KEY), True),
        (NodeInfo(), True),  # it may yet say that it is beta
        (NodeInfo(name="gamma"), False),
    ],
)
def test_only_nodes_that_can_be_a_registered_site_are_asked(node: NodeInfo, asked: bool) -> None:
    assert Registration([ALPHA, BETA]).may_ask(node) == asked


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (NodeInfo(node_id=7, public_key=ALPHA_KEY), "alpha"),
        (NodeInfo(node_id=7, public_key=ALPHA_KEY, name="ward-3"), "alpha"),
        (NodeInfo(node_id=7, public_key=STRANGER_KEY, name="ward-3"), "ward-3"),
        (NodeInfo(node_id=7), "node-7"),
    ],
)
def test_a_node_that_has_not_introduced_itself_goes_by_its_registered_key(node: NodeInfo, name: str) -> None:
    assert Registration([ALPHA, BETA]).name_of(node) == name


def test_where_every_site_has_a_key_a_node_without_one_is_not_even_asked() -> None:
    assert not Registration([ALPHA]).may_ask(NodeInfo())


@pytest.mark.parametrize(
    ("name", "key"),
    [("alpha", b""), ("alpha", STRANGER_KEY), ("gamma", ALPHA_KEY), ("gamma", b""), ("beta", ALPHA_KEY)],
)
def test_a_name_without_its_key_is_refused(name: str, key: bytes) -> None:
    with pytest.raises(WireError, match="not_registered"):
        Registration([ALPHA, BETA]).check(says(name), NodeInfo(public_key=key))


def test_a_name_with_its_key_is_believed() -> None:
    Registration([ALPHA, BETA]).check(says("alpha"), NodeInfo(public_key=ALPHA_KEY))
    Registration([ALPHA, BETA]).check(says("beta"), NodeInfo())


@pytest.mark.parametrize("line", ["ecdsa-sha2-nistp384 AAAA alpha", "not a key", "-----BEGIN PUBLIC KEY-----"])
def test_a_key_that_cannot_be_read_is_told_with_the_way_out(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^sites: 'alpha': public_key: .*; (expected|have)"):
        Registration([RegisteredSite(name="alpha", public_key=line)])


def test_two_sites_with_one_key_are_refused() -> None:
    twin = RegisteredSite(name="twin", public_key=ALPHA_LINE)
    with pytest.raises(ConfigError, match="'alpha' and 'twin' have the same public_key"):
        Registration([ALPHA, BETA, twin])


@pytest.mark.parametrize(
    ("claimed", "fine"), [({2: 10, 3: 3}, True), ({2: 11, 3: 3}, False), ({2: 10, 3: 4}, False), ({2: 0, 3: 0}, True)]
)
def test_claims_above_what_is_registered_are_refused(claimed: dict[Rank, int], fine: bool) -> None:
    registration = Registration([RegisteredSite(name="ct", max_images=10, max_volumes=3)])
    site = StubSite("ct", {3: 6})
    request = TrainRequest(small_study(), run="0" * 16, round=1, student={}, teacher=None, teacher_retention={})
    reply = dataclasses.replace(good_answer(request, site), scans=claimed)
    if fine:
        registration.check_counts(reply)
    else:
        with pytest.raises(WireError, match="counts"):
            registration.check_counts(reply)


def test_a_run_asks_registered_sites_alone_and_holds_them_to_their_numbers(tmp_path: Path) -> None:
    def grown(request: TrainRequest, of: StubSite) -> TrainReply:
        scans: dict[Rank, int] = {2: 0, 3: 5 + request.round}
        return dataclasses.replace(good_answer(request, of), scans=scans)

    sites = {"ct": StubSite("ct", {3: 6}, grown), "other": StubSite("other", {2: 4})}
    config = CoordinatorConfig(
        study=Path("unused"),
        out=tmp_path,
        sites=(RegisteredSite(name="ct", max_volumes=6),),
        wait_s=0.1,
        round_tries=1,
        min_sites=1,
    )
    with LocalGrid(stub_app(sites), {name: {"name": name} for name in sites}, run_config={}) as grid:
        Federation(grid, small_study(rounds=1), config).run()
    assert not sites["other"].requests
    assert metric_rows(tmp_path)[0]["sites"].keys() == {"ct"}
    assert metric_rows(tmp_path)[0]["sites"]["ct"]["status"] == "ok"


def test_a_file_with_a_name_twice_or_too_few_sites_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.yaml"
    path.write_text("study: s\nout: o\nsites: [{name: a}, {name: a}]\n")
    with pytest.raises(ConfigError, match="sites: the name a stands twice"):
        load_coordinator(path)
    path.write_text("study: s\nout: o\nsites: [{name: a}]\nmin_sites: 2\n")
    with pytest.raises(ConfigError, match="min_sites=2 must not be above the number of sites, 1"):
        load_coordinator(path)


# ------------------------------------------------------------------------------- studies of site-level privacy


def coordinator(out: Path, **changes: object) -> CoordinatorConfig:
    """Of two sites at least."""
    return CoordinatorConfig.model_validate({"study": out, "out": out, "min_sites": 2, "min_replies": 2, **changes})


@pytest.mark.parametrize(
    ("sites", "lacks"),
    [
        ((), "names no sites"),
        ((ALPHA, BETA), "gives no public_key for beta"),
        ((BETA, RegisteredSite(name="gamma", public_key="")), "gives no public_key for beta and gamma"),
    ],
)
def test_a_site_level_study_asks_for_every_sites_key(
    tmp_path: Path, sites: tuple[RegisteredSite, ...], lacks: str
) -> None:
    """Else one hospital could connect under two names and move each sum by two clip norms."""
    told = f"but the coordinator file {lacks}. List every site .* with its public_key, .* or write identity: believed"
    with pytest.raises(ConfigError, match=told):
        check_site_level(site_study(), coordinator(tmp_path, sites=sites))
    for waived in ("believed", "simulated"):
        check_site_level(site_study(), coordinator(tmp_path, sites=sites, identity=waived))
    check_site_level(small_study(), coordinator(tmp_path, sites=sites))


def test_with_every_sites_key_nothing_is_asked_nor_told(tmp_path: Path) -> None:
    proved = coordinator(tmp_path, sites=(ALPHA, RegisteredSite(name="beta", public_key=key_pair()[0])))
    check_site_level(site_study(), proved)
    assert who_is_believed(site_study(), proved) is None
    assert who_is_believed(small_study(), coordinator(tmp_path, identity="believed")) is None


def test_sites_that_are_believed_are_told_of_on_the_screen_with_what_a_second_name_costs(tmp_path: Path) -> None:
    study, config = site_study(), coordinator(tmp_path, identity="believed", wait_s=0.1)
    heard: list[progress.Event] = []
    sites = {name: StubSite(name, {2: 10}) for name in ("a", "b")}
    with progress.listen(heard.append), LocalGrid(stub_app(sites), {n: {"name": n} for n in sites}, run_config={}) as g:
        Federation(g, study, config).run()
    told = r"One that does pays epsilon ([0-9.]+) at delta 1e-05 by the last round, instead of epsilon ([0-9.]+)$"
    (found,) = [match for event in heard if isinstance(event, progress.Note) and (match := re.search(told, event.text))]
    twice, once = (epsilon([Mechanism(noise, 1.0, 1)], 1e-5) for noise in (1.0, 2.0))
    assert [float(found[1]), float(found[2])] == pytest.approx([twice, once], rel=0.005)


def test_a_simulation_says_that_its_sites_are_its_own(tmp_path: Path) -> None:
    """Of site-level privacy it then asks for no keys."""
    (tmp_path / "study.yaml").write_text(dump_yaml(site_study()))
    (tmp_path / "simulation.yaml").write_text(
        "study: study.yaml\nquorum: {min_sites: 2, min_replies: 2}\n"
        "sites: [{name: a, phantom: {kind: cr, patients: 1}}, {name: b, phantom: {kind: cr, patients: 1}}]\n"
    )
    made = prepare(read_simulation(tmp_path / "simulation.yaml"), tmp_path / "out", resume=False)
    check_site_level(site_study(), load_coordinator(made))
