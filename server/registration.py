"""Which sites a run may ask: those that its coordinator file names, told apart by their keys.

A node proves to Flower's SuperLink that it holds the private half of its key, where that runs with
`--enable-supernode-auth`; without, key and name alike are claims.
"""

from collections.abc import Sequence
from functools import cache

from flwr.proto.node_pb2 import NodeInfo

from server.coordinator_config import RegisteredSite
from server.patience import Called
from unimiss_core.errors import ConfigError, WireError
from unimiss_core.keys import pem_of_public, site_public_key
from unimiss_core.scan import RANKS
from unimiss_core.wire import Introduction, TrainReply


class Registration:
    """The sites that a coordinator file names; where it names none, every node that connects may take part."""

    def __init__(self, sites: Sequence[RegisteredSite]) -> None:
        """Raises ConfigError: a public key that cannot be read, or that two sites have in common."""
        self._sites = {site.name: site for site in sites}
        self._keys: dict[str, bytes] = {}
        for site in sites:
            if not site.public_key:
                continue
            if owner := self._owner_of(key := _pem(site)):
                raise ConfigError(
                    f"sites: '{owner}' and '{site.name}' have the same public_key; each site needs a key of its own, "
                    "or one could answer for the other"
                )
            self._keys[site.name] = key

    def name_of(self, node: NodeInfo) -> str:
        """What people call a node before it has introduced itself: by its registered key, else as Flower was told."""
        return self.called(node).name

    def called(self, node: NodeInfo) -> Called:
        """`name_of` the node, and whether that lasts: without name or key it is another node when it starts again."""
        lasting = self._owner_of(node.public_key) or node.name
        return Called(lasting or f"node-{node.node_id}", lasts=bool(lasting))

    @property
    def names(self) -> frozenset[str]:
        """The sites that are named."""
        return frozenset(self._sites)

    def may_ask(self, node: NodeInfo) -> bool:
        """Whether this node may be asked who it is: it has a registered key, or may still name a site without one."""
        if not self._sites or node.public_key in self._keys.values():
            return True
        return any(node.name in ("", name) for name in self._sites.keys() - self._keys.keys())

    def check(self, introduction: Introduction, node: NodeInfo) -> None:
        """Raises WireError `not_registered`: the site that the node says it is is not named, or not with its key."""
        name = introduction.site
        owner = self._owner_of(node.public_key)
        has_its_key = owner == name if owner else name not in self._keys
        if self._sites and not (name in self._sites and has_its_key):
            raise WireError("not_registered", "the coordinator file does not name this site with this key")

    def check_counts(self, reply: TrainReply) -> None:
        """Raises WireError `counts`: the reply claims more scans than the site is registered with."""
        if (site := self._sites.get(reply.site)) is None:
            return
        for rank in RANKS:
            if (most := site.most_scans(rank)) is not None and reply.scans[rank] > most:
                raise WireError("counts", f"the reply claims more than the registered {most} scans of rank {rank}")

    def _owner_of(self, key: bytes) -> str | None:
        return next((name for name, registered in self._keys.items() if registered == key), None)


@cache
def _pem(site: RegisteredSite) -> bytes:
    """The site's public key as Flower gives a node's."""
    return pem_of_public(site_public_key(site.public_key or "", f"sites: '{site.name}': public_key"))
