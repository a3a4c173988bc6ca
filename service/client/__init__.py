"""The Python client: every acknowledged step is applied exactly once, and a broken connection costs time only.

    with Client("http://127.0.0.1:8000") as latch:
        session = latch.session("motor-7", model="sensors")
        for reply in session.stream(readings):
            print(reply.step, reply["y"])

    with Client("http://127.0.0.1:8000") as latch, latch.group() as group:
        motors = [latch.session(name, model="sensors") for name in names]
        replies = group.step(dict(zip(motors, rows)))  # one row of each, over one socket

`AsyncClient` is the same for asyncio. Steps are numbered, tried again and resumed by the client; what is refused for
good is raised as the class of its code in `service.errors`, of which those that one meets are here, too.

Rule: it needs the service's addresses and its packed rows, and imports none of the service's inside.
"""

from service.client.asynchronous import AsyncClient, AsyncGroup, AsyncSession
from service.client.blocking import Client, Group, Session
from service.client.errors import LostSteps, NotAllStepped, NotLatch, OtherProcess, OutputsNotKept, PatienceExhausted
from service.client.protocol import Reply
from service.errors import (
    InvalidInput,
    LatchError,
    ModelNotFound,
    PayloadTooLarge,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    SnapshotInvalid,
    SnapshotMismatch,
    StepConflict,
    StepNotKept,
)

__all__ = [
    "AsyncClient",
    "AsyncGroup",
    "AsyncSession",
    "Client",
    "Group",
    "InvalidInput",
    "LatchError",
    "LostSteps",
    "ModelNotFound",
    "NotAllStepped",
    "NotLatch",
    "OtherProcess",
    "OutputsNotKept",
    "PatienceExhausted",
    "PayloadTooLarge",
    "Reply",
    "Session",
    "SessionExists",
    "SessionExpired",
    "SessionNotFound",
    "SnapshotInvalid",
    "SnapshotMismatch",
    "StepConflict",
    "StepNotKept",
]
