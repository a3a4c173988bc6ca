"""What may be between a client and the service: a proxy that cuts connections, and strangers at the address."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any


class Network:
    """A TCP proxy before a service. It cuts connections wherever a test says, in any direction.

    Args:
        port: of the service; may be changed when the service has moved.
        lengths: how many bytes each connection carries before it is reset; None: any number. After the last, all live.
    """

    def __init__(self, port: int, lengths: list[int | None]) -> None:
        self.port = port
        self.lengths = lengths
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.close()
                    continue
                left = [self.lengths.pop(0) if self.lengths else None]
                pair = (near, far)
                self._open |= set(pair)
                for source, target in (pair, pair[::-1]):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, target, pair, left)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, pair: Any, left: list[int | None]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    room = left[0]
                    cut = room is not None and room <= len(data)
                    if room is not None:
                        data = data[:room]
                        left[0] = room - len(data)
                    if cut:
                        self.cuts += 1
                target.sendall(data)
                if cut:
                    break
        for end in pair:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
                end.shutdown(socket.SHUT_RDWR)

    def move(self, port: int) -> None:
        """The service is elsewhere now, and all connections are gone."""
        self.port = port
        for end in self._open.copy():
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.move(0)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._open):
            end.close()


@contextmanager
def network(url: str, lengths: list[int | None]) -> Iterator[Network]:
    """A proxy for the time of a test."""
    proxy = Network(int(url.rpartition(":")[2]), lengths)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def stranger(answer: bytes, pause: float = 0.0) -> Iterator[int]:
    """Something else on a port, which says the same to everybody, perhaps with a pause before each byte of the body; or
    nothing, and keeps the line.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with ExitStack() as silent, suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    if not answer:
                        silent.enter_context(near)
                        continue
                    with near, suppress(ConnectionError):
                        near.recv(65536)
                        if pause:
                            head, _, body = answer.partition(b"\r\n\r\n")
                            near.sendall(head + b"\r\n\r\n")
                            for byte in body:
                                time.sleep(pause)
                                near.sendall(bytes([byte]))
                        else:
                            near.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def page(status: str, body: str = "") -> bytes:
    """An HTTP reply."""
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n{body}".encode()
