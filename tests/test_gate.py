"""The gate: what it lets to Flower's SuperNode and what it lets out, and that Flower is what it takes it for."""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from client import gate
from client.gate import FleetLine, Gate, Rules
from client.health import ContactBook, read_contact, read_refused, tell_of_refusal
from server.exchange import Reply, content_of
from tests.unfolding import array_of_one_chunk
from unimiss_core import bundle
from unimiss_core.errors import AuditError, WireError
from unimiss_core.reasons import REASONS

FAB = bundle.fab()
HASH = hashlib.sha256(FAB).hexdigest()
RUN_ID = 7
NODE_ID = 1234
SECRET_WORDS = "patient Jane Doe in /data/doe_jane.dcm"

MOST_BYTES = 8_000_000
"""That a message may take in memory."""


@dataclass
class Coordinator:
    """The other end of the line: answers as it is told, and keeps what was sent to it."""

    inbox: list[Message] = field(default_factory=list)
    run: Run = field(
        default_factory=lambda: replace(
            Run.create_empty(RUN_ID),
            fab_id="unimiss/federated-unimiss",
            fab_version=bundle.VERSION,
            fab_hash=HASH,
            override_config={"coordinator": "/srv/coordinator.yaml", "resume": True},
        )
    )
    fab: bytes = FAB
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    pushed: dict[str, bytes] = field(default_factory=dict)
    runtimes_s: list[float] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def line(self) -> FleetLine:
        return FleetLine(
            NODE_ID,
            self._receive,
            self._send,
            self._get_run,
            self._get_fab,
            lambda _, object_id: self.objects[object_id],
            lambda _run, _session, object_id, content: self.pushed.update({object_id: content}),
            lambda _run, object_id: self.asked.append(f"confirm {object_id}"),
        )

    def _receive(self) -> tuple[Message, ObjectTree] | None:
        if not self.inbox:
            return None
        message = self.inbox.pop(0)
        return message, get_object_tree(message)

    def _send(self, message: Message, tree: ObjectTree, runtime_s: float) -> tuple[set[str], str]:
        self.sent.append(message)
        self.runtimes_s.append(runtime_s)
        return {tree.object_id}, "session"

    def _get_run(self, run_id: int) -> Run:
        self.asked.append(f"run {run_id}")
        return self.run

    def _get_fab(self, fab_hash: str, _run_id: int) -> Fab:
        self.asked.append(f"fab {fab_hash[:8]}")
        return Fab(hashlib.sha256(self.fab).hexdigest(), self.fab, {})


def request(message_type: str = "train", round_text: str = "3", run_id: int = RUN_ID) -> Message:
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=1,
        dst_node_id=NODE_ID,
        reply_to_message_id="",
        group_id=round_text,
        created_at=now().timestamp(),
        ttl=60.0,
        message_type=message_type,
    )
    message = make_message(metadata, RecordDict({"config": ConfigRecord({"a": 1})}))
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@dataclass
class Guarded:
    coordinator: Coordinator
    gate: Gate
    notes: list[tuple[str, Mapping[str, str | int | float]]]
    state: Path

    @property
    def refusals(self) -> list[str]:
        return [str(facts["reason"]) for _, facts in self.notes if facts["decision"] == "refused"]


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    coordinator = Coordinator()
    notes: list[tuple[str, Mapping[str, str | int | float]]] = []
    rules = Rules(
        frozenset({HASH}),
        MOST_BYTES,
        tmp_path / "apps",
        ContactBook(tmp_path),
        lambda kind, facts: notes.append((kind, facts)),
        partial(tell_of_refusal, tmp_path),
    )
    return Guarded(coordinator, Gate(coordinator.line(), rules), notes, tmp_path)


def test_our_own_bundle_passes_and_is_looked_at_once(guarded: Guarded) -> None:
    guarded.coordinator.inbox += [request("query", ""), request("train")]
    supernode = guarded.gate.guarded()
    assert supernode.receive() is not None
    assert supernode.get_run(RUN_ID) is guarded.coordinator.run
    assert supernode.get_fab(HASH, RUN_ID).content == FAB
    assert supernode.receive() is not None
    assert guarded.coordinator.asked == [f"run {RUN_ID}", f"fab {HASH[:8]}"]
    assert guarded.notes == [("bundle", {"run": str(RUN_ID), "hash": HASH, "decision": "accepted"})]


def test_a_second_answer_to_the_same_question_is_never_heard(guarded: Guarded) -> None:
    guarded.coordinator.inbox.append(request())
    supernode = guarded.gate.guarded()
    assert supernode.receive() is not None
    guarded.coordinator.fab = FAB + b"other"
    guarded.coordinator.run = replace(guarded.coordinator.run, override_config={"noise": 0.0})
    assert supernode.get_fab(HASH, RUN_ID).content == FAB
    assert "noise" not in supernode.get_run(RUN_ID).override_config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fab_hash": "0" * 64}, "bundle"),  # what is delivered is ours, and the run says it is another
        ({"override_config": {"simulation": "demo.yaml"}}, "run_config"),
        ({"override_config": {"out": "/srv"}}, "run_config"),
        ({"override_config": {"study.privacy.noise": 0.0}}, "run_config"),
        ({"override_config": {"resume": "yes"}}, "run_config"),
        ({"override_config": {"coordinator": 1}}, "run_config"),
        ({"primary_task_type": TaskType.AGENT_APP}, "run"),
        ({"fab_id": "../../evil/app"}, "run"),  # Flower makes a path of it
        ({"fab_version": "9.9.9"}, "run"),
        ({"run_id": 8}, "run"),
    ],
)
def test_a_run_that_is_not_as_it_should_be_is_refused_without_a_word(
    guarded: Guarded, change: Mapping[str, object], reason: str
) -> None:
    guarded.coordinator.run = replace(guarded.coordinator.run, **change)  # type: ignore[arg-type]
    assert_refused(guarded, request(), reason)
    told = read_refused(guarded.state)  # what `unimiss-site status` shows
    assert told is not None
    assert (told.reason, told.words) == ("bundle", gate.REFUSED_WORDS[reason])


def test_another_bundle_is_refused_and_each_time_again(guarded: Guarded) -> None:
    guarded.coordinator.fab = FAB + b"\0"
    guarded.coordinator.run = replace(guarded.coordinator.run, fab_hash=hashlib.sha256(FAB + b"\0").hexdigest())
    assert_refused(guarded, request(), "bundle")
    guarded.coordinator.inbox.append(request())
    assert guarded.gate.receive() is None
    assert len(guarded.coordinator.sent) == 2
    assert guarded.refusals == ["bundle"]  # noted once for a run, not for each message


@pytest.mark.parametrize("message_type", ["evaluate", "train.raw_data", "query.files", "system"])
def test_what_no_site_answers_is_refused_before_any_code_is_asked_for(guarded: Guarded, message_type: str) -> None:
    assert_refused(guarded, request(message_type), "message_type", ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    assert not guarded.coordinator.asked


def test_an_error_in_the_place_of_a_question_is_refused(guarded: Guarded) -> None:
    assert_refused(guarded, make_message(request().metadata, error=Error(1)), "message_type", code=2)


def assert_refused(guarded: Guarded, message: Message, reason: str, code: int = ErrorCode.INVALID_FAB) -> None:
    guarded.coordinator.inbox.append(message)
    assert guarded.gate.receive() is None
    (reply,) = guarded.coordinator.sent
    assert (reply.error.code, reply.error.reason) == (code, gate.UNSAID)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert guarded.coordinator.pushed == {reply.metadata.message_id: reply.deflate()}
    assert guarded.refusals == [reason]


@pytest.mark.parametrize("code", [ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.CLIENT_APP_CRASHED, 99])
def test_an_error_leaves_without_its_text(guarded: Guarded, code: int) -> None:
    reply = Message(Error(code, SECRET_WORDS), reply_to=request())
    reply.metadata.__dict__["_message_id"] = reply.object_id
    supernode = guarded.gate.guarded()
    assert supernode.send(reply, get_object_tree(reply), 12.5) == (set(), "")  # nothing for the SuperNode to push
    (sent,) = guarded.coordinator.sent
    left = message_to_proto(sent).SerializeToString() + b"".join(guarded.coordinator.pushed.values())
    assert b"Doe" not in left
    assert b"doe" not in left
    assert sent.error.code == (code if code < 9 else ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    assert guarded.coordinator.pushed.keys() == {sent.metadata.message_id}
    assert reply.error.reason == SECRET_WORDS  # the site's own copy stays as it was


def test_a_reply_leaves_as_it_is_but_for_how_long_the_work_took(guarded: Guarded) -> None:
    reply = Message(RecordDict({"arrays": ArrayRecord()}), reply_to=request())
    assert guarded.gate.guarded().send(reply, get_object_tree(reply), 12.5) == ({reply.object_id}, "session")
    assert guarded.coordinator.sent == [reply]
    assert guarded.coordinator.runtimes_s == [0.0]


def test_a_message_that_would_fill_the_memory_is_cut_off(guarded: Guarded) -> None:
    part = ConfigRecord({"a": b"x" * (MOST_BYTES // 2)}).deflate()
    guarded.coordinator.objects = {"a": part, "b": part}
    guarded.coordinator.inbox += [request(), request()]
    supernode = guarded.gate.guarded()
    supernode.receive()
    supernode.pull_object(RUN_ID, "a")
    with pytest.raises(ValueError, match=f"more than {MOST_BYTES} bytes"):
        supernode.pull_object(RUN_ID, "b")
    supernode.receive()
    supernode.pull_object(RUN_ID, "b")  # counted for each message


def test_a_message_that_unfolds_to_more_than_memory_is_cut_off(guarded: Guarded) -> None:
    guarded.coordinator.objects = {"a": array_of_one_chunk(times=1000)}
    guarded.coordinator.inbox.append(request())
    supernode = guarded.gate.guarded()
    supernode.receive()
    with pytest.raises(ValueError, match=f"more than {MOST_BYTES} bytes"):
        supernode.pull_object(RUN_ID, "a")


@pytest.mark.parametrize("at", ["pull_object", "confirm"])
@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_message_whose_run_ends_while_it_comes_is_let_go_whole(guarded: Guarded, at: str, is_guarded: bool) -> None:
    """By Flower's own loop, which otherwise keeps the message, and sends each reply one message late from then on."""

    def is_over(*_: object) -> None:
        raise RunNotRunningException

    message = request()
    guarded.coordinator.objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    guarded.coordinator.inbox.append(message)
    line = guarded.coordinator.line()._replace(**{at: is_over})
    stored = ObjectStoreFactory()
    state, gated = NodeStateFactory(objectstore_factory=stored).state(), Gate(line, guarded.gate.rules).guarded()
    state.set_node_id(NODE_ID)
    taken = start_client_internal._pull_and_store_message(
        state,
        stored.store(),
        {},
        gated.receive,
        gated.get_run,
        gated.get_fab,
        gated.pull_object if is_guarded else line.pull_object,
        gated.confirm if is_guarded else line.confirm,
        None,
    )
    assert taken is None
    assert bool(state.get_messages_legacy(is_reply=False)) is not is_guarded


def test_what_was_unpacked_before_is_not_run_again(guarded: Guarded) -> None:
    (guarded.state / "apps" / "unimiss.federated-unimiss.0.1.0.abcd").mkdir(parents=True)
    guarded.coordinator.inbox.append(request())
    guarded.gate.receive()
    assert not (guarded.state / "apps").exists()


def test_the_round_is_told_where_it_is_a_number(guarded: Guarded) -> None:
    for text, told in {"12": 12, "": None, "x; rm -rf": None, "9" * 30: None}.items():
        guarded.coordinator.inbox.append(request(round_text=text))
        guarded.gate.receive()
        contact = read_contact(guarded.state)
        assert contact is not None
        assert contact.round == told


def test_what_cannot_be_written_down_is_not_run_and_is_tried_again(guarded: Guarded) -> None:
    def full(_kind: str, _facts: Mapping[str, str | int | float]) -> None:
        raise AuditError("/var/lib/site/audit.jsonl: no space left")

    gated = Gate(guarded.coordinator.line(), replace(guarded.gate.rules, note=full))
    guarded.coordinator.inbox += [request(), request()]
    assert gated.receive() is None
    (reply,) = guarded.coordinator.sent
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, gate.UNSAID)
    gated.rules = guarded.gate.rules
    assert gated.receive() is not None


def test_decisions_about_old_runs_do_not_pile_up(guarded: Guarded) -> None:
    for number in range(3 * gate.KEPT_RUNS):
        guarded.coordinator.inbox.append(request(run_id=number))
        guarded.gate.receive()
    assert len(guarded.gate._runs) == gate.KEPT_RUNS


def test_flower_is_as_the_gate_takes_it_to_be() -> None:
    """The private names of the pinned version that are replaced, and what is asked of them."""
    assert start_client_internal.http_request_response is fleet_http_connection.http_request_response
    connect = inspect.signature(fleet_http_connection.http_request_response)
    assert list(connect.parameters)[:4] == ["server_address", "insecure", "root_certificates", "authentication_keys"]
    source = inspect.getsource(fleet_http_connection)
    assert source.count("FleetHttpClient.from_server_address(") == source.count("FleetHttpClient.") == 1
    loop = inspect.getsource(start_client_internal.start_client_internal)
    names = ",".join(FleetLine._fields).replace("confirm", "confirm_message_received")
    assert names in loop.replace(" ", "").replace("\n", "")
    reads = inspect.getsource(start_client_internal._pull_and_store_message)
    assert reads.index("receive()") < reads.index("get_run(") < reads.index("get_fab(") < reads.index("create_task(")


def test_the_site_files_path_is_in_nothing_that_the_supernode_sends() -> None:
    """It stands in the node configuration, which Flower's line to the coordinator is never given."""
    assert "node_config" not in inspect.getsource(fleet_http_connection)
    given = inspect.getsource(start_client_internal._push_messages)
    assert "node_config" not in given
    assert "context" not in given


def test_the_coordinator_is_told_that_its_code_is_another(guarded: Guarded) -> None:
    guarded.coordinator.run = replace(guarded.coordinator.run, fab_hash="0" * 64)
    guarded.coordinator.inbox.append(request())
    guarded.gate.receive()
    with pytest.raises(WireError) as raised:
        content_of(Reply(guarded.coordinator.sent[0]))
    assert raised.value.reason == "bundle"
    assert raised.value.reason in REASONS
