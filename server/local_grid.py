"""A Flower `Grid` inside one process: the same two apps, no network, no Ray.

Each site is a node with its own node configuration (which Flower's simulation engine cannot express) and its own
thread: one message at a time, in order, as a SuperNode works. Deadlines, stragglers and Ctrl-C behave as they do
between machines: a message past its time-to-live is not begun, its reply does not count, and it gives up its place.
"""

import copy
import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from unimiss_core import progress
from unimiss_core.wire import arrays_in

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
"""How long leaving the grid waits for sites to stop; after that their threads end with the process."""

MOST_WAITING = 1
"""Replies with arrays that lie ready for the coordinator: each is as large as the model, and sites may be faster than
it is. Between machines they would wait at the server."""

_COORDINATOR = 1
_CLIENT_APP_RAISED = 2
"""Flower's error code for an exception in a ClientApp."""
_POLL_S = 0.05


class LocalGrid(Grid):
    """Nodes 1001, 1002, ... run `client_app`, each with its entry of `node_configs`; `workers` of them at a time.

    Use it as a context manager: leaving stops the sites at their next progress report.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: Mapping[str, UserConfig], *, run_config: UserConfig, workers: int = 1
    ) -> None:
        self._client_app = client_app
        self._workers = workers
        self._run = Run.create_empty(run_id=1)
        self._names = dict(zip(itertools.count(1001), node_configs, strict=False))
        self._contexts = {
            node_id: Context(self._run.run_id, node_id, node_configs[name], RecordDict(), run_config)
            for node_id, name in self._names.items()
        }
        self._inboxes: dict[int, queue.SimpleQueue[Message]] = {node_id: queue.SimpleQueue() for node_id in self._names}
        self._replies: dict[str, tuple[Message, Message]] = {}
        """Message -> (it, its reply), until the reply is pulled."""
        self._number = itertools.count(1)
        self._closing = threading.Event()
        self._at_work: dict[int, Message] = {}
        self._place = threading.Condition()
        self._threads = [threading.Thread(target=self._serve, args=[node], daemon=True) for node in self._names]
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run.run_id, _COORDINATOR, 1

    def __enter__(self) -> Self:
        self._guarding = progress.guarded_by(self._stop_when_closing)
        self._guarding.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        give_up = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, give_up - time.monotonic()))
        self._guarding.__exit__(None, None, None)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id, name=name) for node_id, name in self._names.items()]

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        ids = []
        for message in messages:
            sent = Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)
            sent.__dict__["_metadata"] = copy.deepcopy(message.metadata)
            sent.metadata.__dict__["_message_id"] = f"message-{next(self._number)}"
            ids.append(sent.metadata.message_id)
            self._inboxes[sent.metadata.dst_node_id].put(sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        with self._place:
            pulled = [self._replies.pop(message_id)[1] for message_id in message_ids if message_id in self._replies]
            self._place.notify_all()
        return pulled

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("rounds push and pull, so that each reply is folded in as it arrives")

    def _serve(self, node_id: int) -> None:
        while not self._closing.is_set():
            try:
                message = self._inboxes[node_id].get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if not self._take_place(node_id, message):
                continue
            try:
                self._deliver(message, self._answer(message))
            except _Stopped:
                return
            finally:
                self._leave_place(node_id)

    def _take_place(self, node_id: int, message: Message) -> bool:
        """Wait for one of the `workers` places; False where the message expired or the grid closed meanwhile."""
        with self._place:
            while sum(not _is_expired(other) for other in self._at_work.values()) >= self._workers:
                self._place.wait(timeout=_POLL_S)  # also to see a straggler's message expire
                if self._closing.is_set():
                    return False
            if _is_expired(message):
                return False
            self._at_work[node_id] = message
            return True

    def _deliver(self, message: Message, reply: Message) -> None:
        """Lay the reply out to be pulled, where the message has not expired and as soon as few others lie there."""
        with self._place:
            while _holds_arrays(reply) and self._num_waiting() >= MOST_WAITING:
                self._place.wait(timeout=_POLL_S)
                if self._closing.is_set() or _is_expired(message):
                    return
            if not _is_expired(message):
                self._replies[message.metadata.message_id] = (message, reply)

    def _num_waiting(self) -> int:
        """Replies with arrays that can still be pulled; what nobody pulled in time is forgotten."""
        self._replies = {name: pair for name, pair in self._replies.items() if not _is_expired(pair[0])}
        return sum(_holds_arrays(reply) for _, reply in self._replies.values())

    def _leave_place(self, node_id: int) -> None:
        with self._place:
            del self._at_work[node_id]
            self._place.notify_all()

    def _answer(self, message: Message) -> Message:
        try:
            # A network would copy: an app that changes what it received must not change it for the others.
            return self._client_app(copy.deepcopy(message), self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            # As Flower does between machines; our ClientApp never lets one through that could hold a patient's name.
            log.debug("site raised", exc_info=True)
            return Message(Error(_CLIENT_APP_RAISED, type(error).__name__), reply_to=message)

    def _stop_when_closing(self) -> None:
        if self._closing.is_set() and threading.current_thread() in self._threads:
            raise _Stopped


def _is_expired(message: Message) -> bool:
    return time.time() > message.metadata.created_at + message.metadata.ttl


def _holds_arrays(reply: Message) -> bool:
    return reply.has_content() and bool(arrays_in(reply.content))


class _Stopped(BaseException):
    """The run was interrupted; the site leaves its round where it is."""
