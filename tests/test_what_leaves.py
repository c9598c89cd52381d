"""docs/what-leaves-the-site.md says of every field that can cross the wire that it does, and of no other."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore import constant
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from client.app import REASONS as SITE_REASONS
from tests.federation import RUN, random_tensors, small_study, whole_layout
from unimiss_core import codec, wire
from unimiss_core.chain import Head
from unimiss_core.codec import layout_of
from unimiss_core.formats import FORMATS
from unimiss_core.groups import GROUPS
from unimiss_core.network import empty_network
from unimiss_core.reasons import REASONS
from unimiss_core.study import ModelConfig
from unimiss_core.wire import Hello, Introduction, Refusal, TrainReply, TrainRequest, arrays_in, with_ledger

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "what-leaves-the-site.md").read_text()
LAYOUT = whole_layout()
HEAD = Head(3, "a" * 64)


def section(heading: str) -> str:
    """The text under a heading of the page, up to the next."""
    (found,) = re.findall(rf"^##+ {re.escape(heading)}[^\n]*\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return str(found)


def table(heading: str) -> dict[str, str]:
    """Field -> type of the first table of a section."""
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section(heading), re.M))


def packed(content: RecordDict) -> dict[str, str]:
    facts = content["facts"]
    assert isinstance(facts, ConfigRecord)
    assert set(content) == {"facts", *arrays_in(content)}
    return {name: type(value).__name__ for name, value in facts.items()} | dict.fromkeys(arrays_in(content), "arrays")


def request(dtype: str, **parts: object) -> RecordDict:
    study = small_study(rounds=9, wire={"dtype": dtype})
    filled = {"student": None, "teacher": None, **parts}
    return TrainRequest(study, RUN, 2, teacher_retention={}, ledger=HEAD, **filled).pack(LAYOUT)  # type: ignore[arg-type]


def reply(dtype: str) -> RecordDict:
    tensors = random_tensors(LAYOUT, 0)
    told = TrainReply("north", RUN, 1, "a" * 64, tensors, {2: 1, 3: 1}, 2, 1.0, {"image": 1.0}, {"grad_norm": 1.0})
    return with_ledger(told.pack(LAYOUT, dtype), HEAD)


TENSORS = random_tensors(LAYOUT, 0)
MESSAGES: Mapping[str, tuple[RecordDict, ...]] = {
    "Who it is": (Introduction("north", {2: 1, 3: 1}, 2, HEAD).pack(),),
    "An update": (reply("bf16"), reply("int8"), reply("fp32")),
    "A refusal": (Refusal("budget").pack(),),
    "Who are you": (Hello(small_study(), RUN).pack(),),
    "Train a round": (request("bf16", student=TENSORS, teacher=TENSORS), request("int8", student_step=TENSORS)),
}


@pytest.mark.parametrize("heading", MESSAGES)
def test_every_key_that_is_packed_is_on_the_page_with_its_type_and_no_other(heading: str) -> None:
    fields: dict[str, str] = {}
    for content in MESSAGES[heading]:
        fields |= packed(content)
    assert table(heading) == fields


def test_every_message_of_the_wire_is_on_the_page() -> None:
    packing = {kind for kind in vars(wire).values() if isinstance(kind, type) and hasattr(kind, "pack")}
    assert packing == {Hello, Introduction, TrainRequest, TrainReply, Refusal}
    assert PAGE.count("| field | type |") == len(MESSAGES)


@pytest.mark.parametrize("dtype", FORMATS)
def test_an_update_is_arrays_of_known_groups_and_types_and_of_the_length_that_is_told(dtype: str) -> None:
    update = arrays_in(reply(dtype))["update"]
    assert set(update) == set(GROUPS)
    text = section("An update")
    assert all(f"`{word}`" in text for word in (*GROUPS, dtype))
    for group, array in update.items():
        assert (array.dtype, array.stype) == (dtype, "unimiss")
        assert len(array.data) == codec.num_bytes({group: LAYOUT[group]}, dtype)  # type: ignore[dict-item, index]
    assert sum(len(array.data) for array in update.values()) == codec.num_bytes(LAYOUT, dtype)


def test_the_sizes_are_those_of_the_models() -> None:
    published = {"image_size": (224, 224), "volume_size": (16, 96, 96), "prototypes": 65_536}
    for size, model in (
        ("nano", ModelConfig(size="nano")),
        ("tiny", ModelConfig(size="tiny", **published)),  # type: ignore[arg-type]
        ("small", ModelConfig(size="small", **published)),  # type: ignore[arg-type]
    ):
        layout = layout_of(empty_network(model))
        sizes = " | ".join(f"{codec.num_bytes(layout, dtype):,}" for dtype in ("bf16", "fp32", "int8"))
        assert re.search(rf"^\| {size}[^|]*\| {sizes} \|$", PAGE, re.M)


def test_every_reason_that_a_site_can_give_is_on_the_page() -> None:
    sources = [path for package in ("client", "unimiss_core") for path in (ROOT / package).glob("*.py")]
    given = {reason for path in sources for reason in re.findall(r'WireError\(\s*"(\w+)"', path.read_text())}
    given |= set(SITE_REASONS.values()) | {"failed"}
    listed = set(re.findall(r"`(\w+)`", section("A refusal").split("program may give")[1].split("unimiss_core/")[0]))
    assert listed == given <= set(REASONS)


# -- Flower's own -----------------------------------------------------------------------------------------------------

SENT = (
    *("ActivateNodeRequest", "DeactivateNodeRequest", "PullMessagesRequest", "PushMessagesRequest"),
    *("SendNodeHeartbeatRequest", "PullObjectRequest", "PushObjectRequest", "ConfirmMessageReceivedRequest"),
    *("GetRunRequest", "GetFabRequest"),
)
"""What our sites send of Flower's messages: those that the coordinator's front lets through."""


def fields_of(message: str) -> list[str]:
    for module in (fleet_pb2, message_pb2, heartbeat_pb2, run_pb2, fab_pb2):
        if message in module.DESCRIPTOR.message_types_by_name:
            return [field.name for field in module.DESCRIPTOR.message_types_by_name[message].fields]
    raise AssertionError(message)


def test_flowers_own_fields_are_those_of_the_installed_flower() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", section("What Flower sends of itself"), re.M))
    assert set(rows) == {*SENT, "Metadata"}
    for message, told in rows.items():
        asked = fields_of(message)
        assert re.findall(r"`(\w+)`", told) == asked, message


def test_flowers_headers_are_on_the_page() -> None:
    metadata = RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()
    signed = (constant.FLEET_HTTP_PUBLIC_KEY_HEADER, constant.FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
    for header in (*(name for name, _ in metadata), *signed):
        assert f"`{header}`" in PAGE
