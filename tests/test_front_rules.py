"""What the public side's rules, shares and account of refusals are, by themselves."""

from collections.abc import Mapping

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore import constant
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from server.contacts import AHEAD_S, BEHIND_S
from server.front_rules import HEADERS, MEDIA_TYPE, MESSAGES, OBJECTS, Refused
from server.front_shares import Allowance
from server.refusals import MOST_STRANGERS, Refusals
from unimiss_core.errors import AuditError


def test_ten_requests_pass_and_no_other_of_the_flower_that_is_installed() -> None:
    """By name: a new version of Flower must not widen what passes, nor narrow it unseen."""
    names = {path.removeprefix(b"/v1/fleet/").decode() for path in MESSAGES | OBJECTS}
    assert names == {
        *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab", "confirm-message-received"),
        *("pull-messages", "push-messages", "pull-object", "push-object"),
    }
    fleet = {path.removeprefix("/v1/fleet/") for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert fleet - names == {"register-node", "unregister-node"}


def test_headers_and_clocks_are_those_of_the_flower_that_is_installed() -> None:
    told = [
        *(constant.FLEET_HTTP_PUBLIC_KEY_HEADER, constant.FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER),
        *(constant.FLWR_PACKAGE_NAME_METADATA_KEY, constant.FLWR_PACKAGE_VERSION_METADATA_KEY),
        constant.FLWR_COMPONENT_NAME_METADATA_KEY,
    ]
    assert {b"content-type", b"accept", *(name.encode() for name in told)} == HEADERS
    assert MEDIA_TYPE.decode() == PROTOBUF_MEDIA_TYPE
    assert (BEHIND_S, AHEAD_S) == (TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE)


def test_a_site_sends_no_more_than_its_hourly_share() -> None:
    now = 7200.0
    allowance = Allowance(100.0, clock=lambda: now)
    allowance.take("alpha", 60)
    with pytest.raises(Refused, match="busy"):
        allowance.take("alpha", 41)
    allowance.take("alpha", 40)
    allowance.take("beta", 100)
    now += 3600.0
    allowance.take("alpha", 100)


def test_a_disk_that_is_full_stops_no_refusal() -> None:
    def full(_kind: str, _fields: Mapping[str, object]) -> None:
        raise AuditError("no room")

    refusals = Refusals(full)
    refusals.add("path", "alpha")
    with refusals.told_in_background():
        refusals.add("path", "beta")
    assert refusals.counts == {"path": 2}


def test_a_scan_of_ports_cannot_fill_the_log() -> None:
    now, noted = 0.0, []
    refusals = Refusals(lambda _, fields: noted.append(fields), clock=lambda: now)
    for count in range(20_000):
        refusals.add("not_tls", f"10.0.{count // 256 % 256}.{count % 256}", is_stranger=True)
    assert len(noted) == MOST_STRANGERS + 1
    now = 61.0
    refusals.tell_due()
    assert sum(int(fields["count"]) for fields in noted) == 20_000
    assert len(noted) == MOST_STRANGERS + 2


def test_a_scan_of_ports_hides_no_site() -> None:
    noted: list[Mapping[str, object]] = []
    refusals = Refusals(lambda _, fields: noted.append(fields), clock=lambda: 0.0)
    for count in range(MOST_STRANGERS + 1):
        refusals.add("not_tls", f"10.0.0.{count}", is_stranger=True)
    refusals.add("forged", "alpha")
    assert noted[-1] == {"reason": "forged", "peer": "alpha", "count": 1}
