"""`POST /v1/sessions/{id}/steps`: advance a session over HTTP, in JSON or in packed rows.

Rule: the hot path of HTTP, by plain calls (`take`) or raw ASGI (`serve`); nothing per call that a step does not need.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Coroutine
from functools import partial
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from service.commits import MadeAnew
from service.errors import Draining, Internal, InvalidInput, LatchError
from service.metrics import Metrics
from service.routers import JSON, PACKED, error_response, in_turns, read_body
from service.sessions import Session, SessionManager
from service.wire import StepReply, StepRequest
from service.wire.frames import packed_request

log = logging.getLogger(__name__)

_NUMBER = re.compile("[1-9][0-9]{0,18}")
_LONG = 2**18  # bytes of packed rows, from which on their JSON takes milliseconds to write
_FAILED = "the service failed on this call; its log says why"


class Answer(NamedTuple):
    """An HTTP reply."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Plain(Protocol):
    """A step that came past ASGI; see `service/step_protocol.py`."""

    session_id: str
    kind: str
    query: bytes

    def reply(self, answer: Answer) -> None:
        """Answers; a second time, nobody."""

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Has a task of the server do what must wait."""


class StepDoor:
    """Answers steps.

    Args:
        manager: has the sessions.
        metrics: counts what is refused.
        max_body_bytes: of one request.
        max_steps: steps that one request may carry.
    """

    def __init__(self, manager: SessionManager, metrics: Metrics, *, max_body_bytes: int, max_steps: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._manager = manager
        self._metrics = metrics
        self._max_steps = max_steps

    async def serve(self, session_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call, whatever becomes of it."""
        status, headers, body = await self._outcome(self.answer(session_id, scope, receive))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def answer(self, session_id: str, scope: Scope, receive: Receive) -> Answer:
        """Reads a request, has it applied, and says what came of it. Raises LatchError; then nothing has changed."""
        kind, body = await read_body(scope, receive, self.max_body_bytes, (JSON, PACKED))
        return await self._applied(session_id, kind, scope["query_string"], body)

    def take(self, call: Plain, body: bytes) -> None:
        """One call past ASGI: it is answered from where its run ends, with no task or future of its own."""
        try:
            session = self._manager.resident(call.session_id)
            if session is None:
                call.later(self._take_later(call, body))
            else:
                request = self._request(session, call.kind, call.query, body)
                self._manager.submit(session, request, partial(self._tell, call, body, session))
        except InvalidInput as error:
            if self._manager.is_shared:  # the id may be another session's by now, of another model
                call.later(self._take_later(call, body))
            else:
                self.refuse(call, error)
        except LatchError as error:
            self.refuse(call, error)
        except Exception:
            log.exception("a step of session %s failed", call.session_id)
            self.refuse(call, Internal(_FAILED))

    def refuse(self, call: Plain, error: LatchError) -> None:
        """Answers a call with an error."""
        call.reply(self._refusal(error))

    def _tell(self, call: Plain, body: bytes, session: Session, outcome: StepReply | LatchError) -> None:
        if isinstance(outcome, MadeAnew):
            call.later(self._take_later(call, body))
        elif isinstance(outcome, LatchError):
            self.refuse(call, outcome)
        else:
            try:
                if call.kind == JSON and _is_long(outcome):
                    call.later(self._tell_in_turns(call, session, outcome))
                else:
                    call.reply(self._answer(session, call.kind, outcome))
            except Exception:
                log.exception("an answer of session %s could not be made", call.session_id)
                self.refuse(call, Internal(_FAILED))

    async def _take_later(self, call: Plain, body: bytes) -> None:
        call.reply(await self._outcome(self._applied(call.session_id, call.kind, call.query, body)))

    async def _tell_in_turns(self, call: Plain, session: Session, reply: StepReply) -> None:
        call.reply(await self._outcome(self._answer_in_turns(session, call.kind, reply)))

    async def _outcome(self, answering: Awaitable[Answer]) -> Answer:
        try:
            return await answering
        except LatchError as error:
            return self._refusal(error)
        except asyncio.CancelledError:  # as in the front door
            return self._refusal(Draining())
        except Exception:
            log.exception("a step failed")
            return self._refusal(Internal(_FAILED))

    async def _applied(self, session_id: str, kind: str, query: bytes, body: bytes) -> Answer:
        while True:
            session = self._manager.resident(session_id) or await self._manager.find(session_id)
            try:
                request = self._request(session, kind, query, body)
                reply = await self._manager.step(session, request)
                if kind == JSON and _is_long(reply):
                    return await self._answer_in_turns(session, kind, reply)
                return self._answer(session, kind, reply)
            except MadeAnew:  # the caller means whichever session has the id now
                continue
            except InvalidInput:  # of the rows, or for the model of a session that has the id no more
                if await self._manager.is_current(session):
                    raise

    async def _answer_in_turns(self, session: Session, kind: str, reply: StepReply) -> Answer:
        parts = session.engine.codec.parts_of_reply(reply, self._manager.expires_at(session))
        return self._answer(session, kind, reply, await in_turns(parts))

    def _answer(self, session: Session, kind: str, reply: StepReply, written: bytes | None = None) -> Answer:
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
            content = written or session.engine.codec.encode_reply(reply, self._manager.expires_at(session))
            headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(content)))
        return Answer(200, headers, content)

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
                elif name == "step" and len(values) == 1 and _NUMBER.fullmatch(values[0]):
                    first_step = int(values[0])
                else:
                    raise InvalidInput(
                        f"{name}={','.join(values)[:40]} in the query: it takes one step (from 1) and outputs (names)",
                        path=name,
                    )
        steps, rest = divmod(len(body), rows.input_bytes)
        if rest:
            raise InvalidInput(
                f"the body has {len(body)} bytes: rows of this model have {rows.input_bytes} each, {rest} are over",
                path="body",
            )
        return packed_request(body, steps, rows.names(names, "outputs"), first_step, self._max_steps)

    def _refusal(self, error: LatchError) -> Answer:
        self._metrics.errors.labels(error.code).inc()
        response = error_response(error)
        return Answer(response.status_code, response.raw_headers, bytes(response.body))


def _is_long(reply: StepReply) -> bool:
    """Whether nobody should have to wait until its JSON is written."""
    return reply.data is not None and len(reply.data) > _LONG


def _facts(reply: StepReply) -> list[tuple[bytes, bytes]]:
    """What the JSON says beside the outputs, as headers."""
    facts = [(b"latch-step", b"%d" % reply.step)]
    if reply.replayed:
        facts.append((b"latch-replayed", b"true"))
    if reply.data is None:
        facts.append((b"latch-already-applied", b"true"))
    return facts
