"""Which of SuperLink's objects a site may have: those of the messages that SuperLink gave it.

SuperLink gives any object to whoever names its sha256, and lets go of any message that whoever it likes says to have
received. The front hears what each site is given, and lets it have that and no more. It is kept on the disk, for a
front that is started again: SuperLink gives a message once.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from server.front_answers import within
from server.front_rules import Refused
from unimiss_core import durable
from unimiss_core.json_text import read_object

log = logging.getLogger(__name__)

PULL_MESSAGES = "/v1/fleet/pull-messages"
PULL_OBJECT = "/v1/fleet/pull-object"
CONFIRM = "/v1/fleet/confirm-message-received"

KEPT_MESSAGES = 4
"""Of a site. A SuperNode works on one at a time, and may ask again for what it did not hear."""


class Given:
    """folder: with a file for each site, in a folder of that site's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sites: dict[str, Mapping[str, list[str]]] = {}
        """Site -> message -> its objects, the oldest message first. What is in it is replaced and not changed: one
        thread may read while another writes."""

    def note(self, site: str, body: bytes) -> None:
        """SuperLink gives `site` the messages in the `body` of its answer."""
        try:
            answer = PullMessagesResponse.FromString(body)
        except DecodeError:  # then the site cannot read it either
            return
        told = zip(answer.messages_list, answer.message_object_trees, strict=False)
        new = {message.metadata.message_id: [node.object_id for node in within(tree)] for message, tree in told}
        if new:
            self._sites[site] = given = dict([*self._of(site).items(), *new.items()][-KEPT_MESSAGES:])
            self._keep(site, given)

    def require(self, site: str, path: str, body: bytes) -> None:
        """Raises Refused: what the request asks for, or says to have received, `site` was not given."""
        given = self._of(site)
        try:
            if path == CONFIRM:
                is_given = ConfirmMessageReceivedRequest.FromString(body).message_object_id in given
            else:
                asked = PullObjectRequest.FromString(body).object_id
                is_given = any(asked in objects for objects in given.values())
        except DecodeError:
            raise Refused("malformed") from None
        if not is_given:
            raise Refused("not_given")

    def _of(self, site: str) -> Mapping[str, list[str]]:
        if site not in self._sites:
            try:
                self._sites[site] = read_object(self._file(site))
            except (OSError, ValueError):
                self._sites[site] = {}
        return self._sites[site]

    def _keep(self, site: str, given: Mapping[str, list[str]]) -> None:
        try:
            self._file(site).parent.mkdir(parents=True, exist_ok=True)
            durable.write_text(self._file(site), json.dumps(given))
        except OSError as error:  # it is only for a front that is started again
            log.warning("what a site was given cannot be kept (%s)", error.strerror)

    def _file(self, site: str) -> Path:
        return self._folder / site / "given.json"
