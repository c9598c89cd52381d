"""Who takes part: every node is asked who it is before it is asked to train."""

import logging
import time
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from server.coordinator_config import CoordinatorConfig
from server.exchange import POLL_S, introduction_of, status_of
from server.site_round import SiteRound
from unimiss_core import progress
from unimiss_core.errors import RoundError, WireError
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Introduction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Hello:
    """A node that was asked who it is."""

    node_id: int
    node_name: str
    wait_until: float
    expires_at: float


class Roster:
    """The nodes of a grid: who they are, and which of them can take part.

    sites: node -> who it is, for the sites that can take part. unfit: the others by name, and why.
    """

    def __init__(self, grid: Grid, study: StudyConfig, config: CoordinatorConfig) -> None:
        self._grid = grid
        self._config = config
        self._hello = Hello(study).pack()
        self.sites: dict[int, Introduction] = {}
        self.unfit: dict[str, SiteRound] = {}
        self._hellos: dict[str, _Hello] = {}
        """Message -> the node that has not answered it yet."""
        self._silent: set[int] = set()
        """Nodes that once let their time to answer pass."""

    def gather(self) -> None:
        """Ask every node that is not known who it is; begin when all have said so and `min_sites` are there.

        A node that is asked for the first time is waited for `introduction_s`, because it may have an archive to read;
        one that stayed silent is asked in every round, and no longer waited for. Raises RoundError.
        """
        give_up = time.monotonic() + self._config.wait_s
        self.unfit = {}
        while True:
            self._greet_new_nodes()
            self._hear_introductions()
            reading = any(time.monotonic() < hello.wait_until for hello in self._hellos.values())
            if not reading and len(self.sites) >= self._config.min_sites:
                break
            if not reading and time.monotonic() > give_up:
                told = "".join(f"; {name}: {line.reason}" for name, line in sorted(self.unfit.items()))
                raise RoundError(
                    f"{len(self.sites)} of at least {self._config.min_sites} sites are there{told}. "
                    "Mend the sites or lower min_sites, then resume"
                )
            time.sleep(POLL_S)
        for message_id, hello in list(self._hellos.items()):
            self._mark_unfit(hello.node_name, SiteRound("absent", "no_introduction"))
            self._silent.add(hello.node_id)
            if time.monotonic() >= hello.expires_at:
                del self._hellos[message_id]

    def ask_again(self, node_id: int) -> None:
        """Forget what a node said it is; it may have changed, by new scans say."""
        del self.sites[node_id]

    def _greet_new_nodes(self) -> None:
        nodes = {node.node_id: node.name or f"node-{node.node_id}" for node in self._grid.get_nodes()}
        for gone in self.sites.keys() - nodes.keys():
            del self.sites[gone]
        waiting = {hello.node_id for hello in self._hellos.values()}
        for node_id, name in nodes.items():
            if node_id not in self.sites and node_id not in waiting and name not in self.unfit:
                message = Message(self._hello, node_id, "query", ttl=self._config.introduction_s)
                (message_id,) = self._grid.push_messages([message])
                expires_at = time.monotonic() + self._config.introduction_s
                wait_until = 0.0 if node_id in self._silent else expires_at
                self._hellos[message_id] = _Hello(node_id, name, wait_until, expires_at)

    def _hear_introductions(self) -> None:
        for reply in self._grid.pull_messages(list(self._hellos)):
            hello = self._hellos.pop(reply.metadata.reply_to_message_id)
            try:
                introduction = introduction_of(reply)
                if introduction.site in {site.site for site in self.sites.values()}:
                    raise WireError("name_taken", "another connected site goes by the same name")
            except WireError as error:
                self._mark_unfit(hello.node_name, SiteRound(status_of(error.reason), error.reason))
            else:
                self.sites[hello.node_id] = introduction
                self._silent.discard(hello.node_id)

    def _mark_unfit(self, name: str, line: SiteRound) -> None:
        self.unfit[name] = line
        log.warning("site=%s status=%s reason=%s", name, line.status, line.reason)
        progress.report(progress.Note(f"{name} cannot take part: {line.reason}"))
