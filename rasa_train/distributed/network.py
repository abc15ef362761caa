"""Network interfaces of this machine."""

from __future__ import annotations

import os
import socket
import sys

from ..errors import UserError

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def stay_on(address: str) -> None:
    """Let gloo and NCCL listen on the interface with this address only, unless the user has chosen one. gloo may
    otherwise listen on, and tell the others, any address of the machine: one that all can reach, or none."""
    interface = LOOPBACK if address.startswith("127.") else {a: name for name, a in addresses().items()}.get(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # the sign: this name, not names that begin so


def address_towards(host: str, port: int) -> str:
    """Return this machine's address on the route to ``host``. Raises ``UserError`` if there is no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--rdzv: {host} cannot be reached from here: {error.strerror or error}") from None


def interfaces() -> str:
    """Return the network interfaces of this machine with their addresses, on one line."""
    return ", ".join(f"{name} {address}" for name, address in addresses().items()) or "none"


def addresses() -> dict[str, str]:
    """Return the IPv4 addresses of this machine by interface (Linux)."""
    import fcntl
    import struct

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
