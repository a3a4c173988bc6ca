"""The Python client: every acknowledged step is applied exactly once, and a broken connection costs time only.

    with Client("http://127.0.0.1:8000") as latch:
        session = latch.session("motor-7", model="sensors")
        for reply in session.stream(readings):
            print(reply.step, reply["y"])

`AsyncClient` is the same for asyncio. Steps are numbered, tried again and resumed by the client; what is refused for
good is raised as the class of its code in `service.errors`.

Rule: it needs the service's addresses and its packed rows, and imports none of the service's inside.
"""

from service.client.asynchronous import AsyncClient, AsyncSession
from service.client.blocking import Client, Session
from service.client.errors import LostSteps, NotLatch, OutputsNotKept, PatienceExhausted
from service.client.protocol import Reply

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Client",
    "LostSteps",
    "NotLatch",
    "OutputsNotKept",
    "PatienceExhausted",
    "Reply",
    "Session",
]
