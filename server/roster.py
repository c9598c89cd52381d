"""Who takes part: every node is asked who it is before it is asked to train."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from server.coordinator_config import CoordinatorConfig
from server.exchange import Reply, introduction_of, pulled, pushed, read_or_malformed, status_of
from server.patience import Called, Patience
from server.quorum import is_in_vain, too_few_sites
from server.registration import Registration
from server.site_round import SiteRound
from unimiss_core import progress
from unimiss_core.config import NAME
from unimiss_core.errors import WireError
from unimiss_core.wire import Hello, Introduction

log = logging.getLogger(__name__)


POLL_S, LONGEST_POLL_S = 0.01, 0.2
"""Pauses between two looks for nodes and their introductions: the first, and what they double to."""


@dataclass(frozen=True)
class _Greeted:
    """A node that was asked who it is."""

    node: NodeInfo
    called: Called
    wait_until: float
    expires_at: float


class Roster:
    """The nodes of a grid: who they are, and which of them can take part.

    sites: node -> who it is, for the sites that can take part. unfit: the others by name, and why.
    """

    def __init__(
        self, grid: Grid, config: CoordinatorConfig, note: Callable[[str, Reply, str], None] = lambda *_: None
    ) -> None:
        """note: writes down a site's name, the introduction that was refused, and the reason: once, until the site
        comes in, or is refused for another.

        Raises ConfigError: a registered key that cannot be read.
        """
        self._grid = grid
        self._config = config
        self._note = note
        self.sites: dict[int, Introduction] = {}
        self.unfit: dict[str, SiteRound] = {}
        self._greeted: dict[str, _Greeted] = {}
        """Message -> the node that has not answered it yet."""
        self.registration = Registration(config.sites)
        self._patience = Patience(config.introduction_s)
        self._strangers: set[str] = set()
        """Nodes that are not registered and were told of, by name; of those without one, only the first is."""
        self._told: dict[str, str] = {}
        """Name -> why it cannot take part, as it was told last."""

    @property
    def lines(self) -> dict[str, SiteRound]:
        """How each site stands before it is asked to train: it is there, it cannot take part, or it never came."""
        never_came = {name: SiteRound("absent", "not_connected") for name in self.registration.names}
        there = {
            site.site: SiteRound("there", scans={f"{rank}d": count for rank, count in site.scans.items()})
            for site in self.sites.values()
        }
        return never_came | self.unfit | there

    def gather(self, hello: Hello, *, least: int, counted: frozenset[str] = frozenset()) -> None:
        """Ask every node that is not known who it is; begin when all have said so and `least` sites are there.

        counted: sites whose updates count already, wherever they are now.

        A node that is asked for the first time is waited for `introduction_s`, because it may have an archive to read;
        one that stayed silent is asked in every round, and no longer waited for. Raises TooFew.
        """
        began, pause_s = time.monotonic(), POLL_S
        give_up, all_read = began + self._config.wait_s, began + self._config.introduction_s
        self.unfit = {}
        self._patience.begin()
        content = hello.pack()
        while True:
            self._greet_new_nodes(content)
            self._hear_introductions()
            now = time.monotonic()
            reading = now < all_read and any(now < greeted.wait_until for greeted in self._greeted.values())
            there = counted | {site.site for site in self.sites.values()}
            if not reading and len(there) >= least:
                break
            if not reading and (now > give_up or self._all_have_refused(counted)):
                raise too_few_sites(
                    self._lines_but(counted), there=len(there), least=least, study=hello.study, config=self._config
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)
        for message_id, greeted in list(self._greeted.items()):
            self._mark_unfit(greeted.node, SiteRound("absent", "no_introduction"))
            self._patience.note_silent(greeted.called)
            if time.monotonic() >= greeted.expires_at:
                del self._greeted[message_id]
            else:
                self._greeted[message_id] = replace(greeted, wait_until=0.0)

    def _all_have_refused(self, counted: frozenset[str]) -> bool:
        """Whether all who are named and lacking have refused for reasons that last, so that nobody is waited for."""
        return bool(self.registration.names) and is_in_vain(self._lines_but(counted))

    def _lines_but(self, counted: frozenset[str]) -> dict[str, SiteRound]:
        return {name: line for name, line in self.lines.items() if name not in counted}

    def ask_again(self, node_id: int) -> None:
        """Forget what a node said it is; it may have changed, by new scans say."""
        self.sites.pop(node_id, None)  # it may have left

    def _greet_new_nodes(self, hello: RecordDict) -> None:
        nodes = {node.node_id: node for node in self._grid.get_nodes()}
        for gone in self.sites.keys() - nodes.keys():
            del self.sites[gone]
        self._forget_those_that_left(nodes)
        waiting = {greeted.node.node_id for greeted in self._greeted.values()}
        for node_id, node in nodes.items():
            if not self.registration.may_ask(node):
                self._tell_of_stranger(node)
                continue
            called = self.registration.called(node)
            if node_id not in self.sites and node_id not in waiting and not self._patience.is_put_off(called):
                message = Message(hello, node_id, "query", ttl=self._config.introduction_s)
                if (taken := pushed(self._grid, message)) is None:
                    continue  # it left since the nodes were listed
                expires_at = time.monotonic() + self._config.introduction_s
                self._greeted[taken] = _Greeted(node, called, self._patience.until(called), expires_at)

    def _forget_those_that_left(self, nodes: Mapping[int, NodeInfo]) -> None:
        """One that left before it answered is asked anew when it is back."""
        for message_id, greeted in list(self._greeted.items()):
            if greeted.node.node_id not in nodes:
                del self._greeted[message_id]
                self._patience.note_left(greeted.called)
        for name in self._patience.forget_all_but(map(self.registration.called, nodes.values())):
            self._told.pop(name, None)

    def _hear_introductions(self) -> None:
        for message_id, greeted in list(self._greeted.items()):
            if (reply := pulled(self._grid, message_id)) is None:
                continue
            del self._greeted[message_id]
            try:
                with read_or_malformed():
                    introduction = introduction_of(reply)
                self.registration.check(introduction, greeted.node)
                if introduction.site in {site.site for site in self.sites.values()}:
                    raise WireError("name_taken", "another connected site goes by the same name")
            except WireError as error:
                self._patience.note_refused(greeted.called)
                if self._mark_unfit(greeted.node, SiteRound(status_of(error.reason), error.reason)):
                    self._note(self._written_name_of(greeted.node), reply, error.reason)
            else:
                self.sites[greeted.node.node_id] = introduction
                self._patience.note_introduced(greeted.called)
                self.unfit.pop(greeted.called.name, None)
                self._told.pop(self.registration.name_of(greeted.node), None)

    def _tell_of_stranger(self, node: NodeInfo) -> None:
        called = self.registration.called(node)
        if called.counted_as not in self._strangers:
            self._strangers.add(called.counted_as)
            log.warning("node=%s status=refused reason=not_registered", called.name)
            progress.report(progress.Note(f"{called.name} is not asked: the coordinator file does not name it"))

    def _written_name_of(self, node: NodeInfo) -> str:
        """As an audit log takes it: without a key, Flower may have been told any name."""
        name = self.registration.name_of(node)
        return name if re.fullmatch(NAME, name) else f"node-{node.node_id}"

    def _mark_unfit(self, node: NodeInfo, line: SiteRound) -> bool:
        """Whether that is new."""
        name = self.registration.name_of(node)
        self.unfit[name] = line
        log.warning("site=%s status=%s reason=%s", name, line.status, line.reason)
        if self._told.get(name) == line.reason:
            return False
        self._told[name] = line.reason
        progress.report(progress.Note(f"{name} cannot take part: {line.reason}"))
        return True
