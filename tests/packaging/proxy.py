"""HAProxy from Debian, `deploy/haproxy.cfg`, and a DNS server through which it finds replicas."""

import asyncio
import os
import shutil
import socket
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
# Debian keeps it where only root's PATH leads.
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Names(asyncio.DatagramProtocol):
    """A DNS server that knows one name: every address of `hosts`."""

    def __init__(self, hosts: set[str]) -> None:
        self.hosts = hosts

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio."""
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        """Answers one question."""
        end = data.index(0, 12) + 5  # of the question: a name, a type and a class
        is_ipv4 = data[end - 4 : end - 2] == b"\0\1"
        answers = [b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(host) for host in sorted(self.hosts) if is_ipv4]
        header = data[:2] + b"\x81\x80\0\1" + len(answers).to_bytes(2, "big") + b"\0\0\0\0"
        self.transport.sendto(header + data[12:end] + b"".join(answers), address)
