"""`POST /v1/sessions/{id}/steps`: advance a session over HTTP, in JSON or in packed rows.

Rule: the hot path of HTTP; raw ASGI, nothing per call that a step does not need.
"""

import asyncio
import logging
import re
from typing import NamedTuple
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from service.commits import MadeAnew
from service.errors import Draining, Internal, InvalidInput, LatchError
from service.metrics import Metrics
from service.routers import JSON, PACKED, error_response, read_body
from service.sessions import Session, SessionManager
from service.wire import StepReply, StepRequest
from service.wire.frames import packed_request

log = logging.getLogger(__name__)

_NUMBER = re.compile("[1-9][0-9]{0,18}")


class Answer(NamedTuple):
    """An HTTP reply: status is 200."""

    body: bytes
    headers: list[tuple[bytes, bytes]]


class StepDoor:
    """Answers steps.

    Args:
        manager: has the sessions.
        metrics: counts what is refused.
        max_body_bytes: of one request.
        max_steps: steps that one request may carry.
    """

    def __init__(self, manager: SessionManager, metrics: Metrics, *, max_body_bytes: int, max_steps: int) -> None:
        self._manager = manager
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_steps = max_steps

    async def serve(self, session_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One call, whatever becomes of it."""
        try:
            answer = await self.answer(session_id, scope, receive)
        except LatchError as error:
            await self._refuse(error, scope, receive, send)
        except asyncio.CancelledError:  # as in the front door
            await self._refuse(Draining(), scope, receive, send)
        except Exception:
            log.exception("a step of session %s failed", session_id)
            await self._refuse(Internal("the service failed on this call; its log says why"), scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": answer.headers})
            await send({"type": "http.response.body", "body": answer.body})

    async def answer(self, session_id: str, scope: Scope, receive: Receive) -> Answer:
        """Reads a request, has it applied, and says what came of it. Raises LatchError; then nothing has changed."""
        kind, body = await read_body(scope, receive, self._max_body_bytes, (JSON, PACKED))
        query = scope["query_string"]
        while True:
            session = self._manager.resident(session_id) or await self._manager.find(session_id)
            request = self._request(session, kind, query, body)
            try:
                reply = await self._manager.step(session, request)
                break
            except MadeAnew:  # the caller means whichever session has the id now
                continue
        headers = [
            (
                b"server-timing",
                b"queue;dur=%.3f, compute;dur=%.3f, store;dur=%.3f"
                % (reply.queue_seconds * 1e3, reply.compute_seconds * 1e3, reply.store_seconds * 1e3),
            ),
        ]
        if kind == PACKED:
            content = reply.data or b""
            headers += [(b"content-type", PACKED.encode()), *_facts(reply)]
        else:
            content = session.engine.codec.encode_reply(reply, self._manager.expires_at(session))
            headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(content)))
        return Answer(content, headers)

    def _request(self, session: Session, kind: str, query: bytes, body: bytes) -> StepRequest:
        if kind == PACKED:
            return self._packed_request(session, query, body)
        if query:
            raise InvalidInput("a JSON step has `step` and `outputs` in its body, not in the query", path="query")
        return session.engine.codec.decode_step(body)

    def _packed_request(self, session: Session, query: bytes, body: bytes) -> StepRequest:
        """T packed rows, and `?step=` and `&outputs=` beside them."""
        rows, names, first_step = session.engine.rows, None, None
        if query:
            try:
                fields = parse_qs(query.decode("ascii"), keep_blank_values=True, strict_parsing=True, max_num_fields=8)
            except ValueError as error:
                raise InvalidInput(
                    f"the query cannot be read: {error}; it takes step and outputs", path="query"
                ) from error
            for name, values in fields.items():
                if name == "outputs":
                    names = [part for value in values for part in value.split(",") if part]
                elif name == "step" and _NUMBER.fullmatch(values[-1]):
                    first_step = int(values[-1])
                else:
                    raise InvalidInput(
                        f"{name}={values[-1][:40]} in the query: it takes step (from 1) and outputs (names, commas)",
                        path=name,
                    )
        steps, rest = divmod(len(body), rows.input_bytes)
        if rest:
            raise InvalidInput(
                f"the body has {len(body)} bytes: rows of this model have {rows.input_bytes} each, {rest} are over",
                path="body",
            )
        return packed_request(body, steps, rows.names(names, "outputs"), first_step, self._max_steps)

    async def _refuse(self, error: LatchError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.errors.labels(error.code).inc()
        await error_response(error)(scope, receive, send)


def _facts(reply: StepReply) -> list[tuple[bytes, bytes]]:
    """What the JSON says beside the outputs, as headers."""
    facts = [(b"latch-step", b"%d" % reply.step)]
    if reply.replayed:
        facts.append((b"latch-replayed", b"true"))
    if reply.data is None:
        facts.append((b"latch-already-applied", b"true"))
    return facts
