"""Which ports this site's processes listen on: none may be open to a network. Only Linux tells."""

import ipaddress
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @property
    def is_open_to_a_network(self) -> bool:
        inner = getattr(self.address, "ipv4_mapped", None) or self.address
        return not inner.is_loopback

    def __str__(self) -> str:
        return f"{self.address} port {self.port}"


def listeners_of(pid: int) -> list[Listener] | None:
    """What a process and all that it started listen on; None where the system does not tell."""
    if not Path("/proc/self/net/tcp").exists():
        return None
    sockets = {inode for number in _family(pid) for inode in _sockets_of(number)}
    return [listener for inode, listener in _all_listeners() if inode in sockets]


def _family(pid: int) -> list[int]:
    """A process and its descendants, as the kernel has them at this moment."""
    found = [pid]
    for number in found:  # grows while it is gone through
        with suppress(OSError):  # it ended meanwhile
            for task in Path(f"/proc/{number}/task").iterdir():
                with suppress(OSError):
                    found.extend(map(int, (task / "children").read_text().split()))
    return found


def _sockets_of(pid: int) -> Iterator[str]:
    with suppress(OSError):  # it ended meanwhile, or is not ours to look into
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if (name := str(file.readlink())).startswith("socket:["):
                    yield name.removeprefix("socket:[").removesuffix("]")


def _all_listeners() -> Iterator[tuple[str, Listener]]:
    """(inode, where) of every listening TCP socket in this network namespace, as proc(5) writes them."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN:
                    address, _, port = fields[1].partition(":")
                    yield fields[9], Listener(_address(address), int(port, 16))


def _address(in_hex: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Words of 32 bits, each with its lowest byte first on the machines that we know."""
    words = [bytes.fromhex(in_hex[i : i + 8])[::-1] for i in range(0, len(in_hex), 8)]
    return ipaddress.ip_address(b"".join(words))
