"""What a site may push to SuperLink: one answer, in its own name, to a question that it was asked.

SuperLink believes what a pushed message says of itself. One that answers nothing it takes for a question by the
coordinator: to another site, or to the ServerApp, which is given it in the place of the answer that it waits for. And
for each object that an answer announces it writes to its database for some milliseconds, during which nobody else may.
So the front reads these requests, by Flower's own reader, before they pass.
"""

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from server.front_rules import Refused

PUSH_MESSAGES = "/v1/fleet/push-messages"


def announced(body: bytes, *, most: int) -> int:
    """How many objects the answer in a request's `body` is made of. Raises Refused: it is no such answer, or is made of
    more than `most`."""
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
    return _counted(tree, most)


def _counted(tree: ObjectTree, most: int) -> int:
    """Objects of `tree`; the reader let it be a hundred deep at most."""
    count, waiting = 0, [tree]
    while waiting:
        if (count := count + 1) > most:
            raise Refused("length")
        waiting.extend(waiting.pop().children)
    return count
