"""What a site may push to SuperLink: one answer, in its own name, to a question that it was asked.

SuperLink believes what a pushed message says of itself. One that answers nothing it takes for a question by the
coordinator: to another site, or to the ServerApp, which is given it in the place of the answer that it waits for. And
for each object that an answer announces it writes to its database for some milliseconds, during which nobody else may.
So the front reads these requests, by Flower's own reader, before they pass.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from server.front_rules import Refused

PUSH_MESSAGES = "/v1/fleet/push-messages"


@dataclass(frozen=True)
class Answer:
    """An answer as a site announces it. body: of the request. objects: what it is made of; id -> ids of its parts."""

    body: bytes
    message_id: str
    run_id: int
    node_id: int
    objects: Mapping[str, frozenset[str]]


def announced(body: bytes, *, most: int) -> Answer:
    """The answer in a request's `body`. Raises Refused: it is no such answer, or of more than `most` objects."""
    try:
        request = PushMessagesRequest.FromString(body)
        (message,), (tree,) = request.messages_list, request.message_object_trees
    except (DecodeError, ValueError):  # not of this form; not one answer
        raise Refused("malformed") from None
    told = message.metadata
    is_own_answer = (
        told.reply_to_message_id != ""
        and told.src_node_id == request.node.node_id  # whose key SuperLink knows and compares
        and told.dst_node_id == SUPERLINK_NODE_ID
        and told.message_id == tree.object_id
    )
    if not is_own_answer:
        raise Refused("forged")
    return Answer(body, told.message_id, told.run_id, request.node.node_id, _objects(tree, most))


def _objects(tree: ObjectTree, most: int) -> dict[str, frozenset[str]]:
    """Raises Refused: more than `most`, by their places in the tree; or one in two forms."""
    found: dict[str, frozenset[str]] = {}
    for place, node in enumerate(within(tree), start=1):
        if place > most:
            raise Refused("length")
        parts = [part.object_id for part in node.children]
        if not re.fullmatch("[0-9a-f]{64}", node.object_id) or len(set(parts)) < len(parts):
            raise Refused("malformed")
        if found.setdefault(node.object_id, frozenset(parts)) != frozenset(parts):
            raise Refused("malformed")
    return found


def within(tree: ObjectTree) -> Iterator[ObjectTree]:
    """`tree` and all below it; the reader let it be a hundred deep at most."""
    waiting = [tree]
    while waiting:
        yield (node := waiting.pop())
        waiting.extend(node.children)
