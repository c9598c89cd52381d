"""The gate between a coordinator and this site: Flower's SuperNode, in which nothing foreign is run and no text leaves.

    python -m client.gate --home FOLDER --port PORT --secret FILE        (started by `client.daemon`, not by hand)

Flower's SuperNode runs whatever bundle of code the coordinator hands it, and sends back the text of any exception. Here
every message is looked at before the SuperNode's own loop sees it: it must be of a kind that our sites answer, and its
run's bundle must be byte for byte one that this site allows, which is the one that its own installation makes. What is
refused gets an error without a word, and every error that leaves has its text taken out, whoever wrote it.

The SuperNode has no public place to hook into, so two names of Flower's modules are replaced (`install`). The version
is pinned, and tests/test_gate.py holds that version to what is relied upon here.
"""

import argparse
import hashlib
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import Error, Message
from flwr.cli.config_utils import get_fab_metadata
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import fleet_http_connection, start_client_internal

from client.audit import log_of
from client.fleet import Lines
from client.health import ContactBook, tell_of_refusal
from client.home import Home
from client.site_config import load_site
from client.tls import tls_of
from unimiss_core import bundle, tether
from unimiss_core.errors import AuditError, ConfigError, UnimissError
from unimiss_core.joining import read_welcome
from unimiss_core.unfolding import bytes_in_memory

log = logging.getLogger(__name__)

MESSAGE_TYPES = frozenset({"query", "train"})
"""What `client.app` answers: who a site is, and a round of training."""
BYTES_OF_PARAMETER = 16
"""Student and teacher at 4 bytes each, which the SuperNode holds in memory in parts, and its ClientApp joined."""
BYTES_BESIDE = 256 << 20
"""For all else that a message brings; the last part of each array counts as a whole one."""
INVALID_FAB = 7
CLIENT_APP_RAISED = 2
"""Flower's codes of errors."""
_ERROR_CODES = range(1, 9)
UNSAID = "the site's own log says why"
"""The text of every error that leaves."""
BUNDLE = "bundle"
"""By which reason of `unimiss_core.reasons` the coordinator knows INVALID_FAB."""
REFUSED_WORDS: Mapping[str, str] = {
    "bundle": "the coordinator's run is of other code than this site has installed; install the same version at both, "
    "or list its sha256, which `unimiss-site audit` shows, under policy.bundles",
    "run_config": "the coordinator's run is submitted with settings that ours never have; ask its operator",
    "run": "the coordinator's run is not what it says of itself; ask its operator",
}
"""For this site's own operator, of a run that is refused."""

KEPT_RUNS = 16
"""Runs whose decision is remembered; an older one is looked at again."""

Note = Callable[[str, Mapping[str, str | int | float]], None]
"""Writes down what was decided: a kind and its facts."""

Received = tuple[Message, ObjectTree]


class Refused(Exception):  # noqa: N818 - what became of a message, not a fault
    """A message that this site does not answer. `reason`: for its own log. `code`: what the coordinator is told."""

    def __init__(self, reason: str, code: int = INVALID_FAB) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


class FleetLine(NamedTuple):
    """What Flower's connection gives to its SuperNode, in its order."""

    node_id: int
    receive: Callable[[], Received | None]
    send: Callable[[Message, ObjectTree, float], tuple[set[str], str]]
    get_run: Callable[[int], Run]
    get_fab: Callable[[str, int], Fab]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


@dataclass(frozen=True)
class Rules:
    """allowed: SHA-256, in hex, of the bundles that may run here. most_bytes: that a message may take in memory. apps:
    where Flower unpacks bundles. tell: a reason and words, to whoever asks how this site is doing."""

    allowed: frozenset[str]
    most_bytes: int
    apps: Path
    contact: ContactBook
    note: Note
    tell: Callable[[str, str], None]


@dataclass
class Gate:
    """Stands between a line and the SuperNode's loop, which handles one message at a time."""

    line: FleetLine
    rules: Rules
    _runs: dict[int, tuple[Run, Fab] | str] = field(default_factory=dict)
    """What was admitted, or why it was not."""
    _bytes: int = 0
    """That the message at work takes in memory."""

    def guarded(self) -> FleetLine:
        return self.line._replace(
            receive=self.receive,
            send=self.send,
            get_run=self.get_run,
            get_fab=self.get_fab,
            pull_object=self.pull_object,
            confirm=self.confirm,
        )

    def receive(self) -> Received | None:
        """The next message, where it may be answered; one that may not is answered with an error here."""
        if (received := self.line.receive()) is None:
            return None
        message, _ = received
        self.rules.contact.asked(message.metadata.group_id)
        try:
            self._admit(message)
        except Refused as refused:
            log.warning("a message is refused: %s", refused.reason)
            if words := REFUSED_WORDS.get(refused.reason):
                self.rules.tell(BUNDLE, words)
            self._send_error(Message(Error(refused.code), reply_to=message))
            return None
        except AuditError as error:
            log.error("a message is refused: %s", error)  # what cannot be written down is not done
            self._send_error(Message(Error(CLIENT_APP_RAISED), reply_to=message))
            return None
        self._bytes = 0
        shutil.rmtree(self.rules.apps, ignore_errors=True)  # unpacked anew: what was edited on the disk is not run
        return received

    def get_run(self, run_id: int) -> Run:
        """The very one that was looked at. A second question could get a second answer."""
        return self._admitted(run_id)[0]

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        del fab_hash
        return self._admitted(run_id)[1]

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        """Raises ValueError, upon which the SuperNode lets the message go: its run is over, it is too large, or would
        be once joined."""
        with _let_go_where_a_run_is_over():
            content = self.line.pull_object(run_id, object_id)
        self._bytes += bytes_in_memory(content)
        if self._bytes > self.rules.most_bytes:
            raise ValueError(f"the message takes more than {self.rules.most_bytes} bytes of memory")
        return content

    def confirm(self, run_id: int, message_id: str) -> None:
        """Raises ValueError, as above."""
        with _let_go_where_a_run_is_over():
            self.line.confirm(run_id, message_id)

    def send(self, message: Message, tree: ObjectTree, runtime_s: float) -> tuple[set[str], str]:
        """Errors leave without their text, and nothing tells how long the site worked.

        Returns the objects that the coordinator lacks, and its session to push them in.
        """
        del runtime_s
        if message.has_error():
            self._send_error(message)
            return set(), ""
        return self.line.send(message, tree, 0.0)

    def _send_error(self, message: Message) -> None:
        """`message` with a fixed text in the place of its own; as Flower sends it, in the head and as an object."""
        clean = deepcopy(message)
        code = message.error.code if message.error.code in _ERROR_CODES else CLIENT_APP_RAISED
        clean.error = Error(code, UNSAID)
        clean.metadata.__dict__["_message_id"] = clean.object_id
        run_id = clean.metadata.run_id
        lacking, session = self.line.send(clean, get_object_tree(clean), 0.0)
        for object_id in lacking & {clean.object_id}:
            self.line.push_object(run_id, session, object_id, clean.deflate())

    def _admit(self, message: Message) -> None:
        """Raises Refused."""
        if message.metadata.message_type not in MESSAGE_TYPES or message.has_error():
            self._decide("message_type", message.metadata.run_id)
            raise Refused("message_type", CLIENT_APP_RAISED)
        run_id = message.metadata.run_id
        if run_id not in self._runs:
            self._runs[run_id] = self._examined(run_id)
            if len(self._runs) > KEPT_RUNS:
                del self._runs[next(iter(self._runs))]
        if isinstance(reason := self._runs[run_id], str):
            raise Refused(reason)

    def _examined(self, run_id: int) -> tuple[Run, Fab] | str:
        """A run and its bundle, or why they are refused: asked for once, and noted once."""
        run = self.line.get_run(run_id)
        if run.run_id != run_id or run.primary_task_type == TaskType.AGENT_APP:
            return self._decide("run", run_id)
        if not _is_declared(run.override_config):
            return self._decide("run_config", run_id)
        fab = self.line.get_fab(run.fab_hash, run_id)
        digest = hashlib.sha256(fab.content).hexdigest()
        if digest not in self.rules.allowed or {fab.hash_str, run.fab_hash} != {digest}:
            return self._decide("bundle", run_id, digest)
        if (run.fab_id, run.fab_version) != get_fab_metadata(fab.content):
            return self._decide("run", run_id, digest)  # by these names Flower finds it on the disk
        self.rules.note("bundle", {"run": str(run_id), "hash": digest, "decision": "accepted"})
        return run, fab

    def _decide(self, reason: str, run_id: int, digest: str = "") -> str:
        self.rules.note("bundle", {"run": str(run_id), "hash": digest, "decision": "refused", "reason": reason})
        return reason

    def _admitted(self, run_id: int) -> tuple[Run, Fab]:
        found = self._runs[run_id]
        assert not isinstance(found, str)  # the SuperNode asks about runs whose message `receive` gave it
        return found


@contextmanager
def _let_go_where_a_run_is_over() -> Iterator[None]:
    """By Flower's own word for it the SuperNode drops a message at this point only in part: its ClientApp works on, and
    from then on each reply leaves when the next message comes, which may be never."""
    try:
        yield
    except RunNotRunningException:
        raise ValueError("its run is over") from None


def _is_declared(override: Mapping[str, object]) -> bool:
    """Whether a run's configuration sets only what a submission may: a site reads none of it."""
    declared = bundle.RUN_CONFIG
    return all(key in declared and type(value) is type(declared[key]) for key, value in override.items())


def install(lines: Lines, rules: Rules) -> None:
    """Put the gate into Flower's SuperNode, in this process."""
    connection: Any = fleet_http_connection  # its names are private: no type is promised
    loop: Any = start_client_internal
    connect: Callable[..., AbstractContextManager[tuple[object, ...]]] = connection.http_request_response

    @contextmanager
    def guarded(*arguments: object) -> Iterator[FleetLine]:
        with connect(*arguments) as line:
            rules.contact.connected()
            yield Gate(FleetLine._make(line), rules).guarded()

    connection.FleetHttpClient = lines
    loop.http_request_response = guarded


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the SuperNode until it ends; ends the process, whatever threads of Flower's are left."""
    options = _parser().parse_args(arguments)
    _show_our_own_words()
    threading.excepthook = _end_with_a_thread
    tether.watch()
    code = 1
    try:
        home = Home(options.home.absolute())
        _run_supernode(home, options.port, options.secret, log_of(home.site).record)
    except UnimissError as error:
        print(f"gate: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # Flower says by one that a run is over, also where the site is refused
        log.error("the SuperNode ended: %s", type(error).__name__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the SuperNode's own server is a thread that outlives its loop


def _run_supernode(home: Home, port: int, secret: Path, note: Note) -> None:
    """Raises ConfigError; SystemExit, as Flower ends."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    site = load_site(home.site)
    contact = ContactBook(site.state)
    rules = Rules(
        allowed=frozenset({bundle.fab_hash(), *site.policy.bundles}),
        most_bytes=BYTES_BESIDE + BYTES_OF_PARAMETER * site.policy.most_parameters,
        apps=flower_home() / "apps",
        contact=contact,
        note=note,
        tell=partial(tell_of_refusal, site.state),
    )
    install(Lines(tls_of(home), contact), rules)
    sys.argv = ["flower-supernode", *supernode_arguments(home, read_welcome(home.welcome)[0].address, port, secret)]
    flower_supernode()


def supernode_arguments(home: Home, address: str, port: int, secret: Path) -> list[str]:
    """Raises ConfigError: the folder's name cannot be written in a node configuration."""
    if "'" in str(home.site) or not str(home.site).isprintable():
        raise ConfigError(f"{home.path}: its name holds a quotation mark or a control character; rename the folder")
    options: Mapping[str, str] = MappingProxyType(
        {
            "--superlink": address,
            "--root-certificates": str(home.authority),
            "--auth-supernode-private-key": str(home.private_key),
            "--isolation": "process",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--superexec-auth-secret-file": str(secret),
            "--node-config": f"site='{home.site}'",
        }
    )
    return [word for pair in options.items() for word in pair]


def flower_home() -> Path:
    """Raises ConfigError: the environment names none, and that of the machine's user is not ours to clear."""
    if not (named := os.environ.get("FLWR_HOME")):
        raise ConfigError("FLWR_HOME names no folder; the gate is started by `unimiss-site run`, not by hand")
    return Path(named)


def _show_our_own_words() -> None:
    """Flower shows its own; those of libraries are of no use here: a line for each request."""
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("client", "unimiss_core", "__main__"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(shown)


def _end_with_a_thread(failed: threading.ExceptHookArgs) -> None:
    """A SuperNode whose heartbeats have ended looks alive here and is dead to the coordinator: start over."""
    log.error("a thread of the SuperNode ended: %s", failed.exc_type.__name__)
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m client.gate")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True, help="of Flower's Runtime API, on 127.0.0.1")
    parser.add_argument("--secret", type=Path, required=True, help="what flower-superexec shows to it")
    return parser


if __name__ == "__main__":
    main()
