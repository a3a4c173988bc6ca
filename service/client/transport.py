"""What the two shells share: the address of the service, and what the libraries' errors mean.

Rule: the only place that knows how httpx and websockets say that something broke.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.typing import Subprotocol

from service.client.effects import Later
from service.client.errors import NotLatch, OtherProcess
from service.errors import InvalidInput, LatchError, PayloadTooLarge

# Whatever the libraries raise because of the network or the other end. TimeoutError is an OSError.
FAILURES = (httpx.RequestError, WebSocketException, OSError)
_TOO_BIG = 1009
_REFUSALS = (1002, 1003, 1007, 1008, 1010)  # the service, or a proxy, will close as often as we send this


class Process:
    """The process that connections were made in."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether it is this one, and not one that this was forked from."""
        return self._id == os.getpid()

    def check(self) -> None:
        """Raises OtherProcess."""
        if not self.is_this:
            raise OtherProcess("this client was made before the process was forked: make one in each process")


@dataclass(frozen=True)
class Target:
    """Where the service is, and what it is told with every request."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # the port is no number, or too large
            is_address = False
        if not is_address or parts.query or parts.fragment or any(map(str.isspace, self.url)):
            raise InvalidInput(
                f"{self.url!r} is no address: http:// or https://, a host, perhaps a port and a path", path="url"
            )
        object.__setattr__(self, "url", parts.geturl())  # the scheme in lower case
        try:
            httpx.Headers(self.headers)
        except (AttributeError, TypeError, ValueError) as error:
            raise InvalidInput(f"the headers are no text by name: {error}", path="headers") from error

    def http(self) -> dict[str, Any]:
        """Arguments of an httpx client."""
        return {"base_url": self.url, "headers": self.headers}

    def socket(self, path: str, timeout: float) -> dict[str, Any]:
        """Arguments of a websockets connection."""
        return {
            "uri": "ws" + self.url.rstrip("/")[4:] + path,
            "subprotocols": [Subprotocol("latch.binary")],
            "additional_headers": dict(self.headers),
            "open_timeout": timeout,
            "close_timeout": 0.2,  # what was sent is answered, or asked again: nothing hangs on a proper goodbye
            "ping_timeout": None,  # a pong waits behind a long message on a slow line; an exchange has its own limit
            "compression": None,  # a row is small and hardly shrinks
            "max_size": None,
        }


def failure(error: Exception) -> Later | LatchError:
    """What one of `FAILURES` means: try again, or never."""
    if isinstance(error, ConnectionClosed):
        code = error.rcvd.code if error.rcvd else 1006
        if code == _TOO_BIG:
            return PayloadTooLarge("a message was larger than the service takes (LATCH_MAX_BODY_BYTES)")
        if code in _REFUSALS:
            return NotLatch(f"the WebSocket was closed with {code}: {error}")
    if (untrusted := _untrusted(error)) is not None:
        return NotLatch(
            f"the certificate is not trusted: {untrusted.verify_message}; SSL_CERT_FILE may name a file of further ones"
        )
    if isinstance(error, InvalidURI):
        return NotLatch(str(error))
    if isinstance(error, httpx.LocalProtocolError):
        return InvalidInput(f"this is no HTTP: {error}", path="headers")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status < 500 and status not in (408, 429):
            return NotLatch(f"the WebSocket was refused with {status}: Latch, or a proxy before it, takes none there")
    return Later(error)


def _untrusted(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Why the certificate is refused, where that is behind an error: another try would find the same."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error
