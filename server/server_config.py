"""server.yaml: where sites reach the coordinator, and what its public side allows."""

import ipaddress
from contextlib import suppress
from typing import Annotated, Self

from pydantic import Field, model_validator

from unimiss_core.config import Config
from unimiss_core.joining import PublicAddress, host_and_port

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Megabytes = Annotated[float, Field(gt=0)]


def usually_bound(host: str) -> str:
    """Where sites come by `host`: that address alone where it is a loopback one, which no other machine reaches."""
    if host == "localhost":
        return "127.0.0.1"
    with suppress(ValueError):  # a name
        if ipaddress.ip_address(host).is_loopback:
            return host
    return "0.0.0.0"


class FrontLimits(Config):
    """What one peer, and all together, may take of the public side before it says no."""

    connections: Count = 1024
    """Open at once, by all peers."""
    handshakes: Count = 128
    """Connections that have not shown a certificate yet: those of strangers end here."""
    handshakes_of_address: Count = 16
    """The same, of one IP address. Sites behind one address share them."""
    connections_of_site: Count = 16
    """A site's SuperNode opens about six."""
    requests_of_site: Count = 12
    """In work at once."""
    handshake_s: Seconds = 10.0
    head_s: Seconds = 10.0
    """From a request's first byte to the end of its headers."""
    idle_s: Seconds = 60.0
    """A connection without a request; a SuperNode asks every 3 s."""
    connection_s: Seconds = 3600.0
    """After so long a connection is closed between two requests; the next shows its certificate anew."""
    stall_s: Seconds = 30.0
    """Between two pieces of what a peer sends, or takes."""
    body_s: Seconds = 180.0
    """For one whole request: a piece of 5 MB then needs 230 kbit/s. Flower gives up an upload after as long."""
    answer_s: Seconds = 60.0
    """How long SuperLink may take to begin an answer."""
    object_mb: Megabytes = 6.0
    """One piece of an update. Flower cuts arrays into pieces of 5.3 MB (5 MiB)."""
    site_gb_per_hour: Annotated[float, Field(gt=0)] = 50.0
    """Sent by a site, and 1 MB for each object that it announces. SuperLink keeps it on disk until it is fetched; so
    nobody fills the disk quickly, or keeps the database from the others."""
    objects_of_answer: Count = 256
    """That one answer is made of: a piece of 5.3 MB each, and some ten more for its own form. 200 million parameters in
    fp32 are 153 pieces. The ServerApp holds all of them in memory."""
    message_mb: Megabytes = 1.0
    """Any other request. Flower's largest announces an answer: some 70 bytes for each object of it."""


class Patience(Config):
    """How a run that ended before its last round is submitted again."""

    pause_s: Seconds = 30.0
    """Before the next try; twice as long after each further one that finished no round."""
    longest_s: Seconds = 900.0
    tries: Count = 6
    """So many in a row that finished no round end the run; `unimiss-server run` then goes on with it by hand."""


class ServerConfig(Config):
    address: PublicAddress
    """HOST:PORT by which sites reach this machine; HOST stands in the server's certificate."""
    listen: str | None = None
    """The address that the public side binds to; "0.0.0.0" is every IPv4 address of this machine, "::" every address of
    both kinds. None is "0.0.0.0", or the host of `address` where that is a loopback one: trials stay on the machine."""
    listen_port: Port | None = None
    """None is the port of `address`; another one where a router passes that on."""
    superlink_port: Port = 8000
    """Of Flower's SuperLink, on 127.0.0.1. Whoever may open it can run code here: no other users on this machine."""
    log_mb: Megabytes = 32.0
    """Of each file of a process' log; when it is full, it becomes NAME.log.1, and that NAME.log.2, up to NAME.log.4."""
    patience: Patience = Patience()
    limits: FrontLimits = FrontLimits()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port == self.superlink_port:
            raise ValueError(f"superlink_port={self.superlink_port} must differ from the public side's port")
        return self

    @property
    def host(self) -> str:
        """That the public side binds to."""
        return self.listen or usually_bound(host_and_port(self.address).host)

    @property
    def bound(self) -> str:
        """The same in words, with the port."""
        every = {"0.0.0.0": "every IPv4 address of this machine", "::": "every address of this machine"}
        return f"{every.get(self.host, self.host)}, port {self.port}"

    @property
    def port(self) -> int:
        """That the public side binds to."""
        return self.listen_port or host_and_port(self.address).port
